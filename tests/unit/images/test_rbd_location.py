# SPDX-License-Identifier: Apache-2.0
"""How disks in Ceph are named, and what the options say: no cluster is asked."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import imagebackend
from imagebackend import exceptions
from imagebackend.images import rbd_location, rbd_options
from imagebackend.images.rbd import Rbd
from imagebackend.storage import ceph

SAFE = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.-]{0,20}", fullmatch=True)


def pool(conf_file: str = "", user: str | None = None, namespace: str = "") -> ceph.Pool:
    return ceph.Pool(ceph.Settings(conf_file, user, 5, 60, "auto"), "vms", namespace)


def configured(**options: object) -> object:
    conf = imagebackend.load_config()
    for name, value in {"images_type": "rbd", **options}.items():
        conf.set_override(name, value, group="libvirt")
    return conf


@pytest.mark.parametrize(
    ("where", "path"),
    [
        (pool(), "rbd:vms/guest_disk"),
        (pool(user="cinder"), "rbd:vms/guest_disk:id=cinder"),
        (pool("/etc/ceph/ceph.conf", "cinder"), "rbd:vms/guest_disk:id=cinder:conf=/etc/ceph/ceph.conf"),
        (pool("/a:b/c.conf"), r"rbd:vms/guest_disk:conf=/a\:b/c.conf"),
        (pool(namespace="tenant"), "rbd:vms/tenant/guest_disk"),
    ],
)
def test_a_path_is_as_qemu_takes_it_and_is_read_back(where: ceph.Pool, path: str) -> None:
    assert rbd_location.format_path(where, "guest_disk") == path
    assert rbd_location.parse_path(path) == ("vms", where.namespace, "guest_disk")


@given(SAFE, SAFE.filter(lambda name: name), st.sampled_from(["/c.conf", "/a:b/c", r"/back\slash", "/at@", ""]))
def test_every_name_survives_the_path(instance: str, disk: str, conf_file: str) -> None:
    name = rbd_location.image_name(instance, disk)
    parsed = rbd_location.parse_path(rbd_location.format_path(pool(conf_file), name))
    assert rbd_location.disk_names(parsed[2]) == (instance, disk)


@pytest.mark.parametrize(
    "path", ["", "disk", "rbd:", "rbd:vms", "rbd:vms/disk", "rbd:vms/_disk", "rbd:vms/guest_", "rbd:/guest_disk"]
)
def test_what_is_no_path_of_a_disk_is_refused(path: str) -> None:
    with pytest.raises(exceptions.InvalidName):
        rbd_location.parse_path(path)


@pytest.mark.parametrize("name", ["template:debian", "partial:guest_disk", "zombie:1234", "volume-1", ".x_y", "a_"])
def test_images_that_are_no_disks_are_told_apart(name: str) -> None:
    assert rbd_location.disk_names(name) is None


def test_two_disks_never_have_one_image() -> None:
    assert rbd_location.image_name("a", "b_c") == "a_b_c"
    with pytest.raises(exceptions.InvalidName, match="separates"):
        rbd_location.image_name("a_b", "c")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"images_rbd_pool": ""}, "images_rbd_pool"),
        ({"images_rbd_pool": "a/b"}, "images_rbd_pool"),
        ({"images_rbd_pool": "vms:conf=/x"}, "images_rbd_pool"),
        ({"images_rbd_namespace": "../x"}, "images_rbd_namespace"),
        ({"images_rbd_object_size": 5000}, "images_rbd_object_size"),
        ({"images_rbd_object_size": 2048}, "images_rbd_object_size"),
    ],
)
def test_options_that_cannot_be_used_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(exceptions.InvalidConfiguration, match=named):
        imagebackend.Backend(configured(**options)).image("guest", "disk")


def test_the_options_say_how_disks_are_laid_out() -> None:
    conf = configured(images_rbd_features=["layering"], images_rbd_object_size=1 << 20, images_rbd_data_pool="data")
    assert rbd_options.layout(conf) == ceph.Layout(("layering",), 1 << 20, "data")
    assert rbd_options.layout(configured()) == ceph.Layout()


def test_making_an_image_loads_no_binding_and_asks_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rados", None)
    monkeypatch.setitem(sys.modules, "rbd", None)
    image = imagebackend.Backend(configured(images_rbd_ceph_conf="/nowhere/ceph.conf")).image("guest", "disk")
    assert isinstance(image, Rbd)
    assert image.path == "rbd:rbd/guest_disk:conf=/nowhere/ceph.conf"
    assert (image.resolve_driver_format(), image.is_shared_block_storage()) == ("raw", True)


def test_a_ceph_conf_that_is_not_there_is_a_configuration_error() -> None:
    image = imagebackend.Backend(configured(images_rbd_ceph_conf="/nowhere/ceph.conf")).image("guest", "disk")
    with pytest.raises(exceptions.InvalidConfiguration, match="images_rbd_ceph_conf"):
        image.exists()


def test_a_missing_binding_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rados", None)
    with pytest.raises(exceptions.Unsupported, match="python3-rados"):
        imagebackend.Backend(configured()).image("guest", "disk").exists()
