# SPDX-License-Identifier: Apache-2.0
"""What the doctor makes of what it finds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import imagebackend
from imagebackend import exceptions
from imagebackend.cli import hypervisor
from imagebackend.cli.doctor import ceph_pool, configuration, folders, libvirt_host, tools
from imagebackend.cli.doctor.ceph_pool import PoolFacts
from imagebackend.cli.doctor.finding import Finding, Severity, error, fine, warning, worst
from imagebackend.cli.doctor.folders import FileSystem, Folder
from imagebackend.cli.doctor.libvirt_host import Host
from imagebackend.cli.doctor.tools import Presence

GIB = 1 << 30
GOOD = FileSystem(True, True, None, 50 * GIB, 100 * GIB, 500, 1000)
REACHED = Host("qemu:///system", version=9_000_000, emulator="/usr/bin/qemu-system-x86_64")
ALL_TOOLS = {tool.command: Presence(f"/usr/bin/{tool.command}", "7.2.22") for tool in tools.TOOLS}


def by_check(findings: list[Finding]) -> dict[str, Severity]:
    return {each.check: each.status for each in findings}


def test_the_worst_finding_decides() -> None:
    found = [fine("a", "b"), warning("a", "b", "c"), error("a", "b", "c")]

    assert [worst(found[:number]) for number in range(4)] == ["ok", "ok", "warning", "error"]
    assert worst(reversed(found)) == "error"


@pytest.mark.parametrize(
    ("changed", "option", "copies", "check", "status"),
    [
        ({}, "auto", True, "reflink", "ok"),
        ({"direct_io": False}, "auto", False, "direct I/O", "warning"),
        ({"direct_io": None}, "auto", False, "direct I/O", "warning"),
        ({"reflink": False}, "auto", False, "reflink", "ok"),
        ({"reflink": False}, "auto", True, "reflink", "warning"),
        ({"reflink": False}, "always", False, "reflink", "error"),
        ({"reflink": False}, "never", True, "reflink", "ok"),
        ({"reflink": None}, "always", True, "reflink", "warning"),
        ({"lock_failure": "no locks"}, "auto", False, "locks", "error"),
        ({"free": GIB, "size": 2 * GIB}, "auto", False, "space", "ok"),
        ({"free": GIB - 1, "size": 2 * GIB}, "auto", False, "space", "warning"),
        ({"free": 4 * GIB}, "auto", False, "space", "warning"),
        ({"free": 0}, "auto", False, "space", "error"),
        ({"free": 0, "size": 0}, "auto", False, "space", "ok"),
        ({"free_files": 0}, "auto", False, "inodes", "error"),
        ({"free_files": 49}, "auto", False, "inodes", "warning"),
        ({"free_files": 0, "files": 0}, "auto", False, "inodes", "ok"),
    ],
)
def test_what_a_file_system_can_do(
    changed: dict[str, Any], option: str, copies: bool, check: str, status: str
) -> None:
    found = by_check(folders.judge_file_system(replace(GOOD, **changed), option, copies=copies))

    assert found[check] == status
    assert {each for name, each in found.items() if name != check} == {Severity.OK}


@pytest.mark.parametrize(
    ("folder", "status", "words"),
    [
        (Folder("/srv/a", "/srv/a"), "ok", "can write there"),
        (Folder("/srv/a", "/srv"), "ok", "it will be made in /srv"),
        (Folder("/srv/a", "/srv/a", "Permission denied"), "error", "nothing can be made in it: Permission denied"),
        (Folder("/srv/a", "/srv", "Read-only file system"), "error", "made in /srv, and it is not there: Read-only"),
    ],
)
def test_what_a_folder_allows(folder: Folder, status: str, words: str) -> None:
    found = folders.judge_folder("[DEFAULT] instances_path", folder, 0)

    assert found.status == status
    assert words in found.message


def test_a_folder_is_tried_where_it_would_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    assert folders.look_at_folder(str(tmp_path)) == Folder(str(tmp_path), str(tmp_path))
    assert folders.look_at_folder(f"{tmp_path}/a/b/c") == Folder(f"{tmp_path}/a/b/c", str(tmp_path))
    assert folders.look_at_folder("/proc/a").failure is not None
    assert folders.look_at_folder(f"{tmp_path}/file").failure == "Not a directory"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_system_is_tried_and_nothing_is_left(tmp_path: Path) -> None:
    found = folders.look_at_file_system(str(tmp_path))

    assert found.lock_failure is None
    assert 0 < found.free <= found.size
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("command", "presence", "default_filesystem", "status"),
    [
        ("qemu-img", Presence(None), None, "error"),
        ("qemu-img", Presence("/usr/bin/qemu-img"), None, "error"),
        ("qemu-img", Presence("/usr/bin/qemu-img", "5.1.99"), None, "error"),
        ("qemu-img", Presence("/usr/bin/qemu-img", "5.2"), None, "warning"),
        ("qemu-img", Presence("/usr/bin/qemu-img", "10.0.0"), None, "ok"),
        ("setpriv", Presence(None), None, "error"),
        ("prlimit", Presence(None), None, "error"),
        ("mkswap", Presence(None), None, "warning"),
        ("mkswap", Presence("/sbin/mkswap"), None, "ok"),
        ("mkfs.ext4", Presence(None), None, "warning"),
        ("mkfs.ntfs", Presence(None), None, "ok"),
        ("mkfs.ntfs", Presence(None), "ext4", "ok"),
        ("mkfs.ntfs", Presence(None), "ntfs", "error"),
    ],
)
def test_which_tools_are_needed(command: str, presence: Presence, default_filesystem: str | None, status: str) -> None:
    findings = tools.judge_tools({**ALL_TOOLS, command: presence}, default_filesystem)

    found = by_check(findings)
    assert found.pop(f"tool {command}") == status
    assert set(found.values()) == {Severity.OK}
    package = next(tool.package for tool in tools.TOOLS if tool.command == command)
    told = next(f"{each.message} {each.advice}" for each in findings if each.check == f"tool {command}")
    assert presence.path is not None or package in told


@pytest.mark.parametrize(
    ("host", "virt_type", "demanded", "expected"),
    [
        (REACHED, "kvm", False, {"libvirt": "ok", "emulator": "ok"}),
        (Host("lxc:///system", version=9_000_000), "lxc", False, {"libvirt": "ok"}),
        (replace(REACHED, version=8_009_000), "kvm", False, {"libvirt": "warning", "emulator": "ok"}),
        (replace(REACHED, guest_failure="no /dev/kvm"), "kvm", False, {"libvirt": "ok", "emulator": "error"}),
        (Host("x", failure="no such file"), "kvm", False, {"libvirt": "warning"}),
        (Host("x", failure="no such file"), "kvm", True, {"libvirt": "error"}),
        (Host("x", import_failure="No module named libvirt"), "kvm", False, {"libvirt": "error"}),
    ],
)
def test_what_libvirt_is_good_for(host: Host, virt_type: str, demanded: bool, expected: dict[str, str]) -> None:
    assert by_check(libvirt_host.judge_host(host, virt_type, demanded=demanded)) == expected


def test_without_kvm_emulation_is_proposed() -> None:
    kvm, qemu = (
        libvirt_host.judge_host(replace(REACHED, guest_failure="no"), virt_type, demanded=False)[-1]
        for virt_type in ("kvm", "qemu")
    )

    assert "virt_type = qemu" in kvm.advice
    assert "install the package" in qemu.advice


def test_a_libvirt_that_is_not_there_is_told() -> None:
    found = libvirt_host.look_at_host("qemu:///system?socket=/nonexistent", "kvm")

    assert found.failure is not None
    assert "/nonexistent" in found.failure


@pytest.mark.parametrize(
    ("virt_type", "uri"), [("kvm", "qemu:///system"), ("qemu", "qemu:///system"), ("lxc", "lxc:///system")]
)
def test_the_hypervisor_follows_the_type_of_domain(virt_type: str, uri: str) -> None:
    assert hypervisor.default_uri(virt_type) == uri


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"libvirt.disk_cachemodes": ["file=fast"]}, {"[libvirt] disk_cachemodes": "error"}),
        ({"libvirt.disk_cachemodes": ["file=none"]}, {}),
        ({"virt_mkfs": ["linux"]}, {"[DEFAULT] virt_mkfs": "error"}),
        ({"default_ephemeral_format": "zfs"}, {"[DEFAULT] default_ephemeral_format": "error"}),
        ({"libvirt.images_qcow2_cluster_size": 2 << 20}, {}),
        (
            {"libvirt.images_qcow2_cluster_size": 8192, "libvirt.images_qcow2_extended_l2": True},
            {"[libvirt] images_qcow2_cluster_size": "error"},
        ),
        (
            {"libvirt.images_qcow2_cluster_size": 8192, "preallocate_images": "space"},
            {"[libvirt] images_qcow2_cluster_size": "error"},
        ),
        ({"libvirt.images_qcow2_cluster_size": 16384, "preallocate_images": "space"}, {}),
        ({"libvirt.images_qcow2_cluster_size": 8192}, {}),
    ],
)
def test_values_that_are_right_by_type_only(options: dict[str, Any], expected: dict[str, str]) -> None:
    conf = imagebackend.load_config()
    for name, value in options.items():
        group, _, option = name.rpartition(".")
        conf.set_override(option, value, group=group or None)

    assert by_check(configuration.judge_options(conf)) == expected


def test_unknown_options_of_our_groups_are_hints() -> None:
    sections = {
        "DEFAULT": {"rpc_backend": [""]},
        "libvirt": {"images_tpye": [""], "virt_type": [""]},
        "neutron": {"x": [""]},
    }

    found = configuration.unknown_options(sections)

    assert by_check(found) == {"[DEFAULT] rpc_backend": "ok", "[libvirt] images_tpye": "ok"}
    assert "did you mean images_type?" in found[1].message


def test_every_wrong_value_is_found_and_the_default_goes_on(tmp_path: Path) -> None:
    ini = tmp_path / "imagebackend.conf"
    ini.write_text(
        "[DEFAULT]\nuse_cow_images = perhaps\nlock_timeout = -1\n[libvirt]\nimages_type = zfs\nimages_tpye = raw\n"
    )

    conf, findings = configuration.examine([str(ini)], [])

    found = by_check(findings)
    assert conf.use_cow_images is True
    assert conf.lock_timeout == 600
    wrong = {name for name, status in found.items() if status is Severity.ERROR}
    assert wrong == {"[DEFAULT] use_cow_images", "[DEFAULT] lock_timeout", "[libvirt] images_type"}
    assert found["[libvirt] images_tpye"] == "ok"


def test_a_file_that_is_no_ini_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.conf").write_text("nonsense[\n")

    conf, findings = configuration.examine([], [str(tmp_path)])

    assert by_check(findings) == {"configuration": "error"}
    assert "broken.conf" in findings[0].message
    assert conf.use_cow_images is True


def test_an_entry_point_that_cannot_be_loaded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[imagebackend.backends]\nbroken = broken_images:Broken\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    _, findings = configuration.examine([], [])

    assert by_check(findings)["entry point imagebackend.backends broken"] == "error"


@pytest.mark.parametrize(
    ("found", "check", "status"),
    [
        (PoolFacts(name="rbd", monitors=3, free=50 * GIB, size=100 * GIB), "Ceph pool", "ok"),
        (PoolFacts(name="rbd", monitors=1, free=50 * GIB, size=100 * GIB), "Ceph monitors", "warning"),
        (PoolFacts(name="rbd", monitors=3, free=9 * GIB, size=100 * GIB), "Ceph space", "warning"),
        (PoolFacts(exceptions.InvalidConfiguration("[libvirt] rbd_user", "no key")), "[libvirt] rbd_user", "error"),
        (PoolFacts(exceptions.StorageTimeout("connecting to the monitors", 5)), "Ceph pool", "error"),
        (PoolFacts(exceptions.PermissionDenied("rbd/image", 1, "the cluster denies it")), "Ceph pool", "error"),
        (PoolFacts(exceptions.Unsupported("a disk in Ceph", "install python3-rbd")), "Ceph pool", "error"),
        (PoolFacts(exceptions.StorageError("rbd/image", "broken")), "Ceph pool", "error"),
    ],
)
def test_what_a_pool_can_do(found: PoolFacts, check: str, status: str) -> None:
    findings = ceph_pool.judge_pool(found)

    assert by_check(findings)[check] == status
    assert all(each.advice for each in findings if each.status != "ok")
    assert worst(findings) == status


def test_what_guests_need_for_a_disk_in_ceph() -> None:
    assert ceph_pool.judge_driver(is_there=True).status == "ok"
    assert "qemu-block-extra" in ceph_pool.judge_driver(is_there=False).advice
    assert ceph_pool.judge_secret(None) == []
    assert by_check(ceph_pool.judge_secret("there is none")) == {"[libvirt] rbd_secret_uuid": "error"}
