# SPDX-License-Identifier: Apache-2.0
"""Copies that cost what the data cost: blocks are shared where that is possible, holes are never read or written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator

from imagebackend import exceptions
from imagebackend.storage import reflink
from imagebackend.storage.run import Run

__all__ = ["allocate", "copy", "copy_runs", "data_ranges"]

Progress = Callable[[int, int], None]

# Small enough that write-back starts at once and a slow disk still reports progress twice a second.
_CHUNK = 4 << 20
# "Not supported here" (copy_file_range(2), sendfile(2)): two file systems, a file system or a kernel without it, files
# that it does not take.
_NOT_SUPPORTED = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Every reflinking file system clones in multiples of this at most.
_ALIGNMENT = 4096


def copy(source: int, target: int, *, progress: Progress | None = None, share: bool = True) -> None:
    """Copy a file, keeping its size and its holes.

    Write-back is started on the way, so that the fdatasync which the caller owes a durable copy finds little to do.

    :param source: descriptor of a regular file, open for reading; nobody writes to it meanwhile.
    :param target: descriptor of a regular file, open for writing; what it held is dropped.
    :param progress: called with bytes done, bytes in all; holes count.
    :param share: let the copy share the source's blocks if the file system can. Otherwise, it has its own.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says, or the source got
        shorter; what the target holds is of no use then.
    """
    try:
        size = os.fstat(source).st_size
        if os.fstat(target).st_size:
            os.ftruncate(target, 0)
        if share and reflink.clone_file(source, target):
            _tell(progress, size, size)
            return
        _tell(progress, 0, size)
        os.ftruncate(target, size)
        for start, end in data_ranges(source, size):
            for done in _copy_range(source, target, start, start, end - start, share):
                _tell(progress, done, size)
        _tell(progress, size, size)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error


def copy_runs(
    source: int, target: int, runs: Iterable[Run], *, progress: Progress | None = None, share: bool = True
) -> None:
    """Copy data between places of two files, or of one; what is between them stays as it is.

    :param source: descriptor of a regular file, open for reading; nobody writes there meanwhile.
    :param target: descriptor of a regular file, open for writing, that has its final size.
    :param runs: uncompressed data: ``host_offset`` in the source, ``guest_offset`` in the target.
    :param progress: called with the end of what was copied last, and the target's size.
    :param share: let the target share the source's blocks if the file system can. Otherwise, it has its own.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says, or the source is shorter
        than the runs say; what the target holds is of no use then.
    """
    try:
        size = os.fstat(target).st_size
        _tell(progress, 0, size)
        for run in runs:
            cloned = _clone_aligned(source, target, run) if share else 0
            if cloned:
                _tell(progress, run.guest_offset + cloned, size)
            start, place = run.host_offset + cloned, run.guest_offset + cloned
            for done in _copy_range(source, target, start, place, run.length - cloned, share):
                _tell(progress, done, size)
        _tell(progress, size, size)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error


def allocate(descriptor: int, size: int) -> None:
    """Give a file storage for all its bytes up to ``size``, growing but never shrinking it.

    What was a hole reads as zeros, as before. Blocks that are shared with another file stay shared.

    :param descriptor: open for reading and writing.
    :param size: bytes, above 0.
    :raises InsufficientSpace: there is no room; the file has its size of before, and may have lost holes.
    :raises PermissionDenied, StorageError: as the operating system says; likewise.
    """
    try:
        before = os.fstat(descriptor).st_size
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            # ext4 has allocated and grown the file as far as it could. The first error is the one to tell.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(descriptor)) from error


def data_ranges(source: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of what is not a hole in the first ``size`` bytes of an open file.

    :raises OSError: as the operating system says.
    """
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        yield start, end


def _tell(progress: Progress | None, done: int, size: int) -> None:
    if progress is not None:
        progress(done, size)


def _clone_aligned(source: int, target: int, run: Run) -> int:
    # The end of a disk need not be aligned, but that is no reason to copy all of its last run.
    length = run.length - run.length % _ALIGNMENT
    if length and reflink.clone_range(source, target, run.host_offset, length, run.guest_offset):
        return length
    return 0


def _copy_range(source: int, target: int, start: int, place: int, length: int, share: bool) -> Iterator[int]:
    """Copy ``length`` bytes at ``start`` to ``place``, and yield the end of each piece there."""
    in_kernel = _copy_file_range if share else _send_file
    end = start + length
    while start < end:
        wanted = min(end - start, _CHUNK)
        # 0 also where the kernel cannot read the source in this way; reading it tells whether it has ended.
        done = in_kernel(source, target, start, place, wanted)
        done = done or _read_and_write(source, target, start, place, wanted)
        # Starts write-back without waiting for it (posix_fadvise(2)), so that the disk works while the copy goes on.
        os.posix_fadvise(target, place, done, os.POSIX_FADV_DONTNEED)
        start, place = start + done, place + done
        yield place


def _copy_file_range(source: int, target: int, start: int, place: int, length: int) -> int:
    # Shares blocks on XFS and btrfs, and lets an NFS server copy by itself.
    try:
        return os.copy_file_range(source, target, length, start, place)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise


def _send_file(source: int, target: int, start: int, place: int, length: int) -> int:
    # Goes through the page cache on every file system, so that nothing is ever shared.
    try:
        os.lseek(target, place, os.SEEK_SET)
        return os.sendfile(target, source, start, length)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise


def _read_and_write(source: int, target: int, start: int, place: int, length: int) -> int:
    piece = os.pread(source, length, start)
    if not piece:
        raise exceptions.StorageError(reflink.file_path(source), f"ends at {start}, earlier than expected")
    return os.pwrite(target, piece, place)
