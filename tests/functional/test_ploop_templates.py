# SPDX-License-Identifier: Apache-2.0
"""Images and disks of ploop as templates: whoever made them, disks of every type hold what they hold."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import Template, exceptions
from imagebackend.storage import ploop
from imagebackend.templates.sources import open_source
from tests.contract.conftest import MIB, PloopStore, Store, template_content
from tests.functional import ploop_tool, test_faults
from tests.functional.filesystems import allocated

SIZE = 6 * MIB
GUIDS = [f"{{{digit * 8}-{digit * 4}-4{digit * 3}-8{digit * 3}-{digit * 12}}}" for digit in "12"]
NOTHING = "{00000000-0000-0000-0000-000000000000}"


def by_ploop(folder: Path, raw: Path) -> Path:
    """Version 1, as ploop(8) makes it and a container's file system is in it."""
    image = ploop_tool.init(folder / "disk", SIZE)
    ploop_tool.qemu_img("convert", "-n", "--target-is-zero", "-f", "raw", "-O", "parallels", raw, image)
    return image


def by_qemu(folder: Path, raw: Path) -> Path:
    """Version 2."""
    image = folder / "root.hds"
    ploop_tool.qemu_img("convert", "-f", "raw", "-O", "parallels", raw, image)
    return image


def in_small_clusters(folder: Path, raw: Path) -> Path:
    image = folder / "root.hds"
    ploop_tool.qemu_img("convert", "-f", "raw", "-O", "parallels", "-o", "cluster_size=64k", raw, image)
    return image


@pytest.fixture(params=["raw", "qcow2", "ploop"])
def store(request: pytest.FixtureRequest, xfs_folder: Path) -> Store:
    kind = PloopStore if request.param == "ploop" else Store
    return kind(xfs_folder, request.param, {})


@pytest.mark.parametrize("claim", ["ploop", "parallels", None])
@pytest.mark.parametrize("make", [by_ploop, by_qemu, in_small_clusters])
def test_an_image_of_ploop_becomes_a_template(
    make: Callable[[Path, Path], Path], claim: str | None, store: Store
) -> None:
    os.truncate(store.raw_template, SIZE)
    image = make(store.sources, store.raw_template)
    source = open_source(str(image), store.conf, disk_format=claim)

    disk = store.image()
    disk.cache(source.fetch, "container", 8 * MIB)

    assert store.content(disk) == template_content().ljust(8 * MIB, b"\x00")
    store.check(disk)
    template = store.backend.templates.get("container")
    assert (template.format, template.source_format, template.virtual_size) == ("raw", "parallels", SIZE)
    store.backend.templates.verify("container")
    assert allocated(Path(template.path)) < 4 * MIB


def test_an_image_whose_writer_was_killed_is_refused_and_nothing_stays(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    image = by_qemu(store.sources, store.raw_template)
    with image.open("r+b") as file:
        file.seek(44)
        file.write(b"Ynot")
    with pytest.raises(exceptions.ImageUnacceptable, match="qemu-img check -f parallels -r all"):
        store.image().cache(open_source(str(image), store.conf).fetch, "container", 8 * MIB)
    assert not [name for name in store.files() if "_base/" in name and "/." not in name]

    ploop_tool.qemu_img("check", "-f", "parallels", "-r", "all", image, success=(0, 3))
    store.image().cache(open_source(str(image), store.conf).fetch, "container", 8 * MIB)
    assert store.content(store.image())[: len(template_content())] == template_content()


def chained(folder: Path) -> Path:
    """Return a disk that ploop has divided into three images, and that has a snapshot beside them."""
    disk = folder / "disk"
    base = ploop_tool.init(disk, SIZE)
    ploop_tool.qemu_io(base, "write -P 1 0 2M", "write -P 2 4M 4k")
    for guid, command in zip(GUIDS, ("write -P 3 1M 1M", "write -P 4 5M 512"), strict=True):
        ploop_tool.ploop("snapshot", "-u", guid, disk / ploop.NAME)
        ploop_tool.qemu_io(top_of(disk), command)
    ploop_tool.ploop("snapshot-switch", "-u", GUIDS[0], disk / ploop.NAME)
    ploop_tool.qemu_io(top_of(disk), "write -P 5 3M 64k")
    return disk


def described(disk: Path) -> ploop.Descriptor:
    return ploop.parse_descriptor((disk / ploop.NAME).read_bytes(), "descriptor")


def top_of(disk: Path) -> Path:
    return disk / described(disk).top.file


def read(disk: Path, target: Path) -> bytes:
    """Return what QEMU reads of a disk."""
    return ploop_tool.read(target, *(disk / delta.file for delta in described(disk).chain(ploop.TOP)))


def archive(disk: Path) -> Path:
    """Return an archive that keeps times whole: others have them in seconds."""
    path = disk.parent / "archive"
    subprocess.run(["tar", "-C", disk.parent, "--sparse", "--format=posix", "-cf", path, disk.name], check=True)
    return path


def archive_of_content(disk: Path) -> Path:
    path = disk.parent / "archive"
    subprocess.run(["tar", "-C", disk, "--zstd", "-cf", path, "."], check=True)
    return path


def fetch(store: Store, source: Path, **options: str) -> Template:
    return store.backend.templates.fetch(
        "container", open_source(str(source), store.conf, disk_format="ploop", **options).fetch
    )


@pytest.mark.parametrize("as_source", [lambda disk: disk, archive, archive_of_content], ids=["folder", "tar", "zstd"])
def test_a_disk_of_several_images_becomes_a_template(as_source: Callable[[Path], Path], store: Store) -> None:
    disk = chained(store.sources)
    expected = read(disk, store.sources / "read")
    assert len(described(disk).deltas) == 3
    source = as_source(disk)

    image = store.image()
    image.cache(open_source(str(source), store.conf, disk_format="ploop").fetch, "container", 8 * MIB)

    assert store.content(image) == expected.ljust(8 * MIB, b"\x00")
    store.check(image)
    template = store.backend.templates.get("container")
    assert (template.format, template.source_format, template.virtual_size) == ("raw", "parallels", SIZE)
    assert template.source == source.as_uri()
    store.backend.templates.verify("container")
    assert not [name for name in store.files() if "tree" in name or "download" in name]


@pytest.mark.parametrize("durable", [True, False])
def test_a_disk_of_the_library_with_snapshots_becomes_a_template(durable: bool, ext4_folder: Path) -> None:
    store = PloopStore(ext4_folder, "ploop", {"durable_writes": durable})
    first = store.make(size=16 * MIB)
    first.create_snap("one")
    store.write(first, 10 * MIB, MIB, 7)

    fetch(store, Path(first.path))

    image = store.image("other")
    image.cache(store.fetch, "container", 16 * MIB)
    assert store.content(image) == store.content(first)


def test_an_archive_is_held_to_its_checksum_and_tells_whether_it_is_as_it_was(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    disk = chained(store.sources)
    path = archive(disk)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(exceptions.ChecksumMismatch):
        fetch(store, path, checksum=f"sha256:{'0' * 64}")
    assert not left_of(store)

    template = fetch(store, path, checksum=f"sha256:{digest}")

    assert template.sha256 == digest
    source = open_source(str(path), store.conf, disk_format="ploop")
    assert source.unchanged_since(sha256=digest, etag=template.etag)
    assert not open_source(str(disk), store.conf, disk_format="ploop").unchanged_since(sha256=template.sha256)
    with pytest.raises(exceptions.InvalidArgument, match="give an archive"):
        open_source(str(disk), store.conf, disk_format="ploop", checksum=f"sha256:{digest}").fetch("/missing")


def left_of(store: Store) -> list[str]:
    return [name for name in store.files() if "container" in name]


def changed(old: str, new: str) -> Callable[[Path], None]:
    """Change the descriptor, which stays as old as it is."""

    def change(disk: Path) -> None:
        path = disk / ploop.NAME
        before, content = path.stat(), path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    return change


def written(offset: int, content: bytes) -> Callable[[Path], None]:
    """Write into the image below, which stays as old as it is."""

    def change(disk: Path) -> None:
        path = disk / ploop.ROOT_IMAGE
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(content)
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))

    return change


def linked(name: str) -> Callable[[Path], None]:
    def change(disk: Path) -> None:
        shutil.move(disk / name, disk.parent / "elsewhere")
        (disk / name).symlink_to("../elsewhere")

    return change


def replaced_by_fifo(disk: Path) -> None:
    top_of(disk).unlink()
    os.mkfifo(disk / described(disk).top.file)


def grown_and_switched(disk: Path) -> None:
    """What ploop itself does: the header has the size of before, the descriptor that of after."""
    ploop_tool.ploop("grow", "-s", "16M", disk / ploop.NAME)
    ploop_tool.ploop("snapshot-switch", "-u", GUIDS[0], disk / ploop.NAME)


def smaller_clusters(disk: Path) -> None:
    top = top_of(disk)
    top.unlink()
    ploop_tool.qemu_img("create", "-f", "parallels", "-o", "cluster_size=64k", top, str(SIZE))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "absolute": (changed(f"{ploop.ROOT_IMAGE}<", "/etc/passwd<"), "a plain name"),
    "dot-dot": (changed(f"{ploop.ROOT_IMAGE}<", "../elsewhere<"), "a plain name"),
    "entity": (
        changed('<?xml version="1.0"?>', '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "document type",
    ),
    "two-roots": (changed(f"<ParentGUID>{GUIDS[0]}", f"<ParentGUID>{NOTHING}"), "no parent"),
    "circle": (changed(f"<ParentGUID>{GUIDS[0]}", f"<ParentGUID>{GUIDS[1]}"), "do not lead to its root"),
    "size": (changed(f"{SIZE // 512}<", f"{2 * SIZE // 512}<"), "are described; 'ploop grow'"),
    "size-that-ploop-left": (grown_and_switched, "are described; 'ploop grow'"),
    "no-descriptor": (lambda disk: (disk / ploop.NAME).unlink(), f"{ploop.NAME} is unacceptable: it is missing"),
    "missing-image": (lambda disk: (disk / ploop.ROOT_IMAGE).unlink(), "root.hds is unacceptable: it is missing"),
    "missing-top": (lambda disk: top_of(disk).unlink(), "it is missing"),
    "linked-image": (linked(ploop.ROOT_IMAGE), "root.hds is unacceptable: it is a link"),
    "linked-descriptor": (linked(ploop.NAME), f"{ploop.NAME} is unacceptable: it is a link"),
    "changed-base": (
        lambda disk: ploop_tool.qemu_io(disk / ploop.ROOT_IMAGE, "write -P 9 0 4k"),
        f"root.hds is unacceptable: it was written to after another .* 'touch {ploop.NAME}'",
    ),
    "cut-in-table": (lambda disk: os.truncate(disk / ploop.ROOT_IMAGE, 70), "the file ends at 70"),
    "cut": (lambda disk: os.truncate(top_of(disk), MIB), "is no cluster of the file"),
    "version": (written(0, b"WithoutFreeSpacf"), "signature of a ploop image, of version 1 or 2"),
    "in-use": (written(44, b"Ynot"), "marked in use"),
    "geometry": (written(28, b"\x03\x00\x00\x00"), "clusters of 3 sectors"),
    "other-clusters": (smaller_clusters, "are described"),
    "table": (written(64, b"\xff\xff\xff\x7f"), "is no cluster of the file"),
}  # fmt: skip


@pytest.mark.parametrize("as_source", [lambda disk: disk, archive], ids=["folder", "tar"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_disk_that_means_no_good_is_refused_and_nothing_stays(
    case: str, as_source: Callable[[Path], Path], ext4_folder: Path
) -> None:
    store = Store(ext4_folder, "raw", {})
    disk = chained(store.sources)
    spoil, reason = HOSTILE[case]
    spoil(disk)

    with pytest.raises(exceptions.ImageUnacceptable, match=reason):
        fetch(store, as_source(disk))

    assert not left_of(store)


def test_an_image_may_seem_to_be_a_tick_newer_than_the_descriptor_that_came_after_it(ext4_folder: Path) -> None:
    """As on kernels whose clock for files goes in steps of that, where a program sets a time to the nanosecond."""
    store = Store(ext4_folder, "raw", {})
    disk = chained(store.sources)
    described_at = (disk / ploop.NAME).stat().st_mtime_ns
    os.utime(disk / ploop.ROOT_IMAGE, ns=(described_at, described_at + 4_000_000))
    fetch(store, disk)


def test_a_disk_that_is_written_to_meanwhile_is_refused(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    disk = chained(store.sources)

    def write(done: int, total: int) -> None:
        written(2 * MIB, b"new")(disk)
        os.utime(disk / ploop.ROOT_IMAGE)

    with pytest.raises(exceptions.ImageUnacceptable, match="it was written to while it was read"):
        store.backend.templates.fetch(
            "container", open_source(str(disk), store.conf, disk_format="ploop").fetch, progress=write
        )
    assert not left_of(store)


def test_a_fifo_among_the_images_does_not_hang(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    disk = chained(store.sources)
    replaced_by_fifo(disk)
    with pytest.raises(exceptions.ImageUnacceptable, match="not a regular file"):
        fetch(store, disk)
    with pytest.raises(exceptions.ImageUnacceptable, match="a FIFO"):
        fetch(store, archive(disk))


@pytest.mark.parametrize("member", ["../outside", "/outside", "device", "link-out", "below-link"])
def test_of_an_archive_that_leads_out_nothing_is_written_outside(member: str, ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    path = archive(chained(store.sources))
    before = {each for each in ext4_folder.rglob("*") if not each.is_relative_to(store.folder)}
    with tarfile.open(path, "a") as tar:
        bad = tarfile.TarInfo(member)
        if member == "device":
            bad.type, bad.devmajor, bad.devminor = tarfile.CHRTYPE, 1, 3
        elif member == "link-out":
            bad.type, bad.linkname = tarfile.LNKTYPE, "../../sources/template.raw"
        elif member == "below-link":
            bad.type, bad.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(bad)
            bad = tarfile.TarInfo("below-link/outside")
        tar.addfile(bad)

    with pytest.raises(exceptions.ImageUnacceptable, match="its member"):
        fetch(store, path)

    assert {each for each in ext4_folder.rglob("*") if not each.is_relative_to(store.folder)} == before
    assert not left_of(store)


def test_a_full_disk_is_told_and_nothing_of_a_ploop_disk_stays(small_tmpfs: Path, tmp_path: Path) -> None:
    store = Store(small_tmpfs, "raw", {})
    disk = tmp_path / "disk"
    base = ploop_tool.init(disk, 32 * MIB)
    ploop_tool.qemu_io(base, "write -P 1 0 20M")
    for source in (disk, archive(disk)):
        with pytest.raises(exceptions.InsufficientSpace):
            fetch(store, source)
        assert not left_of(store)


@pytest.mark.parametrize("as_source", [lambda disk: disk, archive], ids=["folder", "tar"])
def test_killed_after_any_step_the_same_fetch_succeeds(as_source: Callable[[Path], Path], ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    source = as_source(chained(store.sources))

    def act() -> None:
        fetch(store, source)

    steps = test_faults.steps_of(act)
    assert ("template.ploop.unpacked" in steps) is (source.name == "archive")
    files = store.files()
    for number, step in enumerate(steps):
        store.backend.templates.remove("container")
        assert test_faults.run(number, act) == -signal.SIGKILL
        act()
        store.backend.templates.verify("container")
        assert store.files() == files, step


def test_a_folder_that_nothing_was_said_of(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    with pytest.raises(exceptions.FetchFailed, match="but a folder; say that it is ploop, or a tree"):
        open_source(str(chained(store.sources)), store.conf).fetch(str(store.sources / "target"))
    with pytest.raises(exceptions.FetchFailed, match="No such file"):
        fetch(store, ext4_folder / "missing")
