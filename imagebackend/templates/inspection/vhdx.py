# SPDX-License-Identifier: Apache-2.0
"""VHDX images without a parent ([MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format")."""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from functools import cache

from imagebackend.names import SECTOR
from imagebackend.templates.inspection.subject import Subject, Verdict, upper_bound

__all__ = ["inspect"]

_MIB = 1 << 20
_HEADERS = (64 << 10, 128 << 10)
_HEADER_SIZE = 4096
#: Signature, checksum, sequence number, three GUIDs of which the last is the log's, log version, version.
_HEADER = struct.Struct("<4sIQ16s16s16sHH")
_NO_GUID = bytes(16)

_REGION_TABLES = (192 << 10, 256 << 10)
_REGION_TABLE_SIZE = 64 << 10
#: Signature, checksum, number of entries; then of each: GUID, offset, length, whether it is required.
_TABLE = struct.Struct("<4sIII")
_REGION = struct.Struct("<16sQII")
_BLOCK_TABLE = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le

#: Signature, reserved, number of entries; then of each: GUID, offset, length, flags, reserved.
_METADATA_TABLE = struct.Struct("<8sHH20x")
_METADATA_ENTRY = struct.Struct("<16sIII4x")
_METADATA_TABLE_SIZE = 64 << 10
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_VIRTUAL_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_LOGICAL_SECTOR = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_PHYSICAL_SECTOR = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
_DISK_ID = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
_KNOWN_METADATA = {_FILE_PARAMETERS, _VIRTUAL_SIZE, _LOGICAL_SECTOR, _PHYSICAL_SECTOR, _DISK_ID, _PARENT_LOCATOR}
_MAX_METADATA_ENTRIES = _MAX_REGIONS = 2047
_REQUIRED_METADATA = 4
_HAS_PARENT = 2

#: Block states: 0 to 3 and 5 read as zeros.
_PRESENT, _PARTLY_PRESENT = 6, 7
_STATE = 7
_MAX_VIRTUAL_SIZE = 64 << 40
_MAX_BLOCK_SIZE = 256 << 20


@dataclass(frozen=True, slots=True)
class _Disk:
    block_size: int
    virtual_size: int


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins like a VHDX image.

    :raises ImageUnacceptable: it has a parent, a log to replay, or a table that breaks the format's rules.
    """
    _check_headers(subject)
    regions = _regions(subject)
    disk = _disk(subject, *regions[_METADATA])
    allocated = _count_blocks(subject, disk, *regions[_BLOCK_TABLE]) * disk.block_size
    return Verdict("vhdx", disk.virtual_size, upper_bound(allocated, disk.virtual_size))


def _check_headers(subject: Subject) -> None:
    """Refuse a log that the newest header says must be replayed: the file is not what it will be."""
    newest = -1
    log_guid = _NO_GUID
    for offset in _HEADERS:
        content = subject.read(offset, _HEADER_SIZE, "header")
        signature, checksum, sequence, _, _, log, log_version, version = _HEADER.unpack_from(content)
        if signature != b"head" or checksum != _crc32c(content[:4] + bytes(4) + content[8:]):
            continue
        if version != 1 or log_version != 0:
            raise subject.refusal(f"VHDX version {version} with a log of version {log_version}")
        if sequence == newest and log != log_guid:
            raise subject.refusal("its two VHDX headers contradict each other")
        if sequence > newest:
            newest, log_guid = sequence, log
    if newest < 0:
        raise subject.refusal("neither of its VHDX headers is whole")
    if log_guid != _NO_GUID:
        raise subject.refusal("its VHDX log is not empty: it was not closed cleanly")


def _regions(subject: Subject) -> dict[bytes, tuple[int, int]]:
    first, second = (subject.read(offset, _REGION_TABLE_SIZE, "region table") for offset in _REGION_TABLES)
    signature, checksum, count, _ = _TABLE.unpack_from(first)
    if first != second or signature != b"regi" or checksum != _crc32c(first[:4] + bytes(4) + first[8:]):
        raise subject.refusal("its VHDX region tables are damaged or differ")
    if count > _MAX_REGIONS:
        raise subject.refusal(f"{count} VHDX regions; {_MAX_REGIONS} is the limit")
    regions: dict[bytes, tuple[int, int]] = {}
    for index in range(count):
        guid, offset, length, required = _REGION.unpack_from(first, _TABLE.size + index * _REGION.size)
        if guid in regions:
            raise subject.refusal("a VHDX region is named twice")
        if guid not in (_BLOCK_TABLE, _METADATA) and required:
            raise subject.refusal(f"unknown VHDX region {uuid.UUID(bytes_le=guid)}")
        if offset < _MIB or offset % _MIB or length % _MIB:
            raise subject.refusal(f"a VHDX region of {length} bytes at {offset}")
        subject.check_inside(offset, length, "region")
        regions[guid] = (offset, length)
    if not regions.keys() >= {_BLOCK_TABLE, _METADATA}:
        raise subject.refusal("a VHDX image without block table or metadata")
    return regions


def _metadata(subject: Subject, offset: int, length: int) -> dict[bytes, bytes]:
    table = subject.read(offset, _METADATA_TABLE_SIZE, "metadata table")
    signature, _, count = _METADATA_TABLE.unpack_from(table)
    if signature != b"metadata" or count > _MAX_METADATA_ENTRIES:
        raise subject.refusal(f"a VHDX metadata table of {count} entries")
    found: dict[bytes, bytes] = {}
    for index in range(count):
        guid, start, size, flags = _METADATA_ENTRY.unpack_from(
            table, _METADATA_TABLE.size + index * _METADATA_ENTRY.size
        )
        if guid in found:
            raise subject.refusal("a VHDX metadata item is named twice")
        if guid not in _KNOWN_METADATA:
            if flags & _REQUIRED_METADATA:
                raise subject.refusal(f"unknown VHDX metadata {uuid.UUID(bytes_le=guid)}")
            continue
        if guid == _PARENT_LOCATOR:
            raise subject.refusal("a differencing VHDX: it names a parent")
        if start < _METADATA_TABLE_SIZE or start + size > length or size > 16:
            raise subject.refusal(f"a VHDX metadata item of {size} bytes at {start}")
        found[guid] = subject.read(offset + start, size, "metadata")
    return found


def _disk(subject: Subject, offset: int, length: int) -> _Disk:
    metadata = _metadata(subject, offset, length)
    sizes = {_FILE_PARAMETERS: 8, _VIRTUAL_SIZE: 8, _LOGICAL_SECTOR: 4}
    if any(len(metadata.get(guid, b"")) != size for guid, size in sizes.items()):
        raise subject.refusal("a VHDX image without the metadata that every one has")
    block_size, flags = struct.unpack("<II", metadata[_FILE_PARAMETERS])
    (virtual_size,) = struct.unpack("<Q", metadata[_VIRTUAL_SIZE])
    (sector_size,) = struct.unpack("<I", metadata[_LOGICAL_SECTOR])
    if flags & _HAS_PARENT:
        raise subject.refusal("a differencing VHDX: it has a parent")
    if not _MIB <= block_size <= _MAX_BLOCK_SIZE or block_size & (block_size - 1):
        raise subject.refusal(f"VHDX blocks of {block_size} bytes")
    if sector_size != SECTOR:
        raise subject.refusal(f"VHDX sectors of {sector_size} bytes; QEMU reads those of 512 alone")
    if virtual_size > _MAX_VIRTUAL_SIZE:
        raise subject.refusal(f"a VHDX disk of {virtual_size} bytes; {_MAX_VIRTUAL_SIZE} is the limit")
    subject.check_virtual_size(virtual_size)
    return _Disk(block_size, virtual_size)


def _count_blocks(subject: Subject, disk: _Disk, offset: int, length: int) -> int:
    # After so many blocks comes an entry for their sector bitmap, which only a differencing image has.
    ratio = (SECTOR << 23) // disk.block_size
    blocks = -(-disk.virtual_size // disk.block_size)
    count = blocks + (blocks - 1) // ratio
    if count * 8 > length:
        raise subject.refusal(f"a VHDX block table of {length} bytes for {count} entries")
    present = 0
    for first, entries in subject.entries(offset, count, "Q", "little", "block table"):
        for index, entry in enumerate(entries, first):
            state = entry & _STATE
            if state not in (_PRESENT, _PARTLY_PRESENT):
                continue
            if state == _PARTLY_PRESENT or index % (ratio + 1) == ratio:
                raise subject.refusal("a VHDX block that is partly in a parent")
            place = entry & ~(_MIB - 1)
            if place < _MIB:
                raise subject.refusal("a VHDX block on the headers")
            subject.check_inside(place, 1, "block")
            present += 1
    return present


@cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F6_3B78 if value & 1 else 0)
        table.append(value)
    return table


def _crc32c(content: bytes) -> int:
    """Return the Castagnoli checksum, which zlib does not have."""
    table = _crc_table()
    value = 0xFFFF_FFFF
    for byte in content:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFF_FFFF
