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
_SIZE = 4 << 30


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


def empty(name: str) -> None:
    """Remove everything from a volume group, and the mappings on top of it."""
    for mapping in Path("/dev/mapper").glob("*-dmcrypt"):
        run("dmsetup", "remove", mapping.name)
    run("lvremove", "--yes", "--force", name)


@pytest.fixture(scope="session")
def session_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with (
        loop_device(tmp_path_factory.mktemp("volume-group") / "device", _SIZE) as device,
        group_on(f"test{os.getpid()}", device) as name,
    ):
        yield name


@pytest.fixture
def group(session_group: str) -> Iterator[VolumeGroup]:
    """An empty volume group."""
    yield VolumeGroup(session_group, timeout=60)
    empty(session_group)
