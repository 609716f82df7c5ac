# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters of qcow2 images, none of which is believed to be what it should be."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from typing import Any

from imagebackend import exceptions

__all__ = ["Decompress", "decompressor"]

#: Called with what is compressed and how many bytes it should give; returns these, or fewer if there are no more. What
#: follows the compressed data is ignored, since their length is known to the sector only. Raises ValueError if they
#: are damaged. Threads may call it at the same time.
Decompress = Callable[[bytes, int], bytes]

# As QEMU writes them (block/qcow2-threads.c): the window, in bits, and no header.
_WINDOW = -12
# RFC 8878, section 3.1.1.1.2, wants decoders to accept this much. A larger window would cost memory for nothing.
_LARGEST_ZSTD_WINDOW = 8 << 20


def decompressor(compression_type: int) -> Decompress:
    """Return what decompresses the clusters of an image.

    :param compression_type: of its header: 0 zlib, 1 zstd.
    :raises Unsupported: the package that could is not installed.
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
    try:
        import zstandard
    except ImportError as error:
        raise exceptions.Unsupported("zstd", "the Python package zstandard is not installed") from error

    def decompress(compressed: bytes, length: int) -> bytes:
        decoder = zstandard.ZstdDecompressor(max_window_size=_LARGEST_ZSTD_WINDOW)
        try:
            # QEMU, too, goes on with the next frame if a cluster is more than one.
            with decoder.stream_reader(compressed, read_across_frames=True) as reader:
                return reader.read(length)
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error

    return decompress
