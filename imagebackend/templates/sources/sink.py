# SPDX-License-Identifier: Apache-2.0
"""The file that a source fills, hashed while it is written.

Each digest is computed in a thread of its own, so that receiving, writing and hashing overlap: hashlib releases the
interpreter lock. At most a few blocks wait for a digest, so memory stays flat whatever the image's size.
"""

from __future__ import annotations

import collections
import hashlib
import os
import stat
import time
import types
from collections.abc import Callable, Iterator
from concurrent import futures

from imagebackend import exceptions
from imagebackend.templates.sources.checksum import BROKEN, Checksum

__all__ = ["BLOCK_SIZE", "HEARTBEAT", "Sink"]

#: The most bytes that are read, written and hashed at a time.
BLOCK_SIZE = 1 << 20
#: Seconds between two reports of progress while nothing happens.
HEARTBEAT = 0.25

_SHA256 = "sha256"
_BLOCKS_WAITING = 4
# Zeros are looked for in pieces of this many bytes: a multiple of every file system's block size.
_HOLE = bytes(1 << 16)
_ZEROS = bytes(BLOCK_SIZE)


class Sink:
    """A file that is filled from its beginning to its end, as a context manager.

    Pieces that are zero become holes. Leaving the block ends the threads and closes the file.

    :param target: the path of an empty regular file.
    :param source: where the content comes from, for errors.
    :param checksum: what the content must hash to; None: anything.
    :param progress: called with the bytes done and in all.
    :param part: the file may hold something: :meth:`take_up` or :meth:`restart` comes first.
    :raises InsufficientSpace, PermissionDenied, StorageError: the file cannot be written; from every method.

    :ivar size: how many bytes have been taken.
    :ivar total: how many are expected; 0: not known.
    :ivar checksum: what the content must hash to.
    """

    def __init__(
        self,
        target: str,
        source: str,
        checksum: Checksum | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        part: bool = False,
    ) -> None:
        self.size = 0
        self.total = 0
        self.checksum = checksum
        self._target = target
        self._source = source
        self._part = part
        self._progress = progress
        self._reported = float("-inf")
        self._algorithms = sorted({_SHA256, checksum.algorithm if checksum else _SHA256})
        self._waiting: collections.deque[list[futures.Future[None]]] = collections.deque()
        self._new_digests()

    def __enter__(self) -> Sink:
        self._descriptor = _open(self._target, self._part)
        # One thread for each digest keeps its blocks in order.
        self._threads = [futures.ThreadPoolExecutor(1, f"imagebackend-{name}") for name in self._algorithms]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        try:
            os.close(self._descriptor)
        except OSError as closing:
            # A network file system may report a lost write here; the first error matters more.
            if error is None:
                raise exceptions.storage_error(closing, self._target) from closing

    def fileno(self) -> int:
        """Return the descriptor of the file, open for reading and writing."""
        return self._descriptor

    def expect(self, total: int, required: int | None = None) -> None:
        """Say how much will come.

        :param total: bytes; 0: not known.
        :param required: how many of them will be written, if holes are known to be among them.
        :raises InsufficientSpace: it would not fit; nothing has been written.
        """
        self.total = total
        file_system = os.fstatvfs(self._descriptor)
        available = file_system.f_bavail * file_system.f_frsize
        required = total if required is None else required
        # Some network and FUSE file systems do not tell their size.
        if required > available and file_system.f_blocks:
            raise exceptions.InsufficientSpace(self._target, required, available)
        self.report(force=True)

    def write(self, block: bytearray) -> None:
        """Append a block of at most :data:`BLOCK_SIZE` bytes; it is the sink's from now on."""
        offset = self.size
        # Hashed from now on, while it is being written.
        self.take(block)
        with memoryview(block) as view:
            try:
                for start, end in _data(block):
                    done = start
                    while done < end:
                        done += os.pwrite(self._descriptor, view[done:end], offset + done)
            except OSError as error:
                raise exceptions.storage_error(error, self._target) from error
        self.report()

    def take(self, block: bytearray | memoryview) -> None:
        """Hash a block that is in the file already; it must not change any more."""
        pairs = zip(self._threads, self._digests, strict=True)
        self._waiting.append([thread.submit(digest.update, block) for thread, digest in pairs])
        self.size += len(block)
        while len(self._waiting) > _BLOCKS_WAITING:
            self._wait_for_oldest()

    def skip(self, length: int) -> None:
        """Append a hole of ``length`` bytes, which is hashed as the zeros that it reads as."""
        while length:
            piece = memoryview(_ZEROS)[: min(length, BLOCK_SIZE)]
            self.take(piece)
            length -= len(piece)
            self.report()

    def restart(self) -> None:
        """Throw away what has been taken."""
        self._drain()
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            raise exceptions.storage_error(error, self._target) from error
        self._new_digests()
        self.size = 0

    def take_up(self, size: int, sha256: str) -> bool:
        """Count what the file holds as taken, if its first ``size`` bytes have that digest; else throw it away."""
        try:
            os.ftruncate(self._descriptor, size)
            while self.size < size:
                block = bytearray(min(size - self.size, BLOCK_SIZE))
                if os.preadv(self._descriptor, [block], self.size) != len(block):
                    break
                self.take(block)
                self.report()
        except OSError as error:
            raise exceptions.storage_error(error, self._target) from error
        if self.size == size and self.sha256() == sha256:
            return True
        self.restart()
        return False

    def sha256(self) -> str:
        """Return the SHA-256 of what has been taken until now, in hexadecimal digits."""
        self._drain()
        return self._digests[self._algorithms.index(_SHA256)].hexdigest()

    def finish(self) -> str:
        """Check what has been taken, and return its SHA-256 in hexadecimal digits.

        :raises FetchFailed: nothing has been taken.
        :raises ChecksumMismatch: it does not hash to the checksum.
        """
        if not self.size:
            raise exceptions.FetchFailed(self._source, "the image is empty")
        self._drain()
        try:
            os.ftruncate(self._descriptor, self.size)  # a hole at the end has not been written
        except OSError as error:
            raise exceptions.storage_error(error, self._target) from error
        found = {name: digest.hexdigest() for name, digest in zip(self._algorithms, self._digests, strict=True)}
        wanted = self.checksum
        if wanted is not None and found[wanted.algorithm] != wanted.hexdigest:
            raise exceptions.ChecksumMismatch(
                self._source, wanted.algorithm, wanted.hexdigest, found[wanted.algorithm]
            )
        self.report(force=True)
        return found[_SHA256]

    def report(self, *, force: bool = False) -> None:
        """Report progress, if it is time to."""
        if self._progress is None:
            return
        now = time.monotonic()
        if force or now - self._reported >= HEARTBEAT:
            self._reported = now
            self._progress(self.size, self.total)

    def _new_digests(self) -> None:
        # Not for security as far as FIPS mode is concerned: md5 and sha1 are only taken when they are asked for.
        self._digests = [hashlib.new(name, usedforsecurity=name not in BROKEN) for name in self._algorithms]

    def _drain(self) -> None:
        while self._waiting:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for update in self._waiting.popleft():
            update.result()


def _open(target: str, part: bool) -> int:
    try:
        descriptor = os.open(target, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise exceptions.storage_error(error, target) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or (found.st_size and not part):
        os.close(descriptor)
        raise exceptions.InvalidArgument(f"target {target}: an empty regular file is needed")
    return descriptor


def _data(block: bytearray) -> Iterator[tuple[int, int]]:
    start = end = 0
    for offset in range(0, len(block), len(_HOLE)):
        piece_end = min(offset + len(_HOLE), len(block))
        if not block.startswith(_HOLE[: piece_end - offset], offset):
            end = piece_end
            continue
        if end > start:
            yield start, end
        start = end = piece_end
    if end > start:
        yield start, end
