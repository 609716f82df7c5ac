# SPDX-License-Identifier: Apache-2.0
"""Ephemeral and swap disks, as the kernel's own tools see them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.backend import Backend
from imagebackend.images.ephemeral import create_ephemeral, create_swap
from tests.contract.conftest import configured

MIB = 1 << 20


def signature(backend: Backend, folder: Path, disk_name: str) -> tuple[str, str]:
    """Return type and label of what a guest would find on the disk."""
    image = backend.image("guest", disk_name)
    target = folder / f"{disk_name}.content"
    image.snapshot_extract(str(target), "raw")
    said = subprocess.run(
        ["blkid", "-p", "-o", "export", str(target)], check=True, capture_output=True, text=True
    ).stdout
    facts = dict(line.split("=", 1) for line in said.splitlines())
    return facts["TYPE"], re.sub(r"\\(.)", r"\1", facts.get("LABEL", ""))


@pytest.fixture(params=["raw", "qcow2"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return Backend(configured(tmp_path / "instances", request.param))


@pytest.mark.parametrize("filesystem", ["ext2", "ext3", "ext4", "xfs", "vfat", "ntfs"])
def test_the_file_system_asked_for_is_made_with_its_label(backend: Backend, tmp_path: Path, filesystem: str) -> None:
    create_ephemeral(backend.image("guest", "disk.eph0"), 300 * MIB, specified_fs=filesystem, fs_label="ephemeral0")

    kind, label = signature(backend, tmp_path, "disk.eph0")
    assert (kind, label.lower()) == (filesystem, "ephemeral0")


def test_guests_of_different_systems_on_one_host_each_get_their_own(backend: Backend, tmp_path: Path) -> None:
    for os_type in ("linux", "windows", "other"):
        create_ephemeral(backend.image("guest", f"disk.{os_type}"), 64 * MIB, os_type=os_type)

    found = [signature(backend, tmp_path, f"disk.{os_type}")[0] for os_type in ("linux", "windows", "other")]
    assert found == ["ext4", "ntfs", "vfat"]


def test_an_operators_command_formats_and_names_the_template(tmp_path: Path) -> None:
    conf = configured(tmp_path / "instances", "qcow2", virt_mkfs=["linux=mkfs.ext3 -q -L %(fs_label)s -F %(target)s"])
    backend = Backend(conf)

    create_ephemeral(backend.image("guest", "disk.eph0"), 64 * MIB, os_type="linux", fs_label="mine")
    create_ephemeral(backend.image("guest", "disk.eph1"), 64 * MIB, os_type="windows", fs_label="mine")

    assert signature(backend, tmp_path, "disk.eph0") == ("ext3", "mine")
    assert signature(backend, tmp_path, "disk.eph1") == ("ntfs", "mine")
    assert len(backend.templates.names()) == 2


def test_a_swap_disk_is_one(backend: Backend, tmp_path: Path) -> None:
    create_swap(backend.image("guest", "disk.swap"), 64 * MIB, label="swap0")

    assert signature(backend, tmp_path, "disk.swap") == ("swap", "swap0")


def test_what_cannot_be_made_leaves_nothing(backend: Backend, tmp_path: Path) -> None:
    image = backend.image("guest", "disk.eph0")

    with pytest.raises(exceptions.InvalidArgument, match="reiserfs"):
        create_ephemeral(image, 64 * MIB, specified_fs="reiserfs")
    with pytest.raises(exceptions.InvalidArgument):
        create_ephemeral(image, 64 * MIB, specified_fs="vfat", fs_label="far-too-long-for-fat")
    with pytest.raises(exceptions.DiskTooSmall):
        create_ephemeral(image, 64 * MIB, specified_fs="xfs")

    assert not image.exists()
    assert not {path.name for path in (tmp_path / "instances").rglob("*") if path.is_file()}


def test_overlays_of_one_kind_share_a_template(tmp_path: Path) -> None:
    backend = Backend(configured(tmp_path / "instances", "qcow2"))

    for number in range(3):
        create_ephemeral(backend.image(f"guest{number}", "disk.eph0"), 64 * MIB, os_type="linux")

    assert list(backend.templates.names()) == [f"ephemeral_{64 * MIB}_ext4"]
    assert len(backend.templates.leases(f"ephemeral_{64 * MIB}_ext4")) == 3
