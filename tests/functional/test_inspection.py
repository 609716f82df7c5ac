# SPDX-License-Identifier: Apache-2.0
"""The inspector against images that real tools made, good ones and spoiled ones."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions, process
from imagebackend.templates import inspection
from tests.functional import hostile_disks, hostile_vmdk
from tests.functional.hostile_images import HOSTILE_IMAGES, HostileImage
from tests.functional.hostile_qcow2 import HOSTILE_QCOW2
from tests.functional.image_building import MIB, Build, content, converted, make_disk, put, qemu_img, then


def inspect(path: Path, claimed_format: str | None) -> inspection.Verdict:
    with path.open("rb") as image:
        return inspection.inspect(image.fileno(), path.name, claimed_format)


@pytest.mark.parametrize("image", HOSTILE_IMAGES, ids=lambda image: image.name)
def test_hostile_image_is_refused(image: HostileImage, tmp_path: Path) -> None:
    path = tmp_path / "image"
    image.build(path)
    with pytest.raises(exceptions.ImageUnacceptable, match=image.reason) as refusal:
        inspect(path, image.claimed_format)
    assert refusal.value.image == "image"


def qemu_img_info(path: Path, image_format: str) -> dict[str, Any]:
    command = ["qemu-img", "info", "--output=json", "-f", image_format, str(path)]
    found: dict[str, Any] = json.loads(process.run(command, timeout=60).stdout)
    return found


def assert_accepted(path: Path, image_format: str, claimed_format: str) -> inspection.Verdict:
    """Check a verdict against what qemu-img says of the image, and makes of it."""
    verdict = inspect(path, claimed_format)
    assert inspect(path, None) == verdict
    assert verdict.format == image_format
    assert verdict.virtual_size == qemu_img_info(path, image_format)["virtual-size"]
    raw = path.with_name(path.name + ".converted")
    qemu_img("convert", "-f", image_format, "-O", "raw", path, raw)
    assert raw.stat().st_size == verdict.virtual_size
    assert raw.stat().st_blocks * 512 <= verdict.allocated_size <= verdict.virtual_size + 4095
    return verdict


GOOD_OPTIONS = {
    "qcow2": [
        "compat=0.10", "compat=1.1", "lazy_refcounts=on", "refcount_bits=1", "refcount_bits=64", "cluster_size=512",
        "cluster_size=4k", "cluster_size=2M", "extended_l2=on", "extended_l2=on,cluster_size=16k",
        "preallocation=metadata", "preallocation=falloc", "preallocation=full",
        "preallocation=metadata,extended_l2=on", "compression_type=zstd",
    ],
    "vmdk": [
        "subformat=monolithicSparse", "subformat=streamOptimized", "subformat=monolithicSparse,zeroed_grain=on",
        "subformat=monolithicSparse,compat6=on", "subformat=monolithicSparse,adapter_type=lsilogic",
        "subformat=streamOptimized,hwversion=13,toolsversion=1",
    ],
    "vpc": [
        "subformat=fixed", "subformat=dynamic", "subformat=fixed,force_size=on", "subformat=dynamic,force_size=on",
    ],
    "vhdx": [
        "subformat=dynamic", "subformat=fixed", "block_size=1M", "block_size=32M", "block_state_zero=off",
        "log_size=4M",
    ],
    "vdi": ["static=off", "static=on"],
    "parallels": ["cluster_size=1M", "cluster_size=64k"],
}  # fmt: skip
GOOD = [(image_format, options) for image_format, each in GOOD_OPTIONS.items() for options in each]


@pytest.mark.parametrize(("image_format", "options"), GOOD)
def test_good_image_with_data_is_accepted(image_format: str, options: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    converted(image_format, "-o", options)(path)
    verdict = assert_accepted(path, image_format, image_format)
    # Data lie in the first 128 KiB and in 200 000 bytes at 3 MiB of 8 MiB.
    assert verdict.allocated_size >= 128 * 1024 + 200_000


@pytest.mark.parametrize(("image_format", "options"), GOOD)
def test_good_empty_image_is_accepted(image_format: str, options: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", image_format, "-o", options, path, 20 * MIB)
    assert_accepted(path, image_format, image_format)


@pytest.mark.parametrize("size", ["1M", "1000448", "130G", "1T"])
@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vpc", "vhdx", "vdi", "parallels"])
def test_good_image_of_any_size_is_accepted(image_format: str, size: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", image_format, path, size)
    verdict = inspect(path, image_format)
    assert verdict.virtual_size == qemu_img_info(path, image_format)["virtual-size"]
    # QEMU allocates the first block of every raw file that it makes.
    assert verdict.allocated_size == 4096


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", ["512", "64k", "2M"])
def test_compressed_qcow2_is_accepted(compression: str, cluster_size: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    options = f"compression_type={compression},cluster_size={cluster_size}"
    converted("qcow2", "-c", "-o", options)(path)
    verdict = assert_accepted(path, "qcow2", "qcow2")
    assert ("compression type zstd" in verdict.notes) == (compression == "zstd")


def test_bomb_reports_what_it_expands_to(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "image"
    with source.open("wb") as disk:
        for _ in range(512):
            disk.write(b"\x5a" * MIB)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", source, path)
    assert path.stat().st_size < 4 * MIB
    verdict = inspect(path, "qcow2")
    assert (verdict.virtual_size, verdict.allocated_size) == (512 * MIB, 512 * MIB)


def test_qcow2_with_snapshots_and_bitmaps_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    converted("qcow2")(path)
    qemu_img("snapshot", "-c", "first", path)
    qemu_img("bitmap", "--add", path, "changes")
    assert assert_accepted(path, "qcow2", "qcow2").notes == ("snapshots",)


def test_flattened_qcow2_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    HOSTILE_QCOW2["backing-file"][1](path)
    qemu_img("rebase", "-f", "qcow2", "-b", "", path)
    assert_accepted(path, "qcow2", "qcow2")


def test_vmdk_stream_with_its_directory_at_the_end_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    hostile_vmdk.end_directory()(path)
    assert assert_accepted(path, "vmdk", "vmdk").notes == ("streamOptimized",)


def test_vmdk_stream_by_virtualbox_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "image"
    hostile_vmdk.edited(b"RW 16384", b"RDONLY 16384", hostile_vmdk.STREAM)(path)
    assert_accepted(path, "vmdk", "vmdk")


@pytest.mark.parametrize(
    ("creator", "by_footer"),
    [(b"win ", True), (b"qem2", True), (b"d2v ", True), (b"tap\x00", True), (b"CTXS", True), (b"vpc ", False)],
)
def test_vhd_size_is_the_creators(creator: bytes, by_footer: bool, tmp_path: Path) -> None:
    path = tmp_path / "image"
    hostile_disks.footer(28, creator, then(hostile_disks.FIXED, put(-512 + 48, (4 * MIB).to_bytes(8))), copy=False)(
        path
    )
    verdict = assert_accepted(path, "vpc", "vhd")
    assert (verdict.virtual_size == 4 * MIB) == by_footer


def disk_of(size: int = 4 * MIB) -> Build:
    return content(b"", size)


def run_on(*command: str, stdin: str = "", size: int = 4 * MIB) -> Build:
    """Return what runs a command on a disk of zeros."""

    def build(path: Path) -> None:
        disk_of(size)(path)
        process.run([*command, str(path)], timeout=60, input=stdin.encode())

    return build


def file_system(kind: str, *options: str, size: int = 4 * MIB) -> Build:
    return run_on(f"mkfs.{kind}", *options, size=size)


def iso(path: Path) -> None:
    """Write the volume descriptors of an empty ISO 9660 image (ECMA-119, section 8)."""
    primary = (
        b"\x01CD001\x01\x00" + b"LINUX".ljust(32) + b"TEST".ljust(32) + bytes(8) + b"\x40\x00\x00\x00\x00\x00\x00\x40"
    )
    end = b"\xffCD001\x01"
    path.write_bytes(bytes(16 * 2048) + primary.ljust(2048, b"\x00") + end.ljust(2048, b"\x00") + bytes(46 * 2048))


GPT = "label: gpt\nsize=1M, type=uefi\nsize=1M, type=linux\n"
PROTECTIVE = 446
HYBRID_MBR = b"\x80\xfe\xff\xff\x0c\xfe\xff\xff\x00\x08\x00\x00\x00\x08\x00\x00"

GOOD_RAW: dict[str, tuple[tuple[str, ...], Build]] = {
    "zeros": ((), disk_of()),
    "text": ((), content(b"#!/bin/sh\necho version=1\n")),
    "odd-size": ((), content(b"x", 1000)),
    "one-sector": ((), content(b"x", 512)),
    "gpt": (("gpt",), run_on("sfdisk", "-q", stdin=GPT)),
    "gpt-by-u-boot": (("gpt",), then(run_on("sfdisk", "-q", stdin=GPT), put(PROTECTIVE + 1, b"\x00\x00\x00"))),
    "gpt-hybrid": (("gpt",), then(run_on("sfdisk", "-q", stdin=GPT), put(PROTECTIVE + 16, HYBRID_MBR))),
    "mbr": (("mbr",), run_on("sfdisk", "-q", stdin="label: dos\nsize=1M, type=83, bootable\n")),
    "mbr-empty": ((), run_on("sfdisk", "-q", stdin="label: dos\n")),
    "fat": ((), file_system("vfat")),
    "fat-32": ((), file_system("vfat", "-F", "32", size=40 * MIB)),
    "ntfs": ((), file_system("ntfs", "-q", "-F", "-f", size=8 * MIB)),
    "ext4": ((), file_system("ext4", "-q")),
    "xfs": ((), file_system("xfs", "-q", size=320 * MIB)),
    "swap": ((), run_on("mkswap", "-q")),
    "iso": (("iso9660",), iso),
    "iso-hybrid": (
        ("mbr", "iso9660"),
        then(iso, put(446, HYBRID_MBR), put(510, b"\x55\xaa")),
    ),
}


@pytest.mark.parametrize("name", GOOD_RAW)
def test_good_raw_disk_is_accepted(name: str, tmp_path: Path) -> None:
    notes, build = GOOD_RAW[name]
    path = tmp_path / "image"
    build(path)
    assert assert_accepted(path, "raw", "raw").notes == notes
    assert probed(path) == "raw"


def probed(path: Path) -> str:
    """Return what QEMU takes a file for when nobody tells it."""
    found: str = json.loads(process.run(["qemu-img", "info", "--output=json", str(path)], timeout=60).stdout)["format"]
    return found


#: What QEMU's probes look for, and what stands around it.
PROBED = [
    b"QFI\xfb", b"\x00\x00\x00\x01", b"\x00\x00\x00\x03", b"QED\x00", b"KDMV", b"COWD", b"conectix", b"vhdxfile",
    b"WithoutFreeSpace", b"WithouFreSpacExt", b"\x02\x00\x00\x00", b"Bochs Virtual HD Image", b"\x7f\x10\xda\xbe",
    b"LUKS\xba\xbe", b"\x00\x01", b"#!/bin/sh\n", b"#V2.0 Format\n", b"# Disk DescriptorFile\n", b"#", b" ", b"\n",
    b"\r\n", b"version=1\n", b"version=2\r\n", b"version=3\n", b"x", bytes(64), b"OOOM",
]  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(pieces=st.lists(st.sampled_from(PROBED), max_size=6))
def test_what_is_accepted_as_raw_is_raw_to_qemus_probes(pieces: list[bytes]) -> None:
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        content(b"".join(pieces), 64 * 1024)(path)
        try:
            inspect(path, "raw")
        except exceptions.ImageUnacceptable:
            return
        assert probed(path) == "raw"


@pytest.mark.parametrize("claimed_format", ["iso", "ami", "aki", "ari", "gpt"])
def test_glances_names_for_raw(claimed_format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    iso(path)
    assert inspect(path, claimed_format).format == "raw"


@pytest.mark.parametrize("claimed_format", ["docker", "expanded", "", "RAW", "qcow2 ", "x" * 300])
def test_unknown_claim_is_refused(claimed_format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    make_disk(path)
    with pytest.raises(exceptions.ImageUnacceptable, match="accepted are aki, ami, ari, gpt, iso, parallels, ploop"):
        inspect(path, claimed_format)


CLAIMS = {"raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi", "parallels"}


@pytest.mark.parametrize("image_format", sorted(CLAIMS))
def test_every_other_claim_is_refused(image_format: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    converted(image_format)(path)
    for claimed_format in CLAIMS - {image_format}:
        with pytest.raises(exceptions.ImageUnacceptable, match=f"to be {claimed_format}, but it is {image_format}"):
            inspect(path, claimed_format)


def test_only_regular_files_are_inspected(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with pytest.raises(exceptions.ImageUnacceptable, match="not a regular file"):
                inspection.inspect(descriptor, "image", "raw")
        finally:
            os.close(descriptor)


def test_descriptor_keeps_its_position(tmp_path: Path) -> None:
    path = tmp_path / "image"
    converted("qcow2")(path)
    with path.open("rb", buffering=0) as image:
        image.seek(12345)
        inspection.inspect(image.fileno(), "image")
        assert image.tell() == 12345
