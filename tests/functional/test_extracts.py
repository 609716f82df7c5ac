# SPDX-License-Identifier: Apache-2.0
"""Where extracts go, that two to one place do not mix, and that nobody writes to a disk that is copied."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions, faults
from imagebackend.backend import Backend
from imagebackend.images.base import Image
from tests.contract.conftest import MIB, STORES, Store, configured


@pytest.fixture(params=["raw-xfs", "qcow2"])
def store(request: pytest.FixtureRequest, xfs_folder: Path) -> Iterator[Store]:
    image_type, _, options = STORES[request.param]
    yield Store(xfs_folder, image_type, options)
    shutil.rmtree(xfs_folder)


def two_disks(store: Store) -> tuple[Image, Image]:
    first, second = store.make(), store.make(disk_name="second")
    store.write(first, 0, 4 * MIB, 1)
    store.write(second, 0, 4 * MIB, 2)
    return first, second


def test_two_extracts_to_one_target_go_one_after_the_other(store: Store) -> None:
    first, second = two_disks(store)
    impatient = Backend(configured(store.folder, store.image_type, lock_timeout=0.0))
    target = store.sources / "extract"
    refused = []

    def extract_the_second(done: int, total: int) -> None:
        with pytest.raises(exceptions.LockTimeout) as caught:
            impatient.snapshot(second.path).snapshot_extract(str(target), "qcow2")
        refused.append(caught.value.name)

    first.snapshot_extract(str(target), "qcow2", progress=extract_the_second)

    assert refused
    assert {os.path.basename(lock)[:8] for lock in refused} == {"extract-"}
    store.run("qemu-img", "compare", "-f", store.format(first), "-F", "qcow2", first.path, target)
    impatient.snapshot(second.path).snapshot_extract(str(target), "qcow2")
    store.run("qemu-img", "compare", "-f", store.format(second), "-F", "qcow2", second.path, target)


@pytest.mark.parametrize("out_format", ["raw", "qcow2"])
def test_extracts_to_one_target_from_several_threads_leave_one_of_them_whole(store: Store, out_format: str) -> None:
    contents = {}
    disks = two_disks(store)
    for image in disks:
        contents[image.path] = store.content(image)
    target = store.sources / "extract"
    errors: list[BaseException] = []

    def extract(image: Image) -> None:
        try:
            image.snapshot_extract(str(target), out_format)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=extract, args=(image,)) for image in disks * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    store.run("qemu-img", "convert", "-f", out_format, "-O", "raw", target, f"{target}.raw")
    assert Path(f"{target}.raw").read_bytes() in contents.values()
    assert sorted(path.name for path in store.sources.glob("*extract*")) == ["extract", "extract.raw"]


@pytest.mark.parametrize(
    "target",
    [
        "{disk}",
        "{instance}/second",
        "{instance}/new",
        "{instance}/disk.info",
        "{instances}/_base/template",
        "{instances}/_base/.records/template.json",
        "{instances}/locks/lock",
        "{instances}/file",
        "{instances}/snapshots/../{name}/disk",
        "{instances}/snapshots/folder/extract",
        "{link}/disk",
        "../{name}/disk",
    ],
)
def test_an_extract_does_not_go_where_disks_and_templates_are(store: Store, target: str) -> None:
    image, _ = two_disks(store)
    (store.folder / "snapshots" / "folder").mkdir(parents=True)
    link = store.sources / "link"
    link.symlink_to(os.path.dirname(image.path))
    before = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in store.folder.rglob("*")}
    before = {path: found for path, found in before.items() if path.is_file() and "locks" not in path.parts}
    place = target.format(
        disk=image.path, instance=os.path.dirname(image.path), instances=store.folder, name=image.instance, link=link
    )

    with pytest.raises(exceptions.InvalidArgument, match="choose a folder outside"):
        image.snapshot_extract(place, "raw")

    for path, found in before.items():
        assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == found, path
    after = {path for path in store.folder.rglob("*") if path.is_file() and "locks" not in path.parts}
    assert after == set(before)


def test_a_relative_target_and_one_in_the_folder_for_it_are_taken(store: Store) -> None:
    image = store.make()
    folder = store.folder / "snapshots"

    image.snapshot_extract("relative", "raw")
    image.snapshot_extract(str(folder / "absolute"), "raw")

    for name in ("relative", "absolute"):
        assert (folder / name).read_bytes() == store.content(image)
    assert [disk.path for disk in store.backend.disks()] == [image.path]


def test_a_link_at_the_target_is_replaced_not_followed(store: Store) -> None:
    image = store.make()
    content = store.content(image)
    target = store.sources / "extract"
    target.symlink_to(image.path)

    image.snapshot_extract(str(target), "raw")

    assert not target.is_symlink()
    assert target.read_bytes() == content == store.content(image)


def opened_for_writing(store: Store, image: Image) -> bool:
    command = ["qemu-io", "-f", store.format(image), "-c", "write -P 9 0 512", image.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or "lock" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("out_format", ["raw", "qcow2"])
def test_nobody_writes_to_a_disk_that_is_extracted(store: Store, out_format: str) -> None:
    image = store.make()
    content = store.content(image)
    target = store.sources / "extract"
    opened = []

    image.snapshot_extract(
        str(target), out_format, progress=lambda done, total: opened.append(opened_for_writing(store, image))
    )

    assert opened
    assert not any(opened)
    store.run("qemu-img", "convert", "-f", out_format, "-O", "raw", target, f"{target}.raw")
    assert Path(f"{target}.raw").read_bytes() == content
    assert opened_for_writing(store, image)


@pytest.mark.parametrize("act", [lambda image: image.create_snap("two"), lambda image: image.rollback_to_snap("one")])
def test_nobody_writes_to_a_raw_disk_that_is_cloned(xfs_folder: Path, act: Callable[[Image], None]) -> None:
    store = Store(xfs_folder, "raw", {})
    image = store.make()
    image.create_snap("one")
    content = store.content(image)
    opened = []

    def step(name: str) -> None:
        if name in ("publish.filled", "publish.synced"):
            opened.append(opened_for_writing(store, image))

    faults.arm(step)
    try:
        act(image)
    finally:
        faults.arm(None)

    assert opened == [False, False]
    assert store.content(image) == content
    assert opened_for_writing(store, image)
