# SPDX-License-Identifier: Apache-2.0
"""Real volume groups for tests: a pytest plugin, loaded by tests/conftest.py.

They lie on loop devices, and need a kernel with device-mapper. A session has one volume group; each test finds it
empty.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend.storage.lvm2 import VolumeGroup

MIB = 1 << 20
#: Small, so that rounding up to it shows and costs little; the default is 4 MiB.
EXTENT = MIB
#: The name of the thin pool.
POOL = "pool"
_SIZE, _POOL_SIZE = 4 << 30, 1 << 30


def run(*command: object) -> str:
    """Run a command to its end and return what it wrote."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


@contextlib.contextmanager
def loop_device(path: Path, size: int) -> Iterator[str]:
    """Give a loop device of ``size`` bytes over a new sparse file."""
    with path.open("wb") as file:
        file.truncate(size)
    device = run("losetup", "--find", "--show", path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        path.unlink()


@contextlib.contextmanager
def group_on(name: str, *devices: str, extent: int = EXTENT) -> Iterator[str]:
    """Give a volume group on devices."""
    run("vgcreate", "--yes", "--physicalextentsize", f"{extent}b", name, *devices)
    try:
        yield name
    finally:
        subprocess.run(["vgremove", "--yes", "--force", name], capture_output=True, timeout=120)


def with_lvm_conf(folder: Path, text: str) -> list[str]:
    """Return what runs a command of LVM's with another lvm.conf, as words, for ``[DEFAULT] root_helper``."""
    folder.mkdir(exist_ok=True)
    (folder / "lvm.conf").write_text(text)
    return ["env", f"LVM_SYSTEM_DIR={folder}"]


def empty(group: VolumeGroup) -> None:
    """Remove everything from a volume group but the thin pool that all tests share, and the mappings on top of it."""
    volumes = group.report()
    for volume in volumes:
        if os.path.exists(f"/dev/mapper/{volume.name}-dmcrypt"):
            run("dmsetup", "remove", f"{volume.name}-dmcrypt")
    left = [volume.pool if "+pool+" in volume.pool else volume.name for volume in volumes]
    if left := sorted({*left} - {POOL}):
        group.remove(*left)


@pytest.fixture(scope="session")
def session_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The device that the volume group is on."""
    with loop_device(tmp_path_factory.mktemp("volume-group") / "device", _SIZE) as device:
        yield device


@pytest.fixture(scope="session")
def session_group(session_device: str) -> Iterator[str]:
    with group_on(f"test{os.getpid()}", session_device) as name:
        VolumeGroup(name, timeout=60).create_thin_pool(POOL, _POOL_SIZE)
        yield name


@pytest.fixture
def group(session_group: str) -> Iterator[VolumeGroup]:
    """A volume group with nothing in it but an empty thin pool, :data:`POOL`."""
    opened = VolumeGroup(session_group, timeout=60)
    yield opened
    empty(opened)


@pytest.fixture
def group_folder(tmp_path: Path) -> Path:
    """An empty folder beside an empty volume group."""
    folder = tmp_path / "group-folder"
    folder.mkdir()
    return folder
