# SPDX-License-Identifier: Apache-2.0
"""Digests of image files.

``sha256`` is the ordinary one. ``sha256-1m`` is the SHA-256 of the concatenated SHA-256 digests of the file's
1 MiB blocks (the last may be shorter): it also covers the whole content, but holes cost nothing, so that it can be
taken of a raw disk whose virtual size is many times its data.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable

from imagebackend import exceptions

__all__ = ["BLOCKS", "BLOCK_SIZE", "SHA256", "ZERO_BLOCK", "BlockDigest", "compute", "next_data"]

SHA256 = "sha256"
BLOCKS = "sha256-1m"

#: The bytes of a block of :data:`BLOCKS`.
BLOCK_SIZE = 1 << 20

_MOST_ZEROS = 1 << 16
#: The SHA-256 of a block of zeros.
ZERO_BLOCK = hashlib.sha256(bytes(BLOCK_SIZE)).digest()


class BlockDigest:
    """:data:`BLOCKS`, taken of blocks in the order of the file.

    :ivar size: the bytes that were added.
    """

    def __init__(self) -> None:
        self._total = hashlib.sha256()
        self.size = 0

    def add(self, block_digest: bytes, length: int) -> None:
        """Add the SHA-256 digest of the next block, of ``length`` bytes; only the last has less than a block's."""
        self._total.update(block_digest)
        self.size += length

    def add_zeros(self, end: int) -> None:
        """Add zeros up to the offset ``end``, the end of a block or of the file; at most 64 GiB of them at a time.

        Whether that reached ``end`` shows in :attr:`size`.
        """
        blocks = min((end - self.size) // BLOCK_SIZE, _MOST_ZEROS)
        if blocks > 0:
            self.add(ZERO_BLOCK * blocks, blocks * BLOCK_SIZE)
        elif self.size < end:
            self.add(hashlib.sha256(bytes(end - self.size)).digest(), end - self.size)

    def value(self) -> str:
        """Return the digest, as ``algorithm:hex``."""
        return f"{BLOCKS}:{self._total.hexdigest()}"


def compute(descriptor: int, algorithm: str, name: str, progress: Callable[[int, int], None] | None = None) -> str:
    """Return the digest of an open file's content, as ``algorithm:hex``.

    :param descriptor: the file; its position is not used.
    :param algorithm: :data:`SHA256` or :data:`BLOCKS`.
    :param name: the file, for errors.
    :param progress: called with the bytes done and in all.
    :raises InvalidArgument: another algorithm.
    :raises StorageError: it cannot be read.
    """
    if algorithm not in (SHA256, BLOCKS):
        raise exceptions.InvalidArgument(f"digest algorithm {algorithm!r}: {SHA256} and {BLOCKS} are known")
    total = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK_SIZE))
    offset = 0
    try:
        size = os.fstat(descriptor).st_size
        while offset < size:
            zeros = 0
            if algorithm == BLOCKS:
                zeros = min((next_data(descriptor, offset, size) - offset) // BLOCK_SIZE, _MOST_ZEROS)
            if zeros:
                total.update(ZERO_BLOCK * zeros)
                offset += zeros * BLOCK_SIZE
            else:
                block = buffer[: min(BLOCK_SIZE, size - offset)]
                if os.preadv(descriptor, [block], offset) != len(block):
                    raise exceptions.StorageError(name, "became shorter while it was read")
                total.update(hashlib.sha256(block).digest() if algorithm == BLOCKS else block)
                offset += len(block)
            if progress is not None:
                progress(offset, size)
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    return f"{algorithm}:{total.hexdigest()}"


def next_data(descriptor: int, offset: int, size: int) -> int:
    """Return the offset, from ``offset`` on and up to ``size``, at which the next data of an open file begin.

    :raises OSError: as the operating system says.
    """
    try:
        # It may have grown meanwhile.
        return min(os.lseek(descriptor, offset, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise
