# SPDX-License-Identifier: Apache-2.0
"""Walk the L1, L2, refcount and snapshot tables of a qcow2 image, none of which is believed."""

from __future__ import annotations

import contextlib
import datetime
import os
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from imagebackend import exceptions
from imagebackend.storage.qcow2.header import MAX_L1_SIZE, Header, read_header
from imagebackend.storage.run import Run

__all__ = ["Snapshot", "all_counted", "allocated_size", "data_runs", "read_snapshots"]

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SNAPSHOT_SIZES = struct.Struct(">QQ")
_MAX_SNAPSHOT_EXTRA = 1024
_MAX_SNAPSHOT_TABLE = 16 << 20

#: The L2 tables of 2 TiB in clusters of 64 KiB; above, one image would keep the reader busy for long.
_MAX_L2_SIZE = 256 << 20
_PIECE = 1 << 20
#: The block in which file systems allocate.
_BLOCK = 4096
#: Less than ext4 allows (16 TiB), and more than what a killed tool can have left lies behind.
_LONGEST_FILE = 8 << 40


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An internal snapshot.

    :ivar id: QEMU's number for it, as the text that stands in the image.
    :ivar created: when, in UTC.
    :ivar virtual_size: the size of the disk at that time, in bytes.
    :ivar vm_state_size: bytes of saved guest memory; 0 for a snapshot of the disk alone.
    """

    id: str
    name: str
    created: datetime.datetime
    virtual_size: int
    vm_state_size: int


def read_snapshots(descriptor: int, header: Header, name: str) -> list[Snapshot]:
    """Return the internal snapshots, in the order of the table; at most 16 MiB are read.

    :param name: what to call the image in errors.
    :raises ImageUnacceptable: the table, or a snapshot's L1 table, breaks the format's rules or leaves the file.
    :raises StorageError: the file cannot be read.
    """
    tables = _Tables(descriptor, header, name)
    offset = header.snapshots_offset
    end = min(header.file_size, offset + _MAX_SNAPSHOT_TABLE)
    found = []
    for _ in range(header.snapshot_count):
        snapshot, length = tables.snapshot(offset, end)
        found.append(snapshot)
        offset += length
    return found


@contextlib.contextmanager
def all_counted(path: str) -> Iterator[None]:
    """Let an image be, in the block, as long as its reference counts reach, for whoever gives leaked clusters back.

    QEMU looks at no counts beyond the end of the file, where a tool that was killed has put some if it did not live to
    write there. They would leak as soon as the file grows.

    :param path: the image, to which nobody else writes. Nothing is appended to it in the block.
    :raises ImageUnacceptable: its header breaks the format's rules.
    :raises StorageError: it cannot be opened, read or made longer.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            header = read_header(descriptor, path)
            counted = min(_Tables(descriptor, header, path).counted_size(), _LONGEST_FILE)
            os.ftruncate(descriptor, max(header.file_size, counted))
            try:
                yield
            finally:
                # A file that stays long is harmless: what it has more is a hole.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, header.file_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def allocated_size(descriptor: int, header: Header, name: str) -> int:
    """Return an upper bound of the bytes that the guest's data occupy as raw; all tables are checked on the way.

    Reads the refcount table, the L1 table and each L2 table that is there: at most 8 MiB, 2 * 32 MiB and 256 MiB.

    :raises ImageUnacceptable: an entry breaks the format's rules, leaves the file, or names what is in use already: a
        table twice, or a table as data.
    :raises Unsupported: the data lie in another file.
    :raises StorageError: the file cannot be read.
    """
    tables = _Tables(descriptor, header, name)
    tables.reserve_refcount_blocks()
    count = 0
    for guest_offset, entries in tables.l2_tables():
        if header.extended_l2:
            # One bit for each of 32 subclusters that has data, in the lower half of the second word.
            used = [
                entry for entry, bitmap in zip(entries[::2], entries[1::2], strict=True)
                if bitmap & 0xFFFF_FFFF or entry & _COMPRESSED
            ]  # fmt: skip
            tables.check_data([entry for entry in entries[::2] if entry])
        else:
            data = [entry for entry in entries if entry]
            tables.check_data(data)
            used = [entry for entry in data if entry & _COMPRESSED or not entry & _ZERO]
        if guest_offset < header.virtual_size:
            count += len(used)
    block = max(header.cluster_size, _BLOCK)
    return min(count * block, -(-header.virtual_size // _BLOCK) * _BLOCK)


def data_runs(descriptor: int, header: Header, name: str) -> Iterator[Run]:
    """Return where the guest's data lie in the image file, in guest order, adjacent clusters joined.

    What no run covers reads as zeros. A run ends at the virtual size and at the end of the file at the latest.

    :raises Unsupported: at once: the image has a backing file, a data file, encryption or extended L2 entries.
        qemu-img must read it.
    :raises ImageUnacceptable: while iterating: an entry breaks the format's rules or leaves the file.
    :raises StorageError: while iterating: the file cannot be read.
    """
    reasons = {
        "a backing file": header.backing_file is not None,
        "a data file": header.data_file,
        "encryption": header.crypt_method != 0,
        "extended L2 entries": header.extended_l2,
    }
    for reason, present in reasons.items():
        if present:
            raise exceptions.Unsupported(f"reading {name} in-process", f"it has {reason}")
    return _runs(_Tables(descriptor, header, name), header)


def _runs(tables: _Tables, header: Header) -> Iterator[Run]:
    cluster_size = header.cluster_size
    start = host = length = 0
    for table_offset, entries in tables.l2_tables():
        tables.check_data([entry for entry in entries if entry])
        for index, entry in enumerate(entries):
            host_offset = entry & _OFFSET
            if not host_offset or (entry & (_COMPRESSED | _ZERO)) == _ZERO:
                continue
            guest_offset = table_offset + index * cluster_size
            if entry & _COMPRESSED:
                yield from _clipped(start, host, length, header)
                length = 0
                yield from _compressed(guest_offset, entry, header)
            elif length and guest_offset == start + length and host_offset == host + length:
                length += cluster_size
            else:
                yield from _clipped(start, host, length, header)
                start, host, length = guest_offset, host_offset, cluster_size
    yield from _clipped(start, host, length, header)


def _clipped(start: int, host: int, length: int, header: Header) -> Iterator[Run]:
    length = min(length, header.virtual_size - start, header.file_size - host)
    if length > 0:
        yield Run(start, host, length)


def _compressed(guest_offset: int, entry: int, header: Header) -> Iterator[Run]:
    length = min(header.cluster_size, header.virtual_size - guest_offset)
    if length > 0:
        offset, compressed_length = _compressed_place(entry, header.cluster_size)
        yield Run(guest_offset, offset, length, compressed_length)


def _compressed_place(entry: int, cluster_size: int) -> tuple[int, int]:
    """Return the offset that an L2 entry of a compressed cluster gives, and the length to the end of its sectors."""
    offset_bits = 62 - (cluster_size.bit_length() - 9)
    offset = entry & ((1 << offset_bits) - 1)
    sectors = ((entry & ~_COMPRESSED) >> offset_bits) + 1
    return offset, (offset // 512 + sectors) * 512 - offset


class _Tables:
    """The tables of one image, with the checks that every entry must pass."""

    def __init__(self, descriptor: int, header: Header, name: str) -> None:
        self._descriptor = descriptor
        self._header = header
        self._name = name
        self._reserved = set(self._places())

    def _places(self) -> Iterator[int]:
        header = self._header
        for offset, length in (
            (0, header.cluster_size),
            (header.l1_offset, header.l1_entries * 8),
            (header.refcount_table_offset, header.refcount_table_clusters * header.cluster_size),
        ):
            yield from range(offset, offset + length, header.cluster_size)

    def refusal(self, reason: str) -> exceptions.ImageUnacceptable:
        return exceptions.ImageUnacceptable(self._name, reason)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            piece = os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise exceptions.storage_error(error, self._name) from error
        if len(piece) < length:
            raise self.refusal(f"it ends at {offset + len(piece)}, within a table")
        return piece

    def reserve_refcount_blocks(self) -> None:
        header = self._header
        length = header.refcount_table_clusters * header.cluster_size
        for _, entries in self._pieces(header.refcount_table_offset, length):
            for entry in filter(None, entries):
                self._reserve("refcount block", entry)

    def counted_size(self) -> int:
        """Return the end of what the refcount blocks cover, in bytes."""
        header = self._header
        length = header.refcount_table_clusters * header.cluster_size
        pieces = self._pieces(header.refcount_table_offset, length)
        ends = (first + index for first, entries in pieces for index, entry in enumerate(entries, 1) if entry)
        blocks = max(ends, default=0)
        return blocks * (header.cluster_size * 8 >> header.refcount_order) * header.cluster_size

    def l2_tables(self) -> Iterator[tuple[int, array[int]]]:
        """Yield the entries of each L2 table that is there and not all zero, with its first guest offset."""
        header = self._header
        if header.data_file:
            raise exceptions.Unsupported(f"reading {self._name} in-process", "it has a data file")
        # All are known before the first is read: none of them may hold a guest's data.
        for count, (_, offset) in enumerate(self._l2_offsets(), 1):
            self._reserve("L2 table", offset)
            if count * header.cluster_size > _MAX_L2_SIZE:
                raise self.refusal(f"its L2 tables take more than {_MAX_L2_SIZE} bytes")
        empty = bytes(header.cluster_size)
        covered = header.cluster_size * header.l2_entries
        for index, offset in self._l2_offsets():
            table = self._read(offset, header.cluster_size)
            if table != empty:
                yield index * covered, _entries(table)

    def _l2_offsets(self) -> Iterator[tuple[int, int]]:
        for first, entries in self._pieces(self._header.l1_offset, self._header.l1_entries * 8):
            for index, entry in enumerate(entries, first):
                if entry:
                    yield index, entry & ~_COPIED

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, array[int]]]:
        """Yield the 64-bit entries of a table with the index of the first, a megabyte at a time."""
        for done in range(0, length, _PIECE):
            yield done // 8, _entries(self._read(offset + done, min(_PIECE, length - done)))

    def _reserve(self, what: str, offset: int) -> None:
        cluster_size, file_size = self._header.cluster_size, self._header.file_size
        if offset % cluster_size or offset + cluster_size > file_size or offset in self._reserved:
            raise self.refusal(f"{what} at {offset} is not a cluster of its own in the file of {file_size} bytes")
        self._reserved.add(offset)

    def check_data(self, entries: list[int]) -> None:
        """Check the entries of one L2 table that are not 0."""
        header = self._header
        # In version 2, and with extended L2 entries, no bit says that a cluster reads as zeros.
        flags = _COPIED if header.version == 2 or header.extended_l2 else _COPIED | _ZERO
        offsets = set()
        for entry in entries:
            if entry & _COMPRESSED:
                self._check_compressed(entry)
                continue
            if entry & ~(_OFFSET | flags):
                raise self.refusal(f"L2 entry {entry:#x} sets reserved bits")
            offsets.add(entry & _OFFSET)
        offsets.discard(0)
        for offset in offsets:
            if offset % header.cluster_size or offset >= header.file_size:
                raise self.refusal(f"data at {offset} are not a cluster of the file of {header.file_size} bytes")
        if not offsets.isdisjoint(self._reserved):
            raise self.refusal("an L2 entry names the header or a table as data")

    def _check_compressed(self, entry: int) -> None:
        header = self._header
        if entry & _COPIED:
            raise self.refusal(f"L2 entry {entry:#x} sets reserved bits")
        offset, length = _compressed_place(entry, header.cluster_size)
        end = offset + length
        if offset < header.cluster_size or end > header.file_size + header.cluster_size or offset >= header.file_size:
            raise self.refusal(f"compressed data at {offset} leave the file of {header.file_size} bytes")

    def snapshot(self, offset: int, end: int) -> tuple[Snapshot, int]:
        """Return the snapshot whose entry begins at ``offset``, and the length of the entry."""
        if offset + _SNAPSHOT.size > end:
            raise self.refusal(f"its snapshot table reaches past {end}")
        (l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, _, state_size, extra_length) = (
            _SNAPSHOT.unpack(self._read(offset, _SNAPSHOT.size))
        )
        rest = extra_length + id_length + name_length
        if extra_length > _MAX_SNAPSHOT_EXTRA or offset + _SNAPSHOT.size + rest > end:
            raise self.refusal(f"the entry of a snapshot at {offset} takes {_SNAPSHOT.size + rest} bytes")
        self._check_snapshot_l1(l1_offset, l1_entries)
        tail = self._read(offset + _SNAPSHOT.size, rest)
        virtual_size = self._header.virtual_size
        if extra_length >= _SNAPSHOT_SIZES.size:
            state_size, virtual_size = _SNAPSHOT_SIZES.unpack_from(tail)
        created = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
        snapshot = Snapshot(
            id=os.fsdecode(tail[extra_length : extra_length + id_length]),
            name=os.fsdecode(tail[extra_length + id_length :]),
            created=created + datetime.timedelta(microseconds=nanoseconds // 1000),
            virtual_size=virtual_size,
            vm_state_size=state_size,
        )
        return snapshot, -(-(_SNAPSHOT.size + rest) // 8) * 8

    def _check_snapshot_l1(self, offset: int, entries: int) -> None:
        header = self._header
        length = entries * 8
        if length > MAX_L1_SIZE or offset % header.cluster_size or offset + length > header.file_size:
            raise self.refusal(f"a snapshot's L1 table of {length} bytes at {offset} is not in the file")


def _entries(table: bytes) -> array[int]:
    entries = array("Q", table)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
