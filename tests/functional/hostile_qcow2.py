# SPDX-License-Identifier: Apache-2.0
"""qcow2 images that must not become templates: the reason that the refusal has to give, and what makes the image."""

from __future__ import annotations

import struct
from pathlib import Path

from imagebackend.storage.qcow2 import header, read_header
from tests.functional.image_building import Build, converted, number, patch, put, qemu_img, then, truncated

# qemu-img puts the refcount table at 64 KiB, a block at 128 KiB, the L1 table at 192 KiB and the L2 table at 256 KiB.

PLAIN = converted("qcow2")
REFCOUNT_TABLE, L1_TABLE, L2_TABLE, DATA = 0x10000, 0x30000, 0x40000, 0x50000


def field(offset: int, form: str, value: int) -> Build:
    return then(PLAIN, number(offset, form, value))


def l2_entry(value: int) -> Build:
    return then(PLAIN, number(L2_TABLE, ">Q", value))


def with_snapshot(*steps: Build) -> Build:
    return then(PLAIN, lambda path: qemu_img("snapshot", "-c", "before", path), *steps)


def in_snapshot(offset: int, form: str, value: int) -> Build:
    def change(path: Path) -> None:
        with path.open("rb") as image:
            table = read_header(image.fileno(), str(path)).snapshots_offset
        patch(path, table + offset, struct.pack(form, value))

    return change


def with_backing_file(backing_format: str, image_format: str) -> Build:
    def build(path: Path) -> None:
        backing = path.with_name(path.name + ".backing")
        qemu_img("create", "-q", "-f", backing_format, backing, "8M")
        qemu_img("create", "-q", "-f", image_format, "-b", backing, "-F", backing_format, path)

    return build


def with_data_file(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={path}.data,data_file_raw=on", path, "8M")


#: A header extension's type and length, and the end of the extensions. qemu-img's own begin at 112.
_EXTENSION = struct.Struct(">II")


def extensions(*found: tuple[int, bytes]) -> Build:
    whole = b"".join(
        _EXTENSION.pack(kind, len(value)) + value.ljust(-(-len(value) // 8) * 8, b"\x00") for kind, value in found
    )
    return then(PLAIN, put(112, whole + _EXTENSION.pack(0, 0)))


def tiny_with_backing_file(path: Path) -> None:
    """Write a header of 200 bytes: QEMU reads zeros past the end of a file, so it opens this."""
    name = b"/etc/hostname"
    start = header.V2.pack(b"QFI\xfb", 3, 180, len(name), 16, 512, 0, 1, 0x10000, 0x20000, 1, 0, 0)
    path.write_bytes((start + header.V3.pack(0, 0, 0, 4, 104)).ljust(180, b"\x00") + name)


def bomb(path: Path) -> None:
    """Let 64 L1 entries share one L2 table: a file of 320 KiB that claims 32 GiB of data."""
    PLAIN(path)
    patch(path, 24, struct.pack(">Q", 64 << 29))
    patch(path, 36, struct.pack(">I", 64))
    patch(path, L1_TABLE, struct.pack(">Q", 1 << 63 | L2_TABLE) * 64)


HOSTILE_QCOW2: dict[str, tuple[str, Build]] = {
    "backing-file": ("it has a backing file", with_backing_file("raw", "qcow2")),
    "backing-name-too-long": ("backing file name of 1024 bytes", then(PLAIN, put(8, struct.pack(">QI", 1024, 1024)))),
    "backing-name-in-header": ("backing file name of 8 bytes at 16", then(PLAIN, put(8, struct.pack(">QI", 16, 8)))),
    "backing-name-past-cluster": (
        "backing file name of 9 bytes at 65534",
        then(PLAIN, put(8, struct.pack(">QI", 65534, 9))),
    ),
    "data-file": ("it has a data file", with_data_file),
    "data-file-name-alone": ("it has a data file", extensions((0x44415441, b"/etc/shadow"))),
    "encrypted-luks": ("it is encrypted", field(32, ">I", 2)),
    "encrypted-aes": ("it is encrypted", field(32, ">I", 1)),
    "encryption-unknown": ("unknown encryption method 3", field(32, ">I", 3)),
    "crypto-header-alone": ("it is encrypted", extensions((0x0537BE77, bytes(16)))),
    "feature-unknown": ("unknown incompatible features 0x20", field(72, ">Q", 1 << 5)),
    "feature-last": ("unknown incompatible features 0x8", field(72, ">Q", 1 << 63)),
    "dirty": ("marked dirty", field(72, ">Q", 1)),
    "corrupt": ("marked corrupt", field(72, ">Q", 2)),
    "version-4": ("qcow2 version 4", field(4, ">I", 4)),
    "clusters-of-256-bytes": (r"clusters of 2\*\*8", field(20, ">I", 8)),
    "clusters-of-4-mib": (r"clusters of 2\*\*22", field(20, ">I", 22)),
    "virtual-size-of-nothing": ("virtual size of 0", field(24, ">Q", 0)),
    "virtual-size-odd": ("virtual size of 1000 bytes", field(24, ">Q", 1000)),
    "virtual-size-beyond-l1": ("an L1 table of 1 entries", field(24, ">Q", 1 << 50)),
    "l1-absurd": ("L1 table of 34359738360 bytes", field(36, ">I", 0xFFFFFFFF)),
    "l1-outside": ("L1 table reaches to", field(40, ">Q", 1 << 40)),
    "l1-unaligned": ("L1 table at 196616 does not begin", field(40, ">Q", L1_TABLE + 8)),
    "l1-on-header": ("L1 table at 0 does not begin", field(40, ">Q", 0)),
    "refcount-table-outside": ("refcount table reaches to", field(48, ">Q", 1 << 40)),
    "refcount-table-absurd": ("refcount table of 281474976645120 bytes", field(56, ">I", 0xFFFFFFFF)),
    "refcount-table-none": ("no refcount table", field(56, ">I", 0)),
    "refcount-block-outside": (
        "refcount block at .* is not a cluster",
        then(PLAIN, number(REFCOUNT_TABLE, ">Q", 1 << 40)),
    ),
    "refcount-block-on-l1": ("refcount block at 196608 is not", then(PLAIN, number(REFCOUNT_TABLE, ">Q", L1_TABLE))),
    "refcount-block-twice": (
        "refcount block at 131072 is not a cluster of its own",
        then(PLAIN, put(REFCOUNT_TABLE, struct.pack(">QQ", 0x20000, 0x20000))),
    ),
    "refcount-order": (r"refcounts of 2\*\*7 bits", field(96, ">I", 7)),
    "snapshots-absurd": ("65537 snapshots", field(60, ">I", 65537)),
    "snapshots-outside": ("snapshot table reaches", then(field(60, ">I", 1), number(64, ">Q", 1 << 40))),
    "snapshot-l1-outside": ("snapshot's L1 table", with_snapshot(in_snapshot(0, ">Q", 1 << 40))),
    "snapshot-l1-absurd": ("snapshot's L1 table", with_snapshot(in_snapshot(8, ">I", 0xFFFFFFFF))),
    "snapshot-extra-absurd": ("entry of a snapshot", with_snapshot(in_snapshot(36, ">I", 0xFFFFFFFF))),
    "snapshot-name-outside": ("entry of a snapshot", with_snapshot(in_snapshot(14, ">H", 65535))),
    "l2-outside": ("L2 table at .* is not a cluster", then(PLAIN, number(L1_TABLE, ">Q", 1 << 63 | 1 << 40))),
    "l2-unaligned": ("L2 table at .* is not a cluster", then(PLAIN, number(L1_TABLE, ">Q", 1 << 63 | L2_TABLE + 512))),
    "l2-on-l1": ("L2 table at 196608 is not", then(PLAIN, number(L1_TABLE, ">Q", 1 << 63 | L1_TABLE))),
    "bomb": ("L2 table at 262144 is not a cluster of its own", bomb),
    "data-outside": ("data at .* are not a cluster", l2_entry(1 << 63 | 1 << 40)),
    "data-unaligned": ("data at .* are not a cluster", l2_entry(1 << 63 | DATA + 512)),
    "data-on-refcounts": ("names the header or a table", l2_entry(1 << 63 | REFCOUNT_TABLE)),
    "data-on-refcount-block": ("names the header or a table", l2_entry(1 << 63 | 0x20000)),
    "data-on-l1": ("names the header or a table", l2_entry(1 << 63 | L1_TABLE)),
    "data-on-l2": ("names the header or a table", l2_entry(1 << 63 | L2_TABLE)),
    "data-reserved-bits": ("sets reserved bits", l2_entry(1 << 63 | 1 << 58 | DATA)),
    "compressed-outside": ("compressed data at", l2_entry(1 << 62 | 1 << 40)),
    "compressed-on-header": ("compressed data at 16", l2_entry(1 << 62 | 16)),
    "extension-too-long": ("passes the end of the header", then(PLAIN, put(112, _EXTENSION.pack(0x1234, 0xFFFFFFFF)))),
    "extensions-without-end": ("is one too many", extensions(*((0x1000 + index, b"") for index in range(33)))),
    "extension-twice": ("is one too many", extensions((0xE2792ACA, b"raw"), (0xE2792ACA, b"qcow2"))),
    "backing-format-too-long": ("backing format name of 16 bytes", extensions((0xE2792ACA, b"x" * 16))),
    "header-length-short": ("header length of 96", field(100, ">I", 96)),
    "header-length-odd": ("header length of 105", field(100, ">I", 105)),
    "header-length-absurd": ("header length of 2147483648", field(100, ">I", 1 << 31)),
    "compression-type-without-bit": ("contradicts the feature bits", field(104, ">B", 1)),
    "compression-type-unknown": ("unknown compression type 7", then(field(72, ">Q", 8), number(104, ">B", 7))),
    "extended-l2-in-small-clusters": (
        "extended L2 entries with clusters of 8192",
        then(converted("qcow2", "-o", "cluster_size=8192"), number(72, ">Q", 16)),
    ),
    "cut-in-header": ("cut off after 60 bytes", then(PLAIN, truncated(60))),
    "cut-in-version-3": ("cut off after 100 bytes", then(PLAIN, truncated(100))),
    "cut-in-tables": ("reaches to", then(PLAIN, truncated(4096))),
    "cut-in-data": ("data at .* are not a cluster", then(PLAIN, truncated(L2_TABLE + 0x10000))),
    "tiny": ("reaches to", tiny_with_backing_file),
    "also-vdi": ("read as qcow2 and as vdi", then(PLAIN, number(64, "<I", 0xBEDA107F))),
}
