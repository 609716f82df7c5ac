# SPDX-License-Identifier: Apache-2.0
"""The file that a source fills: hashed while it is written, and decompressed if it comes compressed."""

from __future__ import annotations

import os
import stat
import time
import types
from collections.abc import Callable, Iterator

from imagebackend import exceptions
from imagebackend.templates.sources import compression
from imagebackend.templates.sources.checksum import Checksum
from imagebackend.templates.sources.digests import Digests

__all__ = ["BLOCK_SIZE", "HEARTBEAT", "Sink"]

#: The most bytes that are read, written and hashed at a time.
BLOCK_SIZE = 1 << 20
#: Seconds between two reports of progress while nothing happens.
HEARTBEAT = 0.25

_SHA256 = "sha256"
# Zeros are looked for in pieces of this many bytes: a multiple of every file system's block size.
_HOLE = bytes(1 << 16)
_ZEROS = bytes(BLOCK_SIZE)

# Compressed content is a bomb if there is more data in it than this, and more than so many times what came; images
# are rarely compressed to a tenth, but for their zeros. Those cost time only, and get a limit of their own.
_DATA, _DATA_RATIO = 1 << 30, 200
_CONTENT, _CONTENT_RATIO = 64 << 30, 1000


class Sink:
    """A file that is filled from its beginning to its end, as a context manager.

    Pieces that are zero become holes. What begins like a compressed stream is decompressed. Leaving the block ends
    the threads and closes the file.

    :param target: the path of an empty regular file.
    :param source: where the content comes from, for errors.
    :param checksum: what the content must hash to, as it comes; None: anything.
    :param progress: called with the bytes done and in all.
    :param part: the file may hold something: :meth:`take_up` or :meth:`restart` comes first.
    :param largest: the largest virtual size that the image may have, in bytes; 0: no limit.
    :raises InsufficientSpace, PermissionDenied, StorageError: the file cannot be written; from every method.

    :ivar size: how many bytes have been taken, as they came.
    :ivar total: how many are expected; 0: not known.
    :ivar checksum: what the content must hash to.
    :ivar compression: how it is compressed, as :class:`~imagebackend.templates.sources.Fetched` has it.
    """

    def __init__(
        self,
        target: str,
        source: str,
        checksum: Checksum | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        part: bool = False,
        largest: int = 0,
    ) -> None:
        self.size = 0
        self.total = 0
        self.checksum = checksum
        self.compression: str | None = None
        self._target = target
        self._source = source
        self._largest = largest
        self._part = part
        self._progress = progress
        self._reported = float("-inf")
        # What came first, until it tells how it is compressed; None: it has told.
        self._head: bytearray | None = bytearray()
        self._decompressor: compression.Decompressor | None = None
        # Of the file: its length, and how much of it is no hole.
        self._written = 0
        self._data = 0

    def __enter__(self) -> Sink:
        self._descriptor = _open(self._target, self._part)
        self._digests = Digests([_SHA256, self.checksum.algorithm if self.checksum else _SHA256])
        self._content_digest: Digests | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        self._digests.close()
        if self._content_digest is not None:
            self._content_digest.close()
        try:
            os.close(self._descriptor)
        except OSError as closing:
            # A network file system may report a lost write here; the first error matters more.
            if error is None:
                raise exceptions.storage_error(closing, self._target) from closing

    def fileno(self) -> int:
        """Return the descriptor of the file, open for reading and writing."""
        return self._descriptor

    @property
    def content_sha256(self) -> str | None:
        """The SHA-256 of what was decompressed, in hexadecimal digits; None: it did not come compressed."""
        return self._content_digest.values()[_SHA256] if self._content_digest is not None else None

    @property
    def resumable(self) -> bool:
        """Whether the file holds just what has been taken, so that another sink can take it up."""
        return self.compression is None and self._head is None and self.size > 0

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
        """Append a block; it is the sink's from now on.

        :raises FetchFailed: it is compressed, and damaged.
        :raises ImageUnacceptable: it is compressed, and becomes too large.
        """
        self.size += len(block)
        if self._head is not None:
            self._head += block
            if len(self._head) < compression.LONGEST_MARK:
                return
            self._settle()
        else:
            self._accept(block)
        self.report()

    def take(self, block: bytearray | memoryview) -> None:
        """Hash a block that is in the file already; it must not change any more."""
        self._settle()
        self._digests.add(block)
        self.size += len(block)
        self._written += len(block)

    def skip(self, length: int) -> None:
        """Append a hole of ``length`` bytes, which is hashed as the zeros that it reads as."""
        if length:
            self._settle()
        while length:
            piece = memoryview(_ZEROS)[: min(length, BLOCK_SIZE)]
            if self._decompressor is None:
                self.take(piece)
            else:
                self.write(bytearray(piece))
            length -= len(piece)
            self.report()

    def restart(self) -> None:
        """Throw away what has been taken."""
        self._digests.restart()
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            raise exceptions.storage_error(error, self._target) from error
        self._head, self._decompressor, self.compression = bytearray(), None, None
        if self._content_digest is not None:
            self._content_digest.close()
            self._content_digest = None
        self.size = self._written = self._data = 0

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
        return self._digests.values()[_SHA256]

    def finish(self) -> str:
        """Check what has been taken, and return its SHA-256 in hexadecimal digits.

        :raises FetchFailed: nothing has been taken, or a compressed stream has not come to its end.
        :raises ChecksumMismatch: it does not hash to the checksum.
        """
        self._settle()
        if not self.size:
            raise exceptions.FetchFailed(self._source, "the image is empty")
        found, wanted = self._digests.values(), self.checksum
        if wanted is not None and found[wanted.algorithm] != wanted.hexdigest:
            raise exceptions.ChecksumMismatch(
                self._source, wanted.algorithm, wanted.hexdigest, found[wanted.algorithm]
            )
        self._finish_decompressing()
        try:
            os.ftruncate(self._descriptor, self._written)  # a hole at the end has not been written
        except OSError as error:
            raise exceptions.storage_error(error, self._target) from error
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

    def _settle(self) -> None:
        """Decide whether it is compressed, by what has come."""
        if self._head is None:
            return
        head, self._head = self._head, None
        self.compression = compression.recognise(head)
        if self.compression is not None:
            self._decompressor = compression.Decompressor(self.compression)
            self._content_digest = Digests([_SHA256])
        if head:
            self._accept(head)

    def _accept(self, block: bytearray) -> None:
        # Hashed from now on, while it is being written.
        self._digests.add(block)
        if self._decompressor is None:
            self._store(block)
            return
        assert self._content_digest is not None
        try:
            for content in self._decompressor.feed(block, BLOCK_SIZE):
                self._content_digest.add(content)
                self._store(content)
                self._check_limits()
                self.report()
        except compression.DamagedError as error:
            raise self._damaged(error) from error

    def _finish_decompressing(self) -> None:
        if self._decompressor is None:
            return
        try:
            self._decompressor.finish()
        except compression.DamagedError as error:
            raise self._damaged(error) from error
        if not self._written:
            raise exceptions.FetchFailed(self._source, f"the image in the {self.compression} stream is empty")

    def _store(self, block: bytes | bytearray) -> None:
        offset = self._written
        self._written += len(block)
        with memoryview(block) as view:
            try:
                for start, end in _data(block):
                    self._data += end - start
                    done = start
                    while done < end:
                        done += os.pwrite(self._descriptor, view[done:end], offset + done)
                # Starts write-back without waiting for it (posix_fadvise(2)): the file will have to be durable.
                os.posix_fadvise(self._descriptor, offset, len(block), os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise exceptions.storage_error(error, self._target) from error

    def _check_limits(self) -> None:
        """Refuse a bomb.

        :raises ImageUnacceptable: it is one, as far as can be told.
        """
        if self._largest:
            # Formats such as qcow2 need a little more than the disk that they hold.
            limit, why = self._largest + self._largest // 32 + (64 << 20), "[image_cache] max_virtual_size allows"
        else:
            limit, why = max(_CONTENT, self.size * _CONTENT_RATIO), "is sound; decompress it yourself"
        if self._written > limit:
            raise exceptions.ImageUnacceptable(self._source, f"it decompresses to more than {why}: {limit} bytes")
        if self._data > max(_DATA, self.size * _DATA_RATIO):
            raise exceptions.ImageUnacceptable(
                self._source, f"it decompresses to more than {_DATA_RATIO} times its size; decompress it yourself"
            )

    def _damaged(self, error: compression.DamagedError) -> exceptions.FetchFailed:
        return exceptions.FetchFailed(self._source, f"the {self.compression} stream cannot be decompressed: {error}")


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


def _data(block: bytes | bytearray) -> Iterator[tuple[int, int]]:
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
