# SPDX-License-Identifier: Apache-2.0
"""Images in the expanded format of ploop: made, grown and cut to what they hold, without a tool."""

from __future__ import annotations

import dataclasses
import itertools
import os
from array import array
from collections.abc import Callable, Sequence

from imagebackend import exceptions, faults
from imagebackend.storage import reflink, sparse_copy
from imagebackend.storage.ploop.header import (
    CLUSTER_SIZE,
    HEADER_SIZE,
    MAX_SIZE_V1,
    Header,
    first_block,
    pack_header,
    read_header,
    round_size,
)
from imagebackend.storage.ploop.table import pack_table, read_table
from imagebackend.storage.run import Run

__all__ = ["allocate", "cut", "grow", "version_for", "write_image"]

Progress = Callable[[int, int], None]


def version_for(size: int) -> int:
    """Return the version of the format for a disk of a size: 1, which every ploop reads, as long as it reaches."""
    return 1 if size <= MAX_SIZE_V1 else 2


def write_image(
    target: int,
    size: int,
    sources: Sequence[tuple[int, Sequence[Run]]],
    *,
    progress: Progress | None = None,
    share: bool = True,
    preallocate: bool = False,
) -> Header:
    """Write an image into an empty file. Only clusters that hold data are stored, in the order of the disk.

    :param target: open for reading and writing.
    :param size: bytes; rounded up to whole clusters.
    :param sources: open files, and where in them the data of the disk are; no two runs overlap in the disk.
    :param progress: called with the bytes done of the image's file, and its size; once around for each source.
    :param share: let the image share blocks with the sources where the file system can.
    :param preallocate: give every cluster of the disk its storage.
    :raises InvalidSize: it is more than a ploop disk can have.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says; the file is of no use.
    """
    virtual_size = round_size(size)
    table, header = _lay_out(virtual_size, [run for _, runs in sources for run in runs], everything=preallocate)
    try:
        if preallocate:
            os.posix_fallocate(target, 0, header.file_size)
        else:
            os.ftruncate(target, header.file_size)
        _write(target, pack_header(header) + pack_table(table, header), 0)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error
    for descriptor, runs in sources:
        placed = [Run(_place(run.guest_offset, table), run.host_offset, run.length) for run in runs]
        sparse_copy.copy_runs(descriptor, target, placed, progress=progress, share=share and not preallocate)
    return header


def grow(target: int, size: int, name: str, *, durable: bool) -> Header:
    """Make an image larger. At every moment it is whole: of its old size or of the new one.

    Clusters that are where the block table will be are copied to the end of the file, and the table is led there, one
    entry after the other, before the header tells of the larger table in one small write.

    :param target: open for reading and writing; nobody else has it.
    :param size: bytes; rounded up to whole clusters.
    :param name: what to call the image in errors.
    :param durable: each step reaches stable storage before the next one.
    :returns: the header that the image has now; the old one if that is as large.
    :raises InvalidSize: it is more than a ploop disk can have.
    :raises Unsupported: the image is of version 1, which does not reach so far.
    :raises ImageUnacceptable: the image is damaged.
    :raises InsufficientSpace, StorageError: it is as large as before. :func:`cut` gives back what was added.
    """
    old = read_header(target, name)
    size = round_size(size)
    if size <= old.virtual_size:
        return old
    if old.version < version_for(size):
        raise exceptions.Unsupported(
            f"a disk of {size} bytes in {name}",
            f"version 1 of the format has at most {MAX_SIZE_V1} bytes; a copy of the disk can be larger",
        )
    entries = -(-size // old.cluster_size)
    new = dataclasses.replace(
        old,
        virtual_size=size,
        entries=entries,
        first_block=max(old.first_block, first_block(entries, old.cluster_size)),
    )
    try:
        _make_room(target, old, new, name, durable)
        _write(target, pack_header(new), 0)
        _sync(target, durable)
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    faults.point("ploop.grow.header")
    return new


def allocate(target: int, name: str, *, durable: bool) -> None:
    """Give every cluster of the disk its storage; those that had none read as zeros, as before.

    :param target: open for reading and writing; nobody else has it.
    :param durable: the storage is there, after a power cut too, before the table leads to it.
    :raises ImageUnacceptable: the image is damaged.
    :raises InsufficientSpace, StorageError: nothing has changed.
    """
    header = read_header(target, name)
    table = read_table(target, header, name)
    end = _end(table, header)
    missing = [index for index, cluster in enumerate(table) if not cluster]
    for place, index in enumerate(missing, end // header.cluster_size):
        table[index] = place
    if not missing:
        return
    try:
        os.ftruncate(target, end)
        sparse_copy.allocate(target, end + len(missing) * header.cluster_size)
        _sync(target, durable)
        _write(target, pack_table(table, header), HEADER_SIZE)
        _sync(target, durable)
    except OSError as error:
        raise exceptions.storage_error(error, name) from error


def cut(target: int, name: str) -> None:
    """End the file behind the last cluster in use: what is beyond it would show in the next one that is allocated.

    :param target: open for reading and writing; nobody else has it.
    :raises ImageUnacceptable: the image is damaged.
    :raises StorageError: the file cannot be read or changed.
    """
    header = read_header(target, name)
    end = _end(read_table(target, header, name), header)
    if end < header.file_size:
        try:
            os.ftruncate(target, end)
        except OSError as error:
            raise exceptions.storage_error(error, name) from error


def _lay_out(size: int, runs: Sequence[Run], *, everything: bool) -> tuple[array[int], Header]:
    """Return the block table and the header of an image of ``size`` bytes that is to hold ``runs``."""
    clusters = size // CLUSTER_SIZE
    stored = bytearray(clusters)
    for run in [Run(0, 0, size)] if everything else runs:
        first, end = run.guest_offset // CLUSTER_SIZE, -(-(run.guest_offset + run.length) // CLUSTER_SIZE)
        stored[first:end] = b"\x01" * (end - first)
    start = first_block(clusters)
    before = start // CLUSTER_SIZE - 1
    used = stored[: stored.rfind(1) + 1]
    numbers = itertools.accumulate(used, initial=before)
    next(numbers)
    table = array("I", (number if here else 0 for number, here in zip(numbers, used, strict=True)))
    table.frombytes(bytes(4 * (clusters - len(used))))
    header = Header(
        version=version_for(size),
        virtual_size=size,
        cluster_size=CLUSTER_SIZE,
        entries=clusters,
        first_block=start,
        in_use=False,
        file_size=start + sum(stored) * CLUSTER_SIZE,
    )
    return table, header


def _place(guest_offset: int, table: array[int]) -> int:
    return table[guest_offset // CLUSTER_SIZE] * CLUSTER_SIZE + guest_offset % CLUSTER_SIZE


def _make_room(target: int, old: Header, new: Header, name: str, durable: bool) -> None:
    """Make what will be the table of ``new`` read as zeros where it is not that of ``old``."""
    size = old.cluster_size
    if new.first_block > old.first_block:
        table = read_table(target, old, name)
        moved = [index for index, cluster in enumerate(table) if 0 < cluster < new.first_block // size]
        end = max(_end(table, old), new.first_block)
        os.ftruncate(target, end)
        for number, index in enumerate(moved):
            run = Run(end + number * size, table[index] * size, size)
            os.ftruncate(target, run.guest_offset + size)
            sparse_copy.copy_runs(target, target, [run])
        _sync(target, durable)
        faults.point("ploop.grow.copied")
        for number, index in enumerate(moved):
            entry = (end // size + number) * old.unit
            _write(target, entry.to_bytes(4, "little"), HEADER_SIZE + 4 * index)
        _sync(target, durable)
        faults.point("ploop.grow.moved")
    start, end = HEADER_SIZE + 4 * old.entries, HEADER_SIZE + 4 * new.entries
    _zero(target, start, max(end, new.first_block if new.first_block > old.first_block else 0))
    _sync(target, durable)
    faults.point("ploop.grow.zeroed")


def _zero(target: int, start: int, end: int) -> None:
    """Make bytes of a file zero that are not."""
    while start < end:
        length = min(end - start, CLUSTER_SIZE)
        found = os.pread(target, length, start)
        if any(found) or len(found) < length:
            _write(target, bytes(length), start)
        start += length


def _end(table: array[int], header: Header) -> int:
    last = max(table, default=0)
    return max(header.first_block, (last + 1) * header.cluster_size)


def _write(target: int, content: bytes, offset: int) -> None:
    left = memoryview(content)
    while left:
        done = os.pwrite(target, left, offset)
        left, offset = left[done:], offset + done


def _sync(target: int, durable: bool) -> None:
    if durable:
        os.fdatasync(target)
