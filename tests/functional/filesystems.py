# SPDX-License-Identifier: Apache-2.0
"""Small real file systems for tests: a pytest plugin, loaded by tests/conftest.py.

Each file system is made and mounted once a session, when a test first asks for it; each test gets an empty folder of
its own on it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
_SIZE = 1 << 30
_count = itertools.count()


@contextlib.contextmanager
def mounted(filesystem: str, folder: Path, size: int = _SIZE) -> Iterator[Path]:
    """Make a file system in a sparse file in ``folder``, mount it, give its mount point, and unmount it."""
    device, mount_point = folder / f"{filesystem}.img", folder / filesystem
    with device.open("wb") as file:
        file.truncate(size)
    subprocess.run([*_MKFS[filesystem], str(device)], check=True)
    mount_point.mkdir()
    subprocess.run(["mount", "-o", "loop", str(device), str(mount_point)], check=True)
    try:
        yield mount_point
    finally:
        _unmount(mount_point)
        device.unlink()


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """Mount a tmpfs of ``size`` bytes on a new folder in ``folder``, give it, and unmount it."""
    mount_point = folder / "tmpfs"
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount_point)], check=True)
    try:
        yield mount_point
    finally:
        _unmount(mount_point)


def allocated(path: Path) -> int:
    """Return the bytes of storage that a file occupies, once what is written has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path.stat().st_blocks * 512


def shared(path: Path) -> int:
    """Return the bytes of storage that a file shares with others, as FIEMAP tells (filefrag(8))."""
    listing = subprocess.run(
        ["filefrag", "-s", "-b1", "-v", str(path)], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split(":") for line in listing.splitlines() if "shared" in line]
    return sum(int(row[3]) for row in rows)


@pytest.fixture(scope="session")
def ext4_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("ext4", tmp_path_factory.mktemp("ext4")) as mount_point:
        yield mount_point


@pytest.fixture(scope="session")
def xfs_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("xfs", tmp_path_factory.mktemp("xfs")) as mount_point:
        yield mount_point


@pytest.fixture(scope="session")
def btrfs_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted("btrfs", tmp_path_factory.mktemp("btrfs")) as mount_point:
        yield mount_point


@pytest.fixture
def ext4_folder(ext4_mount: Path) -> Iterator[Path]:
    """An empty folder on ext4: holes and O_DIRECT, no reflink."""
    with _new_folder(ext4_mount) as folder:
        yield folder


@pytest.fixture
def xfs_folder(xfs_mount: Path) -> Iterator[Path]:
    """An empty folder on XFS with reflink."""
    with _new_folder(xfs_mount) as folder:
        yield folder


@pytest.fixture
def btrfs_folder(btrfs_mount: Path) -> Iterator[Path]:
    """An empty folder on btrfs."""
    with _new_folder(btrfs_mount) as folder:
        yield folder


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB that is full when it is full."""
    with mounted_tmpfs(tmp_path, 8 << 20) as mount_point:
        yield mount_point


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Have a folder read-only, for root too, while the block runs."""
    subprocess.run(["mount", "--bind", folder, folder], check=True, timeout=60)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, timeout=60)
        yield
    finally:
        _unmount(folder)


@contextlib.contextmanager
def _new_folder(mount_point: Path) -> Iterator[Path]:
    folder = mount_point / f"test{next(_count)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        # Hundreds of tests share this small file system, and what they leave together would fill it.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _unmount(mount_point: Path) -> None:
    # What a failed test left open must not leave a mount behind, but is no success either.
    done = subprocess.run(["umount", str(mount_point)], check=False, capture_output=True, text=True)
    if done.returncode:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)
        raise AssertionError(done.stderr)
