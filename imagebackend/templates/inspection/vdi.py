# SPDX-License-Identifier: Apache-2.0
"""VirtualBox disk images, version 1.1 (block/vdi.c of QEMU)."""

from __future__ import annotations

import struct

from imagebackend.names import SECTOR
from imagebackend.templates.inspection.subject import Subject, Verdict, round_up, upper_bound

__all__ = ["inspect"]

# From offset 64: signature, version, header size, type, flags, description, block map offset, data offset, geometry,
# sector size, unused, disk size, block size, extra bytes, blocks, allocated blocks, and four UUIDs.
_HEADER = struct.Struct("<IIIII256sII12sIIQIIII16s16s16s16s")
_VERSION = 0x0001_0001
_DYNAMIC, _FIXED = 1, 2
_BLOCK_SIZE = 1 << 20
_NO_UUID = bytes(16)
#: Map entries from here on: reads as zeros, and not allocated.
_DISCARDED = 0xFFFF_FFFE
#: A map of 128 MiB: disks of 32 TiB.
_MAX_BLOCKS = 32 << 20


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins like a VDI image.

    :raises ImageUnacceptable: it has a parent, or a table that breaks the format's rules.
    """
    header = _HEADER.unpack(subject.read(64, _HEADER.size, "header"))
    version, image_type = header[1], header[3]
    map_offset, data_offset, sector_size, disk_size = header[6], header[7], header[9], header[11]
    block_size, block_extra, blocks = header[12:15]
    if version != _VERSION:
        raise subject.refusal(f"VDI version {version:#x}; {_VERSION:#x} is known")
    if image_type not in (_DYNAMIC, _FIXED) or header[18] != _NO_UUID or header[19] != _NO_UUID:
        raise subject.refusal("a differencing VDI image: it has a parent")
    if sector_size != SECTOR or block_size != _BLOCK_SIZE or block_extra:
        raise subject.refusal(f"VDI blocks of {block_size} + {block_extra} bytes, sectors of {sector_size} bytes")
    if map_offset < SECTOR or map_offset % SECTOR or data_offset % SECTOR or data_offset < map_offset + 4 * blocks:
        raise subject.refusal(f"a block map at {map_offset} and data at {data_offset} are not possible")
    virtual_size = round_up(disk_size, SECTOR)
    subject.check_virtual_size(virtual_size)
    if blocks > _MAX_BLOCKS or virtual_size > blocks * _BLOCK_SIZE:
        raise subject.refusal(f"{blocks} blocks of 1 MiB for {virtual_size} bytes; {_MAX_BLOCKS} is the limit")
    allocated = _count_blocks(subject, map_offset, data_offset, blocks)
    return Verdict("vdi", virtual_size, upper_bound(allocated * _BLOCK_SIZE, virtual_size))


def _count_blocks(subject: Subject, map_offset: int, data_offset: int, blocks: int) -> int:
    count = 0
    for _, entries in subject.entries(map_offset, blocks, "I", "little", "block map"):
        used = [entry for entry in entries if entry < _DISCARDED]
        if used:
            subject.check_inside(data_offset + max(used) * _BLOCK_SIZE, 1, "last block")
        count += len(used)
    return count
