# SPDX-License-Identifier: Apache-2.0
"""How volumes are named and tagged, and what the options say: LVM is not asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import imagebackend
from imagebackend import exceptions
from imagebackend.images import lvm_naming, lvm_options, lvm_pool
from imagebackend.images.lvm import Lvm
from imagebackend.storage import lvm2

UUID = "4a1c2b1e-0000-4000-8000-000000000001"
SAFE = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


def configured(**options: object) -> imagebackend.Backend:
    conf = imagebackend.load_config()
    for name, value in {"images_type": "lvm", "images_volume_group": "vg", **options}.items():
        conf.set_override(name, value, group="libvirt")
    return imagebackend.Backend(conf)


@pytest.mark.parametrize(
    ("instance", "disk", "name"),
    [
        (UUID, "disk", f"{UUID}_disk"),
        (UUID, "disk.eph0", f"{UUID}_disk.eph0"),
        (UUID, "disk_config", f"{UUID}_disk__config"),
        ("a_b", "c", "a__b_c"),
        ("a_", "b", "a___b"),
        ("a__", "b_c", "a_____b__c"),
    ],
)
def test_a_volume_has_the_name_that_nova_gives_it(instance: str, disk: str, name: str) -> None:
    assert lvm_naming.volume_name("vg", instance, disk) == name
    assert lvm_naming.disk_names(name) == (instance, disk)
    assert configured().image(instance, disk).path == f"/dev/vg/{name}"


@given(SAFE, SAFE)
def test_no_two_disks_share_a_name(instance: str, disk: str) -> None:
    try:
        name = lvm_naming.volume_name("vg", instance, disk)
    except exceptions.InvalidName:
        return
    assert lvm_naming.disk_names(name) == (instance, disk)
    assert lvm_naming.parse_path(f"/dev/vg/{name}") == ("vg", name)


@pytest.mark.parametrize(
    ("instance", "disk"), [("x", "tdata"), ("x_tmeta", "y"), ("snapshot", "y"), ("-".join("x" * 50), "y")]
)
def test_names_that_lvm_keeps_or_cannot_hold_are_refused(instance: str, disk: str) -> None:
    with pytest.raises(exceptions.InvalidName, match="disk name"):
        configured().image(instance, disk)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "disk",
        "/dev/vg",
        "/dev/vg/disk",
        "/dev/vg/a_b/c",
        "/dev/mapper/vg-a_b",
        "/vg/a_b",
        "/dev/vg/a_b+new",
        "/dev/../a_b",
    ],
)
def test_what_is_no_path_of_a_disk_is_refused(path: str) -> None:
    with pytest.raises(exceptions.InvalidName):
        lvm_naming.parse_path(path)


def test_a_path_says_which_volume_group() -> None:
    image = configured().snapshot("/dev/other/a_b")
    assert isinstance(image, Lvm)
    assert (image.group.name, image.instance, image.disk_name) == ("other", "a", "b")


def test_tags_are_read_back_and_others_are_not_ours() -> None:
    tags = lvm_naming.tags({"kind": "disk", "header": 4096})
    facts = lvm_naming.facts({*tags, lvm_naming.COMPLETE, lvm_naming.disk_tag("a", "b"), "backup", "x.kind=y"})
    assert facts == {"kind": "disk", "header": "4096", "complete": "", "disk": "a/b"}
    assert lvm_naming.facts(["backup"]) == {}


def test_templates_are_told_apart_by_name_and_content() -> None:
    keys = {lvm_naming.template_key(name, digest) for name in ("a", "b") for digest in ("1", "2")}
    assert len(keys) == 4
    name = lvm_naming.template_volume("x" * 128, next(iter(keys)), 1 << 62)
    assert len(lvm2.device_name("a-volume-group", lvm2.check_name(name))) < 110


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, lvm_pool.GroupSpace),
        ({"sparse_logical_volumes": True}, lvm_pool.OwnPools),
        ({"images_thin_pool": "pool"}, lvm_pool.ThinPool),
        ({"images_thin_pool": "pool", "sparse_logical_volumes": True}, lvm_pool.ThinPool),
    ],
)
def test_the_options_say_where_volumes_come_from(options: dict[str, object], kind: type) -> None:
    conf = configured(**options).conf
    assert isinstance(lvm_pool.space(conf, lvm_options.group(conf)), kind)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"images_volume_group": None}, "images_volume_group"),
        ({"images_volume_group": "-x"}, "images_volume_group"),
        ({"images_thin_pool": "a/b"}, "images_thin_pool"),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, object], option: str) -> None:
    with pytest.raises(exceptions.InvalidConfiguration, match=option):
        configured(**options).image("a", "b")


def test_the_helper_is_split_as_a_shell_would() -> None:
    conf = configured().conf
    assert lvm_options.root_helper(conf) == []
    conf.set_override("root_helper", "sudo -n 'a b'")
    assert lvm_options.root_helper(conf) == ["sudo", "-n", "a b"]
    conf.set_override("root_helper", "sudo '")
    with pytest.raises(exceptions.InvalidConfiguration, match="root_helper"):
        lvm_options.root_helper(conf)
