# SPDX-License-Identifier: Apache-2.0
"""What the path from a cached template to a disk costs, in system calls: no clock, no noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.counting import Counts, count
from tests.functional.image_building import qemu_img

GIB = 1 << 30

SETUP = """
import os, shutil
import imagebackend
conf = imagebackend.load_config()
conf.set_override("instances_path", {folder!r})
conf.set_override("images_type", {image_type!r}, group="libvirt")
backend = imagebackend.Backend(conf)
def fetch(target):
    with open(target, "r+b") as file:
        file.write(b"data" * 16384)
        file.truncate(1 << 30)
def make(number, size):
    image = backend.image(f"instance{{number}}", "disk")
    image.cache(fetch, "template", size)
    return image
make("-first", 1 << 30)  # the template, and everything that is loaded once
"""


def counted(folder: Path, script: str, image_type: str = "qcow2", more: str = "") -> Counts:
    return count(script, setup=SETUP.format(folder=str(folder), image_type=image_type) + more)


@pytest.mark.parametrize("size", [GIB, 64 << 40])
@pytest.mark.parametrize("others", [0, 1000])
def test_a_warm_qcow2_disk_costs_the_same_whatever_its_size_and_however_many_there_are(
    ext4_folder: Path, size: int, others: int
) -> None:
    more = f"""
conf.set_override("durable_writes", False)
for number in range(1, {others + 1}):
    make(number, {GIB})
conf.clear_override("durable_writes")
"""
    counts = counted(ext4_folder, f"make(0, {size})", more=more)

    assert (counts.processes, counts.threads, counts.execs) == (0, 0, 0)
    assert counts.syncs == 3  # the disk, its record, their folder
    assert counts.blocked_locks == 0
    assert counts.total == 53
    assert counts.bytes_written < 1024


def test_another_disk_of_the_same_instance_costs_no_more_than_reading_the_record(ext4_folder: Path) -> None:
    counts = counted(
        ext4_folder,
        f'backend.image("instance0", "disk.local").cache(fetch, "template", {GIB})',
        more=f"make(0, {GIB})\n",
    )

    assert (counts.processes, counts.threads, counts.syncs) == (0, 0, 3)
    assert counts.total <= 52


def test_without_durable_writes_nothing_is_synced(ext4_folder: Path) -> None:
    counts = counted(ext4_folder, f"make(0, {GIB})", more='conf.set_override("durable_writes", False)\n')

    assert counts.syncs == 0


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
def test_a_disk_that_exists_costs_two_looks(ext4_folder: Path, image_type: str) -> None:
    counts = counted(ext4_folder, f"make(0, {GIB})", image_type, more=f"make(0, {GIB})\n")

    assert (counts.processes, counts.threads, counts.syncs, counts.bytes_written) == (0, 0, 0, 0)
    assert counts.total <= 2


def test_a_raw_disk_on_a_reflink_file_system_moves_no_data(xfs_folder: Path) -> None:
    counts = counted(xfs_folder, f"make(0, {2 * GIB})", "raw")

    assert (counts.processes, counts.threads, counts.execs) == (0, 0, 0)
    assert counts.syncs == 3
    assert counts.bytes_written < 1024
    assert counts.total <= 60


def test_a_raw_disk_elsewhere_writes_the_data_and_not_the_holes(ext4_folder: Path) -> None:
    counts = counted(ext4_folder, f"make(0, {2 * GIB})", "raw")

    assert (counts.processes, counts.threads, counts.execs) == (0, 0, 0)
    assert 65536 <= counts.bytes_written < 65536 + 8192


def test_a_ploop_disk_on_a_reflink_file_system_costs_the_same_whatever_the_templates_size(xfs_folder: Path) -> None:
    """Of the template that is one image of 100 MiB, and of the one that has 64 KiB of data."""
    more = """
def fetch_full(target):
    with open(target, "r+b") as file:
        for _ in range(100):
            file.write(os.urandom(1 << 20))
        file.truncate(1 << 30)
backend.image("instance-full", "disk").cache(fetch_full, "full", 1 << 30)
"""
    small = counted(xfs_folder / "less", f"make(0, {GIB})", "ploop", more)
    create = f'backend.image("instance0", "disk").cache(fetch_full, "full", {GIB})'
    full = counted(xfs_folder / "full", create, "ploop", more)

    assert (small.processes, small.threads, small.execs) == (0, 0, 0)
    assert small.syncs == 5  # the image, the descriptor, the record, the disk's folder and the one above
    assert small.bytes_written < 2048
    assert small.by_name == full.by_name
    assert small.bytes_written == full.bytes_written


def test_a_ploop_disk_elsewhere_writes_the_data_and_not_the_holes(ext4_folder: Path) -> None:
    counts = counted(ext4_folder, f"make(0, {2 * GIB})", "ploop")

    assert (counts.processes, counts.threads, counts.execs) == (0, 0, 0)
    assert 65536 <= counts.bytes_written < 65536 + 8192


@pytest.mark.parametrize("folder", ["ext4_folder", "xfs_folder"])
@pytest.mark.parametrize("compress", [(), ("-c",)], ids=["plain", "compressed"])
def test_a_qcow2_template_becomes_raw_with_its_data_written_once(
    folder: str, compress: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    path = Path(request.getfixturevalue(folder))
    (path / "raw").write_bytes(bytes(range(256)) * (32 << 10))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *compress, path / "raw", path / "image")
    more = f"content = open({str(path / 'image')!r}, 'rb').read()\n"
    script = """
def fetch(target):
    with open(target, "r+b", buffering=0) as file:
        file.write(content)
backend.templates.fetch("converted", fetch)
"""
    counts = counted(path, script, more=more)

    image, data = (path / "image").stat().st_size, 8 << 20
    assert (counts.processes, counts.execs) == (0, 0)
    assert counts.threads <= 5  # to read, decompress and hash
    assert counts.syncs == 4  # the template, its record, and the folder of each
    # What was fetched, and the disk if it was compressed there; then the record.
    assert counts.bytes_written - image - (data if compress else 0) < 4096


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
def test_describing_a_disk_to_libvirt_starts_nothing(ext4_folder: Path, image_type: str) -> None:
    script = 'image.libvirt_info("virtio", "vda", "disk", "none", {}).to_xml()'
    counts = counted(ext4_folder, script, image_type, more=f"image = make(0, {GIB})\n{script}\n")

    assert (counts.processes, counts.threads, counts.syncs, counts.bytes_written) == (0, 0, 0, 0)
    assert counts.total <= 10


@pytest.mark.parametrize("threads", [8, 32])
def test_disks_made_side_by_side_never_wait_for_each_other(ext4_folder: Path, threads: int) -> None:
    script = f"""
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor({threads}) as pool:
    list(pool.map(lambda number: make(number, {GIB}), range(64)))
"""
    counts = counted(ext4_folder, script)

    assert counts.blocked_locks == 0
    assert counts.processes == 0
    assert counts.syncs == 64 * 3
