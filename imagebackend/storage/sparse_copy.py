# SPDX-License-Identifier: Apache-2.0
"""Copies that cost what the data cost: blocks are shared where that is possible, holes are never read or written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator

from imagebackend import exceptions
from imagebackend.storage import reflink

__all__ = ["allocate", "copy", "data_ranges"]

Progress = Callable[[int, int], None]

# Small enough that write-back starts at once and a slow disk still reports progress twice a second.
_CHUNK = 4 << 20
# "Not supported here" (copy_file_range(2), sendfile(2)): two file systems, a file system or a kernel without it, files
# that it does not take.
_NOT_SUPPORTED = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


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
            for done in _copy_range(source, target, start, end, share):
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


def _copy_range(source: int, target: int, start: int, end: int, share: bool) -> Iterator[int]:
    """Copy from ``start`` on, and yield the end of each piece."""
    in_kernel = _copy_file_range if share else _send_file
    while start < end:
        wanted = min(end - start, _CHUNK)
        # 0 also where the kernel cannot read the source in this way; reading it tells whether it has ended.
        done = in_kernel(source, target, start, wanted) or _read_and_write(source, target, start, wanted)
        # Starts write-back without waiting for it (posix_fadvise(2)), so that the disk works while the copy goes on.
        os.posix_fadvise(target, start, done, os.POSIX_FADV_DONTNEED)
        start += done
        yield start


def _copy_file_range(source: int, target: int, offset: int, length: int) -> int:
    # Shares blocks on XFS and btrfs, and lets an NFS server copy by itself.
    try:
        return os.copy_file_range(source, target, length, offset, offset)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise


def _send_file(source: int, target: int, offset: int, length: int) -> int:
    # Goes through the page cache on every file system, so that nothing is ever shared.
    try:
        os.lseek(target, offset, os.SEEK_SET)
        return os.sendfile(target, source, offset, length)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise


def _read_and_write(source: int, target: int, offset: int, length: int) -> int:
    piece = os.pread(source, length, offset)
    if not piece:
        raise exceptions.StorageError(reflink.file_path(source), f"ends at {offset}, earlier than expected")
    return os.pwrite(target, piece, offset)
