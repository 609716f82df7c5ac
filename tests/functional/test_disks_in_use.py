# SPDX-License-Identifier: Apache-2.0
"""A disk that the kernel has open through a loop device is in use as one that QEMU has open is."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions
from tests.contract.conftest import MIB, Store


@contextlib.contextmanager
def attached(path: str, *options: str) -> Iterator[str]:
    """Attach a loop device to a file, as a container's driver does."""
    command = ["losetup", "--find", "--show", *options, path]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("options", [[], ["--read-only"], ["--partscan"]])
def test_a_disk_on_a_loop_device_is_left_alone(xfs_folder: Path, options: list[str]) -> None:
    store = Store(xfs_folder, "raw", {})
    image = store.make()
    image.create_snap("one")
    content, files = store.content(image), store.files()
    other = store.make(disk_name="disk.other")

    with attached(image.path, *options) as device:
        for work in (
            lambda: image.resize_image(16 * MIB),
            lambda: image.snapshot_extract(str(store.sources / "extract")),
            lambda: image.import_file(image.instance, str(store.raw_template), "disk"),
            lambda: image.create_snap("two"),
            lambda: image.rollback_to_snap("one"),
            image.remove,
        ):
            with pytest.raises(exceptions.DiskInUse, match=device):
                work()
        assert store.content(image) == content
        assert not (store.sources / "extract").exists()
        # It is this disk that is in use, and no other.
        other.resize_image(16 * MIB)
        other.remove()

    assert store.files() == files
    image.resize_image(16 * MIB)
    assert image.get_disk_size(image.path) == 16 * MIB
    image.remove()
    shutil.rmtree(xfs_folder)


def test_a_disk_is_found_in_use_by_another_of_its_paths(xfs_folder: Path) -> None:
    # The kernel lists the path that the file was opened by, which may go through another name of the folder.
    store = Store(xfs_folder, "raw", {})
    image = store.make()
    (xfs_folder / "link").symlink_to(store.folder)

    with (
        attached(image.path.replace(str(store.folder), str(xfs_folder / "link"))),
        pytest.raises(exceptions.DiskInUse),
    ):
        image.remove()

    assert image.exists()
    shutil.rmtree(xfs_folder)
