# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters of qcow2 images, none of which is believed to be what it should be."""

from __future__ import annotations

import contextlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

__all__ = ["Decompress", "decompressor", "zstd_library"]

#: Called with what is compressed and how many bytes it should give; returns these, or fewer if there are no more. What
#: follows the compressed data is ignored, since their length is known to the sector only. Raises ValueError if they
#: are damaged. Threads may call it at the same time.
Decompress = Callable[[bytes, int], bytes]

# As QEMU writes them (block/qcow2-threads.c): the window, in bits, and no header.
_WINDOW = -12
# The logarithm of the window of 8 MiB that decoders should accept (RFC 8878, section 3.1.1.1.2). A larger one would
# cost memory for nothing, since no cluster is larger.
_ZSTD_LARGEST_WINDOW = 23
# QEMU, too, goes on with the next frame where a cluster has more than one, though nobody is known to write that.
_MOST_FRAMES = 64


def decompressor(compression_type: int) -> Decompress:
    """Return what decompresses the clusters of an image.

    :param compression_type: of its header: 0 zlib, 1 zstd.
    """
    return _zstd() if compression_type else _zlib()


def _zlib() -> Decompress:
    library: Any = zlib
    with contextlib.suppress(ImportError):
        # The same in half the time.
        from isal import isal_zlib as library

    def decompress(compressed: bytes, length: int) -> bytes:
        try:
            data: bytes = library.decompressobj(wbits=_WINDOW).decompress(compressed, length)
        except library.error as error:
            raise ValueError(str(error)) from error
        return data

    return decompress


def _zstd() -> Decompress:
    zstd = zstd_library()
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_LARGEST_WINDOW}

    def decompress(compressed: bytes, length: int) -> bytes:
        data = b""
        for _ in range(_MOST_FRAMES):
            decoder = zstd.ZstdDecompressor(options=options)
            try:
                data += decoder.decompress(compressed, length - len(data))
            except zstd.ZstdError as error:
                raise ValueError(str(error)) from error
            if len(data) == length or not decoder.eof:
                break
            compressed = decoder.unused_data
        return data

    return decompress


def zstd_library() -> Any:
    """Return the standard library's module, or what older versions of Python have in its place."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
