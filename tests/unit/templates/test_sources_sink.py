# SPDX-License-Identifier: Apache-2.0
"""The file that a source fills."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.templates.sources.sink import BLOCK_SIZE, Checksum, Sink

PIECE = 65536


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.touch(mode=0o600)
    return path


# Each piece: its length, and the byte that it consists of.
pieces = st.lists(
    st.tuples(st.sampled_from([1, 4095, PIECE, PIECE + 1, BLOCK_SIZE]), st.sampled_from(b"\0\0x")),
    min_size=1,
    max_size=5,
)


@given(blocks=pieces)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_content(target: Path, blocks: list[tuple[int, int]]) -> None:
    os.truncate(target, 0)
    content = b"".join(bytes([value]) * length for length, value in blocks)
    with Sink(str(target), "test") as sink:
        for length, value in blocks:
            sink.write(bytearray([value]) * length)
        assert sink.size == len(content)
        assert sink.finish() == hashlib.sha256(content).hexdigest()
    assert target.read_bytes() == content


def test_zeros_become_holes(target: Path) -> None:
    with Sink(str(target), "test") as sink:
        sink.write(bytearray(5 * PIECE) + bytearray(b"x") + bytearray(3 * PIECE))
        for _ in range(9):
            sink.write(bytearray(BLOCK_SIZE))
        sink.finish()
    assert target.stat().st_size == 8 * PIECE + 1 + 9 * BLOCK_SIZE
    assert target.stat().st_blocks * 512 <= 2 * PIECE
    descriptor = os.open(target, os.O_RDONLY)
    try:
        assert os.lseek(descriptor, 0, os.SEEK_DATA) == 5 * PIECE
    finally:
        os.close(descriptor)


def test_skipped_bytes_are_hashed_as_zeros(target: Path) -> None:
    with Sink(str(target), "test") as sink:
        sink.skip(3 * BLOCK_SIZE + 7)
        sink.write(bytearray(b"end"))
        assert sink.finish() == hashlib.sha256(bytes(3 * BLOCK_SIZE + 7) + b"end").hexdigest()
    assert target.stat().st_size == 3 * BLOCK_SIZE + 10


def test_hole_in_a_compressed_stream(target: Path) -> None:
    stream = gzip.compress(b"content")
    with Sink(str(target), "test") as sink:
        sink.write(bytearray(stream))
        with pytest.raises(exceptions.FetchFailed, match="gzip stream cannot be decompressed"):
            sink.skip(PIECE)


def test_restart(target: Path) -> None:
    with Sink(str(target), "test", Checksum("sha512", hashlib.sha512(b"new").hexdigest())) as sink:
        sink.write(bytearray(b"something longer"))
        sink.restart()
        assert sink.size == 0
        sink.write(bytearray(b"new"))
        assert sink.finish() == hashlib.sha256(b"new").hexdigest()
    assert target.read_bytes() == b"new"


def test_wrong_checksum(target: Path) -> None:
    with Sink(str(target), "test", Checksum("md5", "0" * 32)) as sink:
        sink.write(bytearray(b"data"))
        with pytest.raises(exceptions.ChecksumMismatch) as caught:
            sink.finish()
    assert (caught.value.source, caught.value.algorithm) == ("test", "md5")
    assert caught.value.actual == hashlib.md5(b"data").hexdigest()


def test_nothing_taken(target: Path) -> None:
    with Sink(str(target), "test") as sink, pytest.raises(exceptions.FetchFailed, match="empty"):
        sink.finish()


def test_progress(target: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Sink(str(target), "test", progress=lambda *done: seen.append(done)) as sink:
        sink.expect(6)
        sink.write(bytearray(b"abc"))
        sink.write(bytearray(b"def"))
        sink.finish()
    assert (seen[0], seen[-1]) == ((0, 6), (6, 6))


def test_more_than_fits(target: Path) -> None:
    with Sink(str(target), "test") as sink:
        with pytest.raises(exceptions.InsufficientSpace) as caught:
            sink.expect(1 << 60)
        sink.expect(1 << 60, required=0)
    assert (caught.value.path, caught.value.required) == (str(target), 1 << 60)


@pytest.mark.parametrize("kind", ["absent", "link", "fifo", "folder", "not empty", "device"])
def test_unusable_target(target: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "link":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "not empty":
        path.write_bytes(b"x")
    elif kind == "device":
        path = Path("/dev/null")
    with pytest.raises((exceptions.StorageError, exceptions.InvalidArgument)), Sink(str(path), "test"):
        pass
    assert target.stat().st_size == 0
    assert not (tmp_path / "absent").exists()


def test_nothing_is_left_open_or_running(target: Path) -> None:
    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        raise Stop

    before = os.listdir("/proc/self/fd")
    with Sink(str(target), "test", Checksum("sha512", "0" * 128), progress) as sink, pytest.raises(Stop):
        sink.write(bytearray(BLOCK_SIZE))
    assert os.listdir("/proc/self/fd") == before
    assert [thread for thread in threading.enumerate() if thread.name.startswith("imagebackend")] == []
