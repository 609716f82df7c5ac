# SPDX-License-Identifier: Apache-2.0
"""On a file system without a free block disks can be described, looked at and removed: that makes room."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions
from tests.contract.conftest import MIB, Store
from tests.functional.filesystems import mounted

#: The smallest that mkfs.xfs makes, nearly.
SIZE = 320 * MIB


@pytest.fixture(params=["ext4", "xfs"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with mounted(request.param, tmp_path, SIZE) as mount_point:
        yield mount_point


def fill(folder: Path) -> None:
    """Leave no room, neither for blocks nor for files."""
    length = SIZE
    (folder / "fillers").mkdir()
    with open(folder / "filler", "wb") as filler:
        while length >= 4096:
            try:
                os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, length)
            except OSError:
                length //= 2
    # What is left may do for names, or for files that are empty.
    with contextlib.suppress(OSError):
        for number in range(1_000_000):
            (folder / "fillers" / f"{number:0200}").touch()


@pytest.mark.parametrize("image_type", ["raw", "qcow2", "ploop"])
def test_without_room_disks_are_described_and_removed(folder: Path, image_type: str) -> None:
    store = Store(folder, image_type, {})
    path = store.make(8 * MIB).path
    kept = store.make(8 * MIB, "kept")
    fill(folder)

    with pytest.raises(exceptions.InsufficientSpace):
        store.image("new").create_from_func(lambda target: None, 8 * MIB)
    image = store.backend.snapshot(path)
    assert f'type="{image_type}"' in image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml()
    assert image.capabilities.resize_running == (image_type != "ploop")
    assert image.get_disk_size(path) == 8 * MIB
    assert image.list_snaps() == []
    image.remove()

    assert not os.path.lexists(path)
    assert [disk.path for disk in store.backend.disks()] == [kept.path]
    assert [lease.owner.path for lease in store.backend.templates.leases("template")] == (
        [kept.path] if image_type == "qcow2" else []
    )

    # What there was no room to note is put right when there is.
    (folder / "filler").unlink()
    image.remove()
    kept.remove()
    assert not os.path.lexists(os.path.dirname(path))
