# SPDX-License-Identifier: Apache-2.0
"""A full disk, no rights, a tool or a template that is gone: a clear error, and everything as it was."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import exceptions, process
from imagebackend.backend import Backend
from tests.contract.conftest import MIB, configured


def fetch(target: str) -> None:
    with open(target, "r+b") as file:
        file.write(os.urandom(2 * MIB))
        file.truncate(4 * MIB)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "locks" not in path.parts and not path.is_dir()}


def fill(folder: Path) -> None:
    """Leave no room on the file system of ``folder``."""
    filler = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(filler, bytes(4096))
    os.close(filler)


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_a_full_file_system_refuses_a_disk_and_room_makes_it_work(small_tmpfs: Path, image_type: str) -> None:
    backend = Backend(configured(small_tmpfs / "instances", image_type))
    backend.templates.fetch("template", fetch)
    fill(small_tmpfs)
    before = files(small_tmpfs)
    image = backend.image("guest", "disk")

    with pytest.raises(exceptions.InsufficientSpace, match="prune"):
        image.cache(fetch, "template", 8 * MIB)
    assert files(small_tmpfs) == before

    (small_tmpfs / "filler").unlink()
    image.cache(fetch, "template", 8 * MIB)
    assert image.get_disk_size(image.path) == 8 * MIB


def test_a_template_that_does_not_fit_is_refused_and_leaves_nothing(small_tmpfs: Path) -> None:
    backend = Backend(configured(small_tmpfs / "instances", "qcow2"))

    def fetch_too_much(target: str) -> None:
        with open(target, "r+b") as file:
            file.write(os.urandom(16 * MIB))

    with pytest.raises(OSError, match="No space left"):
        backend.image("guest", "disk").cache(fetch_too_much, "template", 64 * MIB)

    assert files(small_tmpfs) == set()


def test_a_bomb_is_refused_before_it_is_expanded(small_tmpfs: Path, tmp_path: Path) -> None:
    raw, bomb = tmp_path / "raw", tmp_path / "bomb"
    with raw.open("wb") as file:
        for _ in range(64):
            file.write(b"\x01" * MIB)
    process.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(bomb)], timeout=60)
    assert bomb.stat().st_size < MIB
    backend = Backend(configured(small_tmpfs / "instances", "qcow2"))

    def fetch_bomb(target: str) -> None:
        Path(target).write_bytes(bomb.read_bytes())

    with pytest.raises(exceptions.InsufficientSpace) as caught:
        backend.image("guest", "disk").cache(fetch_bomb, "bomb", 128 * MIB)

    assert caught.value.required is not None
    assert caught.value.required >= 64 * MIB
    assert files(small_tmpfs) == set()


def as_nobody(act: Callable[[], object]) -> str:
    """Do ``act`` in a child without rights; return the name of what it raised."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act()
            os.write(writable, b"nothing")
        except exceptions.ImageBackendError as error:
            os.write(writable, type(error).__name__.encode())
        except BaseException:
            os.write(writable, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_without_rights_nothing_is_made_or_changed(ext4_folder: Path, image_type: str) -> None:
    # The tests' own temporary folder is closed to others as a whole; this one is open up to the store.
    backend = Backend(configured(ext4_folder / "instances", image_type))
    image = backend.image("guest", "disk")
    image.cache(fetch, "template", 8 * MIB)
    other = backend.image("other", "disk")
    for folder in [ext4_folder, *ext4_folder.parents]:
        folder.chmod(folder.stat().st_mode | 0o055)
    before = files(ext4_folder)

    for work in (
        lambda: other.cache(fetch, "template", 8 * MIB),
        lambda: other.cache(fetch, "new", 8 * MIB),
        lambda: image.resize_image(16 * MIB),
        image.remove,
        lambda: backend.templates.remove("template"),
        lambda: image.get_disk_size(image.path),
    ):
        assert as_nobody(work) == "PermissionDenied"

    assert files(ext4_folder) == before
    assert image.get_disk_size(image.path) == 8 * MIB


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_a_template_that_vanished_is_named_and_not_fetched_over_its_users(tmp_path: Path, image_type: str) -> None:
    backend = Backend(configured(tmp_path / "instances", image_type))
    backend.image("first", "disk").cache(fetch, "template", 8 * MIB)
    Path(backend.templates.path("template")).unlink()
    before = files(tmp_path)

    with pytest.raises(exceptions.CorruptRecord, match=r"file is gone.*restore"):
        backend.image("second", "disk").cache(fetch, "template", 8 * MIB)

    assert files(tmp_path) == before


def test_a_record_that_vanished_is_not_replaced_under_a_disk(tmp_path: Path) -> None:
    backend = Backend(configured(tmp_path / "instances", "qcow2"))
    backend.image("first", "disk").cache(fetch, "template", 8 * MIB)
    Path(backend.templates.folder, ".records", "template.json").unlink()

    with pytest.raises(exceptions.CorruptRecord, match="disks depend on its file"):
        backend.image("second", "disk").cache(fetch, "template", 8 * MIB)


def test_a_missing_tool_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(configured(tmp_path / "instances", "qcow2"))
    image = backend.image("guest", "disk")
    image.cache(fetch, "template", 8 * MIB)
    monkeypatch.setattr(process, "PATH", str(tmp_path))

    with pytest.raises(exceptions.ToolMissing, match="qemu-utils"):
        image.resize_image(16 * MIB)
    with pytest.raises(exceptions.ToolMissing, match="qemu-utils"):
        image.snapshot_extract(str(tmp_path / "extract"), "qcow2")

    assert image.get_disk_size(image.path) == 8 * MIB
    assert not (tmp_path / "extract").exists()


def test_a_damaged_disk_is_marked_and_no_longer_offered(tmp_path: Path) -> None:
    backend = Backend(configured(tmp_path / "instances", "qcow2"))
    image = backend.image("guest", "disk")
    image.create_from_func(lambda target: Path(target).write_bytes(os.urandom(4 * MIB)), 4 * MIB)
    # A change was cut short, and the table of the disk's clusters points nowhere.
    Path(f"{os.path.dirname(image.path)}/.disk.intent").write_text('{"operation": "resize"}')
    with open(image.path, "r+b") as file:
        file.seek(3 * 65536)
        file.write(b"\x80" + b"\x7f" * 6 + b"\x00")

    for work in (
        lambda: image.libvirt_info("virtio", "vda", "disk", "none", {}),
        lambda: image.resize_image(16 * MIB),
        lambda: image.libvirt_info("virtio", "vda", "disk", "none", {}),
    ):
        with pytest.raises(exceptions.CorruptDisk):
            work()
    image.remove()
    assert files(tmp_path) == set()
