# SPDX-License-Identifier: Apache-2.0
"""mkfs with the real tools; what they made is judged by blkid and the checkers of the file systems."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.storage import mkfs

MIB = 1 << 20
SIZE = 512 * MIB

CHECKERS = {
    "ext2": ["e2fsck", "-f", "-n"],
    "ext3": ["e2fsck", "-f", "-n"],
    "ext4": ["e2fsck", "-f", "-n"],
    "xfs": ["xfs_repair", "-f", "-n"],
    "vfat": ["fsck.vfat", "-n"],
    "ntfs": ["ntfsfix", "-n"],
}
MAKERS = [f"/sbin/mkfs.{name}" for name in mkfs.FILESYSTEMS]
LONGEST_LABELS = {"ext2": 16, "ext3": 16, "ext4": 16, "xfs": 12, "vfat": 11, "ntfs": 32}


def probe(target: Path) -> dict[str, str]:
    """Return what blkid reads from a device, its cache aside."""
    output = subprocess.run(["blkid", "-p", "-o", "export", str(target)], check=True, capture_output=True, text=True)
    return dict(line.split("=", 1) for line in output.stdout.splitlines())


def sparse(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", mkfs.FILESYSTEMS)
def test_filesystem_is_made_with_its_label(tmp_path: Path, name: str) -> None:
    target = sparse(tmp_path / "disk")
    label = "E" + "0" * (LONGEST_LABELS[name] - 1)
    mkfs.make_filesystem(str(target), mkfs.Filesystem(name), label=label, timeout=60)
    found = probe(target)
    assert (found["TYPE"], found["LABEL"]) == (name, label)
    subprocess.run([*CHECKERS[name], str(target)], check=True, capture_output=True)
    assert target.stat().st_size == SIZE
    assert target.stat().st_blocks * 512 < SIZE // 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk"]


@pytest.mark.parametrize("name", mkfs.FILESYSTEMS)
def test_label_that_is_too_long(tmp_path: Path, name: str) -> None:
    target = sparse(tmp_path / "disk")
    with pytest.raises(exceptions.InvalidName, match=f"{name} allows {LONGEST_LABELS[name]}"):
        mkfs.make_filesystem(str(target), mkfs.Filesystem(name), label="E" * (LONGEST_LABELS[name] + 1), timeout=60)
    assert target.stat().st_blocks == 0


@pytest.mark.parametrize("label", ["-n", "a b", "%(target)s", ""])
def test_label_that_is_not_safe(tmp_path: Path, label: str) -> None:
    target = sparse(tmp_path / "disk")
    for filesystem in (mkfs.Filesystem("ext4"), mkfs.Filesystem("mkfs-x", "mkfs.ext4 -L %(fs_label)s %(target)s")):
        with pytest.raises(exceptions.InvalidName):
            mkfs.make_filesystem(str(target), filesystem, label=label, timeout=60)
    assert target.stat().st_blocks == 0


@pytest.mark.parametrize("name", mkfs.FILESYSTEMS)
@pytest.mark.parametrize("disk", ["-F", "a?b:c,d", "new\nline", os.fsdecode(b"\xff")])
def test_any_name_of_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, disk: str) -> None:
    monkeypatch.chdir(tmp_path)
    sparse(tmp_path / disk)
    mkfs.make_filesystem(disk, mkfs.Filesystem(name), timeout=60)
    (tmp_path / disk).rename(tmp_path / "disk")
    found = probe(tmp_path / "disk")
    assert found["TYPE"] == name
    assert "LABEL" not in found or name == "vfat"


@pytest.mark.parametrize("name", mkfs.FILESYSTEMS)
def test_what_a_target_held_is_replaced(tmp_path: Path, name: str) -> None:
    target = sparse(tmp_path / "disk")
    for previous in mkfs.FILESYSTEMS:
        mkfs.make_filesystem(str(target), mkfs.Filesystem(previous), timeout=60)
        mkfs.make_filesystem(str(target), mkfs.Filesystem(name), timeout=60)
        assert probe(target)["TYPE"] == name


@pytest.mark.parametrize("name", mkfs.FILESYSTEMS)
def test_smallest_target(tmp_path: Path, name: str) -> None:
    target = sparse(tmp_path / "disk", 4096)
    with pytest.raises(exceptions.DiskTooSmall) as raised:
        mkfs.make_filesystem(str(target), mkfs.Filesystem(name), timeout=60)
    assert raised.value.size == 4096
    os.truncate(target, raised.value.required)
    mkfs.make_filesystem(str(target), mkfs.Filesystem(name), timeout=60)
    found = probe(target)
    assert found["TYPE"] == name
    subprocess.run([*CHECKERS[name], str(target)], check=True, capture_output=True)


def test_block_device(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk")
    device = subprocess.run(
        ["losetup", "--find", "--show", str(target)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        for name in mkfs.FILESYSTEMS:
            mkfs.make_filesystem(device, mkfs.Filesystem(name), label="ephemeral0", timeout=60)
            assert probe(Path(device))["TYPE"] == name
        mkfs.make_swap(device, timeout=60)
        assert probe(Path(device))["TYPE"] == "swap"
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_command_of_the_operator(tmp_path: Path) -> None:
    target = sparse(tmp_path / "with space; touch x")
    value = "linux=mkfs.ext3 -q -F -L '%(fs_label)s' -E 'root_owner=1:2' %(target)s"
    filesystem = mkfs.filesystem_for("linux", commands=mkfs.parse_commands([value]))
    mkfs.make_filesystem(str(target), filesystem, label="ephemeral0", timeout=60)
    assert (probe(target)["TYPE"], probe(target)["LABEL"]) == ("ext3", "ephemeral0")
    mkfs.make_filesystem(str(target), filesystem, timeout=60)
    assert "LABEL" not in probe(target)


def test_missing_command(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk")
    with pytest.raises(exceptions.ToolMissing, match=r"mkfs\.absent"):
        mkfs.make_filesystem(str(target), mkfs.Filesystem("mkfs-x", "mkfs.absent %(target)s"), timeout=60)


def test_missing_tool_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagebackend.process.PATH", str(tmp_path))
    packages = {}
    target = sparse(tmp_path / "disk")
    for name in mkfs.FILESYSTEMS:
        with pytest.raises(exceptions.ToolMissing) as raised:
            mkfs.make_filesystem(str(target), mkfs.Filesystem(name), timeout=60)
        packages[name] = raised.value.package
    with pytest.raises(exceptions.ToolMissing, match="util-linux"):
        mkfs.make_swap(str(target), timeout=60)
    installed = subprocess.run(["dpkg-query", "-S", *MAKERS], check=True, capture_output=True, text=True)
    owners = {line.split(": ")[1]: line.split(":")[0] for line in installed.stdout.splitlines()}
    assert packages == {name: owners[f"/sbin/mkfs.{name}"] for name in mkfs.FILESYSTEMS}


@pytest.mark.parametrize("name", sorted(set(mkfs.FILESYSTEMS) - {"vfat"}))
def test_full_file_system(small_tmpfs: Path, name: str) -> None:
    target = sparse(small_tmpfs / "disk")
    fill(small_tmpfs)
    with pytest.raises(exceptions.InsufficientSpace):
        mkfs.make_filesystem(str(target), mkfs.Filesystem(name), timeout=60)


def test_full_file_system_that_the_tool_does_not_name(small_tmpfs: Path) -> None:
    target = sparse(small_tmpfs / "disk")
    fill(small_tmpfs)
    with pytest.raises(exceptions.ToolFailed, match="failed whilst writing"):
        mkfs.make_filesystem(str(target), mkfs.Filesystem("vfat"), timeout=60)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb") as file:
        free = os.statvfs(folder)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)


def test_absent_target(tmp_path: Path) -> None:
    with pytest.raises(exceptions.StorageError, match="absent"):
        mkfs.make_filesystem(str(tmp_path / "absent"), mkfs.Filesystem("ntfs"), timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_swap(tmp_path: Path) -> None:
    target = sparse(tmp_path / "disk", MIB)
    mkfs.make_swap(str(target), label="s" * 15, timeout=60)
    found = probe(target)
    assert (found["TYPE"], found["LABEL"]) == ("swap", "s" * 15)
    with pytest.raises(exceptions.InvalidName):
        mkfs.make_swap(str(target), label="s" * 16, timeout=60)
    os.truncate(target, 4096)
    with pytest.raises(exceptions.DiskTooSmall) as raised:
        mkfs.make_swap(str(target), timeout=60)
    os.truncate(target, raised.value.required)
    mkfs.make_swap(str(target), timeout=60)
    assert "LABEL" not in probe(target)
