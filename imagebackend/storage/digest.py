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

__all__ = ["BLOCKS", "SHA256", "compute"]

SHA256 = "sha256"
BLOCKS = "sha256-1m"

_BLOCK = 1 << 20
_MOST_ZEROS = 1 << 16
_ZERO_BLOCK = hashlib.sha256(bytes(_BLOCK)).digest()


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
    buffer = memoryview(bytearray(_BLOCK))
    offset = 0
    try:
        size = os.fstat(descriptor).st_size
        while offset < size:
            zeros = 0
            if algorithm == BLOCKS:
                zeros = min((_next_data(descriptor, offset, size) - offset) // _BLOCK, _MOST_ZEROS)
            if zeros:
                total.update(_ZERO_BLOCK * zeros)
                offset += zeros * _BLOCK
            else:
                block = buffer[: min(_BLOCK, size - offset)]
                if os.preadv(descriptor, [block], offset) != len(block):
                    raise exceptions.StorageError(name, "became shorter while it was read")
                total.update(hashlib.sha256(block).digest() if algorithm == BLOCKS else block)
                offset += len(block)
            if progress is not None:
                progress(offset, size)
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    return f"{algorithm}:{total.hexdigest()}"


def _next_data(descriptor: int, offset: int, size: int) -> int:
    try:
        # It may have grown meanwhile.
        return min(os.lseek(descriptor, offset, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise
