# SPDX-License-Identifier: Apache-2.0
"""What is particular to ploop disks: killed guests, damage, size, and the images that they are cloned from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from imagebackend import exceptions
from imagebackend.images import ploop_content
from imagebackend.images.base import Image
from imagebackend.images.ploop import Ploop
from imagebackend.images.ploop_template import PloopTemplates
from imagebackend.storage import ploop
from tests.contract.conftest import MIB, PloopStore, template_content
from tests.functional import ploop_tool, test_faults
from tests.functional.filesystems import allocated, shared

GIB, TIB = 1 << 30, 1 << 40


@pytest.fixture
def ext4(ext4_folder: Path) -> PloopStore:
    return PloopStore(ext4_folder, "ploop", {})


@pytest.fixture
def xfs(xfs_folder: Path) -> PloopStore:
    return PloopStore(xfs_folder, "ploop", {})


def root_of(image: Image) -> Path:
    return Path(image.path, ploop.ROOT_IMAGE)


def die_while_writing(image: Image, command: str) -> None:
    """Have a guest's QEMU write to the disk, flush that, and be killed."""
    words = [word for each in (command, "flush", "read 0 4k", "sleep 60000") for word in ("-c", each)]
    with subprocess.Popen(
        ["stdbuf", "-oL", "qemu-io", "-f", "parallels", *words, str(root_of(image))], stdout=subprocess.PIPE, text=True
    ) as guest:
        assert guest.stdout is not None
        assert any("read 4096" in line for line in guest.stdout)
        with pytest.raises(exceptions.DiskInUse):
            image.remove()
        image.libvirt_info("virtio", "vda", "disk", "none", {})
        guest.kill()


def describe(image: Image) -> object:
    return image.libvirt_info("virtio", "vda", "disk", "none", {})


@pytest.mark.parametrize("first", [describe, lambda image: image.create_snap("one")])
def test_a_disk_whose_guest_was_killed_is_mended_when_it_is_needed(
    first: Callable[[Image], object], ext4: PloopStore
) -> None:
    image = ext4.make(size=64 * MIB)
    die_while_writing(image, f"write -P 7 {20 * MIB} 1M")
    with pytest.raises(AssertionError, match="not closed correctly"):
        ext4.write(image, 0, 512, 1)

    first(image)

    ext4.write(image, 0, 512, 1)
    assert ext4.content(image)[20 * MIB : 21 * MIB] == b"\7" * MIB
    ext4.check(image)


def test_a_killed_guests_disk_that_is_damaged_is_not_offered(ext4: PloopStore) -> None:
    image = ext4.make(size=64 * MIB)
    die_while_writing(image, f"write -P 7 {20 * MIB} 1M")
    with root_of(image).open("r+b") as file:  # two clusters of the disk in one of the file
        file.seek(64)
        entry = file.read(4)
        file.seek(64 + 4 * 20)
        file.write(entry)

    for _ in range(2):
        with pytest.raises(exceptions.CorruptDisk):
            describe(image)
    with pytest.raises(exceptions.CorruptDisk):
        image.resize_image(128 * MIB)

    image.import_file(image.instance, str(ext4.raw_template), "disk")
    describe(image)
    assert ext4.content(image)[: len(template_content())] == template_content()


HOSTILE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "missing": (lambda folder: (folder / "root.hds").unlink(), exceptions.CorruptDisk, "is gone"),
    "link": (
        lambda folder: ((folder / "root.hds").rename(folder / "away"), (folder / "root.hds").symlink_to("away")),
        exceptions.StorageError,
        "root.hds",
    ),
    "fifo": (
        lambda folder: ((folder / "root.hds").unlink(), os.mkfifo(folder / "root.hds")),
        exceptions.StorageError,
        "root.hds",
    ),
    "truncated": (lambda folder: os.truncate(folder / "root.hds", 4096), exceptions.ImageUnacceptable, "file ends"),
    "version": (
        lambda folder: overwrite(folder / "root.hds", 0, b"WithoutFreeSpac3"),
        exceptions.ImageUnacceptable,
        "signature",
    ),
    "cluster": (
        lambda folder: overwrite(folder / "root.hds", 28, b"\0\4\0\0"),
        exceptions.ImageUnacceptable,
        "clusters",
    ),
    "no descriptor": (lambda folder: (folder / ploop.NAME).write_bytes(b""), exceptions.ImageUnacceptable, "empty"),
    "absolute": (
        lambda folder: (folder / ploop.NAME).write_text(
            (folder / ploop.NAME).read_text().replace("root.hds", "/etc/passwd")
        ),
        exceptions.ImageUnacceptable,
        "a plain name",
    ),
    "linked descriptor": (
        lambda folder: ((folder / ploop.NAME).rename(folder / "away"), (folder / ploop.NAME).symlink_to("away")),
        exceptions.StorageError,
        "DiskDescriptor",
    ),
}


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_disk_that_is_not_what_it_should_be_is_told_and_can_be_removed(case: str, ext4: PloopStore) -> None:
    change, error, reason = HOSTILE[case]
    image = ext4.make()
    change(Path(image.path))

    for work in (
        lambda: describe(image),
        lambda: image.libvirt_fs_info("/"),
        lambda: image.resize_image(64 * MIB),
        lambda: image.create_snap("one"),
        lambda: image.snapshot_extract(str(ext4.sources / "out")),
    ):
        with pytest.raises(error, match=reason):
            work()
    assert not (ext4.sources / "out").exists()
    image.remove()
    assert not image.exists()


def test_a_folder_that_is_no_disk_is_left_alone(ext4: PloopStore) -> None:
    image = ext4.image()
    Path(image.path).mkdir(parents=True)

    for work in (image.exists, ext4.make):
        with pytest.raises(exceptions.StorageError, match="neither a regular file nor a ploop disk"):
            work()


def test_a_file_without_a_record_is_not_taken_for_a_ploop_disk(ext4: PloopStore) -> None:
    image = ext4.image()
    Path(image.path).parent.mkdir(parents=True)
    Path(image.path).write_bytes(bytes(MIB))

    with pytest.raises(exceptions.CorruptRecord, match="write it in"):
        image.resolve_driver_format()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_disk_of_another_type_takes_the_place_of_a_half_made_one(step: int, ext4: PloopStore) -> None:
    ext4.backend.templates.fetch("template", ext4.fetch)
    image = ext4.image()
    assert test_faults.run(step, ext4.make) == -signal.SIGKILL

    other = ext4.backend.image(image.instance, image.disk_name, "qcow2")
    other.cache(ext4.fetch, "template", 8 * MIB)
    assert other.resolve_driver_format() == image.resolve_driver_format() == "qcow2"
    image.remove()

    assert not {path for path in ext4.files() if image.instance in path}


def beginning(image: Image) -> bytes:
    """Return the first 64 MiB of a disk that may be too large to be read as a whole."""
    content = bytearray(64 * MIB)
    with ploop_content.open_layers([str(root_of(image))]) as (_, [(descriptor, runs)]):
        for run in runs:
            content[run.guest_offset : run.guest_offset + run.length] = os.pread(
                descriptor, run.length, run.host_offset
            )
    return bytes(content)


@pytest.mark.parametrize("size", [300 * GIB, 3 * TIB])
def test_a_disk_that_outgrows_its_table_keeps_what_it_has(size: int, xfs: PloopStore) -> None:
    """At 256 GiB the table needs another cluster of the file, at 2 TiB another version of the format."""
    image = xfs.make(size=64 * MIB)
    xfs.write(image, 20 * MIB, MIB, 7)
    content, kept = xfs.content(image), xfs.folder.parent / "kept"
    shutil.copytree(xfs.folder, kept)
    steps = test_faults.steps_of(lambda: image.resize_image(size))

    for number, step in enumerate(steps):
        shutil.rmtree(xfs.folder)
        shutil.copytree(kept, xfs.folder)
        assert test_faults.run(number, lambda: image.resize_image(size)) == -signal.SIGKILL
        describe(image)
        xfs.check(image)
        assert image.get_disk_size(image.path) in (64 * MIB, size), step
        assert beginning(image) == content, step
        image.resize_image(size)
        xfs.check(image)
        assert image.get_disk_size(image.path) == size, step
        assert beginning(image) == content, step
        assert not [path for path in xfs.files() if "intent" in path or "partial" in path], step
    xfs.write(image, size - MIB, MIB, 9)
    assert len(steps) > 3


def test_a_disk_with_snapshots_stays_in_its_version(xfs: PloopStore) -> None:
    image = xfs.make(size=64 * MIB)
    image.create_snap("one")

    with pytest.raises(exceptions.Unsupported, match="remove the snapshots first"):
        image.resize_image(3 * TIB)

    assert image.get_disk_size(image.path) == 64 * MIB
    image.resize_image(TIB)


def test_sizes_are_whole_clusters_and_have_a_limit(ext4: PloopStore) -> None:
    image = ext4.make(size=8 * MIB)

    image.resize_image(9 * MIB + 512)
    assert image.get_disk_size(image.path) == 10 * MIB
    image.resize_image(9 * MIB + 1024)  # it is as large already
    for work in (
        lambda: image.resize_image(17 * TIB),
        lambda: ext4.image("other").cache(ext4.fetch, "template", 17 * TIB),
        lambda: ext4.image("other").create_from_func(lambda target: None, 17 * TIB),
    ):
        with pytest.raises(exceptions.InvalidSize, match="at most"):
            work()
    assert not ext4.image("other").exists()


def test_no_disk_grows_under_its_guest(ext4: PloopStore, libvirt_test_domain: object) -> None:
    image = ext4.make()

    assert not image.capabilities.resize_running
    with pytest.raises(exceptions.Unsupported, match="stop the guest first"):
        image.resize_image(64 * MIB, domain=libvirt_test_domain)
    assert image.get_disk_size(image.path) == 8 * MIB


@pytest.fixture
def libvirt_test_domain() -> Iterator[libvirt.virDomain]:
    """A domain that runs."""
    connection = libvirt.open("test:///default")
    yield connection.lookupByName("test")
    connection.close()


def test_a_preallocated_disk_grows_with_its_storage(ext4_folder: Path) -> None:
    store = PloopStore(ext4_folder, "ploop", {"preallocate_images": "space"})
    image = store.make(size=16 * MIB)

    image.resize_image(32 * MIB)

    assert allocated(root_of(image)) >= 33 * MIB
    assert store.content(image) == template_content() + bytes(32 * MIB - len(template_content()))
    store.check(image)


def test_reflink_always_and_never(ext4_folder: Path, xfs_folder: Path) -> None:
    with pytest.raises(exceptions.Unsupported, match="reflink = always"):
        PloopStore(ext4_folder, "ploop", {"reflink": "always"}).make()

    never = PloopStore(xfs_folder, "ploop", {"reflink": "never"})
    never.make()
    assert shared(root_of(never.image())) == 0
    assert PloopTemplates(never.conf).list() == []


def test_a_disk_of_the_library_shares_with_its_template_and_snapshots(xfs: PloopStore) -> None:
    image = xfs.make()
    image.create_snap("one")

    for path in Path(image.path).glob("root.hds*"):
        if path.name != "root.hds.empty":
            assert shared(path) >= 2 * MIB


def test_container_devices_keep_a_disk(ext4: PloopStore) -> None:
    """What a kernel of OpenVZ would list is put where it would list it, in a mount namespace."""
    image = ext4.make()
    script = f"""
import pathlib, subprocess
subprocess.run(["mount", "-t", "tmpfs", "none", "/sys/block"], check=True)
device = pathlib.Path("/sys/block/ploop12345/pdelta/0")
device.mkdir(parents=True)
(device / "image").write_text({str(root_of(image))!r} + "\\n")
import imagebackend
from imagebackend import exceptions
conf = imagebackend.load_config()
conf.set_override("instances_path", {str(ext4.folder)!r})
image = imagebackend.Backend(conf).image({image.instance!r}, "disk", "ploop")
for work in (image.remove, lambda: image.resize_image(1 << 30), lambda: image.create_snap("one")):
    try:
        work()
    except exceptions.DiskInUse as error:
        assert "/dev/ploop12345 is attached to it" in str(error), error
    else:
        raise AssertionError
"""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script]
    subprocess.run(command, check=True, timeout=60)
    assert image.exists()


def test_templates_are_made_once_listed_swept_and_removed(xfs: PloopStore) -> None:
    templates = Ploop.native_templates(xfs.conf)
    assert templates.list() == []
    template = xfs.backend.templates.fetch("template", xfs.fetch)

    templates.prepare(template)
    [native] = templates.list()
    assert (native.name, native.sha256) == ("template", template.sha256)
    assert (native.virtual_size, native.users) == (template.virtual_size, ())
    before = xfs.files()
    templates.prepare(template)
    disk = xfs.make()
    assert {path for path in xfs.files() if ".ploop" in path} == {path for path in before if ".ploop" in path}
    folder = Path(xfs.backend.templates.folder, ".ploop", template.file)
    ploop_tool.check(folder / ploop.ROOT_IMAGE)
    ploop_tool.qemu_img("compare", "-f", "raw", "-F", "parallels", template.path, folder / ploop.ROOT_IMAGE)

    assert templates.sweep() == []
    assert test_faults.run(0, lambda: PloopTemplates(xfs.conf)._make(template, None)) == -signal.SIGKILL
    assert templates.sweep() == [".template.partial"]
    templates.remove("template")
    assert templates.list() == []
    with pytest.raises(exceptions.TemplateNotFound):
        templates.remove("template")
    assert xfs.content(disk)[: len(template_content())] == template_content()


@pytest.mark.parametrize("damage", ["touched", "no record", "no image", "other"])
def test_an_image_of_a_template_that_is_not_as_it_was_is_made_anew(damage: str, xfs: PloopStore) -> None:
    xfs.make()
    folder = Path(xfs.backend.templates.folder, ".ploop", "template")
    if damage == "touched":
        (folder / ploop.ROOT_IMAGE).write_bytes(b"anything")
    elif damage == "no record":
        (folder / "template.json").write_text("{}")
        assert PloopTemplates(xfs.conf).list() == []
    elif damage == "no image":
        (folder / ploop.ROOT_IMAGE).unlink()
    else:
        facts = json.loads((folder / "template.json").read_text())
        (folder / "template.json").write_text(json.dumps({**facts, "digest": "sha256:00"}))

    other = xfs.make(disk_name="other")

    assert xfs.content(other)[: len(template_content())] == template_content()
    assert len(PloopTemplates(xfs.conf).list()) == 1


def test_where_blocks_are_not_shared_no_template_is_kept_twice(ext4: PloopStore) -> None:
    ext4.make()
    PloopTemplates(ext4.conf).prepare(ext4.backend.templates.get("template"))

    assert not [path for path in ext4.files() if ".ploop" in path]


def test_a_disk_is_found_by_its_image_and_by_its_folder(ext4: PloopStore) -> None:
    image = ext4.make()

    for path in (image.path, f"{image.path}/root.hds"):
        found = ext4.backend.snapshot(path)
        assert (found.path, found.instance, found.disk_name) == (image.path, image.instance, "disk")
    with pytest.raises(exceptions.InvalidName):
        ext4.backend.snapshot("/root.hds")


def test_the_type_of_other_disks_does_not_matter(ext4: PloopStore) -> None:
    image = ext4.make()
    other = ext4.backend.image(image.instance, image.disk_name, "raw")

    assert other.resolve_driver_format() == "ploop"
    other.resize_image(64 * MIB)
    other.create_snap("one")
    other.import_file(image.instance, str(ext4.raw_template), "disk")
    assert other.list_snaps() == []
    assert other.libvirt_info("virtio", "vda", "disk", None, {}).driver_format == "ploop"
    ext4.check(image)
