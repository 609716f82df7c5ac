# SPDX-License-Identifier: Apache-2.0
"""The block table of a ploop image: which cluster of the file holds which cluster of the disk. No entry is trusted."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterator, Sequence

from imagebackend import exceptions
from imagebackend.storage.ploop.header import HEADER_SIZE, Header
from imagebackend.storage.run import Run

__all__ = ["allocated_clusters", "data_runs", "pack_table", "read_table"]

_PIECE = 1 << 20
#: What QEMU allocates ahead, 128 MiB in its smallest clusters, and stays if it is killed.
_MOST_LEFT = 4096


def read_table(descriptor: int, header: Header, name: str) -> array[int]:
    """Return, for each cluster of the disk, the cluster of the file that holds it; 0: none does, it reads as zeros.

    At most 64 MiB are read.

    :param name: what to call the image in errors.
    :raises ImageUnacceptable: an entry leads out of the file, into the table or between clusters, two lead to the
        same cluster, or one is for what is beyond the end of the disk.
    :raises StorageError: the file cannot be read.
    """
    table = array("I")
    seen = _places(header, name)
    for start in range(0, header.entries * 4, _PIECE):
        piece = _read(descriptor, HEADER_SIZE + start, min(_PIECE, header.entries * 4 - start), name)
        if any(piece):
            _check(piece, header, seen, name)
        table.extend(piece)
    clusters = -(-header.virtual_size // header.cluster_size)
    if any(table[clusters:]):
        raise exceptions.ImageUnacceptable(name, f"its block table goes on beyond the disk's {clusters} clusters")
    return table[:clusters]


def data_runs(tables: Sequence[array[int]], header: Header) -> list[list[Run]]:
    """Return where the data of a disk lie that is made of deltas: for each of them, what it holds in the end.

    :param tables: of each delta, the lowest first. A delta may have been made when the disk was smaller.
    :param header: of the uppermost.
    :returns: the runs in each delta, in guest order, adjacent clusters joined, the last one cut at the disk's end.
    """
    clusters = -(-header.virtual_size // header.cluster_size)
    return [list(_runs(table[:clusters], tables[level + 1 :], header)) for level, table in enumerate(tables)]


def allocated_clusters(table: array[int]) -> int:
    """Return how many clusters of the disk are stored."""
    return len(table) - table.count(0)


def pack_table(table: array[int], header: Header) -> bytes:
    """Return the bytes of a block table, up to its last entry that is not 0."""
    end = len(table)
    while end and not any(table[max(0, end - 1024) : end]):
        end = max(0, end - 1024)
    used = table[:end]
    if header.unit != 1:
        used = array("I", (entry * header.unit for entry in used))
    if sys.byteorder == "big":
        used.byteswap()
    return used.tobytes()


def _places(header: Header, name: str) -> bytearray:
    """Return, for each cluster of the file, whether it is in use: those of the table are."""
    tables, places = header.first_block // header.cluster_size, header.file_size // header.cluster_size
    # Clusters that nothing refers to are harmless, but a file of nothing else would take all memory.
    limit = tables + 2 * header.entries + _MOST_LEFT
    if places > limit:
        reason = f"{places} clusters in the file; a table of {header.entries} entries can have left {limit}"
        raise exceptions.ImageUnacceptable(name, reason)
    seen = bytearray(places)
    seen[:tables] = b"\x01" * tables
    return seen


def _read(descriptor: int, offset: int, length: int, name: str) -> array[int]:
    try:
        content = os.pread(descriptor, length, offset)
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    if len(content) < length:
        raise exceptions.ImageUnacceptable(name, f"it ends at {offset + len(content)}, within its block table")
    piece = array("I", content)
    if sys.byteorder == "big":
        piece.byteswap()
    return piece


def _check(piece: array[int], header: Header, seen: bytearray, name: str) -> None:
    """Turn the entries into numbers of clusters, and make sure that each is a cluster of its own."""
    unit, end = header.unit, len(seen)
    for index, entry in enumerate(piece):
        if not entry:
            continue
        cluster, rest = divmod(entry, unit)
        if rest or cluster >= end or seen[cluster]:
            where = "" if cluster >= end or rest else ", which is in use already"
            reason = f"a block table entry of {entry} is no cluster of the file of {header.file_size} bytes{where}"
            raise exceptions.ImageUnacceptable(name, reason)
        seen[cluster] = 1
        piece[index] = cluster


def _runs(table: array[int], above: Sequence[array[int]], header: Header) -> Iterator[Run]:
    size = header.cluster_size
    start = host = length = 0
    for index, cluster in enumerate(table):
        if not cluster or any(index < len(other) and other[index] for other in above):
            continue
        if length and index * size == start + length and cluster * size == host + length:
            length += size
            continue
        if length:
            yield Run(start, host, length)
        start, host, length = index * size, cluster * size, size
    if length:
        yield Run(start, host, min(length, header.virtual_size - start))
