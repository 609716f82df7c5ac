# SPDX-License-Identifier: Apache-2.0
"""Digests of image files: what they are, what they cost, and when they refuse."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.storage import digest
from tests import counting

MIB = 1 << 20
#: Lengths around the borders of file system blocks, holes and digest blocks.
SIZES = [0, 1, 511, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB, 5 * MIB + 4097]


def defined(content: bytes) -> str:
    """Return the digest as the documentation defines it, of bytes in memory."""
    blocks = [content[start : start + MIB] for start in range(0, len(content), MIB)]
    return "sha256-1m:" + hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


def computed(path: Path, algorithm: str = digest.BLOCKS, progress=None) -> str:
    with path.open("rb") as file:
        return digest.compute(file.fileno(), algorithm, str(path), progress)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["data", "zeros", "hole"])
def test_both_digests_are_what_they_are_said_to_be(tmp_path, size, kind):
    content = random.Random(size).randbytes(size) if kind == "data" else bytes(size)
    path = tmp_path / "file"
    path.write_bytes(b"" if kind == "hole" else content)
    os.truncate(path, size)
    assert computed(path) == defined(content)
    assert computed(path, digest.SHA256) == "sha256:" + hashlib.sha256(content).hexdigest()


def test_a_digest_once_written_down_stays_what_it_is(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"imagebackend" * 100_000)
    # (head -c 1M file | sha256sum; tail -c +1048577 file | sha256sum) | cut -c -64 | xxd -r -p | sha256sum
    assert computed(path) == "sha256-1m:526133fb1c270d6ab582bf5c47214c1889fea83632057cc9d77519ed27c28c9c"


@settings(max_examples=30, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 4 * MIB), st.integers(1, 200_000)), max_size=4),
    size=st.integers(0, 5 * MIB),
)
def test_holes_are_zeros(tmp_path_factory, runs, size):
    sparse, full = (tmp_path_factory.mktemp("digest") / name for name in ("sparse", "full"))
    with sparse.open("wb") as file:
        for start, length in runs:
            file.seek(start)
            file.write(b"\xa5" * length)
    os.truncate(sparse, size)
    full.write_bytes(sparse.read_bytes())
    assert computed(sparse) == computed(full) == defined(full.read_bytes())
    for path in (sparse, full):
        path.unlink()


def test_one_bit_shows_wherever_it_is(tmp_path):
    path = tmp_path / "file"
    seen = set()
    for place in (None, 0, MIB - 1, MIB, 3 * MIB, 4 * MIB + 5):
        with path.open("wb") as file:
            file.truncate(4 * MIB + 6)
            if place is not None:
                file.seek(place)
                file.write(b"\x01")
        seen.add(computed(path))
    assert len(seen) == 6


def test_the_length_shows_though_all_is_zero(tmp_path):
    path = tmp_path / "file"
    path.touch()
    seen = set()
    for size in (0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB):
        os.truncate(path, size)
        seen.add(computed(path))
    assert len(seen) == 6


def test_the_position_of_the_descriptor_does_not_matter(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (MIB + 7))
    with path.open("rb") as file:
        found = []
        for position in (0, 5, MIB + 7):
            file.seek(position)
            found.append(digest.compute(file.fileno(), digest.BLOCKS, str(path)))
    assert set(found) == {defined(b"x" * (MIB + 7))}


def test_the_cost_of_a_hole_is_next_to_nothing(small_tmpfs):
    """Though the file is of 64 TiB and has data at both ends: tmpfs lets files be as large."""
    path = small_tmpfs / "file"
    size = 64 << 40
    with path.open("wb") as file:
        file.write(b"first")
        file.truncate(size)
        file.seek(size - 4)
        file.write(b"last")
    setup = f"import os; from imagebackend.storage import digest; file = os.open({str(path)!r}, os.O_RDONLY)"
    counts = counting.count("digest.compute(file, digest.BLOCKS, 'file')", setup=setup)
    # The hole is taken in steps of 64 GiB, so that a progress callback is heard.
    assert counts.by_name.pop("lseek") <= 1024 + 4
    assert counts.total <= 16


def test_progress_is_told_through_data_and_holes(tmp_path):
    path = tmp_path / "file"
    size = (300 << 30) + 5
    with path.open("wb") as file:
        file.write(b"data" * MIB)
        file.truncate(size)
    seen: list[tuple[int, int]] = []
    computed(path, progress=lambda *told: seen.append(told))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {size}
    assert seen[-1] == (size, size)
    assert len(seen) >= 4 + 4


@pytest.mark.parametrize("algorithm", [digest.SHA256, digest.BLOCKS])
def test_progress_may_cancel(tmp_path, algorithm):
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * MIB))
    calls: list[int] = []

    def cancel(done: int, total: int) -> None:
        calls.append(done)
        raise exceptions.Cancelled

    with pytest.raises(exceptions.Cancelled):
        computed(path, algorithm, cancel)
    assert calls == [MIB]


@pytest.mark.parametrize("algorithm", [digest.SHA256, digest.BLOCKS])
def test_a_file_that_gets_shorter_is_an_error(tmp_path, algorithm):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3 * MIB)
    with pytest.raises(exceptions.StorageError, match="became shorter") as caught:
        computed(path, algorithm, lambda done, total: os.truncate(path, MIB + 5))
    assert caught.value.path == str(path)


@pytest.mark.parametrize("algorithm", [digest.SHA256, digest.BLOCKS])
def test_a_file_that_grows_counts_as_it_was_found(tmp_path, algorithm):
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    os.truncate(path, 3 * MIB)
    before = computed(path, algorithm)

    def grow(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(9 * MIB)
            file.write(b"more")

    assert computed(path, algorithm, grow) == before


@pytest.mark.parametrize("algorithm", ["", "md5", "SHA256", "sha256-1M", "sha256:"])
def test_other_algorithms_are_refused(tmp_path, algorithm):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(exceptions.InvalidArgument, match="sha256 and sha256-1m are known"):
        computed(path, algorithm)


@pytest.mark.parametrize("algorithm", [digest.SHA256, digest.BLOCKS])
def test_what_cannot_be_read_is_an_error_that_names_the_file(tmp_path, algorithm):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("ab") as file, pytest.raises(exceptions.StorageError, match="/name: Bad file descriptor"):
        digest.compute(file.fileno(), algorithm, "/name")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(exceptions.StorageError, match="/name: Is a directory"):
            digest.compute(descriptor, digest.SHA256, "/name")
    finally:
        os.close(descriptor)
