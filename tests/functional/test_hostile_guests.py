# SPDX-License-Identifier: Apache-2.0
"""What a guest writes onto its raw disk is data, and what a qcow2 header names is in the cache, or is not opened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.backend import Backend
from imagebackend.images.base import Image
from imagebackend.images.qcow2 import Qcow2
from tests.contract.conftest import MIB, TEMPLATE_SIZE, Store

#: A sector's worth, so that what is cut out of the host's file is still found.
SECRET = b"what only the host may read ".ljust(512, b".")
SIZE = 16 * MIB


class HostFile:
    """A file of the host that no disk of a guest may lead to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(SECRET * 128)
        # Its time of access moves with the first read after its time of change (mount(8), relatime).
        os.utime(path, ns=(0, 0))

    @property
    def was_read(self) -> bool:
        return self.path.stat().st_atime_ns != 0


@pytest.fixture
def host_file(xfs_folder: Path) -> HostFile:
    return HostFile(xfs_folder / "host")


@pytest.fixture
def raw_store(xfs_folder: Path) -> Iterator[Store]:
    yield Store(xfs_folder, "raw", {})
    shutil.rmtree(xfs_folder)


@pytest.fixture
def qcow2_store(xfs_folder: Path) -> Iterator[Store]:
    yield Store(xfs_folder, "qcow2", {})
    shutil.rmtree(xfs_folder)


def naming_a_backing_file(store: Store, host_file: HostFile, path: Path) -> None:
    store.run("qemu-img", "create", "-f", "qcow2", "-b", host_file.path, "-F", "raw", path, "64M")
    store.run("qemu-img", "snapshot", "-c", "of-the-guest", path)


def naming_a_data_file(store: Store, host_file: HostFile, path: Path) -> None:
    options = f"data_file={host_file.path},data_file_raw=on"
    store.run("qemu-img", "create", "-f", "qcow2", "-o", options, path, "64K")
    # Creating it emptied the host's file.
    HostFile(host_file.path)


HEADERS = {"backing file": naming_a_backing_file, "data file": naming_a_data_file}
OPENED: dict[str, Callable[[Backend, str], Image]] = {
    "image": lambda backend, path: backend.image(path.split("/")[-2], "disk"),
    "snapshot": lambda backend, path: backend.snapshot(path),
    "snapshot as qcow2": lambda backend, path: backend.snapshot(path, "qcow2"),
    "disks": lambda backend, path: next(iter(backend.disks())),
}


@pytest.fixture(params=HEADERS)
def written(request: pytest.FixtureRequest, raw_store: Store, host_file: HostFile) -> tuple[str, bytes]:
    """A raw disk onto which its guest wrote a qcow2 header: its path and content; images_type is qcow2 by now."""
    header = raw_store.sources / "header"
    HEADERS[request.param](raw_store, host_file, header)
    path = raw_store.make(SIZE).path
    with open(path, "r+b") as disk:
        disk.write(header.read_bytes())
    raw_store.conf.set_override("images_type", "qcow2", group="libvirt")
    return path, Path(path).read_bytes()


@pytest.mark.parametrize("opened", OPENED)
def test_a_header_that_a_guest_wrote_means_nothing(
    opened: str, raw_store: Store, host_file: HostFile, written: tuple[str, bytes]
) -> None:
    path, content = written
    extract = raw_store.sources / "extract"

    image = OPENED[opened](Backend(raw_store.conf), path)

    assert image.resolve_driver_format() == "raw"
    assert image.get_disk_size(path) == SIZE
    assert [(each.path, each.format, each.virtual_size) for each in image.backing_chain()] == [(path, "raw", SIZE)]
    assert 'type="raw"' in image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml()
    assert image.list_snaps() == []
    assert not image.capabilities.flatten
    for out_format in (None, "raw", "qcow2", "vmdk"):
        image.snapshot_extract(str(extract), out_format)
        raw_store.run("qemu-img", "convert", "-f", out_format or "raw", "-O", "raw", extract, f"{extract}.raw")
        assert Path(f"{extract}.raw").read_bytes() == content
    image.flatten()
    image.create_snap("one")
    assert [snapshot.name for snapshot in image.list_snaps()] == ["one"]
    image.resize_image(2 * SIZE)
    assert Path(path).read_bytes() == content + bytes(SIZE)
    image.rollback_to_snap("one")
    assert Path(path).read_bytes() == content
    image.remove_snap("one")
    if isinstance(image, Qcow2):
        with pytest.raises(exceptions.Unsupported, match="raw"):
            image.rebase("template")
    assert Path(path).read_bytes() == content
    image.remove()
    assert not os.path.lexists(path)
    assert not host_file.was_read


def test_the_same_header_taken_for_its_own_leads_to_the_host(
    raw_store: Store, host_file: HostFile, written: tuple[str, bytes]
) -> None:
    # What the tests above and below would see if the library opened a disk so.
    target = raw_store.sources / "leaked"
    raw_store.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", written[0], target)
    assert SECRET in target.read_bytes()
    assert host_file.was_read


def test_a_disk_that_was_made_anew_in_another_format_is_what_it_is_now(raw_store: Store, host_file: HostFile) -> None:
    store = raw_store
    known = store.backend.image("guest", "disk", "qcow2")
    known.create_from_func(lambda target: None, SIZE)
    assert known.resolve_driver_format() == "qcow2"
    # Another process replaces the disk, and its guest writes a header.
    store.backend.image("guest", "disk", "qcow2").remove()
    store.backend.image("guest", "disk", "raw").create_from_func(lambda target: None, SIZE)
    naming_a_backing_file(store, host_file, store.sources / "header")
    with open(known.path, "r+b") as disk:
        disk.write((store.sources / "header").read_bytes())

    known.snapshot_extract(str(store.sources / "extract"))

    assert (store.sources / "extract").read_bytes() == Path(known.path).read_bytes()
    assert known.get_disk_size(known.path) == SIZE
    assert 'type="raw"' in known.libvirt_info("virtio", "vda", "disk", None, {}).to_xml()
    assert known.list_snaps() == []
    assert not host_file.was_read


def rebased(backing_file: str, backing_format: str = "raw") -> Callable[[Store, HostFile, str], None]:
    def change(store: Store, host_file: HostFile, path: str) -> None:
        name = backing_file.format(
            host=host_file.path, cache=store.backend.templates.folder, instance=Path(path).parent
        )
        store.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", backing_format, path)

    return change


def put_into_a_data_file(store: Store, host_file: HostFile, path: str) -> None:
    Path(path).unlink()
    naming_a_data_file(store, host_file, Path(path))


FOREIGN = {
    "host file": rebased("{host}"),
    "host file, relative": rebased("../../host"),
    "out of the cache": rebased("{cache}/../../host"),
    "file below the cache": rebased("{cache}/.records/template.json"),
    "the cache's parent": rebased("{cache}/.."),
    "partial template": rebased("{cache}/.template.download"),
    "other disk": rebased("{instance}/other", "qcow2"),
    "JSON": rebased('json:{{"driver":"raw","file":{{"driver":"file","filename":"{host}"}}}}'),
    "URL": rebased("nbd://127.0.0.1:1/export"),
    "data file": put_into_a_data_file,
}
USES: dict[str, Callable[[Image, Store], object]] = {
    "describe": lambda image, store: image.libvirt_info("virtio", "vda", "disk", "none", {}),
    "describe as file system": lambda image, store: image.libvirt_fs_info("/"),
    "capabilities": lambda image, store: image.capabilities,
    "size": lambda image, store: image.get_disk_size(image.path),
    "chain": lambda image, store: image.backing_chain(),
    "create": lambda image, store: image.create_image(store.fetch, "template", SIZE),
    "fill": lambda image, store: image.create_from_func(lambda target: None, SIZE),
    "grow": lambda image, store: image.resize_image(2 * SIZE),
    "extract": lambda image, store: image.snapshot_extract(str(store.sources / "extract"), "raw"),
    "flatten": lambda image, store: image.flatten(),
    "rebase": lambda image, store: image.rebase("template"),
    "snapshot": lambda image, store: image.create_snap("one"),
    "snapshots": lambda image, store: image.list_snaps(),
    "roll back": lambda image, store: image.rollback_to_snap("one"),
    "remove snapshot": lambda image, store: image.remove_snap("one"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_disk_that_depends_on_no_template_can_only_be_removed(
    foreign: str, qcow2_store: Store, host_file: HostFile
) -> None:
    store = qcow2_store
    store.make(disk_name="other").flatten()
    path = store.make(SIZE).path
    FOREIGN[foreign](store, host_file, path)
    content, files = Path(path).read_bytes(), store.files()
    leases = list(store.backend.templates.leases("template"))

    for name, use in USES.items():
        with pytest.raises(exceptions.ImageUnacceptable) as caught:
            use(store.image(), store)
        assert caught.value.image == path, name

    assert Path(path).read_bytes() == content
    assert store.files() == files
    assert list(store.backend.templates.leases("template")) == leases
    assert not (store.sources / "extract").exists()
    assert not host_file.was_read
    store.image().remove()
    assert not os.path.lexists(path)
    assert list(store.backend.templates.leases("template")) == []


def test_an_import_takes_the_place_of_such_a_disk(qcow2_store: Store, host_file: HostFile) -> None:
    image = qcow2_store.make(SIZE)
    FOREIGN["host file"](qcow2_store, host_file, image.path)

    image.import_file(image.instance, str(qcow2_store.raw_template), "disk")

    assert qcow2_store.content(image) == qcow2_store.raw_template.read_bytes()
    assert image.get_disk_size(image.path) == TEMPLATE_SIZE
    assert not host_file.was_read
