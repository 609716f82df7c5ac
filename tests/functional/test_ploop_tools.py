# SPDX-License-Identifier: Apache-2.0
"""What the library writes, ploop and QEMU read, and what they write it reads."""

from __future__ import annotations

import os
import re
import subprocess
from array import array
from pathlib import Path

import pytest

from imagebackend.storage import ploop, sparse_copy
from imagebackend.storage.run import Run
from tests.functional import ploop_tool
from tests.functional.filesystems import allocated

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SNAPSHOT = "{11111111-1111-1111-1111-111111111111}"


def template(path: Path, size: int = 9 * MIB) -> Path:
    """Write a raw image: data that fill clusters and data that do not, holes, and a last sector."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in ((0, b"first" * (MIB // 4)), (4 * MIB, b"\x55" * 4096), (size - 512, b"e" * 512)):
            file.seek(offset)
            file.write(data)
    return path


def write(source: Path, target: Path, size: int, *, share: bool = True, preallocate: bool = False) -> ploop.Header:
    """Make an image of a raw one."""
    with source.open("rb") as raw, target.open("w+b") as image:
        length = source.stat().st_size
        runs = [Run(start, start, end - start) for start, end in sparse_copy.data_ranges(raw.fileno(), length)]
        return ploop.write_image(image.fileno(), size, [(raw.fileno(), runs)], share=share, preallocate=preallocate)


def tables_of(*images: Path) -> tuple[list[array[int]], ploop.Header]:
    tables = []
    for image in images:
        with image.open("rb") as file:
            header = ploop.read_header(file.fileno(), str(image))
            tables.append(ploop.read_table(file.fileno(), header, str(image)))
    return tables, header


def content_of(*images: Path) -> bytes:
    """Return what the library reads of a disk of deltas, the lowest first."""
    tables, header = tables_of(*images)
    content = bytearray(header.virtual_size)
    for image, runs in zip(images, ploop.data_runs(tables, header), strict=True):
        with image.open("rb") as file:
            for run in runs:
                file.seek(run.host_offset)
                content[run.guest_offset : run.guest_offset + run.length] = file.read(run.length)
    return bytes(content)


def describe(folder: Path, size: int) -> Path:
    """Write the descriptor of a disk of one image."""
    path = folder / ploop.NAME
    delta = ploop.Delta(ploop.TOP, None, ploop.ROOT_IMAGE)
    path.write_bytes(ploop.format_descriptor(ploop.Descriptor(size, MIB, (delta,))))
    return path


def descriptor_of(folder: Path) -> ploop.Descriptor:
    path = folder / ploop.NAME
    return ploop.parse_descriptor(path.read_bytes(), str(path))


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_ploop_and_qemu_read_what_is_written(filesystem: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{filesystem}_folder")
    raw, image = template(folder / "raw"), folder / ploop.ROOT_IMAGE

    write(raw, image, 64 * MIB)

    ploop_tool.qemu_img("compare", "-f", "raw", "-F", "parallels", raw, image)
    assert allocated(image) <= allocated(raw) + MIB
    descriptor = describe(folder, 64 * MIB)
    assert re.search(r"size:\s*131072\b", ploop_tool.ploop("info", "-s", descriptor))
    assert ploop.TOP in ploop_tool.ploop("snapshot-list", descriptor)
    ploop_tool.ploop("check", descriptor)
    # On ext4, ploop has filled the holes within clusters by now.
    ploop_tool.check(image)
    ploop_tool.qemu_img("compare", "-f", "raw", "-F", "parallels", raw, image)


def test_ploop_and_qemu_go_on_with_what_is_written(ext4_folder: Path) -> None:
    raw, image = template(ext4_folder / "raw"), ext4_folder / ploop.ROOT_IMAGE
    write(raw, image, 64 * MIB)
    descriptor = describe(ext4_folder, 64 * MIB)

    ploop_tool.qemu_io(image, "write -P 7 20M 2M", "write -P 8 512 512")
    ploop_tool.ploop("snapshot", "-u", SNAPSHOT, descriptor)
    [lower, upper] = [ext4_folder / each.file for each in descriptor_of(ext4_folder).chain(ploop.TOP)]
    ploop_tool.qemu_io(upper, "write -P 9 30M 1M")
    ploop_tool.ploop("grow", "-s", "128M", descriptor)
    before = content_of(lower, upper)
    ploop_tool.ploop("snapshot-merge", descriptor)

    assert descriptor_of(ext4_folder).virtual_size == 128 * MIB
    assert content_of(ext4_folder / descriptor_of(ext4_folder).top.file) == before
    assert before[20 * MIB : 22 * MIB] == b"\7" * 2 * MIB
    assert before[30 * MIB : 31 * MIB] == b"\x09" * MIB
    assert before[512:1024] == b"\x08" * 512


@pytest.mark.parametrize(("size", "version"), [(TIB, 1), (4 * TIB, 2)])
def test_large_disks_are_read_in_the_version_that_reaches(size: int, version: int, xfs_folder: Path) -> None:
    raw, image = template(xfs_folder / "raw"), xfs_folder / ploop.ROOT_IMAGE

    header = write(raw, image, size)

    assert header.version == version
    ploop_tool.check(image)
    # Not compared: looking for holes, QEMU 7.2 counts the sectors of an area in 31 bits. It reads and writes well.
    ploop_tool.qemu_io(image, f"write -P 7 {size - MIB} 1M", f"read -P 7 {size - MIB} 1M", "read -P 85 4M 4k")
    [table], _ = tables_of(image)
    assert table[-1]


def test_every_cluster_of_a_preallocated_image_is_stored(ext4_folder: Path) -> None:
    raw, image = template(ext4_folder / "raw"), ext4_folder / ploop.ROOT_IMAGE

    write(raw, image, 16 * MIB, preallocate=True)

    ploop_tool.qemu_img("compare", "-f", "raw", "-F", "parallels", raw, image)
    ploop_tool.qemu_img("check", "-f", "parallels", image)
    assert allocated(image) >= 17 * MIB


@pytest.mark.parametrize("size", [20 * MIB, 100 * GIB, 300 * GIB, 900 * GIB])
def test_ploop_and_qemu_read_what_was_grown(size: int, xfs_folder: Path) -> None:
    """At 256 GiB the block table needs another cluster, and has to move what is there."""
    raw, image = template(xfs_folder / "raw"), xfs_folder / ploop.ROOT_IMAGE
    write(raw, image, 16 * MIB)
    ploop_tool.qemu_io(image, "write -P 7 12M 1M")
    before = content_of(image)
    descriptor = os.open(image, os.O_RDWR)

    ploop.grow(descriptor, size, "image", durable=True)

    os.close(descriptor)
    ploop_tool.check(image)
    (xfs_folder / "before").write_bytes(before)
    ploop_tool.qemu_img("compare", "-f", "raw", "-F", "parallels", xfs_folder / "before", image)
    ploop_tool.qemu_io(image, f"write -P 9 {size - MIB} 1M", f"read -P 9 {size - MIB} 1M")
    assert re.search(rf"size:\s*{size // 512}\b", ploop_tool.ploop("info", "-s", describe(xfs_folder, size)))


def test_what_ploop_and_qemu_write_is_read(ext4_folder: Path) -> None:
    folder = ext4_folder / "disk"
    lower, target = ploop_tool.init(folder, 64 * MIB), ext4_folder / "raw"
    ploop_tool.qemu_io(lower, "write -P 1 0 3M", "write -P 2 40M 1M", "write -P 3 5M 4k")
    assert content_of(lower) == ploop_tool.read(target, lower)

    ploop_tool.ploop("snapshot", "-u", SNAPSHOT, folder / ploop.NAME)
    read = descriptor_of(folder)
    assert [delta.guid for delta in read.chain(ploop.TOP)] == [SNAPSHOT, ploop.TOP]
    upper = folder / read.top.file
    ploop_tool.qemu_io(upper, "write -P 4 1M 1M", "write -P 5 60M 1M")
    assert content_of(lower, upper) == ploop_tool.read(target, lower, upper)

    ploop_tool.ploop("grow", "-s", "128M", folder / ploop.NAME)
    assert descriptor_of(folder).virtual_size == 128 * MIB
    assert content_of(lower, upper) == ploop_tool.read(target, lower, upper)

    # As it is documented of ploop: the descriptor goes on saying 128 MiB after switching back to the smaller delta.
    ploop_tool.ploop("snapshot-switch", "-u", SNAPSHOT, folder / ploop.NAME)
    switched = [folder / delta.file for delta in descriptor_of(folder).chain(ploop.TOP)]
    assert content_of(*switched) == content_of(lower) == ploop_tool.read(target, lower)


def test_a_copy_by_qemu_is_read(ext4_folder: Path) -> None:
    raw, image = template(ext4_folder / "raw"), ext4_folder / "image"
    ploop_tool.qemu_img("convert", "-f", "raw", "-O", "parallels", raw, image)

    assert content_of(image) == raw.read_bytes()
    [_], header = tables_of(image)
    assert (header.version, header.in_use) == (2, False)


def test_an_image_whose_writer_was_killed_is_known_by_its_header(ext4_folder: Path) -> None:
    image = ploop_tool.init(ext4_folder / "disk", 64 * MIB)
    commands = ("write -P 7 0 1M", "flush", "read 0 4k", "sleep 60000")
    words = [word for command in commands for word in ("-c", command)]
    command = ["stdbuf", "-oL", "qemu-io", "-f", "parallels", *words, str(image)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdout is not None
        assert any("read 4096" in line for line in guest.stdout)
        guest.kill()
    [table], header = tables_of(image)

    assert header.in_use
    assert ploop.allocated_clusters(table) == 1
    assert header.file_size > header.first_block + MIB  # what QEMU has allocated ahead
    descriptor = os.open(image, os.O_RDWR)
    ploop.cut(descriptor, "image")
    os.close(descriptor)
    assert image.stat().st_size == header.first_block + MIB
