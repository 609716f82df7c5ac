# SPDX-License-Identifier: Apache-2.0
"""VMDK images that must not become templates: the reason that the refusal has to give, and what makes the image."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.functional.image_building import Build, converted, number, patch, put, qemu_img, then, truncated

SPARSE = converted("vmdk", "-o", "subformat=monolithicSparse")
STREAM = converted("vmdk", "-o", "subformat=streamOptimized")
DESCRIPTOR, DESCRIPTOR_SIZE = 512, 20 * 512
#: Where the header keeps them.
FLAGS, CAPACITY, GRAIN, DESCRIPTOR_OFFSET, PER_TABLE, DIRECTORY, LINE_ENDS, COMPRESSION = 8, 12, 20, 28, 44, 56, 73, 77
AT_END = (1 << 64) - 1


def edited(old: bytes, new: bytes, build: Build = SPARSE) -> Build:
    """Replace a piece of the descriptor."""

    def edit(path: Path) -> None:
        with path.open("rb") as image:
            image.seek(DESCRIPTOR)
            text = image.read(DESCRIPTOR_SIZE).partition(b"\x00")[0]
        assert old in text
        patch(path, DESCRIPTOR, text.replace(old, new).ljust(DESCRIPTOR_SIZE, b"\x00"))

    return then(build, edit)


def with_line(line: bytes) -> Build:
    return edited(b"# Extent description\n", b"# Extent description\n" + line + b"\n")


def changed(offset: int, form: str, value: int) -> Build:
    return then(SPARSE, number(offset, form, value))


def directory_entry(index: int, value: int) -> Build:
    """Change an entry of the grain directory."""

    def change(path: Path) -> None:
        patch(path, _directory(path) + 4 * index, struct.pack("<I", value))

    return then(SPARSE, change)


def grain_entry(value: int) -> Build:
    """Change the first entry of the first grain table."""

    def change(path: Path) -> None:
        (sector,) = _read(path, _directory(path), "<I")
        patch(path, sector * 512, struct.pack("<I", value))

    return then(SPARSE, change)


def _directory(path: Path) -> int:
    (sector,) = _read(path, DIRECTORY, "<Q")
    return sector * 512


def _read(path: Path, offset: int, form: str) -> tuple[int, ...]:
    with path.open("rb") as image:
        image.seek(offset)
        return struct.unpack(form, image.read(struct.calcsize(form)))


def end_directory(*, capacity: int | None = None, kind: int = 3) -> Build:
    """Let a stream keep its grain directory's place in a footer, as VMware's tools do."""

    def change(path: Path) -> None:
        with path.open("r+b") as image:
            header = image.read(512)
            footer = bytearray(header)
            if capacity is not None:
                footer[CAPACITY : CAPACITY + 8] = struct.pack("<Q", capacity)
            image.seek(0, 2)
            image.write(struct.pack("<QII", 1, 0, kind).ljust(512, b"\x00") + footer + bytes(512))
        patch(path, DIRECTORY, struct.pack("<Q", AT_END))

    return then(STREAM, change)


def flat(subformat: str) -> Build:
    def build(path: Path) -> None:
        qemu_img("create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", path, "8M")

    return build


def with_parent(path: Path) -> None:
    backing = path.with_name("parent-" + path.name)
    qemu_img("create", "-q", "-f", "vmdk", backing, "8M")
    qemu_img("create", "-q", "-f", "vmdk", "-b", backing, "-F", "vmdk", path)


def parent_after_descriptor(path: Path) -> None:
    """Shorten the descriptor by the header's account, and hide a parent in what QEMU reads nevertheless."""
    SPARSE(path)
    patch(path, DESCRIPTOR_OFFSET + 8, struct.pack("<Q", 4))
    patch(path, DESCRIPTOR + 6 * 512, b'parentFileNameHint="/etc/passwd"\n')


HOSTILE_VMDK: dict[str, tuple[str, Build]] = {
    "monolithic-flat": ("whose extents are other files", flat("monolithicFlat")),
    "two-gb-sparse": ("whose extents are other files", flat("twoGbMaxExtentSparse")),
    "two-gb-flat": ("whose extents are other files", flat("twoGbMaxExtentFlat")),
    "parent-by-qemu-img": ("names a parent|parentfilenamehint", with_parent),
    "foreign-extent": ("line that is not allowed", with_line(b'RW 16384 FLAT "/etc/passwd" 0')),
    "foreign-extent-alone": ("line that is not allowed", edited(b"RW 16384 SPARSE", b"RW 16384 FLAT")),
    "extent-elsewhere": ("line that is not allowed", edited(b' SPARSE "', b' SPARSE "/etc/')),
    "extent-above": ("line that is not allowed", edited(b' SPARSE "', b' SPARSE "..\\')),
    "extent-no-access": ("line that is not allowed", edited(b"RW 16384", b"NOACCESS 16384")),
    "extent-twice": ("does not name exactly one extent", with_line(b'RW 16384 SPARSE "other.vmdk"')),
    "extent-in-comment": ("does not name exactly one extent", with_line(b'# rw 16384 flat "/etc/passwd" 0')),
    "extent-none": ("does not name exactly one extent", edited(b"RW 16384", b"#")),
    "extent-size": ("extents of .16383. sectors", edited(b"RW 16384", b"RW 16383")),
    "parent-hint": ("word parentfilenamehint", with_line(b'parentFileNameHint="/etc/passwd"')),
    "parent-hint-shouted": ("word parentfilenamehint", with_line(b'PARENTFILENAMEHINT = "/etc/passwd"')),
    "parent-hint-in-comment": ("word parentfilenamehint", with_line(b'#parentFileNameHint="/etc/passwd"')),
    "parent-hint-in-value": ("word parentfilenamehint", with_line(b'ddb.comment = "parentFileNameHint=/etc/passwd"')),
    "parent-hint-after-end": ("goes on after its end", with_line(b'\x00parentFileNameHint="/etc/passwd"')),
    "parent-after-descriptor": ("parent after its descriptor", parent_after_descriptor),
    "parent-cid": ("names a parent, CID", edited(b"parentCID=ffffffff", b"parentCID=12345678")),
    "parent-cid-none": ("exactly one parentcid", edited(b"parentCID=ffffffff\n", b"")),
    "parent-cid-twice": ("sets PARENTCID twice", with_line(b"PARENTCID=12345678")),
    "change-tracking": ("word changetrackpath", with_line(b'changeTrackPath="/etc/passwd"')),
    "encrypted": ("word encryption", with_line(b'encryption.keySafe = "vmware:key/list"')),
    "type-flat": ("VMDK type 'monolithicFlat'", edited(b"monolithicSparse", b"monolithicFlat")),
    "type-custom": ("VMDK type 'custom'", edited(b"monolithicSparse", b"custom")),
    "type-twice": ("sets createType twice", with_line(b'createType="custom"')),
    "type-none": ("exactly one createtype", edited(b'createType="monolithicSparse"\n', b"")),
    "type-wrong": ("but its flags are", edited(b"monolithicSparse", b"streamOptimized")),
    "line-unknown": ("line that is not allowed: 'include", with_line(b"include /etc/passwd")),
    "not-ascii": ("line that is not allowed", with_line(b"parent\xff = 1")),
    "version": ("damaged VMDK header, version 4", changed(4, "<I", 4)),
    "line-ends": ("damaged VMDK header", then(SPARSE, put(LINE_ENDS, b"\n\n\n\n"))),
    "capacity-of-nothing": ("virtual size of 0", changed(CAPACITY, "<Q", 0)),
    "capacity-absurd": ("virtual size of .* is not possible", changed(CAPACITY, "<Q", 1 << 60)),
    "capacity-other": ("extents of .16384. sectors", changed(CAPACITY, "<Q", 16392)),
    "grain": ("VMDK grains of 3 sectors", changed(GRAIN, "<Q", 3)),
    "grain-absurd": ("VMDK grains of 1073741824 sectors", changed(GRAIN, "<Q", 1 << 30)),
    "per-table": ("4294967295 in a table", changed(PER_TABLE, "<I", 0xFFFFFFFF)),
    "compression": ("VMDK compression 9", changed(COMPRESSION, "<H", 9)),
    "descriptor-elsewhere": ("20 sectors at sector 2", changed(DESCRIPTOR_OFFSET, "<Q", 2)),
    "descriptor-none": ("20 sectors at sector 0", changed(DESCRIPTOR_OFFSET, "<Q", 0)),
    "descriptor-absurd": ("sectors at sector 1", changed(DESCRIPTOR_OFFSET + 8, "<Q", 1 << 40)),
    "directory-outside": ("grain directory .* is not in the file", changed(DIRECTORY, "<Q", 1 << 40)),
    "table-outside": ("grain table .* is not in the file", directory_entry(0, 0xFFFFFFF0)),
    "grain-outside": ("last grain .* is not in the file", grain_entry(0xFFFFFFF0)),
    "stream-without-footer": ("stream without a footer", then(STREAM, number(DIRECTORY, "<Q", AT_END))),
    "stream-footer-kind": ("stream without a footer", end_directory(kind=2)),
    "stream-footer-other": ("footer contradicts", end_directory(capacity=32768)),
    "cut": ("grain directory|grain table|is not in the file", then(SPARSE, truncated(8192))),
    "tiny": ("header .* is not in the file", then(SPARSE, truncated(100))),
}
