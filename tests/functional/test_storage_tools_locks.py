# SPDX-License-Identifier: Apache-2.0
"""image_lock against QEMU processes that hold images, and direct_io on real file systems."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from imagebackend import exceptions, locks
from imagebackend.storage import direct_io, image_lock, reflink

Holder = Callable[[Path, str], contextlib.AbstractContextManager[None]]

FORMATS = ["raw", "qcow2"]


@pytest.fixture(params=FORMATS)
def disk_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def disk(tmp_path: Path, disk_format: str) -> Path:
    return create(tmp_path / "disk", disk_format)


def create(path: Path, disk_format: str, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", disk_format, *options, str(path), "1M"], check=True)
    return path


@contextlib.contextmanager
def running(command: list[str], ready: bytes, question: bytes = b"") -> Iterator[None]:
    """Run a command until the block ends; the block begins once it has said that it is ready."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(question)
            process.stdin.flush()
            said = b""
            while ready not in said:
                piece = process.stdout.read1()
                if not piece:
                    raise AssertionError(said.decode())  # in full: pytest would shorten it
                said += piece
            yield
        finally:
            process.kill()


def writer(path: Path, disk_format: str) -> contextlib.AbstractContextManager[None]:
    return running(["qemu-io", "-f", disk_format, str(path)], b"qemu-io> ")


def paused_guest(path: Path, disk_format: str, *, read_only: bool = False) -> contextlib.AbstractContextManager[None]:
    drive = f"file={path},format={disk_format},if=virtio,read-only={'on' if read_only else 'off'}"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-S"]
    return running([*command, "-drive", drive, "-qmp", "stdio"], b'"return"', b'{"execute": "qmp_capabilities"}')


def qemu_io(path: Path, disk_format: str, *command: str, read_only: bool = False) -> str:
    """Let qemu-io do one thing; return what it said on stderr."""
    arguments = ["qemu-io", *(["-r"] if read_only else []), "-f", disk_format, "-c", " ".join(command), str(path)]
    return subprocess.run(arguments, check=False, capture_output=True, text=True).stderr


def test_nobody(disk: Path) -> None:
    assert not image_lock.is_in_use(str(disk))
    with image_lock.hold(str(disk)):
        pass


@pytest.mark.parametrize("holder", [writer, paused_guest])
def test_writer_is_seen(disk: Path, disk_format: str, holder: Holder) -> None:
    with holder(disk, disk_format):
        assert image_lock.is_in_use(str(disk))
        for shared in (True, False):
            with pytest.raises(exceptions.DiskInUse) as raised, image_lock.hold(str(disk), shared=shared):
                pass
            assert raised.value.name == str(disk)
    assert not image_lock.is_in_use(str(disk))
    with image_lock.hold(str(disk)):
        pass


def test_reader_is_no_writer(disk: Path, disk_format: str) -> None:
    with paused_guest(disk, disk_format, read_only=True):
        assert not image_lock.is_in_use(str(disk))
        with image_lock.hold(str(disk), shared=True):
            pass
        with pytest.raises(exceptions.DiskInUse), image_lock.hold(str(disk)):
            pass


def test_backing_file_of_a_running_guest_is_not_written(tmp_path: Path, disk: Path, disk_format: str) -> None:
    overlay = create(tmp_path / "overlay", "qcow2", "-b", str(disk), "-F", disk_format)
    with paused_guest(overlay, "qcow2"):
        assert image_lock.is_in_use(str(overlay))
        assert not image_lock.is_in_use(str(disk))
        with image_lock.hold(str(disk), shared=True):
            pass
        with pytest.raises(exceptions.DiskInUse), image_lock.hold(str(disk)):
            pass


def test_hold_keeps_qemu_out(disk: Path, disk_format: str) -> None:
    with image_lock.hold(str(disk)):
        assert image_lock.is_in_use(str(disk))
        assert "lock" in qemu_io(disk, disk_format, "write", "0", "512")
        with pytest.raises(AssertionError, match="lock"), paused_guest(disk, disk_format, read_only=True):
            pass
        with pytest.raises(exceptions.DiskInUse), image_lock.hold(str(disk)):
            pass
    assert qemu_io(disk, disk_format, "write", "0", "512") == ""


def test_shared_hold_lets_readers_in(disk: Path, disk_format: str) -> None:
    with image_lock.hold(str(disk), shared=True), image_lock.hold(str(disk), shared=True):
        assert not image_lock.is_in_use(str(disk))
        assert "lock" in qemu_io(disk, disk_format, "write", "0", "512")
        assert (
            "lock"
            in subprocess.run(
                ["qemu-img", "resize", "-f", disk_format, str(disk), "2M"], check=False, capture_output=True, text=True
            ).stderr
        )
        assert qemu_io(disk, disk_format, "read", "0", "512", read_only=True) == ""


def test_lock_on_the_whole_file_is_a_holder(disk: Path) -> None:
    with locks.hold(str(disk), timeout=1):
        with pytest.raises(exceptions.DiskInUse), image_lock.hold(str(disk)):
            pass
        assert image_lock.is_in_use(str(disk))


def test_absent_disk(tmp_path: Path) -> None:
    with pytest.raises(exceptions.DiskNotFound):
        image_lock.is_in_use(str(tmp_path / "absent"))
    with pytest.raises(exceptions.DiskNotFound), image_lock.hold(str(tmp_path / "absent")):
        pass


def test_direct_io_on_disk_file_systems(ext4_folder: Path, xfs_folder: Path, btrfs_folder: Path) -> None:
    for folder in (ext4_folder, xfs_folder, btrfs_folder):
        assert direct_io.is_supported(str(folder))
        assert list(folder.iterdir()) == []


def test_direct_io_where_there_is_none(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(tmp_path)], check=True)
    try:
        assert not direct_io.is_supported(str(tmp_path))
        assert not reflink.is_supported(str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("module", [direct_io, reflink])
def test_support_in_a_folder_that_is_not_there(tmp_path: Path, module: ModuleType) -> None:
    with pytest.raises(exceptions.StorageError, match="absent"):
        module.is_supported(str(tmp_path / "absent"))
