# SPDX-License-Identifier: Apache-2.0
"""What an image holds, as a raw disk: read, decompressed, hashed and written span by span, in a few threads.

zlib, hashlib and system calls release the interpreter's lock, so that the threads do work side by side.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures

from imagebackend import exceptions
from imagebackend.storage import reflink
from imagebackend.storage.digest import BLOCK_SIZE, BlockDigest
from imagebackend.storage.qcow2.compression import decompressor
from imagebackend.storage.qcow2.header import MAX_CLUSTER_BITS, Header
from imagebackend.storage.qcow2.tables import data_runs
from imagebackend.storage.run import Run

__all__ = ["Content"]

Progress = Callable[[int, int], None]

#: As many as QEMU has for one image.
_THREADS = 4
#: What a thread takes at a time; no cluster is in two of them.
_SPAN = 1 << MAX_CLUSTER_BITS
#: How many of them wait for a thread, or for one before them.
_WAITING = 2 * _THREADS
_ZEROS = memoryview(bytes(_SPAN))
#: Every file system that shares blocks does it in multiples of this at most.
_ALIGNMENT = 4096

#: Called, in a thread, with a span's offset, its runs and its bytes.
_Handle = Callable[[int, Sequence[Run], memoryview], None]


class Content:
    """What an image holds, as a raw disk. Making the object does no I/O.

    :param source: descriptor of the image, open for reading; nobody writes to it meanwhile.
    :param header: of the image.
    :param name: what to call the image in errors.
    :param timeout: after how many seconds, from now on, to give up.
    :param progress: called in the caller's thread with the bytes done and in all, for each of the steps in turn. What
        it raises ends the work.
    :raises Unsupported: qemu-img must read it.
    """

    def __init__(
        self, source: int, header: Header, name: str, *, timeout: float, progress: Progress | None = None
    ) -> None:
        self._source = source
        self._name = name
        self._size = header.virtual_size
        self._header = header
        self.runs()
        self._decompress = decompressor(header.compression_type)
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._progress = progress
        self._buffers = threading.local()

    @property
    def cluster_size(self) -> int:
        """The cluster size of the image, in bytes."""
        return self._header.cluster_size

    def runs(self) -> Iterator[Run]:
        """Return where the data are; see :func:`imagebackend.storage.qcow2.data_runs`."""
        return data_runs(self._source, self._header, self._name)

    def digest(self) -> str:
        """Return :data:`imagebackend.storage.digest.BLOCKS` of the disk.

        :raises ImageUnacceptable: a cluster cannot be decompressed.
        :raises StorageError: the image cannot be read, or is shorter than the runs say.
        :raises TimedOut: it takes too long.
        """
        return self._each_span(lambda start, runs, disk: None)

    def write(self, target: int) -> str:
        """Write the disk into a file, and return the digest as :meth:`digest` does.

        Data that lie in the image as they are get shared where the file system can. Write-back of others is started
        on the way, so that the fdatasync which the caller owes a durable copy finds little to do.

        :param target: descriptor of an empty file, open for writing; what it holds after an error is of no use.
        :raises InsufficientSpace, PermissionDenied: as the operating system says; others as of :meth:`digest`.
        """
        try:
            os.ftruncate(target, self._size)
        except OSError as error:
            raise exceptions.storage_error(error, reflink.file_path(target)) from error
        return self._each_span(functools.partial(_write, target, self._share(target)))

    def _share(self, target: int) -> bool:
        """Let a file share all data that lie in the image as they are, to whole blocks; False where it cannot."""
        self._tell(0)
        for run in self.runs():
            length = 0 if run.compressed_length else run.length - run.length % _ALIGNMENT
            if length and not reflink.clone_range(self._source, target, run.host_offset, length, run.guest_offset):
                return False
            self._tell(run.guest_offset)
        return True

    def _each_span(self, handle: _Handle) -> str:
        total = BlockDigest()
        pool = futures.ThreadPoolExecutor(_THREADS, "imagebackend-content")
        waiting: collections.deque[tuple[int, futures.Future[list[bytes]]]] = collections.deque()
        try:
            self._tell(0)
            for start, runs in _by_span(self.runs()):
                waiting.append((start, pool.submit(self._span, start, runs, handle)))
                if len(waiting) == _WAITING:
                    self._add(total, *waiting.popleft())
            while waiting:
                self._add(total, *waiting.popleft())
            self._add_zeros(total, self._size)
        finally:
            pool.shutdown(cancel_futures=True)
        return total.value()

    def _add(self, total: BlockDigest, start: int, span: futures.Future[list[bytes]]) -> None:
        self._add_zeros(total, start)
        for block in span.result():
            total.add(block, min(BLOCK_SIZE, self._size - total.size))
        self._tell(total.size)

    def _add_zeros(self, total: BlockDigest, end: int) -> None:
        while total.size < end:
            total.add_zeros(end)
            self._tell(total.size)

    def _tell(self, done: int) -> None:
        if time.monotonic() > self._deadline:
            raise exceptions.TimedOut(f"reading image {self._name}", self._timeout)
        if self._progress is not None:
            self._progress(done, self._size)

    # From here on: in the other threads.

    def _span(self, start: int, runs: Sequence[Run], handle: _Handle) -> list[bytes]:
        """Do the work for one span, and return the digests of its blocks."""
        try:
            buffer = self._buffers.own
        except AttributeError:
            buffer = self._buffers.own = memoryview(bytearray(_SPAN))
        disk = buffer[: min(_SPAN, self._size - start)]
        end = 0
        for run in runs:
            offset = run.guest_offset - start
            disk[end:offset] = _ZEROS[: offset - end]
            end = offset + run.length
            self._read(run, disk[offset:end])
        disk[end:] = _ZEROS[: len(disk) - end]
        handle(start, runs, disk)
        firsts = range(0, len(disk), BLOCK_SIZE)
        return [hashlib.sha256(disk[first : first + BLOCK_SIZE]).digest() for first in firsts]

    def _read(self, run: Run, piece: memoryview) -> None:
        try:
            if run.compressed_length:
                compressed = os.pread(self._source, run.compressed_length, run.host_offset)
                length = 0
            else:
                length = os.preadv(self._source, [piece], run.host_offset)
        except OSError as error:
            raise exceptions.storage_error(error, reflink.file_path(self._source)) from error
        if run.compressed_length:
            self._decompress_into(piece, compressed, run)
        elif length < len(piece):
            end = run.host_offset + length
            raise exceptions.StorageError(reflink.file_path(self._source), f"ends at {end}, earlier than expected")

    def _decompress_into(self, piece: memoryview, compressed: bytes, run: Run) -> None:
        try:
            data = self._decompress(compressed, len(piece))
        except ValueError as error:
            reason = f"its compressed data at {run.host_offset} are damaged: {error}"
            raise exceptions.ImageUnacceptable(self._name, reason) from error
        if len(data) < len(piece):
            reason = f"its compressed data at {run.host_offset} are {len(data)} bytes, not {len(piece)}"
            raise exceptions.ImageUnacceptable(self._name, reason)
        piece[:] = data


def _by_span(runs: Iterable[Run]) -> Iterator[tuple[int, list[Run]]]:
    """Yield the offset of each span that has data, and its parts of the runs."""
    start, found = 0, list[Run]()
    for run in runs:
        done = 0
        while done < run.length:
            offset = run.guest_offset + done
            if offset - offset % _SPAN != start:
                if found:
                    yield start, found
                start, found = offset - offset % _SPAN, []
            length = min(run.length - done, start + _SPAN - offset)
            found.append(
                dataclasses.replace(run, guest_offset=offset, host_offset=run.host_offset + done, length=length)
            )
            done += length
    if found:
        yield start, found


def _write(target: int, is_shared: bool, start: int, runs: Sequence[Run], disk: memoryview) -> None:
    try:
        for first, end in _extents(runs, is_shared):
            done = first
            while done < end:
                done += os.pwrite(target, disk[done - start : end - start], done)
            # Starts write-back without waiting for it (posix_fadvise(2)).
            os.posix_fadvise(target, first, end - first, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error


def _extents(runs: Sequence[Run], is_shared: bool) -> Iterator[tuple[int, int]]:
    """Yield first byte and end of what must be written, adjacent runs joined."""
    first = end = 0
    for run in runs:
        if is_shared and not run.compressed_length and not run.length % _ALIGNMENT:
            continue
        if run.guest_offset != end:
            if first < end:
                yield first, end
            first = run.guest_offset
        end = run.guest_offset + run.length
    if first < end:
        yield first, end
