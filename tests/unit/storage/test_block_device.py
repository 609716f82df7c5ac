# SPDX-License-Identifier: Apache-2.0
"""The content of block devices, on real loop devices."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.storage import block_device
from tests.functional.filesystems import allocated
from tests.lvm.volume_groups import loop_device, run

MIB = 1 << 20
SIZE = 16 * MIB


class Device:
    """A loop device, and the file behind it."""

    def __init__(self, path: str, file: Path) -> None:
        self.path = path
        self.file = file

    def content(self) -> bytes:
        return Path(self.path).read_bytes()

    def dirty(self) -> None:
        """Have it hold what somebody else left there."""
        with open(self.path, "r+b", buffering=0) as device:
            device.write(b"\xaa" * SIZE)
            os.fsync(device.fileno())


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    with loop_device(tmp_path / "device", SIZE) as path:
        yield Device(path, tmp_path / "device")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """A file of 10 MiB and a bit: data at the beginning, in the middle, and in the last, odd, bytes."""
    path = tmp_path / "source"
    with path.open("w+b") as file:
        file.write(b"first" * 1000)
        file.seek(4 * MIB - 100)
        file.write(b"m" * 5 * MIB)
        file.seek(10 * MIB)
        file.write(b"end")
        file.flush()
        yield file.fileno()


def content_of(source: int) -> bytes:
    content = os.pread(source, SIZE, 0)
    return content + bytes(SIZE - len(content))


@pytest.mark.parametrize("reads_as_zeros", [False, True])
def test_a_device_is_filled_with_data_and_zeros(device: Device, source: int, reads_as_zeros: bool) -> None:
    if not reads_as_zeros:
        device.dirty()
    progress: list[tuple[int, int]] = []

    block_device.fill(
        source, device.path, reads_as_zeros=reads_as_zeros, progress=lambda done, size: progress.append((done, size))
    )

    assert device.content() == content_of(source)
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == ((0, SIZE), (SIZE, SIZE))
    block_device.compare(source, device.path)
    assert block_device.size(device.path) == SIZE


def test_holes_are_not_written_where_zeros_are_known(device: Device, source: int) -> None:
    device.dirty()

    block_device.fill(source, device.path, reads_as_zeros=True)

    found, expected = device.content(), content_of(source)
    assert found[:4096] == expected[:4096]
    assert found[4 * MIB : 9 * MIB - 100] == expected[4 * MIB : 9 * MIB - 100]
    assert found[10 * MIB : 10 * MIB + 4096] == expected[10 * MIB : 10 * MIB + 4096]
    assert set(found[8192 : 3 * MIB]) == set(found[10 * MIB + 4096 :]) == {0xAA}


def test_a_difference_is_found_on_the_device_itself(device: Device, source: int) -> None:
    block_device.fill(source, device.path, reads_as_zeros=True)
    with open(device.path, "r+b", buffering=0) as changed:
        changed.seek(6 * MIB + 17)
        changed.write(b"x")

    with pytest.raises(exceptions.CorruptDisk, match="differs"):
        block_device.compare(source, device.path)


def test_what_does_not_fit_is_refused_before_anything_is_written(device: Device, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * 4096)
    os.truncate(large, SIZE + 1)
    with large.open("rb") as file, pytest.raises(exceptions.DiskTooSmall):
        block_device.fill(file.fileno(), device.path, reads_as_zeros=True)
    assert not any(device.content())


def test_a_callback_cancels(device: Device, source: int) -> None:
    def cancel(done: int, size: int) -> None:
        raise exceptions.Cancelled("enough")

    for work in (
        lambda: block_device.fill(source, device.path, reads_as_zeros=False, progress=cancel),
        lambda: block_device.compare(source, device.path, cancel),
        lambda: block_device.zero(device.path, 0, SIZE, progress=cancel),
    ):
        with pytest.raises(exceptions.Cancelled):
            work()


def test_a_part_is_zeroed_or_discarded(device: Device) -> None:
    device.dirty()

    block_device.zero(device.path, 4 * MIB, 6 * MIB)
    found = device.content()
    assert not any(found[4 * MIB : 6 * MIB])
    assert set(found[: 4 * MIB]) == set(found[6 * MIB :]) == {0xAA}

    block_device.discard(device.path, 8 * MIB, SIZE)
    assert allocated(device.file) <= 8 * MIB


def test_a_mounted_device_is_not_written_to(device: Device, source: int, tmp_path: Path) -> None:
    run("mkfs.ext4", "-q", device.path)
    mount_point = tmp_path / "mounted"
    mount_point.mkdir()
    run("mount", device.path, mount_point)
    try:
        for work in (
            lambda: block_device.fill(source, device.path, reads_as_zeros=True),
            lambda: block_device.discard(device.path, 0, SIZE),
        ):
            with pytest.raises(exceptions.DiskInUse, match="file system"):
                work()
    finally:
        run("umount", mount_point)


def test_no_device_and_no_rights_are_told_apart(source: int, tmp_path: Path) -> None:
    for work in (
        lambda: block_device.size(str(tmp_path / "nosuch")),
        lambda: block_device.fill(source, str(tmp_path / "nosuch"), reads_as_zeros=True),
        lambda: block_device.zero(str(tmp_path / "nosuch"), 0, 1),
    ):
        with pytest.raises(exceptions.DiskNotFound):
            work()
