# SPDX-License-Identifier: Apache-2.0
"""Copies that cost what the data cost: blocks are shared where that is possible, holes are never read or written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

from imagebackend import exceptions
from imagebackend.storage import digest, qcow2, reflink

__all__ = ["allocate", "copy", "copy_runs", "copy_runs_with_digest", "data_ranges"]

Progress = Callable[[int, int], None]

# Small enough that write-back starts at once and a slow disk still reports progress twice a second.
_CHUNK = 4 << 20
# "Not supported here" (copy_file_range(2), sendfile(2)): two file systems, a file system or a kernel without it, files
# that it does not take.
_NOT_SUPPORTED = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Every reflinking file system clones in multiples of this at most.
_ALIGNMENT = 4096
# How often a callback is told, and may cancel, while only the digest is left; in seconds.
_TELL_EVERY = 0.2


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
            for offset, length in _copy_range(source, target, start, start, end - start, share):
                _tell(progress, offset + length, size)
        _tell(progress, size, size)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error


def copy_runs(
    source: int,
    target: int,
    runs: Iterable[qcow2.Run],
    *,
    progress: Progress | None = None,
    share: bool = True,
) -> None:
    """Copy the data of an image into a raw file; where no run leads, the target stays as it is.

    :param source: descriptor of the image, open for reading; nobody writes to it meanwhile.
    :param target: descriptor of a regular file that has its final size and reads as zeros, open for writing.
    :param runs: where the data are in the source, and where they go in the target (guest offset).
    :param progress: called with the end of the last run in the target, and the target's size.
    :param share: let the target share the source's blocks where the file system can. Otherwise, it has its own.
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
            for offset, done in _copy_range(
                source, target, run.host_offset + cloned, run.guest_offset + cloned, run.length - cloned, share
            ):
                _tell(progress, offset + done, size)
        _tell(progress, size, size)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error


def copy_runs_with_digest(
    source: int, target: int, runs: Sequence[qcow2.Run], *, progress: Progress | None = None
) -> str:
    """Copy the data of an image as :func:`copy_runs` does, while a second thread takes the digest of the result.

    The digest is taken of the source, through the runs: what is only shared need not be read from the target.

    :param progress: called in the caller's thread, for the copy and then for the digest. What it raises ends both.
    :returns: :data:`imagebackend.storage.digest.BLOCKS` of what the target holds then.
    :raises InsufficientSpace, PermissionDenied, StorageError: as of :func:`copy_runs`; the source cannot be read.
    """
    try:
        size = os.fstat(target).st_size
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error
    reading = _RunsDigest(source, runs, size)
    with futures.ThreadPoolExecutor(1, "digest") as pool:
        try:
            found = pool.submit(reading.compute)

            def tell(done: int, size: int) -> None:
                if found.done():
                    found.result()
                _tell(progress, done, size)

            copy_runs(source, target, runs, progress=tell)
            while not futures.wait([found], _TELL_EVERY).done:
                _tell(progress, reading.done, size)
            value = found.result()
            _tell(progress, size, size)
        finally:
            reading.stopped.set()
    return value


class _RunsDigest:
    """The digest of what runs of a source make up, taken in a thread of its own."""

    def __init__(self, source: int, runs: Sequence[qcow2.Run], size: int) -> None:
        self._source = source
        self._runs = runs
        self._size = size
        self.done = 0
        self.stopped = threading.Event()

    def compute(self) -> str:
        total = digest.BlockDigest()
        buffer = memoryview(bytearray(digest.BLOCK_SIZE))
        start = filled = 0
        for offset, host_offset, length in self._pieces():
            if offset >= start + digest.BLOCK_SIZE:
                self._add(total, buffer, start, filled)
                start, filled = offset - offset % digest.BLOCK_SIZE, 0
            buffer[filled : offset - start] = bytes(offset - start - filled)
            filled = offset - start + length
            self._read(buffer[filled - length : filled], host_offset)
            if self.stopped.is_set():
                break
        self._add(total, buffer, start, filled)
        self._add_zeros(total, self._size)
        return total.value()

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of the runs that lie in one block: offset in the target, in the source, length."""
        for run in self._runs:
            done = 0
            while done < run.length:
                offset = run.guest_offset + done
                length = min(run.length - done, digest.BLOCK_SIZE - offset % digest.BLOCK_SIZE)
                yield offset, run.host_offset + done, length
                done += length

    def _add(self, total: digest.BlockDigest, buffer: memoryview, start: int, filled: int) -> None:
        if filled:
            length = min(digest.BLOCK_SIZE, self._size - start)
            buffer[filled:length] = bytes(length - filled)
            self._add_zeros(total, start)
            total.add(hashlib.sha256(buffer[:length]).digest(), length)
            self.done = total.size

    def _add_zeros(self, total: digest.BlockDigest, end: int) -> None:
        while total.size < end and not self.stopped.is_set():
            total.add_zeros(end)
            self.done = total.size

    def _read(self, piece: memoryview, offset: int) -> None:
        try:
            length = os.preadv(self._source, [piece], offset)
        except OSError as error:
            raise exceptions.storage_error(error, reflink.file_path(self._source)) from error
        if length != len(piece):
            end = offset + length
            raise exceptions.StorageError(reflink.file_path(self._source), f"ends at {end}, earlier than expected")


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


def _clone_aligned(source: int, target: int, run: qcow2.Run) -> int:
    # The end of a disk need not be aligned, but that is no reason to copy all of its last run.
    length = run.length - run.length % _ALIGNMENT
    if length and reflink.clone_range(source, target, run.host_offset, length, run.guest_offset):
        return length
    return 0


def _copy_range(
    source: int, target: int, source_offset: int, target_offset: int, length: int, share: bool
) -> Iterator[tuple[int, int]]:
    in_kernel = _copy_file_range if share else _send_file
    while length:
        wanted = min(length, _CHUNK)
        # 0 also where the kernel cannot read the source in this way; reading it tells whether it has ended.
        done = in_kernel(source, target, source_offset, target_offset, wanted)
        done = done or _read_and_write(source, target, source_offset, target_offset, wanted)
        # Starts write-back without waiting for it (posix_fadvise(2)), so that the disk works while the copy goes on.
        os.posix_fadvise(target, target_offset, done, os.POSIX_FADV_DONTNEED)
        yield target_offset, done
        source_offset += done
        target_offset += done
        length -= done


def _copy_file_range(source: int, target: int, source_offset: int, target_offset: int, length: int) -> int:
    # Shares blocks on XFS and btrfs, and lets an NFS server copy by itself.
    try:
        return os.copy_file_range(source, target, length, source_offset, target_offset)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise


def _send_file(source: int, target: int, source_offset: int, target_offset: int, length: int) -> int:
    # Goes through the page cache on every file system, so that nothing is ever shared.
    try:
        os.lseek(target, target_offset, os.SEEK_SET)
        return os.sendfile(target, source, source_offset, length)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise


def _read_and_write(source: int, target: int, source_offset: int, target_offset: int, length: int) -> int:
    piece = os.pread(source, length, source_offset)
    if not piece:
        raise exceptions.StorageError(reflink.file_path(source), f"ends at {source_offset}, earlier than expected")
    return os.pwrite(target, piece, target_offset)
