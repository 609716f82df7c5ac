# SPDX-License-Identifier: Apache-2.0
"""Imported disks: usable at once whatever was there before, and made as the ini file says new disks are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions
from imagebackend.images.base import Image
from tests.contract.conftest import MIB, STORES, Store
from tests.functional.filesystems import allocated, shared

SIZE = 8 * MIB


@pytest.fixture
def make_store(xfs_folder: Path) -> Iterator[Callable[..., Store]]:
    def make(image_type: str, **options: Any) -> Store:
        return Store(xfs_folder, image_type, options)

    yield make
    shutil.rmtree(xfs_folder)


def use(store: Store, image: Image) -> None:
    """Do with the disk what can be done with one that is sound."""
    image.libvirt_info("virtio", "vda", "disk", "none", {})
    store.check(image)
    image.create_snap("now")
    image.resize_image(2 * SIZE)
    image.rollback_to_snap("now")
    image.snapshot_extract(str(store.sources / "extract"))


def pending(operation: str, **facts: Any) -> Callable[[Image], None]:
    def leave(image: Image) -> None:
        Path(os.path.dirname(image.path), ".disk.intent").write_text(json.dumps({"operation": operation, **facts}))

    return leave


def damaged(image: Image) -> None:
    """A disk that a check found damaged, and marked so."""
    pending("resize")(image)
    with open(image.path, "r+b") as file:
        file.seek(3 * 65536)
        file.write(b"\x80" + b"\x7f" * 6 + b"\x00")
    with pytest.raises(exceptions.CorruptDisk):
        image.resize_image(2 * SIZE)


def illegible(image: Image) -> None:
    Path(os.path.dirname(image.path), ".disk.intent").write_text("{")


@pytest.mark.parametrize(
    "leave",
    [
        pending("resize"),
        pending("rollback", snapshot="gone"),
        pending("rollback", snapshot="one"),
        pending("flatten", template="template", leases=["template"]),
        damaged,
        illegible,
    ],
)
def test_an_import_over_a_disk_in_any_state_is_usable_at_once(
    make_store: Callable[..., Store], leave: Callable[[Image], None]
) -> None:
    store = make_store("qcow2")
    image = store.make(SIZE)
    image.create_snap("one")
    leave(image)

    image.import_file(image.instance, str(store.raw_template), "disk")

    imported = store.image()
    assert imported.list_snaps() == []
    assert store.content(imported) == store.raw_template.read_bytes()
    assert list(store.backend.templates.leases("template")) == []
    use(store, imported)
    folder = Path(imported.path).parent
    assert sorted(path.name for path in folder.iterdir()) == ["disk", "disk.info"]


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_an_import_drops_the_snapshots_of_what_it_replaces(make_store: Callable[..., Store], image_type: str) -> None:
    store = make_store(image_type)
    image = store.make(SIZE)
    other = store.make(SIZE, "disk.other")
    image.create_snap("one")
    other.create_snap("one")

    image.import_file(image.instance, str(store.qcow2_template), "disk")

    assert image.list_snaps() == []
    assert [snapshot.name for snapshot in other.list_snaps()] == ["one"]
    with pytest.raises(exceptions.SnapshotNotFound):
        image.rollback_to_snap("one")
    image.create_snap("one")
    assert store.content(image) == store.raw_template.read_bytes()


def filled(store: Store) -> Image:
    def fill(target: str) -> None:
        with open(target, "r+b") as file:
            file.write(b"filled")

    image = store.image()
    image.create_from_func(fill, SIZE)
    return image


def imported(store: Store, source: Path) -> Image:
    image = store.image()
    image.import_file(image.instance, str(source), "disk")
    return image


MAKERS: dict[str, Callable[[Store], Image]] = {
    "create": lambda store: store.make(SIZE),
    "fill": filled,
    "import raw": lambda store: imported(store, store.raw_template),
    "import qcow2": lambda store: imported(store, store.qcow2_template),
}


@pytest.mark.parametrize("made", MAKERS)
def test_new_qcow2_files_have_the_options_of_the_ini_file(make_store: Callable[..., Store], made: str) -> None:
    _, _, options = STORES["qcow2-options"]
    store = make_store("qcow2", **options)

    image = MAKERS[made](store)

    info = json.loads(store.run("qemu-img", "info", "--output=json", "-f", "qcow2", image.path))
    specific = info["format-specific"]["data"]
    assert info["cluster-size"] == 131072
    assert (specific["lazy-refcounts"], specific["compression-type"], specific["extended-l2"]) == (True, "zstd", True)
    store.check(image)


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_preallocated_disks_have_storage_of_their_own_for_all_of_it(
    make_store: Callable[..., Store], image_type: str, made: str
) -> None:
    store = make_store(image_type, preallocate_images="space")

    image = MAKERS[made](store)

    size = image.get_disk_size(image.path)
    assert allocated(Path(image.path)) >= size
    assert shared(Path(image.path)) == 0
    image.resize_image(size + SIZE)
    assert allocated(Path(image.path)) >= size + SIZE
    assert shared(Path(image.path)) == 0
    store.check(image)


@pytest.mark.parametrize("made", MAKERS)
@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_other_disks_take_what_their_data_take(make_store: Callable[..., Store], image_type: str, made: str) -> None:
    store = make_store(image_type)

    image = MAKERS[made](store)
    image.resize_image(64 * MIB)

    assert allocated(Path(image.path)) < SIZE
