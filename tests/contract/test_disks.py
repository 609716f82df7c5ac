# SPDX-License-Identifier: Apache-2.0
"""What can be done with a disk: grow, snapshot, flatten, extract, import."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.images.base import Image
from tests.contract.conftest import MIB, TEMPLATE_SIZE, Store, template_content
from tests.functional.image_building import held


def test_growing_keeps_the_data_and_adds_zeros(store: Store) -> None:
    image = store.make()

    image.resize_image(32 * MIB)

    assert image.get_disk_size(image.path) == 32 * MIB
    assert store.content(image) == template_content() + bytes(32 * MIB - TEMPLATE_SIZE)
    store.check(image)


def test_growing_to_the_same_size_changes_nothing(store: Store) -> None:
    image = store.make()

    image.resize_image(8 * MIB)

    assert image.get_disk_size(image.path) == 8 * MIB


def test_shrinking_is_refused_with_every_size(store: Store) -> None:
    image = store.make()

    with pytest.raises(exceptions.DiskTooSmall) as caught:
        image.resize_image(6 * MIB)

    assert (caught.value.size, caught.value.required) == (6 * MIB, 8 * MIB)
    assert image.get_disk_size(image.path) == 8 * MIB


def test_a_disk_that_is_not_there_cannot_be_worked_on(store: Store) -> None:
    image = store.image()

    for work in (
        lambda: image.resize_image(8 * MIB),
        lambda: image.get_disk_size(image.path),
        lambda: image.snapshot_extract(str(store.sources / "out")),
        lambda: image.libvirt_info("virtio", "vda", "disk", "none", {}),
    ):
        with pytest.raises(exceptions.DiskNotFound):
            work()


def test_a_disk_that_a_guest_holds_is_left_alone(store: Store) -> None:
    image = store.make()
    image.create_snap("before")
    snapshots = image.capabilities.snapshots
    files = store.files()

    with held(*store.qemu(image)):
        for work in (
            lambda: image.resize_image(16 * MIB),
            lambda: image.snapshot_extract(str(store.sources / "out")),
            lambda: image.import_file(image.instance, str(store.raw_template), "disk"),
            image.remove,
        ):
            with pytest.raises(exceptions.DiskInUse):
                work()
        if snapshots:
            for work in (lambda: image.create_snap("now"), lambda: image.rollback_to_snap("before")):
                with pytest.raises(exceptions.DiskInUse):
                    work()
        assert not (store.sources / "out").exists()
        assert store.files() == files

    assert image.get_disk_size(image.path) == 8 * MIB
    image.resize_image(16 * MIB)


def test_a_template_whose_disks_are_running_serves_others(store: Store) -> None:
    with held(*store.qemu(store.make())):
        other = store.make(disk_name="other")

    assert store.content(other)[:TEMPLATE_SIZE] == template_content()


def test_snapshots_are_listed_rolled_back_to_and_removed(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    image = store.make()
    with caplog.at_level(logging.WARNING, "imagebackend"):
        image.create_snap("one")
    if not image.capabilities.snapshots:
        assert "did not create snapshot one" in caplog.text
        image.rollback_to_snap("one")
        image.remove_snap("one")
        assert image.list_snaps() == []
        return
    before = store.content(image)
    store.write(image, 0, MIB, 1)
    image.create_snap("two")
    store.write(image, MIB, MIB, 2)
    image.resize_image(16 * MIB)

    assert [(snapshot.name, snapshot.virtual_size) for snapshot in image.list_snaps()] == [
        ("one", 8 * MIB),
        ("two", 8 * MIB),
    ]
    image.rollback_to_snap("one")
    assert store.content(image) == before
    image.rollback_to_snap("two")
    assert store.content(image) == b"\x01" * MIB + before[MIB:]

    image.remove_snap("one")
    assert [snapshot.name for snapshot in image.list_snaps()] == ["two"]
    store.check(image)
    image.remove_snap("two")
    assert image.list_snaps() == []
    assert store.content(image) == b"\x01" * MIB + before[MIB:]
    store.check(image)


def test_snapshot_names_are_unique_and_checked(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    image = store.make()

    for name in ("../x", "-x", "a b", "", "a\n"):
        with pytest.raises(exceptions.InvalidName):
            image.create_snap(name)
    if not image.capabilities.snapshots:
        return
    image.create_snap("one")
    with pytest.raises(exceptions.SnapshotExists):
        image.create_snap("one")
    with pytest.raises(exceptions.SnapshotNotFound):
        image.rollback_to_snap("two")
    with pytest.raises(exceptions.SnapshotNotFound):
        image.remove_snap("two")
    with caplog.at_level(logging.WARNING, "imagebackend"):
        image.remove_snap("two", ignore_errors=True)
    assert "snapshot two" in caplog.text


def test_removing_a_disk_removes_its_snapshots(store: Store) -> None:
    store.make(disk_name="other").remove()
    before = store.files()
    image = store.make()
    image.create_snap("one")

    image.remove()

    assert store.files() == before


def test_flattening_makes_a_disk_independent_and_may_be_repeated(store: Store) -> None:
    image = store.make()
    content = store.content(image)

    image.flatten()
    image.flatten()

    assert list(store.backend.templates.leases("template")) == []
    store.backend.templates.remove("template")
    assert store.content(image) == content
    store.check(image)


def test_flattening_never_costs_a_snapshot_its_data(store: Store) -> None:
    image = store.make()
    image.create_snap("one")
    before = store.content(image)
    if store.image_type != "qcow2":
        image.flatten()
        assert store.content(image) == before
        store.write(image, 0, MIB, 3)
        image.rollback_to_snap("one")
        assert store.content(image) == (before if image.capabilities.snapshots else b"\x03" * MIB + before[MIB:])
        return

    with pytest.raises(exceptions.Unsupported, match="one would lose"):
        image.flatten()

    assert store.snapshot_content(image, "one") == before
    image.remove_snap("one")
    image.flatten()
    assert not image.capabilities.flatten
    assert store.content(image) == before


def test_a_template_that_a_disk_depends_on_is_not_removed(store: Store) -> None:
    image = store.make()
    if not image.capabilities.flatten:
        store.backend.templates.remove("template")
        assert store.content(image)[:TEMPLATE_SIZE] == template_content()
        return

    with pytest.raises(exceptions.TemplateInUse) as caught:
        store.backend.templates.remove("template")

    assert caught.value.users == [f"{store.conf.host}:{image.path}"]
    image.remove()
    store.backend.templates.remove("template")


def test_an_extract_stands_alone(store: Store, subtests: pytest.Subtests) -> None:
    image = store.make()
    store.write(image, 6 * MIB, MIB, 3)
    for out_format in (None, "raw", "qcow2", "vmdk", "vdi"):
        with subtests.test(out_format=out_format):
            check_extract(store, image, out_format)


def check_extract(store: Store, image: Image, out_format: str | None) -> None:
    target = store.sources / "extract"
    progress: list[tuple[int, int]] = []

    image.snapshot_extract(str(target), out_format, progress=lambda done, total: progress.append((done, total)))

    extracted_format = out_format or ("raw" if store.image_type == "ploop" else store.format(image))
    assert "backing" not in store.run("qemu-img", "info", "-f", extracted_format, target)
    disk_format, path = store.qemu(image)
    store.run("qemu-img", "compare", "-f", disk_format, "-F", extracted_format, path, target)
    assert progress
    assert progress[-1][0] == progress[-1][1]
    assert target.stat().st_mode & 0o777 == 0o600


def test_an_extract_may_be_cancelled(store: Store) -> None:
    image = store.make()

    def cancel(done: int, total: int) -> None:
        raise exceptions.Cancelled("enough")

    before = set(store.sources.iterdir())
    with pytest.raises(exceptions.Cancelled):
        image.snapshot_extract(str(store.sources / "extract"), "qcow2", progress=cancel)

    assert set(store.sources.iterdir()) == before


def test_extracting_in_an_unknown_format_or_nowhere_is_refused(store: Store) -> None:
    image = store.make()

    with pytest.raises(exceptions.InvalidArgument, match="one of raw, qcow2"):
        image.snapshot_extract(str(store.sources / "extract"), "zip")
    with pytest.raises(exceptions.StorageError, match="no such folder"):
        image.snapshot_extract(str(store.sources / "nowhere" / "extract"))


def test_importing_makes_or_replaces_a_disk(store: Store) -> None:
    local = store.sources / "local"
    local.write_bytes(b"new" * 1024 + bytes(1024))
    image = store.make()

    image.import_file(image.instance, str(local), "disk.config")
    image.import_file(image.instance, str(local), "disk")

    for name in ("disk", "disk.config"):
        imported = store.image(name)
        size = store.rounded(4096)
        assert store.content(imported) == local.read_bytes() + bytes(size - 4096)
        store.check(imported)
    assert list(store.backend.templates.leases("template")) == []


def test_importing_what_must_not_be_used_leaves_the_disk(store: Store, tmp_path: Path) -> None:
    image = store.make()
    content = store.content(image)
    hostile = tmp_path / "hostile"
    store.run("qemu-img", "create", "-f", "qcow2", "-b", store.raw_template, "-F", "raw", hostile)

    with pytest.raises(exceptions.ImageUnacceptable):
        image.import_file(image.instance, str(hostile), "disk")

    assert store.content(image) == content


def test_the_format_is_recorded_and_never_guessed(store: Store) -> None:
    image = store.make(size=64 * MIB)
    recorded = store.format(image)
    # The guest writes a header of another format onto its disk.
    header = store.sources / "header"
    store.run("qemu-img", "create", "-f", "qcow2", header, "4T")
    disk_format, path = store.qemu(image)
    store.run("qemu-io", "-f", disk_format, "-c", f"write -s {header} 0 196608", path)

    again = store.image()
    assert again.resolve_driver_format() == recorded
    assert again.get_disk_size(again.path) == 64 * MIB
    again.resize_image(128 * MIB)
    assert again.get_disk_size(again.path) == 128 * MIB
    assert store.content(again)[:196608] == header.read_bytes()[:196608]


def test_the_model_says_where_the_disk_is(store: Store) -> None:
    store.check_model(store.make())


def test_a_disk_is_found_by_its_libvirt_path(store: Store) -> None:
    image = store.make()

    for found in (store.backend.snapshot(image.path), store.backend.by_libvirt_path(image.instance, image.path)):
        assert found.exists()
        assert store.content(found) == store.content(image)
    for path in ("disk", "/a/../b/disk", "/a/b/", "/a/-b/disk"):
        with pytest.raises(exceptions.InvalidName):
            store.backend.snapshot(path)
