# SPDX-License-Identifier: Apache-2.0
"""Reading a file once more where it lies: past the page cache, at a pace, and from where another reading broke off.

What counts is what the storage has, and the page cache is for guests; so the file is read past it where that is
possible. How far a reading is stands beside the file, as runs of equal blocks. It counts for a day, and only for the
file that it is of: one that was changed, or replaced, is read from its beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import time
from collections.abc import Callable

from imagebackend import exceptions, faults
from imagebackend.storage import digest, direct_io, publish
from imagebackend.storage.digest import BLOCK_SIZE, BlockDigest
from imagebackend.templates.fetching import Progress

__all__ = ["Checkpoint", "Pace", "Reader", "opened"]

# How many bytes are read between two notes of how far it is.
_NOTE_EVERY = 256 << 20
# For how many seconds what was read need not be read again.
_LONGEST_KEPT = 86400
_LONGEST_HEAD = 4096
# How many blocks of zeros BlockDigest adds at a time.
_LONGEST_RUN = 1 << 16
_RUN = struct.Struct(">Q32s")


class Pace:
    """Keeps reading below a rate.

    :param rate: bytes a second; 0: as fast as it goes.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._began = time.monotonic()
        self._done = 0

    def wait(self, length: int) -> None:
        """Wait until ``length`` more bytes may have been read."""
        if self._rate:
            self._done += length
            time.sleep(max(0.0, self._began + self._done / self._rate - time.monotonic()))


class Checkpoint:
    """How far a verification is: runs of equal blocks that were read, and of which file."""

    def __init__(self, path: str, found: os.stat_result) -> None:
        self._path = path
        identity = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        self._size = found.st_size
        self._head = json.dumps(identity).encode() + b"\n"
        self._new = bytearray()
        self._unnoted = 0
        self.runs: list[tuple[int, bytes]] = []

    def load(self) -> bool:
        """Read what another verification of the same file has noted; return whether that is anything."""
        with contextlib.suppress(OSError):
            is_recent = time.time() - os.stat(self._path, follow_symlinks=False).st_mtime < _LONGEST_KEPT
            with open(self._path, "rb", opener=_no_follow) as file:
                if is_recent and file.readline(_LONGEST_HEAD) == self._head:
                    self.runs = self._parse(file.read())
        if not self.runs:
            self.remove()
        return bool(self.runs)

    def _parse(self, content: bytes) -> list[tuple[int, bytes]]:
        if len(content) % _RUN.size:
            return []
        runs = list(_RUN.iter_unpack(content))
        is_possible = all(0 < count <= _LONGEST_RUN for count, _ in runs)
        return runs if is_possible and sum(count for count, _ in runs) * BLOCK_SIZE <= self._size else []

    def add(self, count: int, block_digest: bytes, length: int) -> None:
        """Note ``count`` equal blocks, of ``length`` bytes that were read."""
        self._new += _RUN.pack(count, block_digest)
        self._unnoted += length
        if self._unnoted >= _NOTE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is new."""
        self._unnoted = 0
        if not self._new:
            return
        # It costs another reading at most.
        with contextlib.suppress(OSError), open(self._path, "ab", opener=_no_follow) as file:
            if file.tell() == 0:
                file.write(self._head)
            file.write(self._new)
            self._new.clear()
        faults.point("template.verify.noted")

    def remove(self) -> None:
        """Forget it."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


class Reader:
    """Reads a file, block by block, past the page cache where that is possible."""

    def __init__(self, path: str, descriptor: int, pace: Pace, progress: Progress | None) -> None:
        self._path = path
        self._descriptor = descriptor
        self._pace = pace
        self._progress = progress
        self._size = os.fstat(descriptor).st_size

    def blocks(self, checkpoint: Checkpoint | None = None, also: Callable[[memoryview], object] | None = None) -> str:
        """Return the file's digest by blocks.

        :param checkpoint: what was read before, and where to note what is read; None: nothing, and nowhere.
        :param also: gets the content, too, that of holes included.
        :raises StorageError: it cannot be read.
        """
        total = BlockDigest()
        for count, block_digest in checkpoint.runs if checkpoint is not None else ():
            total.add(block_digest * count, count * BLOCK_SIZE)
        # Memory that begins at a page: what O_DIRECT needs.
        with mmap.mmap(-1, BLOCK_SIZE) as memory, memoryview(memory) as buffer:
            try:
                while total.size < self._size:
                    self._read_on(total, buffer, checkpoint, also)
                    if self._progress is not None:
                        self._progress(total.size, self._size)
            except BaseException as error:
                if checkpoint is not None:
                    checkpoint.flush()
                if isinstance(error, OSError):
                    raise exceptions.storage_error(error, self._path) from error
                raise
        return total.value()

    def _read_on(
        self,
        total: BlockDigest,
        buffer: memoryview,
        checkpoint: Checkpoint | None,
        also: Callable[[memoryview], object] | None,
    ) -> None:
        start = total.size
        data = start if also is not None else digest.next_data(self._descriptor, start, self._size)
        if data - start >= BLOCK_SIZE or data == self._size:
            total.add_zeros(data)
            count, block_digest, length = (total.size - start) // BLOCK_SIZE, digest.ZERO_BLOCK, 0
        else:
            length = min(BLOCK_SIZE, self._size - start)
            # O_DIRECT reads whole blocks of the disk, up to the end of the file.
            if os.preadv(self._descriptor, [buffer], start) < length:
                raise exceptions.StorageError(self._path, "became shorter while it was read")
            with buffer[:length] as block:
                count, block_digest = length // BLOCK_SIZE, hashlib.sha256(block).digest()
                total.add(block_digest, length)
                if also is not None:
                    also(block)
        if checkpoint is not None and count:
            checkpoint.add(count, block_digest, length)
        self._pace.wait(length)


def opened(path: str) -> contextlib.AbstractContextManager[int]:
    """Give a file, open for reading past the page cache where that is possible.

    :raises PermissionDenied, StorageError: it cannot be opened or read, or is a link.
    """
    return publish.opened(path, os.O_RDONLY | (os.O_DIRECT if direct_io.reads(path) else 0))


def _no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
