# SPDX-License-Identifier: Apache-2.0
"""The header of an image in the expanded format of ploop, which QEMU calls parallels, with every bound checked.

Sources: docs/interop/parallels.txt of QEMU, and what ``ploop check`` of OpenVZ and the ploop driver of its kernel
refuse.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from imagebackend import exceptions, names

__all__ = [
    "CLUSTER_SIZE",
    "HEADER_SIZE",
    "MAX_SIZE",
    "MAX_SIZE_V1",
    "SIGNATURES",
    "Header",
    "first_block",
    "geometry",
    "pack_header",
    "read_header",
    "round_size",
]

#: Signature, type, heads, cylinders, sectors in a cluster, entries of the block table, sectors of the disk, whether it
#: is in use, first sector of data, flags, first sector of an extension.
_HEADER = struct.Struct("<16sIIIIIQIIIQ")
HEADER_SIZE = _HEADER.size

#: By version: in 1 the block table counts sectors, in 2 clusters.
SIGNATURES = {1: b"WithoutFreeSpace", 2: b"WithouFreSpacExt"}
_TYPE_EXPANDED = 2
_CLOSED, _CLOSED_2_1, _IN_USE = 0, 0x312E3276, 0x746F6E59
#: Bit 0: no data were ever written, which QEMU does not take back when it writes some. Nothing here relies on it.
_KNOWN_FLAGS = 1
_NO_OFFSET = 0xFFFF_FFFF

#: The cluster of new images: that of ploop and of QEMU.
CLUSTER_SIZE = 1 << 20
#: In sectors: 32 KiB to 64 MiB, as ploop has it.
MIN_CLUSTER, MAX_CLUSTER = 64, 131072
#: A table of 64 MiB: disks of 16 TiB, which is also the longest file of ext4.
MAX_ENTRIES = 1 << 24
MAX_SIZE = MAX_ENTRIES * CLUSTER_SIZE
#: Version 1 has 32 bits for a sector, also for the last one of the file, which is longer than the disk by its table.
MAX_SIZE_V1 = (2 << 40) - (16 << 20)


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says of its image; sizes and offsets in bytes.

    :ivar version: 1 or 2.
    :ivar virtual_size: the size of the disk.
    :ivar entries: of the block table, which follows the header.
    :ivar first_block: where data begin.
    :ivar in_use: somebody has the image open for writing, or had and was killed.
    :ivar file_size: the size of the file itself.
    """

    version: int
    virtual_size: int
    cluster_size: int
    entries: int
    first_block: int
    in_use: bool
    file_size: int

    @property
    def unit(self) -> int:
        """What the block table counts for one cluster."""
        return self.cluster_size // names.SECTOR if self.version == 1 else 1


def round_size(size: int) -> int:
    """Return the size that a new disk gets: whole clusters, or the ploop driver does not take it.

    :raises InvalidSize: it is beyond what the block table addresses.
    """
    rounded = -(-size // CLUSTER_SIZE) * CLUSTER_SIZE
    if rounded > MAX_SIZE:
        raise exceptions.InvalidSize(size, f"a ploop disk has at most {MAX_SIZE} bytes")
    return rounded


def first_block(entries: int, cluster_size: int = CLUSTER_SIZE) -> int:
    """Return where data can begin at the earliest, behind a table of so many entries."""
    return -(-(HEADER_SIZE + 4 * entries) // cluster_size) * cluster_size


def geometry(virtual_size: int) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors of a disk, which nothing but old guests look at."""
    sectors = virtual_size // names.SECTOR
    if sectors < 16 * 32:
        return sectors, 1, 1
    in_track = 63 if sectors > 1_032_192 else 32
    return sectors // (16 * in_track), 16, in_track


def pack_header(header: Header) -> bytes:
    """Return the bytes of a header."""
    cylinders, heads, _ = geometry(header.virtual_size)
    return _HEADER.pack(
        SIGNATURES[header.version],
        _TYPE_EXPANDED,
        heads,
        cylinders,
        header.cluster_size // names.SECTOR,
        header.entries,
        header.virtual_size // names.SECTOR,
        _IN_USE if header.in_use else _CLOSED,
        header.first_block // names.SECTOR,
        0,
        0,
    )


def read_header(descriptor: int, name: str) -> Header:
    """Return what the header of an open file says.

    One ``pread`` of 64 bytes.

    :param descriptor: a regular file, open for reading; its position does not change.
    :param name: what to call the image in errors.
    :raises ImageUnacceptable: not such a header, or one that breaks a rule of the format.
    :raises StorageError: the file cannot be read.
    """
    try:
        content = os.pread(descriptor, HEADER_SIZE, 0)
        file_size = os.fstat(descriptor).st_size
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    return _unpack(content, file_size, name)


def _unpack(content: bytes, file_size: int, name: str) -> Header:
    def refusal(reason: str) -> exceptions.ImageUnacceptable:
        return exceptions.ImageUnacceptable(name, reason)

    version = next((number for number, mark in SIGNATURES.items() if content.startswith(mark)), 0)
    if not version:
        raise refusal("it does not begin with the signature of a ploop image, of version 1 or 2")
    if len(content) < HEADER_SIZE:
        raise refusal(f"its header is cut off after {len(content)} bytes")
    _, kind, _, _, cluster, entries, sectors, state, first, flags, extension = _HEADER.unpack(content)
    if kind != _TYPE_EXPANDED:
        raise refusal(f"a ploop image of type {kind}; only the expanded one, {_TYPE_EXPANDED}, is known")
    if not MIN_CLUSTER <= cluster <= MAX_CLUSTER or cluster & (cluster - 1):
        raise refusal(f"clusters of {cluster} sectors; a power of two from {MIN_CLUSTER} to {MAX_CLUSTER} is needed")
    if entries > MAX_ENTRIES:
        raise refusal(f"a block table of {entries} entries; {MAX_ENTRIES} is the limit")
    if not 0 < sectors <= entries * cluster or (version == 1 and sectors > _NO_OFFSET):
        raise refusal(f"a disk of {sectors} sectors with {entries} clusters of {cluster} sectors is not possible")
    if state not in (_CLOSED, _CLOSED_2_1, _IN_USE):
        raise refusal(f"its state {state:#x} is not known")
    if flags & ~_KNOWN_FLAGS:
        raise refusal(f"unknown flags {flags:#x}")
    header = Header(
        version=version,
        virtual_size=sectors * names.SECTOR,
        cluster_size=cluster * names.SECTOR,
        entries=entries,
        first_block=first * names.SECTOR,
        in_use=state == _IN_USE,
        file_size=file_size,
    )
    reason = _misplaced(header, extension * names.SECTOR)
    if reason:
        raise refusal(reason)
    return header


def _misplaced(header: Header, extension: int) -> str:
    """Return what is wrong with where things are in a file; empty: nothing.

    :param extension: byte at which an extension begins; 0: there is none.
    """
    if header.first_block % header.cluster_size or header.first_block < first_block(
        header.entries, header.cluster_size
    ):
        return f"data from byte {header.first_block} on overlap a block table of {header.entries} entries"
    if header.file_size < header.first_block:
        return f"its block table reaches to {header.first_block}, the file ends at {header.file_size}"
    # Nothing here needs what is there, but QEMU reads it: one cluster. A number that is too large ends it by a signal.
    if extension and not header.first_block <= extension <= header.file_size - header.cluster_size:
        return f"its extension, from byte {extension} on, is not in one of the file's clusters"
    return ""
