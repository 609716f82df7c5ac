# SPDX-License-Identifier: Apache-2.0
"""VHD images, which QEMU calls vpc: fixed and dynamic ("Virtual Hard Disk Image Format Specification", Microsoft)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagebackend.names import SECTOR
from imagebackend.templates.inspection.subject import BLOCK, Subject, Verdict, round_up, upper_bound

__all__ = ["inspect"]

_FOOTER_SIZE = 512
_FOOTER = struct.Struct(">8sIIQI4sIIQQHBBII")
_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
#: What stands for no header; some tools wrote 32 bits of ones.
_NO_OFFSETS = ((1 << 64) - 1, (1 << 32) - 1)
_SAVED_STATE = 84

_DYNAMIC_SIZE = 1024
_DYNAMIC_HEADER = struct.Struct(">8sQQIIII16s")
#: Parent's UUID, time, name and locators: all zero where there is no parent.
_PARENT = slice(40, 768)
_UNUSED = 0xFFFF_FFFF
_MAX_ENTRIES = 16 << 20

#: Programs whose images have the size that the footer states; for others QEMU takes it from the geometry, unless
#: that is the largest there is.
_SIZE_BY_FOOTER = (b"win ", b"qem2", b"d2v ", b"tap\x00", b"CTXS")
_MAX_GEOMETRY = 65535 * 16 * 255


@dataclass(frozen=True, slots=True)
class _Footer:
    data_offset: int
    virtual_size: int
    kind: int


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins or ends with a VHD footer.

    :raises ImageUnacceptable: it has a parent, a saved state, or a table that breaks the format's rules.
    """
    if subject.size % SECTOR:
        raise subject.refusal(f"a VHD of {subject.size} bytes: its footer is cut, or it has another tail")
    tail = subject.read(subject.size - _FOOTER_SIZE, _FOOTER_SIZE, "footer")
    head = subject.read(0, _FOOTER_SIZE, "first sector")
    footer = _footer(subject, tail)
    if footer.kind == _FIXED:
        return _inspect_fixed(subject, footer, head)
    if head != tail:
        raise subject.refusal("the two copies of its footer differ")
    return _inspect_dynamic(subject, footer)


def _footer(subject: Subject, footer: bytes) -> _Footer:
    cookie, _, version, data_offset, _, creator, _, _, _, size, cylinders, heads, sectors, kind, checksum = (
        _FOOTER.unpack_from(footer)
    )
    if cookie != b"conectix":
        raise subject.refusal("it does not end with a VHD footer")
    _check_sum(subject, footer, 64, checksum, "footer")
    if version != 0x0001_0000:
        raise subject.refusal(f"VHD version {version:#x}; 0x10000 is known")
    if kind == _DIFFERENCING:
        raise subject.refusal("a differencing VHD: it has a parent")
    if kind not in (_FIXED, _DYNAMIC):
        raise subject.refusal(f"unknown VHD type {kind}")
    if footer[_SAVED_STATE]:
        raise subject.refusal("it belongs to a machine that was suspended")
    geometry = cylinders * heads * sectors
    virtual_size = geometry * SECTOR
    if creator in _SIZE_BY_FOOTER or geometry == _MAX_GEOMETRY:
        virtual_size = size // SECTOR * SECTOR
    subject.check_virtual_size(virtual_size)
    return _Footer(data_offset, virtual_size, kind)


def _inspect_fixed(subject: Subject, footer: _Footer, head: bytes) -> Verdict:
    if head.startswith(b"conectix"):
        raise subject.refusal("a fixed VHD that begins like a dynamic one")
    if footer.data_offset not in _NO_OFFSETS:
        raise subject.refusal(f"a fixed VHD with a header at {footer.data_offset}")
    if footer.virtual_size > subject.size - _FOOTER_SIZE:
        raise subject.refusal(f"a fixed VHD of {footer.virtual_size} bytes in a file of {subject.size}")
    return Verdict("vpc", footer.virtual_size, round_up(footer.virtual_size, BLOCK), ("fixed",))


def _inspect_dynamic(subject: Subject, footer: _Footer) -> Verdict:
    header = subject.read(footer.data_offset, _DYNAMIC_SIZE, "dynamic header")
    cookie, _, table_offset, version, entries, block_size, checksum, _ = _DYNAMIC_HEADER.unpack_from(header)
    if cookie != b"cxsparse" or version != 0x0001_0000:
        raise subject.refusal("its dynamic header is not one")
    _check_sum(subject, header, 36, checksum, "dynamic header")
    if any(header[_PARENT]):
        raise subject.refusal("its dynamic header names a parent")
    if block_size < SECTOR or block_size & (block_size - 1):
        raise subject.refusal(f"VHD blocks of {block_size} bytes")
    if entries > _MAX_ENTRIES or entries * block_size < footer.virtual_size:
        raise subject.refusal(f"{entries} blocks of {block_size} bytes for a disk of {footer.virtual_size} bytes")
    bitmap_size = round_up(block_size // SECTOR // 8, SECTOR)
    count = 0
    for _, table in subject.entries(table_offset, entries, "I", "big", "block table"):
        used = [entry for entry in table if entry != _UNUSED]
        if used:
            subject.check_inside(max(used) * SECTOR, bitmap_size + block_size, "last block")
            if min(used) * SECTOR < _FOOTER_SIZE:
                raise subject.refusal("a block lies on the footer's copy")
        count += len(used)
    allocated_size = upper_bound(count * max(block_size, BLOCK), footer.virtual_size)
    return Verdict("vpc", footer.virtual_size, allocated_size, ("dynamic",))


def _check_sum(subject: Subject, structure: bytes, offset: int, stated: int, what: str) -> None:
    """Compare the ones' complement of the sum of all bytes, without those of the checksum itself."""
    found = ~(sum(structure) - sum(structure[offset : offset + 4])) & 0xFFFF_FFFF
    if found != stated:
        raise subject.refusal(f"the checksum of its {what} is {found:#x}, {stated:#x} is stated")
