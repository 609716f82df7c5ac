# SPDX-License-Identifier: Apache-2.0
"""Write a fresh qcow2 overlay: header, refcounts and an empty L1 table, and nothing else.

Version 3, 16-bit refcounts, no optional feature: what every QEMU since 1.7 opens. The feature name table that QEMU
writes is left out: it only gives names to bits that a reader does not know, and no such bit is set here. Everything
that is not plain (subclusters, preallocation, encryption, data files) is qemu-img's business.
"""

from __future__ import annotations

import os
import struct

from imagebackend import exceptions
from imagebackend.names import SECTOR
from imagebackend.storage.qcow2 import header

__all__ = ["write_overlay"]

_REFCOUNT_ORDER = 4
_REFCOUNT_SIZE = 2
_ENTRY_SIZE = 8
_HEADER_LENGTH = header.V2.size + header.V3.size


def write_overlay(
    descriptor: int, *, virtual_size: int, cluster_size: int, backing_file: str, backing_format: str
) -> None:
    """Make an empty file a qcow2 image without data of its own, on top of a backing file.

    One ``ftruncate`` and three writes: the header, and 8 bytes for each 2**(2n-1) and 2 bytes for each 2**n bytes of
    metadata, where 2**n is the cluster size. The L1 table stays a hole. That is less than 16 KiB altogether for
    clusters of 8 KiB and more, whatever the virtual size (64 TiB in clusters of 64 KiB: under 2 KiB); at their limits
    clusters of 4 KiB take 18 KiB and clusters of 512 bytes 132 KiB. Nothing is synced: the caller does that.

    :param descriptor: an empty file, open for writing.
    :param virtual_size: bytes, a multiple of 512.
    :param cluster_size: bytes, a power of two from 512 to 2 MiB.
    :param backing_file: the name to record, resolved by QEMU against the overlay's folder unless it is absolute.
    :param backing_format: the backing file's format, by QEMU's name for it.
    :raises InvalidSize: the virtual size is no multiple of 512, or beyond what QEMU accepts for this cluster size.
    :raises InvalidArgument: no such cluster size; a name or format that the header cannot hold, or that QEMU would
        take for a URL.
    :raises StorageError: the file cannot be written; what it holds then is undefined.
    """
    cluster_bits = cluster_size.bit_length() - 1
    if not header.MIN_CLUSTER_BITS <= cluster_bits <= header.MAX_CLUSTER_BITS or cluster_size != 1 << cluster_bits:
        raise exceptions.InvalidArgument(f"cluster size {cluster_size}: a power of two from 512 to 2097152 is needed")
    l1_entries = _l1_entries(virtual_size, cluster_size)
    table_clusters, block_clusters, clusters = _layout(l1_entries, cluster_size)
    table_offset = cluster_size
    blocks_offset = table_offset + table_clusters * cluster_size
    l1_offset = blocks_offset + block_clusters * cluster_size
    name, extension = _backing(backing_file, backing_format, cluster_size)
    head = header.V2.pack(
        header.MAGIC,
        3,
        _HEADER_LENGTH + len(extension),
        len(name),
        cluster_bits,
        virtual_size,
        0,
        l1_entries,
        l1_offset,
        table_offset,
        table_clusters,
        0,
        0,
    ) + header.V3.pack(0, 0, 0, _REFCOUNT_ORDER, _HEADER_LENGTH)
    table = struct.pack(f">{block_clusters}Q", *range(blocks_offset, l1_offset, cluster_size))
    try:
        os.ftruncate(descriptor, clusters * cluster_size)
        _write(descriptor, b"\x00\x01" * clusters, blocks_offset)
        _write(descriptor, table, table_offset)
        _write(descriptor, head + extension + name, 0)
    except OSError as error:
        raise exceptions.storage_error(error, f"overlay of {backing_file}") from error


def _l1_entries(virtual_size: int, cluster_size: int) -> int:
    """Return the number of L1 entries, each of which stands for one table of ``cluster_size / 8`` clusters."""
    covered = cluster_size * cluster_size // _ENTRY_SIZE
    limit = header.MAX_L1_SIZE // _ENTRY_SIZE * covered
    if virtual_size <= 0 or virtual_size % SECTOR:
        raise exceptions.InvalidSize(virtual_size, "a positive multiple of 512 bytes is needed")
    if virtual_size > limit:
        raise exceptions.InvalidSize(
            virtual_size,
            f"qcow2 with clusters of {cluster_size} bytes holds at most {limit} bytes; use larger clusters",
        )
    return -(-virtual_size // covered)


def _layout(l1_entries: int, cluster_size: int) -> tuple[int, int, int]:
    """Return the clusters of the refcount table, of the refcount blocks, and of the whole file."""
    l1_clusters = -(-l1_entries * _ENTRY_SIZE // cluster_size)
    tables = blocks = 1
    while True:
        clusters = 1 + tables + blocks + l1_clusters
        needed_blocks = -(-clusters * _REFCOUNT_SIZE // cluster_size)
        needed_tables = -(-needed_blocks * _ENTRY_SIZE // cluster_size)
        if (needed_tables, needed_blocks) == (tables, blocks):
            return tables, blocks, clusters
        # Both only grow, so this ends.
        tables, blocks = needed_tables, needed_blocks


def _backing(backing_file: str, backing_format: str, cluster_size: int) -> tuple[bytes, bytes]:
    """Return the backing file's name, and the header extensions that stand before it."""
    name = os.fsencode(backing_file)
    if not name or b"\x00" in name:
        raise exceptions.InvalidArgument(f"backing file {backing_file!r}: not the name of a file")
    if b":" in name.split(b"/", 1)[0]:
        raise exceptions.InvalidArgument(f"backing file {backing_file!r}: QEMU takes this for a URL; use a full path")
    if not (backing_format.isascii() and 1 <= len(backing_format) <= header.MAX_FORMAT_NAME):
        raise exceptions.InvalidArgument(f"backing format {backing_format!r}: 1 to 15 ASCII characters are needed")
    padding = b"\x00" * (-len(backing_format) % 8)
    extension = struct.pack(">II", header.BACKING_FORMAT, len(backing_format)) + backing_format.encode() + padding
    extension += struct.pack(">II", 0, 0)
    limit = min(header.MAX_BACKING_NAME, cluster_size - _HEADER_LENGTH - len(extension))
    if len(name) > limit:
        raise exceptions.InvalidArgument(
            f"backing file {backing_file!r}: the name has {len(name)} bytes, a qcow2 header with clusters of "
            f"{cluster_size} bytes holds {limit}"
        )
    return name, extension


def _write(descriptor: int, content: bytes, offset: int) -> None:
    written = os.pwrite(descriptor, content, offset)
    while written < len(content):
        # A short write to a regular file means that the next one tells why.
        written += os.pwrite(descriptor, content[written:], offset + written)
