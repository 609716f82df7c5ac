# SPDX-License-Identifier: Apache-2.0
"""The content of block devices: filled past the page cache by several threads at a time, compared, zeroed, discarded.

Sizes and offsets are bytes. Every function raises PermissionDenied and StorageError as the operating system says, and
DiskNotFound if there is no such device; those that write raise DiskInUse if a file system or another device is on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

from imagebackend import exceptions, process
from imagebackend.storage import reflink, sparse_copy

__all__ = ["Progress", "compare", "discard", "fill", "shred", "size", "sync", "zero"]

Progress = Callable[[int, int], None]

# linux/fs.h
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
# The largest logical block of the disks that there are.
_BLOCK = 4096
_PIECE = 4 << 20
# One request of ours, many of the kernel's, so that a slow device still reports progress.
_CLEARED_PIECE = 128 << 20
_THREADS = 4
_WAITING = 2 * _THREADS

#: A piece of work: what does it, where it begins, and its length.
_Piece = tuple[Callable[[int, int], None], int, int]


def size(path: str) -> int:
    """Return the size of a block device."""
    with _opened(path, os.O_RDONLY) as descriptor:
        return os.lseek(descriptor, 0, os.SEEK_END)


def sync(path: str) -> None:
    """Have everything that was written to a block device reach stable storage."""
    with _opened(path, os.O_WRONLY) as descriptor, _errors(path):
        os.fsync(descriptor)


def fill(source: int, path: str, *, reads_as_zeros: bool, progress: Progress | None = None) -> None:
    """Copy a file to the beginning of a block device; the rest of it, and what are holes in the file, become zeros.

    All of it is on stable storage when this returns.

    :param source: descriptor of a regular file no longer than the device; nobody writes to it meanwhile.
    :param reads_as_zeros: the device does already: only data are written. Otherwise it is told to zero the rest, which
        many devices do without being sent the zeros.
    :param progress: called with the bytes done and in all, the device's.
    :raises DiskTooSmall: the device is.
    """
    with _opened(path, os.O_WRONLY | os.O_DIRECT | os.O_EXCL) as target:
        end = os.lseek(target, 0, os.SEEK_END)
        length = os.fstat(source).st_size
        if length > end:
            raise exceptions.DiskTooSmall(path, end, length, "the size of what is to be written")
        buffers = _Buffers()

        def copy(start: int, length: int) -> None:
            piece = buffers.own()[:length]
            _read(source, piece, start)
            with _errors(path):
                if os.pwritev(target, [piece], start) != length:
                    raise exceptions.StorageError(path, f"took less than it was given at {start}")

        def clear(start: int, length: int) -> None:
            _zero(target, path, start, length)

        def pieces() -> Iterator[_Piece]:
            done = 0
            for start, stop in _aligned(_data_ranges(source, length), end):
                if not reads_as_zeros:
                    yield from _split(clear, done, start, _CLEARED_PIECE)
                yield from _split(copy, start, stop, _PIECE)
                done = stop
            if not reads_as_zeros:
                yield from _split(clear, done, end, _CLEARED_PIECE)

        _in_threads(pieces(), end, progress)
        with _errors(path):
            os.fsync(target)


def compare(source: int, path: str, progress: Progress | None = None) -> None:
    """Make sure that a block device has the data of a file at its beginning; what are holes in it is not looked at.

    What is compared is what the device has, not what the page cache has.

    :param progress: called with the bytes done and in all.
    :raises CorruptDisk: it has not.
    """
    with _opened(path, os.O_RDONLY | os.O_DIRECT) as target:
        end = os.lseek(target, 0, os.SEEK_END)
        buffers, found = _Buffers(), _Buffers()

        def check(start: int, length: int) -> None:
            expected, actual = buffers.own()[:length], found.own()[:length]
            _read(source, expected, start)
            with _errors(path):
                os.preadv(target, [actual], start)
            if bytes(expected) != bytes(actual):
                raise exceptions.CorruptDisk(path, f"differs from what was written to it, near {start}")

        ranges = _aligned(_data_ranges(source, os.fstat(source).st_size), end)
        _in_threads((piece for start, stop in ranges for piece in _split(check, start, stop, _PIECE)), end, progress)


def zero(path: str, start: int, end: int, *, progress: Progress | None = None) -> None:
    """Make a part of a block device zeros, without being sent them where the device can do that by itself.

    It may be in use.

    :param progress: called with the bytes done and in all.
    """
    with _opened(path, os.O_WRONLY) as target:
        work = _split(lambda start, length: _zero(target, path, start, length), start, end, _CLEARED_PIECE)
        _in_threads(work, end, progress)
        with _errors(path):
            os.fsync(target)


def discard(path: str, start: int, end: int, *, progress: Progress | None = None) -> None:
    """Tell a block device to forget a part of it; what it reads as then is up to it.

    :param progress: called with the bytes done and in all.
    :raises Unsupported: it cannot.
    """
    with _opened(path, os.O_WRONLY | os.O_EXCL) as target:

        def forget(start: int, length: int) -> None:
            try:
                fcntl.ioctl(target, _BLKDISCARD, struct.pack("QQ", start, length))
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    raise exceptions.Unsupported("discard", f"{path} does not take it") from error
                raise exceptions.storage_error(error, path) from error

        _in_threads(_split(forget, start, end, _CLEARED_PIECE), end, progress)


def shred(path: str, length: int, *, timeout: float) -> None:
    """Overwrite the beginning of a block device with patterns, by the coreutils' command of that name.

    :param length: how many bytes.
    :param timeout: seconds, after which it is killed.
    :raises ToolMissing, ToolTimeout, ToolFailed: as :func:`imagebackend.process.run` says.
    """
    with _opened(path, os.O_WRONLY | os.O_EXCL):
        process.run(["shred", "--iterations=3", f"--size={length}", path], timeout=timeout, package="coreutils")


class _Buffers:
    """A buffer for each thread, aligned as direct I/O wants it."""

    def __init__(self) -> None:
        self._local = threading.local()

    def own(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(mmap.mmap(-1, _PIECE))
        buffer: memoryview = self._local.buffer
        return buffer


def _in_threads(pieces: Iterable[_Piece], total: int, progress: Progress | None) -> None:
    """Do pieces of work, several at a time, and tell of those that are done in their order.

    After the first that fails none is begun any more.
    """
    tell = progress or (lambda done, total: None)
    tell(0, total)
    waiting: deque[tuple[futures.Future[None], int]] = deque()
    with futures.ThreadPoolExecutor(_THREADS, "block-device") as pool:
        try:
            for work, start, length in pieces:
                if len(waiting) == _WAITING:
                    future, done = waiting.popleft()
                    future.result()
                    tell(done, total)
                waiting.append((pool.submit(work, start, length), start + length))
            for future, done in waiting:
                future.result()
                tell(done, total)
        finally:
            for future, _ in waiting:
                future.cancel()
    tell(total, total)


def _split(work: Callable[[int, int], None], start: int, end: int, most: int) -> Iterator[_Piece]:
    for offset in range(start, end, most):
        yield work, offset, min(most, end - offset)


def _data_ranges(source: int, length: int) -> Iterator[tuple[int, int]]:
    try:
        yield from sparse_copy.data_ranges(source, length)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(source)) from error


def _aligned(ranges: Iterable[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    """Yield ranges that begin and end at whole blocks, or at the end of the device; those that touch are one."""
    first = last = 0
    for start, stop in ranges:
        start, stop = start - start % _BLOCK, min(-(-stop // _BLOCK) * _BLOCK, end)  # noqa: PLW2901
        if start > last:
            if last:
                yield first, last
            first = start
        last = stop
    if last:
        yield first, last


def _read(source: int, piece: memoryview, start: int) -> None:
    """Fill a buffer from a file; what lies beyond its end is zeros."""
    try:
        length = os.preadv(source, [piece], start)
        size = os.fstat(source).st_size
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(source)) from error
    if length < min(len(piece), size - start):
        raise exceptions.StorageError(reflink.file_path(source), f"ends at {start + length}, earlier than expected")
    piece[length:] = bytes(len(piece) - length)


def _zero(target: int, path: str, start: int, length: int) -> None:
    with _errors(path):
        fcntl.ioctl(target, _BLKZEROOUT, struct.pack("QQ", start, length))


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    with _errors(path):
        descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise exceptions.DiskNotFound(path) from error
    except OSError as error:
        if error.errno == errno.EBUSY:
            reason = "a file system or another device is on it; unmount or remove that first"
            raise exceptions.DiskInUse(path, reason) from error
        raise exceptions.storage_error(error, path) from error
