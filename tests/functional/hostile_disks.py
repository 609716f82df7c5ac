# SPDX-License-Identifier: Apache-2.0
"""VHD, VHDX, VDI and other images that must not become templates: the reason to be given, and what makes the image."""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

from tests.functional.hostile_qcow2 import HOSTILE_QCOW2
from tests.functional.image_building import (
    MIB,
    Build,
    content,
    converted,
    make_disk,
    number,
    patch,
    put,
    qemu_img,
    then,
    truncated,
)

DYNAMIC = converted("vpc", "-o", "subformat=dynamic")
FIXED = converted("vpc", "-o", "subformat=fixed")
#: Of a footer, its checksum and type; of a dynamic header, which follows the footer's copy, its checksum.
FOOTER_CHECKSUM, FOOTER_TYPE, HEADER_CHECKSUM = 64, 60, 36


def _sealed(structure: bytearray, offset: int) -> bytes:
    structure[offset : offset + 4] = bytes(4)
    structure[offset : offset + 4] = struct.pack(">I", ~sum(structure) & 0xFFFFFFFF)
    return bytes(structure)


def footer(offset: int, content: bytes, build: Build = DYNAMIC, *, copy: bool = True) -> Build:
    """Change the footer of a VHD and its copy, and make their checksums right."""

    def change(path: Path) -> None:
        whole = bytearray(path.read_bytes()[-512:])
        whole[offset : offset + len(content)] = content
        patch(path, -512, _sealed(whole, FOOTER_CHECKSUM))
        if copy:
            patch(path, 0, bytes(whole))

    return then(build, change)


def dynamic_header(offset: int, content: bytes) -> Build:
    """Change the dynamic header of a VHD, and make its checksum right."""

    def change(path: Path) -> None:
        whole = bytearray(path.read_bytes()[512:1536])
        whole[offset : offset + len(content)] = content
        patch(path, 512, _sealed(whole, HEADER_CHECKSUM))

    return then(DYNAMIC, change)


HOSTILE_VHD: dict[str, tuple[str, Build]] = {
    "differencing": ("a differencing VHD", footer(FOOTER_TYPE, struct.pack(">I", 4))),
    "type-unknown": ("unknown VHD type 7", footer(FOOTER_TYPE, struct.pack(">I", 7))),
    "version": ("VHD version 0x20000", footer(12, struct.pack(">I", 0x20000))),
    "suspended": ("a machine that was suspended", footer(84, b"\x01")),
    "parent-uuid": ("names a parent", dynamic_header(40, uuid.uuid4().bytes)),
    "parent-name": ("names a parent", dynamic_header(64, "/etc/passwd".encode("utf-16-be"))),
    "parent-locator": ("names a parent", dynamic_header(576, b"W2ku")),
    "checksum": ("checksum of its footer", then(DYNAMIC, put(0, b"conectix"), put(-512 + 40, b"\xff"))),
    "header-checksum": ("checksum of its dynamic header", then(DYNAMIC, number(512 + 28, ">I", 1))),
    "copies-differ": ("two copies of its footer differ", footer(24, b"\x01\x02\x03\x04", copy=False)),
    "header-outside": ("dynamic header .* is not in the file", footer(16, struct.pack(">Q", 1 << 40))),
    "header-elsewhere": ("its dynamic header is not one", footer(16, struct.pack(">Q", 1536))),
    "table-outside": ("block table .* is not in the file", dynamic_header(16, struct.pack(">Q", 1 << 40))),
    "table-absurd": ("4294967295 blocks", dynamic_header(28, struct.pack(">I", 0xFFFFFFFF))),
    "table-short": ("1 blocks of", dynamic_header(28, struct.pack(">I", 1))),
    "block-size": ("VHD blocks of 3 bytes", dynamic_header(32, struct.pack(">I", 3))),
    "block-outside": ("last block .* is not in the file", then(DYNAMIC, number(1536, ">I", 0x7FFFFFFF))),
    "block-on-footer": ("block lies on the footer", then(DYNAMIC, number(1536, ">I", 0))),
    "size-of-nothing": ("virtual size of 0", footer(48, bytes(12))),
    "cut": ("claimed to be vhd, but it is raw|does not end with a VHD footer", then(DYNAMIC, truncated(-512))),
    "cut-in-footer": ("a VHD of", then(DYNAMIC, truncated(-1))),
    "fixed-cut": ("a fixed VHD of", footer(56, struct.pack(">HBB", 2000, 16, 63), FIXED, copy=False)),
    "fixed-with-header": ("fixed VHD with a header", footer(16, bytes(8), FIXED, copy=False)),
    "fixed-like-dynamic": ("begins like a dynamic one", then(FIXED, put(0, b"conectix"))),
    "raw": ("claimed to be vhd, but it is raw", make_disk),
}

VHDX = converted("vhdx")
HEADERS, REGION_TABLES = (64 << 10, 128 << 10), (192 << 10, 256 << 10)
HAS_PARENT = 2


def _crc32c(content: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def _reseal(path: Path, start: int, length: int, offset: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes()[start : start + length])
    whole[offset : offset + len(content)] = content
    whole[4:8] = bytes(4)
    whole[4:8] = struct.pack("<I", _crc32c(whole))
    patch(path, start, bytes(whole))


def vhdx_headers(offset: int, content: bytes) -> Build:
    def change(path: Path) -> None:
        for start in HEADERS:
            _reseal(path, start, 4096, offset, content)

    return then(VHDX, change)


def vhdx_regions(offset: int, content: bytes) -> Build:
    def change(path: Path) -> None:
        _reseal(path, REGION_TABLES[0], 64 << 10, offset, content)
        patch(path, REGION_TABLES[1], path.read_bytes()[REGION_TABLES[0] : REGION_TABLES[0] + (64 << 10)])

    return then(VHDX, change)


def unknown_region(path: Path) -> None:
    """Make a VHDX need a region of a kind that nobody knows, beside the two that all have."""
    VHDX(path)
    third = REGION_TABLES[0] + 16 + 2 * 32
    patch(path, third, struct.pack("<16sQII", uuid.uuid4().bytes_le, MIB, MIB, 1))
    _reseal(path, REGION_TABLES[0], 64 << 10, 8, struct.pack("<I", 3))
    patch(path, REGION_TABLES[1], path.read_bytes()[REGION_TABLES[0] : REGION_TABLES[0] + (64 << 10)])


def one_metadata_item(path: Path) -> None:
    VHDX(path)
    patch(path, _region(path, "8b7ca206-4790-4b9a-b8fe-575f050f886e") + 10, struct.pack("<H", 1))


def _region(path: Path, guid: str) -> int:
    table = path.read_bytes()[REGION_TABLES[0] :][: 64 << 10]
    (offset,) = struct.unpack_from("<Q", table, table.index(uuid.UUID(guid).bytes_le) + 16)
    return int(offset)


def vhdx_metadata(guid: str, content: bytes) -> Build:
    """Change the value of a metadata item."""

    def change(path: Path) -> None:
        region = _region(path, "8b7ca206-4790-4b9a-b8fe-575f050f886e")
        table = path.read_bytes()[region : region + (64 << 10)]
        (offset,) = struct.unpack_from("<I", table, table.index(uuid.UUID(guid).bytes_le) + 16)
        patch(path, region + offset, content)

    return then(VHDX, change)


def vhdx_metadata_item(guid: str, renamed: str) -> Build:
    """Give a metadata item another identity."""

    def change(path: Path) -> None:
        region = _region(path, "8b7ca206-4790-4b9a-b8fe-575f050f886e")
        table = path.read_bytes()[region : region + (64 << 10)]
        patch(path, region + table.index(uuid.UUID(guid).bytes_le), uuid.UUID(renamed).bytes_le)

    return then(VHDX, change)


def vhdx_block(entry: int) -> Build:
    def change(path: Path) -> None:
        patch(path, _region(path, "2dc27766-f623-4200-9d64-115e9bfd4a08"), struct.pack("<Q", entry))

    return then(VHDX, change)


FILE_PARAMETERS = "caa16737-fa36-4d43-b3b6-33f0aa44e76b"
VIRTUAL_SIZE = "2fa54224-cd1b-4876-b211-5dbed83bf4b8"
SECTOR_SIZE = "8141bf1d-a96f-4709-ba47-f233a8faab5f"
PARENT_LOCATOR = "a8d35f2d-b30b-454d-abf7-d3d84834ab0c"
DISK_ID = "beca12ab-b2e6-4523-93ef-c309e000c746"

HOSTILE_VHDX: dict[str, tuple[str, Build]] = {
    "has-parent": ("a differencing VHDX", vhdx_metadata(FILE_PARAMETERS, struct.pack("<II", 8 * MIB, HAS_PARENT))),
    "parent-locator": ("names a parent", vhdx_metadata_item(DISK_ID, PARENT_LOCATOR)),
    "log": ("log is not empty", vhdx_headers(48, uuid.uuid4().bytes)),
    "version": ("VHDX version 2", vhdx_headers(66, b"\x02\x00")),
    "headers-damaged": ("neither of its VHDX headers", then(VHDX, *(put(start + 100, b"x") for start in HEADERS))),
    "regions-damaged": ("region tables are damaged", then(VHDX, put(REGION_TABLES[0] + 200, b"x"))),
    "regions-differ": ("region tables are damaged or differ", then(VHDX, put(REGION_TABLES[1] + 200, b"x"))),
    "regions-absurd": ("4294967295 VHDX regions", vhdx_regions(8, struct.pack("<I", 0xFFFFFFFF))),
    "regions-none": ("without block table or metadata", vhdx_regions(8, struct.pack("<I", 0))),
    "region-outside": ("region .* is not in the file", vhdx_regions(32, struct.pack("<Q", 1 << 40))),
    "region-unaligned": ("a VHDX region of", vhdx_regions(32, struct.pack("<Q", 512))),
    "region-unknown": ("unknown VHDX region", unknown_region),
    "metadata-unknown": ("unknown VHDX metadata", vhdx_metadata_item(DISK_ID, str(uuid.uuid4()))),
    "metadata-missing": ("metadata that every one has", one_metadata_item),
    "metadata-twice": ("item is named twice", vhdx_metadata_item(SECTOR_SIZE, DISK_ID)),
    "size-of-nothing": ("virtual size of 0", vhdx_metadata(VIRTUAL_SIZE, bytes(8))),
    "size-absurd": ("a VHDX disk of", vhdx_metadata(VIRTUAL_SIZE, struct.pack("<Q", 1 << 60))),
    "size-beyond-table": ("a VHDX block table of", vhdx_metadata(VIRTUAL_SIZE, struct.pack("<Q", 60 << 40))),
    "block-size": ("VHDX blocks of 3 bytes", vhdx_metadata(FILE_PARAMETERS, struct.pack("<II", 3, 0))),
    "sector-size": ("VHDX sectors of 4096", vhdx_metadata(SECTOR_SIZE, struct.pack("<I", 4096))),
    "block-outside": ("block .* is not in the file", vhdx_block(1 << 50 | 6)),
    "block-on-headers": ("block on the headers", vhdx_block(6)),
    "block-partly-in-parent": ("partly in a parent", vhdx_block(8 * MIB | 7)),
    "cut": ("is not in the file", then(VHDX, truncated(300 << 10))),
    "tiny": ("header .* is not in the file", content(b"vhdxfile", 100)),
}

VDI = converted("vdi")
#: Where the header keeps the UUIDs of what it links to and of its parent.
LINK, PARENT = 424, 440


def vdi(offset: int, form: str, value: int) -> Build:
    return then(VDI, number(offset, form, value))


HOSTILE_VDI: dict[str, tuple[str, Build]] = {
    "parent": ("a differencing VDI", then(VDI, put(PARENT, uuid.uuid4().bytes))),
    "link": ("a differencing VDI", then(VDI, put(LINK, uuid.uuid4().bytes))),
    "differencing": ("a differencing VDI", vdi(76, "<I", 4)),
    "undo": ("a differencing VDI", vdi(76, "<I", 3)),
    "version": ("VDI version 0x20000", vdi(68, "<I", 0x20000)),
    "map-outside": ("block map at|is not in the file", vdi(340, "<I", 0xFFFFFE00)),
    "map-on-header": ("block map at 0", vdi(340, "<I", 0)),
    "data-outside": ("last block .* is not in the file", vdi(344, "<I", 0xFFFFFE00)),
    "data-on-map": ("data at 0 are not possible", vdi(344, "<I", 0)),
    "block-outside": ("last block .* is not in the file", vdi(512, "<I", 0x00FFFFFF)),
    "block-size": ("VDI blocks of 4096", vdi(376, "<I", 4096)),
    "block-extra": ("VDI blocks of 1048576 . 512", vdi(380, "<I", 512)),
    "sector-size": ("sectors of 4096", vdi(360, "<I", 4096)),
    "size-of-nothing": ("virtual size of 0", vdi(368, "<Q", 0)),
    "size-absurd": ("virtual size of", vdi(368, "<Q", (1 << 64) - 512)),
    "size-beyond-blocks": ("8 blocks of 1 MiB", vdi(368, "<Q", 9 * MIB)),
    "blocks-absurd": ("block map at", vdi(384, "<I", 0xFFFFFFFF)),
    "cut": ("is not in the file", then(VDI, truncated(520))),
    "tiny": ("header .* is not in the file", then(VDI, truncated(100))),
}


def created(image_format: str) -> Build:
    return lambda path: qemu_img("create", "-q", "-f", image_format, path, "8M")


PLOOP = converted("parallels")


def ploop(offset: int, form: str, value: int) -> Build:
    return then(PLOOP, number(offset, form, value))


#: The fields of the header of 64 bytes, which the block table follows.
HOSTILE_PLOOP: dict[str, tuple[str, Build]] = {
    "version": ("claimed to be ploop, but it is raw", then(PLOOP, put(0, b"WithouFreSpacExu"))),
    "type": ("a ploop image of type 1", ploop(16, "<I", 1)),
    "cluster": ("clusters of 3 sectors", ploop(28, "<I", 3)),
    "table-absurd": ("block table of 4294967295 entries", ploop(32, "<I", 0xFFFFFFFF)),
    "table-on-data": ("overlap a block table", ploop(32, "<I", 1 << 20)),
    "size-of-nothing": ("a disk of 0 sectors", ploop(36, "<Q", 0)),
    "size-beyond-table": ("with 8 clusters of 2048 sectors", ploop(36, "<Q", 1 << 40)),
    "in-use": ("marked in use", ploop(44, "<I", 0x746F6E59)),
    "state": ("its state 0x7 is not known", ploop(44, "<I", 7)),
    "data-on-table": ("overlap a block table", ploop(48, "<I", 0)),
    "data-outside": ("the file ends at", ploop(48, "<I", 0x40000000)),
    "flags": ("unknown flags 0x80", ploop(52, "<I", 0x80)),
    "extension-outside": ("its extension, from byte 536870912 on", ploop(56, "<Q", 1 << 20)),
    "extension-absurd": ("its extension, from byte 9223372036854775808 on", ploop(56, "<Q", 1 << 54)),
    "extension-on-table": ("its extension, from byte 512 on", ploop(56, "<Q", 1)),
    "entry-outside": ("is no cluster of the file", ploop(64, "<I", 0x7FFFFFFF)),
    "entry-on-table": ("which is in use already", ploop(48, "<I", 4096)),
    "entry-twice": ("which is in use already", ploop(68, "<I", 1)),
    "beyond-the-end": ("goes on beyond the disk", ploop(36, "<Q", 2048)),
    "cut": ("is no cluster of the file", then(PLOOP, truncated(-MIB))),
    "cut-in-table": ("the file ends at", then(PLOOP, truncated(70))),
    "tiny": ("cut off after 60 bytes", then(PLOOP, truncated(60))),
}

# No LUKS by qemu-img: it measures its key derivation first, and gives up on a busy machine.

#: What QEMU, or a tool beside it, opens as something else than what it is claimed to be.
HOSTILE_RAW: dict[str, tuple[str, Build]] = {
    "that-is-qcow2": ("claimed to be raw, but it is qcow2", converted("qcow2")),
    "that-is-qcow2-with-backing-file": ("but it is qcow2", HOSTILE_QCOW2["backing-file"][1]),
    "that-is-vmdk": ("claimed to be raw, but it is vmdk", converted("vmdk")),
    "that-is-vdi": ("claimed to be raw, but it is vdi", VDI),
    "that-is-ploop": ("claimed to be raw, but it is parallels", created("parallels")),
    "that-is-cut-ploop": ("claimed to be raw, but it is parallels", content(b"WithoutFreeSpace", 512)),
    "that-is-vhdx": ("claimed to be raw, but it is vhdx", VHDX),
    "that-is-dynamic-vhd": ("claimed to be raw, but it is vpc", DYNAMIC),
    "that-is-fixed-vhd": ("claimed to be raw, but it is vpc", FIXED),
    "that-is-cut-vhd": ("claimed to be raw, but it is vpc", then(FIXED, truncated(-1))),
    "empty": ("0 bytes, less than one sector", content(b"", 0)),
    "tiny": ("100 bytes, less than one sector", content(b"", 100)),
    "tiny-qcow2": ("claimed to be raw, but it is qcow2", content(b"QFI\xfb\x00\x00\x00\x03", 8)),
}

HOSTILE_OTHERS: dict[str, tuple[str, Build]] = {
    "qcow": ("a qcow image of version 1", created("qcow")),
    "qed": ("a qed image", created("qed")),
    "luks": ("a LUKS volume", content(b"LUKS\xba\xbe\x00\x01aes".ljust(40, b"\x00") + b"xts-plain64")),
    "luks-2": ("a LUKS volume", content(b"LUKS\xba\xbe\x00\x02")),
    "bochs": ("a bochs growing disk", content(b"Bochs Virtual HD Image".ljust(32, b"\x00") + b"Redolog")),
    "cloop": (
        "a cloop image",
        content(b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/"),
    ),
    "cow": ("a cow image of an old QEMU", content(b"OOOM\x00\x00\x00\x02")),
    "cowd": ("a VMDK of type COWD", content(b"COWD\x01\x00\x00\x00")),
    "dmg": ("a dmg image", then(content(b"", MIB), put(-512, b"koly\x00\x00\x00\x04\x00\x00\x02\x00"))),
    "descriptor": ("a VMDK descriptor", content(b'version=1\nRW 8 FLAT "/etc/passwd" 0\n', 1024)),
    "descriptor-commented": ("a VMDK descriptor", content(b"# a\n\n  \n# b\r\nversion=3\r\n", 1024)),
    "descriptor-by-title": ("a VMDK descriptor", content(b"# Disk DescriptorFile\nnothing else\n", 1024)),
    "descriptor-shouted": ("a VMDK descriptor", content(b"\tVersion = 1\n", 1024)),
}
