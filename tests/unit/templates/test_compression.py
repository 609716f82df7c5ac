# SPDX-License-Identifier: Apache-2.0
"""What is recognised as compressed, and what comes out of it, whatever came in."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend.templates.sources import compression
from imagebackend.templates.sources.compression import DamagedError, Decompressor, recognise

zstd: Any = compression._zstd()

MIB = 1 << 20
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd.compress
}  # fmt: skip
KINDS = sorted(COMPRESS)
CONTENT = random.Random(0).randbytes(200_000) + bytes(2 * MIB) + b"end"
SKIPPED = struct.pack("<II", 0x184D2A57, 4) + b"skip"


def decompressed(kind: str, data: bytes, piece: int = 1 << 20, most: int = MIB) -> bytes:
    decompressor, content = Decompressor(kind), bytearray()
    for start in range(0, len(data), piece):
        for block in decompressor.feed(data[start : start + piece], most):
            assert 0 < len(block) <= most
            content += block
    decompressor.finish()
    return bytes(content)


@pytest.mark.parametrize("kind", KINDS)
def test_recognised(kind: str) -> None:
    compressed = COMPRESS[kind](CONTENT)
    assert recognise(compressed) == recognise(compressed[: compression.LONGEST_MARK]) == kind
    assert recognise(COMPRESS[kind](b"")) == kind


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"", None),
        (b"\x00" * 10, None),
        (b"QFI\xfb\x00\x00\x00\x03\x00\x00", None),
        (b"\x1f\x8b\x08\xe0......", None),
        (b"\x1f\x8b\x07\x00......", None),
        (b"\x1f\x9d\x90......", None),
        (b"BZh91AY&SX", None),
        (b"BZh01AY&SY", None),
        (b"BZh9", None),
        (b"\xfd7zXZ\x01....", None),
        (b"\x5d\x00\x00\x80\x00.....", None),
        (b"PK\x03\x04......", None),
        (b"\x28\xb5\x2f\xfc......", None),
        (SKIPPED, "zstd"),
        (b"\x4f\x2a\x4d\x18......", None),
        (b"\x04\x22\x4d\x18......", None),
    ],
)
def test_by_the_first_bytes(head: bytes, kind: str | None) -> None:
    assert recognise(head) == kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("piece", "most"), [(MIB, MIB), (1000, 4096), (70_001, 1 << 20), (1, 100_000)])
def test_whole(kind: str, piece: int, most: int) -> None:
    content = CONTENT if piece > 1 else CONTENT[-100_000:]
    assert decompressed(kind, COMPRESS[kind](content), piece, most) == content


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.binary(max_size=100), min_size=1, max_size=4), piece=st.integers(1, 50))
@settings(deadline=None, max_examples=40)
def test_several_members_are_one(kind: str, parts: list[bytes], piece: int) -> None:
    assert decompressed(kind, b"".join(map(COMPRESS[kind], parts)), piece) == b"".join(parts)


def test_frames_to_be_skipped() -> None:
    compressed = SKIPPED + zstd.compress(b"one") + SKIPPED + zstd.compress(b"two") + SKIPPED
    assert decompressed("zstd", compressed) == decompressed("zstd", compressed, 1) == b"onetwo"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [0.01, 0.5, 0.99, -1, -4])
def test_truncated(kind: str, left: float) -> None:
    compressed = COMPRESS[kind](CONTENT)
    with pytest.raises(DamagedError, match="too early"):
        decompressed(kind, compressed[: int(len(compressed) * left) if left > 0 else int(left)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", [b"x", b"\n", b"\x00", b"\x00" * 5, b"\x00" * 512 + b"x", b"garbage" * 100])
@pytest.mark.parametrize("piece", [MIB, 3])
def test_followed_by_something_else(kind: str, rest: bytes, piece: int) -> None:
    with pytest.raises(DamagedError):
        decompressed(kind, COMPRESS[kind](b"content") + rest, piece)


@pytest.mark.parametrize("piece", [MIB, 3])
def test_padding_of_xz(piece: int) -> None:
    one, two = lzma.compress(b"one"), lzma.compress(b"two")
    assert decompressed("xz", one + bytes(512) + two + bytes(4), piece) == b"onetwo"
    with pytest.raises(DamagedError, match="followed by something else"):
        decompressed("xz", one + bytes(6) + two, piece)


@pytest.mark.parametrize("kind", KINDS)
def test_every_changed_byte_is_noticed_or_does_not_matter(kind: str) -> None:
    """What comes out is right, or is refused: their own checksums see to it."""
    content = random.Random(1).randbytes(300)
    options = {zstd.CompressionParameter.checksum_flag: 1}
    compressed = zstd.compress(content, options=options) if kind == "zstd" else COMPRESS[kind](content)
    for offset in range(len(compressed)):
        damaged = bytearray(compressed)
        damaged[offset] ^= 1 + offset % 255
        try:
            found = decompressed(kind, bytes(damaged))
        except DamagedError:
            continue
        assert found == content


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=60)
def test_nonsense(kind: str, data: bytes) -> None:
    start = COMPRESS[kind](b"content" * 10)[:20]
    with pytest.raises(DamagedError):
        decompressed(kind, start + data)


@pytest.mark.parametrize(
    "compressed",
    [
        lzma.compress(b"x" * 100, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 29}]),
        # The head of a frame with a window of 256 MiB, and a block.
        b"\x28\xb5\x2f\xfd\x00" + bytes([(28 - 10) << 3]) + b"\x09\x00\x00x",
    ],
)
def test_too_much_memory(compressed: bytes) -> None:
    kind = recognise(compressed)
    assert kind is not None
    with pytest.raises(DamagedError, match=r"[Mm]emory"):
        decompressed(kind, compressed)


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_memory_stays_flat(kind: str) -> None:
    """However much comes out of little."""
    compressed = COMPRESS[kind](bytes(64 * MIB))
    tracemalloc.start()
    try:
        total = sum(len(block) for block in Decompressor(kind).feed(compressed, MIB))
        assert total == 64 * MIB
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
