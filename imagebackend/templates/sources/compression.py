# SPDX-License-Identifier: Apache-2.0
"""Images that are published compressed: recognised by what they begin with, and decompressed while they come in.

Of the standard library, and for zstd of what the standard library has from Python 3.14 on: all of them give at most
as much at a time as they are asked for, however well it was compressed, and check what they give.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["LONGEST_MARK", "MOST_MEMORY", "DamagedError", "Decompressor", "recognise"]

#: How many bytes of the beginning tell how it is compressed.
LONGEST_MARK = 10
#: The most memory, in bytes, that decompressing may take: enough for what 'xz -9' and 'zstd --ultra -22' make.
MOST_MEMORY = 160 << 20

# At most this much goes in at a time, since what is left over of it is copied each time that something comes out.
_MOST_IN = 1 << 16
_ZSTD_LONGEST_WINDOW = 27  # the logarithm of 128 MiB, and zstd's own default

_GZIP, _XZ, _ZSTD, _SKIPPABLE = b"\x1f\x8b\x08", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_BZIP2, _BZIP2_BLOCK, _BZIP2_END = b"BZh", b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"


class DamagedError(Exception):
    """What came cannot be decompressed, or not within the limits; the text says why."""


class _Member(Protocol):
    """What decompresses one member, as the standard library's classes do."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def recognise(head: bytes | bytearray) -> str | None:
    """Return how content is compressed that begins so: ``gzip``, ``bzip2``, ``xz`` or ``zstd``; None: it is not.

    :param head: at least :data:`LONGEST_MARK` bytes, unless that is all.
    """
    if head.startswith(_GZIP) and not head[3:4] >= b"\x20":  # the flags; the upper ones are reserved
        return "gzip"
    if head.startswith(_BZIP2) and b"1" <= head[3:4] <= b"9" and head[4:10] in (_BZIP2_BLOCK, _BZIP2_END):
        return "bzip2"
    if head.startswith(_XZ):
        return "xz"
    # pzstd begins with a frame to be skipped.
    if head.startswith(_ZSTD) or (head[1:4] == _SKIPPABLE and 0x50 <= head[0] <= 0x5F):
        return "zstd"
    return None


class Decompressor:
    """What is left of a compressed stream when it is decompressed; it may have several members, one after another.

    :param kind: how it is compressed, as :func:`recognise` says.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._new_member, self._errors = _members(kind)
        self._member: _Member | None = None
        self._zeros = 0

    def feed(self, data: bytes | bytearray, most: int) -> Iterator[bytes]:
        """Yield what is in the next bytes of the stream, at most so many at a time.

        :raises DamagedError: it is damaged, or is followed by something else; or it takes too much memory.
        """
        with memoryview(data) as view:
            for start in range(0, len(view), _MOST_IN):
                yield from self._decompress(bytes(view[start : start + _MOST_IN]), most)

    def finish(self) -> None:
        """Make sure that the stream has come to its end.

        :raises DamagedError: it has not.
        """
        if self._member is not None:
            raise DamagedError("it ends too early")
        self._check_padding()

    def _decompress(self, data: bytes, most: int) -> Iterator[bytes]:
        while True:
            if self._member is None:
                data = self._without_padding(data)
                if not data:
                    return
                self._member = self._new_member()
            try:
                content = self._member.decompress(data, most)
            except self._errors as error:
                raise DamagedError(str(error)) from error
            except MemoryError as error:
                raise DamagedError(f"it takes more than {MOST_MEMORY} bytes of memory") from error
            data = b""
            if content:
                yield content
            if self._member.eof:
                data = self._member.unused_data
                self._member = None
            elif self._member.needs_input and not content:
                return

    def _without_padding(self, data: bytes) -> bytes:
        """Leave out the zeros that may follow the members of xz, four at a time."""
        if self._kind == "xz":
            rest = data.lstrip(b"\x00")
            self._zeros += len(data) - len(rest)
            data = rest
        if data:
            self._check_padding()
            self._zeros = 0
        return data

    def _check_padding(self) -> None:
        if self._zeros % 4:
            raise DamagedError("it is followed by something else")


class _GzipMember:
    """A member of gzip, in the manner of the other kinds."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


def _members(kind: str) -> tuple[Callable[[], _Member], tuple[type[Exception], ...]]:
    """Return what makes decompressors of one member, and what they raise."""
    if kind == "gzip":
        return _GzipMember, (zlib.error,)
    if kind == "bzip2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if kind == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, MOST_MEMORY), (lzma.LZMAError,)
    zstd = _zstd()
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_LONGEST_WINDOW}
    return lambda: zstd.ZstdDecompressor(options=options), (zstd.ZstdError,)


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd
