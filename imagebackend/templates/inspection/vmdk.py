# SPDX-License-Identifier: Apache-2.0
"""VMDK images in one sparse file: monolithicSparse and streamOptimized.

Sources: "Virtual Disk Format 5.0", VMware; block/vmdk.c of QEMU, which looks for a parent in the 20 sectors after the
header wherever the header says that the descriptor is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagebackend.names import SECTOR
from imagebackend.templates.inspection import vmdk_descriptor
from imagebackend.templates.inspection.subject import BLOCK, Subject, Verdict, upper_bound

__all__ = ["inspect"]

_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_LINE_ENDS = b"\n \r\n"
_ZERO_GRAINS, _COMPRESSED, _MARKERS = 1 << 2, 1 << 16, 1 << 17
_AT_END = (1 << 64) - 1
_ENTRIES_PER_TABLE = 512
_MAX_GRAIN_SECTORS = 4096
_MAX_DESCRIPTOR_SECTORS = 128
#: What QEMU searches for a parent.
_SEARCHED_SECTORS = 20
#: 64 TiB in grains of 64 KiB; what fits into the bound on all reads is less.
_MAX_TABLES = 2 << 20

#: Before the footer of a stream, and after it: number, size, kind.
_MARKER = struct.Struct("<QII")
_FOOTER, _END_OF_STREAM = 3, 0


@dataclass(frozen=True, slots=True)
class _Header:
    """The binary header; sizes in sectors."""

    version: int
    flags: int
    capacity: int
    grain: int
    descriptor_offset: int
    descriptor_size: int
    entries_per_table: int
    directory_offset: int
    compression: int


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins like a sparse VMDK extent.

    :raises ImageUnacceptable: it needs another file, is of another type, or has a table that breaks the format's
        rules.
    """
    header = _header(subject, subject.read(0, SECTOR, "header"))
    if header.descriptor_offset != 1 or not 1 <= header.descriptor_size <= _MAX_DESCRIPTOR_SECTORS:
        raise subject.refusal(
            f"a VMDK whose descriptor has {header.descriptor_size} sectors at sector {header.descriptor_offset}"
        )
    virtual_size = header.capacity * SECTOR
    subject.check_virtual_size(virtual_size)
    content = subject.read(SECTOR, header.descriptor_size * SECTOR, "descriptor")
    create_type = vmdk_descriptor.check_descriptor(subject, content, virtual_size)
    if b"parentfilenamehint" in subject.read_up_to(SECTOR, _SEARCHED_SECTORS * SECTOR).lower():
        raise subject.refusal("a VMDK that names a parent after its descriptor")
    if header.directory_offset == _AT_END:
        header = _footer(subject, header)
    if (create_type == "streamOptimized") != bool(header.flags & _COMPRESSED):
        raise subject.refusal(f"a VMDK of type {create_type}, but its flags are {header.flags:#x}")
    allocated = _count_grains(subject, header) * max(header.grain * SECTOR, BLOCK)
    return Verdict("vmdk", virtual_size, upper_bound(allocated, virtual_size), (create_type,))


def _header(subject: Subject, sector: bytes) -> _Header:
    magic, version, flags, capacity, grain, offset, size, per_table, _, directory, _, _, ends, compression = (
        _HEADER.unpack_from(sector)
    )
    if magic != b"KDMV" or not 1 <= version <= 3 or ends != _LINE_ENDS:
        raise subject.refusal(f"a damaged VMDK header, version {version}")
    if per_table != _ENTRIES_PER_TABLE or not 8 <= grain <= _MAX_GRAIN_SECTORS or grain & (grain - 1):
        raise subject.refusal(f"VMDK grains of {grain} sectors, {per_table} in a table")
    if compression not in (0, 1) or bool(flags & _COMPRESSED) != bool(compression):
        raise subject.refusal(f"VMDK compression {compression} with flags {flags:#x}")
    return _Header(version, flags, capacity, grain, offset, size, per_table, directory, compression)


def _footer(subject: Subject, first: _Header) -> _Header:
    """Return the header at the end of a stream, which differs from the first in the directory's place alone."""
    tail = subject.read(subject.size - 3 * SECTOR, 3 * SECTOR, "footer")
    _, size, kind = _MARKER.unpack_from(tail)
    end = _MARKER.unpack_from(tail, 2 * SECTOR)
    if subject.size % SECTOR or (size, kind) != (0, _FOOTER) or end != (0, 0, _END_OF_STREAM):
        raise subject.refusal("a VMDK stream without a footer at its end")
    last = _header(subject, tail[SECTOR : 2 * SECTOR])
    same = ("flags", "capacity", "grain", "descriptor_offset", "descriptor_size", "compression")
    if not first.flags & _MARKERS or any(getattr(first, field) != getattr(last, field) for field in same):
        raise subject.refusal("a VMDK stream whose footer contradicts its header")
    return last


def _count_grains(subject: Subject, header: _Header) -> int:
    """Return how many grains have data; every offset is checked to lie in the file."""
    tables = -(-header.capacity // (header.grain * header.entries_per_table))
    if tables > _MAX_TABLES:
        raise subject.refusal(f"a VMDK with {tables} grain tables; {_MAX_TABLES} is the limit")
    # With this flag the entry 1 stands for a grain of zeros.
    lowest = 2 if header.flags & _ZERO_GRAINS else 1
    count = 0
    seen: set[int] = set()
    for _, directory in subject.entries(header.directory_offset * SECTOR, tables, "I", "little", "grain directory"):
        for sector in filter(None, directory):
            if sector in seen:
                raise subject.refusal(f"the grain table at sector {sector} is named twice")
            seen.add(sector)
            for _, grains in subject.entries(sector * SECTOR, header.entries_per_table, "I", "little", "grain table"):
                used = [grain for grain in grains if grain >= lowest]
                if used:
                    subject.check_inside(max(used) * SECTOR, 1, "last grain")
                count += len(used)
    return count
