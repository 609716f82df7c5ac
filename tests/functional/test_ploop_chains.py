# SPDX-License-Identifier: Apache-2.0
"""Ploop disks that ploop(8) has worked on, and what it makes of those that the library has."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.images.base import Image
from imagebackend.storage import ploop
from tests.contract.conftest import MIB, PloopStore
from tests.functional import ploop_tool, test_faults

GUIDS = [f"{{{digit * 8}-{digit * 4}-4{digit * 3}-8{digit * 3}-{digit * 12}}}" for digit in "123"]
NAMES = [guid.strip("{}") for guid in GUIDS]


@pytest.fixture(params=["ext4", "xfs"])
def store(request: pytest.FixtureRequest) -> PloopStore:
    return PloopStore(request.getfixturevalue(f"{request.param}_folder"), "ploop", {})


def descriptor_of(image: Image) -> ploop.Descriptor:
    path = Path(image.path, ploop.NAME)
    return ploop.parse_descriptor(path.read_bytes(), str(path))


def tool(image: Image, command: str, *arguments: str) -> None:
    ploop_tool.ploop(command, *arguments, f"{image.path}/{ploop.NAME}")


def top_of(image: Image) -> Path:
    return Path(image.path, descriptor_of(image).top.file)


def read(store: PloopStore, image: Image, guid: str = ploop.TOP) -> bytes:
    """Return what QEMU reads of a disk, or of a snapshot of it, of whatever images it is made."""
    chain = [Path(image.path, delta.file) for delta in descriptor_of(image).chain(guid)]
    return ploop_tool.read(store.sources / "read", *chain)


def chained(store: PloopStore) -> Image:
    """Return a disk of 16 MiB in three images, of which ploop put two on top."""
    image = store.make(size=16 * MIB)
    store.write(image, 10 * MIB, MIB, 1)
    tool(image, "snapshot", "-u", GUIDS[0])
    ploop_tool.qemu_io(top_of(image), f"write -P 2 {10 * MIB} 512k", f"write -P 3 {12 * MIB} 1M")
    tool(image, "snapshot", "-u", GUIDS[1])
    ploop_tool.qemu_io(top_of(image), f"write -P 4 {12 * MIB} 4k")
    return image


def forked(store: PloopStore) -> Image:
    """Return a disk with two images on top of one snapshot, the other of which is a snapshot, too."""
    image = chained(store)
    tool(image, "snapshot-switch", "-u", GUIDS[0])
    ploop_tool.qemu_io(top_of(image), f"write -P 5 {3 * MIB} 1M")
    return image


def test_a_chain_is_known_and_not_given_to_qemu(store: PloopStore) -> None:
    image = chained(store)

    assert [snapshot.name for snapshot in image.list_snaps()] == NAMES[:2]
    assert image.capabilities.flatten
    assert image.get_disk_size(image.path) == 16 * MIB
    with pytest.raises(exceptions.Unsupported, match="flatten the disk first"):
        image.libvirt_info("virtio", "vda", "disk", "none", {})
    assert image.libvirt_fs_info("/").source_file == image.path


def test_a_chain_is_extracted(store: PloopStore) -> None:
    image = chained(store)
    expected = read(store, image)

    for out_format in ("raw", "qcow2"):
        target = store.sources / out_format
        image.snapshot_extract(str(target), out_format)
        ploop_tool.qemu_img("compare", "-f", out_format, "-F", "raw", target, store.sources / "read")
    assert (store.sources / "raw").read_bytes() == expected


def test_a_chain_is_flattened_and_its_snapshots_stay(store: PloopStore) -> None:
    image = chained(store)
    expected, snapshots = read(store, image), [read(store, image, guid) for guid in GUIDS[:2]]

    image.flatten()

    assert not image.capabilities.flatten
    assert image.libvirt_info("virtio", "vda", "disk", "none", {}).source_path == str(top_of(image))
    assert store.qemu(image)[0] == "parallels"
    assert ploop_tool.read(store.sources / "read", top_of(image)) == expected
    assert [read(store, image, guid) for guid in GUIDS[:2]] == snapshots
    store.check(image)


def test_what_ploop_snapshot_is_rolled_back_to_and_removed(store: PloopStore) -> None:
    image = chained(store)
    first, second = (read(store, image, guid) for guid in GUIDS[:2])

    image.rollback_to_snap(NAMES[0])
    assert ploop_tool.read(store.sources / "read", top_of(image)) == first
    assert read(store, image, GUIDS[1]) == second

    image.remove_snap(NAMES[0])
    assert [snapshot.name for snapshot in image.list_snaps()] == [NAMES[1]]
    assert read(store, image, GUIDS[1]) == second
    image.remove_snap(NAMES[1])
    assert descriptor_of(image).deltas == (ploop.Delta(ploop.TOP, None, ploop.ROOT_IMAGE),)
    assert store.content(image) == first
    store.check(image)


def test_of_a_fork_every_branch_keeps_what_it_had(store: PloopStore) -> None:
    image = forked(store)
    disk, second = read(store, image), read(store, image, GUIDS[1])

    image.remove_snap(NAMES[0])

    assert [snapshot.name for snapshot in image.list_snaps()] == [NAMES[1]]
    assert read(store, image) == disk
    assert read(store, image, GUIDS[1]) == second
    store.check(image)


def test_removing_snapshots_from_the_end_of_a_chain_merges_it(store: PloopStore) -> None:
    image = chained(store)
    disk = read(store, image)

    image.remove_snap(NAMES[1])
    image.remove_snap(NAMES[0])

    assert store.content(image) == disk
    assert {path.name for path in Path(image.path).glob("root*")} == {ploop.ROOT_IMAGE}


def test_ploop_works_on_snapshots_of_the_library(store: PloopStore) -> None:
    image = store.make(size=16 * MIB)
    image.create_snap("one")
    before = store.content(image)
    store.write(image, 10 * MIB, MIB, 1)
    image.create_snap("two")
    guids = {delta.file: delta.guid for delta in descriptor_of(image).deltas}

    tool(image, "check")
    assert read(store, image) == store.content(image)
    tool(image, "snapshot-switch", "-u", guids["root.hds@one"])
    assert read(store, image) == before
    assert image.capabilities.flatten
    ploop_tool.qemu_io(top_of(image), f"write -P 7 {4 * MIB} 1M")
    changed = read(store, image)
    tool(image, "snapshot-delete", "-u", guids["root.hds@two"])
    tool(image, "snapshot-merge", "-u", guids["root.hds@one"])

    # That merged into the image below, which was empty until then.
    assert read(store, image) == changed
    assert [snapshot.name for snapshot in image.list_snaps()] == [guids["root.hds@one"].strip("{}")]
    image.create_snap("one")
    assert read(store, image) == changed
    image.flatten()
    assert store.content(image) == store.snapshot_content(image, "one") == changed
    for snapshot in image.list_snaps():
        image.remove_snap(snapshot.name)
    assert {path.name for path in Path(image.path).glob("root*")} == {ploop.ROOT_IMAGE}
    assert store.content(image) == changed
    store.check(image)


def test_a_disk_that_ploop_made_is_one(store: PloopStore) -> None:
    folder = store.folder / "guest"
    store.folder.mkdir(exist_ok=True)
    folder.mkdir()
    ploop_tool.init(folder / "disk", 32 * MIB)
    image = store.backend.image("guest", "disk")

    assert image.exists()
    assert image.resolve_driver_format() == "ploop"
    assert image.get_disk_size(image.path) == 32 * MIB
    assert store.backend.image("guest", "disk", "qcow2").resolve_driver_format() == "ploop"
    image.resize_image(64 * MIB)
    image.create_snap("one")
    store.check(image)
    assert [disk.path for disk in store.backend.disks("guest")] == [image.path]


def test_after_switching_back_the_header_says_how_large_the_disk_is(store: PloopStore) -> None:
    image = store.make(size=16 * MIB)
    tool(image, "snapshot", "-u", GUIDS[0])
    tool(image, "grow", "-s", "64M")
    tool(image, "snapshot-switch", "-u", GUIDS[0])
    assert descriptor_of(image).virtual_size == 64 * MIB

    image.flatten()

    assert image.get_disk_size(image.path) == descriptor_of(image).virtual_size == 16 * MIB


def test_a_base_that_was_written_to_is_noticed(store: PloopStore) -> None:
    image = chained(store)
    base = Path(image.path, ploop.ROOT_IMAGE)
    ploop_tool.qemu_io(base, f"write -P 9 {MIB} 4k")  # what a domain of before the snapshot would do

    for work in (
        image.flatten,
        lambda: image.libvirt_fs_info("/"),
        lambda: image.rollback_to_snap(NAMES[0]),
        lambda: image.snapshot_extract(str(store.sources / "extract")),
    ):
        with pytest.raises(exceptions.CorruptDisk, match=r"root\.hds was written to after .* 'touch "):
            work()
    Path(image.path, ploop.NAME).touch()
    image.flatten()


OPERATIONS: dict[str, tuple[Callable[[PloopStore], Image], Callable[[Image], None]]] = {
    "flatten": (chained, lambda image: image.flatten()),
    "flatten a fork": (forked, lambda image: image.flatten()),
    "snapshot": (chained, lambda image: image.create_snap("new")),
    "roll back": (chained, lambda image: image.rollback_to_snap(NAMES[0])),
    "remove the base": (forked, lambda image: image.remove_snap(NAMES[0])),
    "remove the middle": (chained, lambda image: image.remove_snap(NAMES[1])),
    "grow": (chained, lambda image: image.resize_image(64 * MIB)),
    "import": (
        chained,
        lambda image: image.import_file(image.instance, f"{image.path}/../../../sources/local", "disk"),
    ),
    "remove": (chained, lambda image: image.remove()),
}
DONE = (exceptions.SnapshotNotFound, exceptions.SnapshotExists)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_chain_whose_change_is_cut_short_is_as_before_or_as_after(operation: str, xfs_folder: Path) -> None:
    prepare, act = OPERATIONS[operation]

    def fresh() -> tuple[PloopStore, Image]:
        shutil.rmtree(xfs_folder)
        xfs_folder.mkdir()
        store = PloopStore(xfs_folder, "ploop", {})
        store.conf.set_override("lock_timeout", 5.0)
        (store.sources / "local").write_bytes(b"local" * 4096)
        return store, prepare(store)

    def state(store: PloopStore, image: Image) -> dict[str, bytes]:
        if not image.exists():
            return {}
        return {"": read(store, image)} | {
            snapshot.name: read(store, image, delta.guid)
            for snapshot in image.list_snaps()
            for delta in descriptor_of(image).deltas
            if snapshot.name in (delta.guid.strip("{}"), delta.file.partition("@")[2])
        }

    store, image = fresh()
    before = state(store, image)
    steps = test_faults.steps_of(lambda: act(image))
    after, files = state(store, image), store.files()

    for number, step in enumerate(steps):
        store, image = fresh()
        assert test_faults.run(number, lambda image=image: act(image)) == -signal.SIGKILL, step
        assert state(store, image) in (before, after), step
        try:
            act(image)
        except DONE:
            assert step
        assert state(store, image) == after, f"repeated after {step}"
        assert named(store.files()) == named(files), f"left over after {step}"
    assert len(steps) > 2


def named(files: set[str]) -> list[str]:
    """Leave out what is random in the names of images."""
    return sorted(path.partition("{")[0] for path in files)


@pytest.mark.parametrize("step", range(3))
def test_a_snapshot_whose_disk_has_no_room_leaves_everything(step: int, small_tmpfs: Path) -> None:
    (small_tmpfs / "store").mkdir()
    store = PloopStore(small_tmpfs / "store", "ploop", {})
    store.raw_template.write_bytes(b"small" * 1000)
    store.qcow2_template.unlink()
    image = store.make(size=16 * MIB)
    before, files = store.content(image), store.files()
    (store.sources / "content0").unlink()
    free = os.statvfs(small_tmpfs)
    (small_tmpfs / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - step * MIB // 2))

    with pytest.raises(exceptions.InsufficientSpace):
        image.create_snap("one")

    (small_tmpfs / "filler").unlink()
    assert image.list_snaps() == []
    assert store.content(image) == before
    assert store.files() == files
    image.create_snap("one")
    assert [snapshot.name for snapshot in image.list_snaps()] == ["one"]


def fill(target: str) -> None:
    with open(target, "r+b") as file:
        file.write(os.urandom(MIB))


@pytest.mark.parametrize(
    "work",
    [
        lambda store, image: store.make(size=16 * MIB, disk_name="other"),
        lambda store, image: store.image("other").create_from_func(fill, MIB),
        lambda store, image: image.flatten(),
        lambda store, image: image.import_file(image.instance, str(store.sources / "local"), "disk"),
        lambda store, image: image.snapshot_extract(str(store.sources / "extract"), "qcow2"),
    ],
    ids=["create", "fill", "flatten", "import", "extract"],
)
def test_work_on_a_disk_without_room_leaves_everything(
    work: Callable[[PloopStore, Image], object], small_tmpfs: Path
) -> None:
    (small_tmpfs / "store").mkdir()
    store = PloopStore(small_tmpfs / "store", "ploop", {})
    store.raw_template.write_bytes(b"small" * 50_000)
    (store.sources / "local").write_bytes(os.urandom(MIB))
    image = store.make(size=4 * MIB)
    tool(image, "snapshot", "-u", GUIDS[0])
    before, descriptor = read(store, image), descriptor_of(image)
    (store.sources / "read").unlink()
    files = store.files()
    free = os.statvfs(small_tmpfs)
    (small_tmpfs / "filler").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 64 * 1024)))

    # What fills a disk raises its own error.
    with pytest.raises((exceptions.InsufficientSpace, exceptions.ToolFailed, OSError)):
        work(store, image)

    (small_tmpfs / "filler").unlink()
    assert store.files() == files
    assert descriptor_of(image) == descriptor
    assert read(store, image) == before
    work(store, image)
