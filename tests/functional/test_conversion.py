# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 image holds, as raw: written by this process, or moved where it lies. qemu-img says what is right."""

from __future__ import annotations

import os
import random
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.storage import digest, qcow2, rearranging, reflink
from imagebackend.storage.qcow2 import compression
from imagebackend.templates import conversion, inspection
from tests.contract.conftest import configured
from tests.functional.filesystems import allocated, shared
from tests.functional.image_building import patch, qemu_img, qemu_io

KIB, MIB = 1 << 10, 1 << 20
SIZE = 41 * MIB + 512
LAYOUT = {0: 300 * KIB, 3 * MIB: 5 * MIB, 20 * MIB - 512: MIB, 39 * MIB: 70 * KIB}
#: Where qemu-img puts the L2 table of a small image, and its data.
L2_TABLE, DATA = 0x40000, 0x50000


@pytest.fixture(params=["ext4_folder", "xfs_folder", "btrfs_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(params=["ext4_folder", "xfs_folder"])
def moving_folder(request: pytest.FixtureRequest) -> Path:
    """A folder on a file system that can move data within a file."""
    return Path(request.getfixturevalue(request.param))


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def make_image(path: Path, *options: str, size: int = SIZE, layout: dict[int, int] = LAYOUT) -> None:
    """Make an image with data in places: half of each extent is noise, half of it text."""
    raw = path.with_suffix(".raw")
    source = random.Random(1)
    with raw.open("wb") as file:
        file.truncate(size)
        for offset, length in layout.items():
            file.seek(offset)
            file.write(source.randbytes(length // 2) + b"a text that repeats itself" * (length // 52))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    raw.unlink()


def content_of(source: int, path: Path, *, timeout: float = 60, progress: Any = None) -> qcow2.Content:
    header = qcow2.read_header(source, str(path))
    return qcow2.Content(source, header, str(path), timeout=timeout, progress=progress)


def write(image: Path, target: Path, **options: Any) -> None:
    """Write what an image holds, and make sure that the digest is that of the file."""
    with opened(image, target) as (source, descriptor):
        value = content_of(source, image, **options).write(descriptor)
        assert value == digest.compute(descriptor, digest.BLOCKS, "target")
        assert value == content_of(source, image).digest()


def move(path: Path, progress: Callable[[int, int], None] | None = None) -> str | None:
    """Make of an image, in place, what it holds; None if that is not possible."""
    with opened(path) as (image,):
        verdict = inspection.inspect(image, str(path))
        return conversion.in_place(image, str(path), verdict, configured(path.parent, "raw"), progress)


def assert_same(image: Path, raw: Path) -> None:
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", image, raw)
    with opened(image) as (source,):
        assert raw.stat().st_size == qcow2.read_header(source, str(image)).virtual_size


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512", "cluster_size=4096", "cluster_size=65536", "cluster_size=2M", "compat=0.10",
        "compression_type=zstd", "compression_type=zstd,cluster_size=2M",
    ],
)  # fmt: skip
@pytest.mark.parametrize("compress", [(), ("-c",)], ids=["plain", "compressed"])
def test_an_image_is_written_as_qemu_img_reads_it(folder: Path, options: str, compress: tuple[str, ...]) -> None:
    image, target = folder / "image", folder / "target"
    make_image(image, *compress, "-o", options)
    write(image, target)
    assert_same(image, target)
    assert allocated(target) < 20 * MIB
    if not compress:
        # Smaller clusters are not aligned to the blocks that can be shared.
        assert (shared(target) > 6 * MIB) is (reflink.is_supported(str(folder)) and "=512" not in options)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_an_image_of_plain_and_compressed_clusters(folder: Path, kind: str) -> None:
    image, target = folder / "image", folder / "target"
    make_image(image, "-c", "-o", f"compression_type={kind}")
    # Two in place of compressed ones and out of order, then zeros, then one that is compressed and alone.
    qemu_io(image, "write -P 5 3M 64k", "write -P 6 128k 64k", "write -z 4M 256k", "write -c -P 7 30M 64k")
    write(image, target)
    assert_same(image, target)
    assert (shared(target) > 128 * KIB) is reflink.is_supported(str(folder))


def test_without_the_fast_library(ext4_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "isal", None)
    make_image(ext4_folder / "image", "-c")
    write(ext4_folder / "image", ext4_folder / "target")
    assert_same(ext4_folder / "image", ext4_folder / "target")


@pytest.mark.parametrize("frames", [2, 64, 65])
def test_a_cluster_of_several_frames(small_tmpfs: Path, frames: int) -> None:
    image = small_tmpfs / "image"
    step = 65536 // frames + 1
    pieces = [bytes([1]) * min(step, 65536 - first) for first in range(0, 65536, step)]
    assert len(pieces) == frames
    zstd = compression.zstd_library()
    compressed_image(image, b"".join(zstd.compress(piece) for piece in pieces), "zstd")
    if frames <= 64:
        write(image, small_tmpfs / "target")
        assert_same(image, small_tmpfs / "target")
    else:
        with pytest.raises(exceptions.ImageUnacceptable, match="bytes, not 65536"):
            write(image, small_tmpfs / "target")


def compressed_image(path: Path, cluster: bytes, compression_type: str = "zlib") -> None:
    """Make an image with one compressed cluster, which consists of the given bytes."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"compression_type={compression_type}", path, "1M")
    qemu_io(path, "write -c -P 1 0 64k")
    sectors = max(1, -(-len(cluster) // 512))
    patch(path, L2_TABLE, struct.pack(">Q", 1 << 62 | (sectors - 1) << 54 | DATA))
    patch(path, DATA, cluster.ljust(sectors * 512, b"\x00"))


def deflated(content: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-12)
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("library", ["isal", "zlib"])
@pytest.mark.parametrize(
    ("kind", "cluster", "reason"),
    [
        ("zlib", b"\xff" * 4000, "at 327680 are damaged: "),
        ("zlib", deflated(b"a" * 65535), "at 327680 are 65535 bytes, not 65536"),
        ("zlib", b"\x03\x00", "at 327680 are 0 bytes, not 65536"),
        ("zlib", deflated(random.Random(1).randbytes(65536))[:1024], "at 327680 are [0-9]+ bytes, not 65536"),
        ("zstd", b"\xff" * 4000, "at 327680 are damaged: "),
        ("zstd", deflated(b"a" * 65536), "at 327680 are damaged: "),
        # A frame with a window of 16 MiB, which makes a decoder take so much memory.
        ("zstd", b"\x28\xb5\x2f\xfd\x00\x70\x01\x00\x00", "at 327680 are damaged: .*memory"),
    ],
)
def test_compressed_data_that_are_damaged(
    small_tmpfs: Path, kind: str, cluster: bytes, reason: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)
    compressed_image(small_tmpfs / "image", cluster, kind)
    before = threading.active_count()
    with pytest.raises(exceptions.ImageUnacceptable, match=f"its compressed data {reason}"):
        write(small_tmpfs / "image", small_tmpfs / "target")
    assert threading.active_count() == before


def test_a_cluster_that_would_grow_for_ever_is_cut(small_tmpfs: Path) -> None:
    compressed_image(small_tmpfs / "image", deflated(bytes(64 * MIB)))
    write(small_tmpfs / "image", small_tmpfs / "target")
    assert (small_tmpfs / "target").read_bytes() == bytes(MIB)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x70000), st.binary(min_size=1, max_size=9)), min_size=1, max_size=5))
def test_no_spoiled_image_escapes_the_typed_errors(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]
) -> None:
    path = _spoiled_once(tmp_path_factory)
    target = path.with_name("target")
    whole = path.read_bytes()
    try:
        for offset, piece in changes:
            patch(path, offset, piece)
        with opened(path, target) as (image, descriptor):
            content_of(image, path).write(descriptor)
        assert target.stat().st_size <= 8 * MIB * 256
    except (exceptions.ImageUnacceptable, exceptions.Unsupported, exceptions.StorageError):
        pass
    finally:
        path.write_bytes(whole)
        target.unlink(missing_ok=True)


_MADE: list[Path] = []


def _spoiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not _MADE:
        _MADE.append(tmp_path_factory.mktemp("spoiled") / "image")
        make_image(_MADE[0], "-c", size=8 * MIB, layout={0: MIB, 5 * MIB: 64 * KIB})
    return _MADE[0]


def test_writing_reports_progress_and_can_be_cancelled(ext4_folder: Path) -> None:
    make_image(ext4_folder / "image", "-c")
    told: list[tuple[int, int]] = []
    write(ext4_folder / "image", ext4_folder / "target", progress=lambda *each: told.append(each))
    assert {size for _, size in told} == {SIZE}
    done = [each for each, _ in told]
    assert done[-1] == SIZE
    assert sorted(done[2:]) == done[2:]

    def cancel(done: int, size: int) -> None:
        told.append((done, size))
        if done > 4 * MIB:
            raise exceptions.Cancelled("enough")

    before = threading.active_count()
    with pytest.raises(exceptions.Cancelled):
        write(ext4_folder / "image", ext4_folder / "target", progress=cancel)
    assert told[-1][0] <= 8 * MIB
    assert threading.active_count() == before


def test_the_zeros_of_a_huge_disk_end_with_the_deadline(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, "1E")
    with (
        opened(image) as (source,),
        pytest.raises(exceptions.TimedOut, match=r"reading image .*: gave up after 0\.2 s"),
    ):
        content_of(source, image, timeout=0.2).digest()


def test_writing_to_a_full_file_system(tmp_path: Path, small_tmpfs: Path) -> None:
    make_image(tmp_path / "image", "-c", size=64 * MIB, layout={0: 20 * MIB})
    before = threading.active_count()
    with pytest.raises(exceptions.InsufficientSpace) as caught:
        write(tmp_path / "image", small_tmpfs / "target")
    assert caught.value.path == str(small_tmpfs / "target")
    assert threading.active_count() == before


def test_an_image_that_gets_shorter(ext4_folder: Path) -> None:
    make_image(ext4_folder / "image")
    with pytest.raises(exceptions.StorageError, match=r"/image: ends at [0-9]+, earlier than expected"):
        write(
            ext4_folder / "image",
            ext4_folder / "target",
            progress=lambda done, size: os.truncate(ext4_folder / "image", 2 * MIB) if done else None,
        )


@pytest.mark.parametrize("options", ["cluster_size=4096", "cluster_size=65536", "cluster_size=2M", "compat=0.10"])
def test_an_image_becomes_raw_where_it_lies(moving_folder: Path, options: str) -> None:
    path, kept = moving_folder / "image", moving_folder / "kept"
    make_image(kept, "-o", options)
    qemu_img("convert", "-f", "qcow2", "-O", "qcow2", "-o", options, kept, path)
    inode = path.stat().st_ino
    told: list[int] = []

    value = move(path, lambda done, size: told.append(done))

    assert (path.stat().st_ino, told[-1]) == (inode, SIZE)
    assert_same(kept, path)
    with opened(path) as (raw,):
        assert value == digest.compute(raw, digest.BLOCKS, "raw")
    assert allocated(path) < 20 * MIB
    assert sorted(entry.name for entry in moving_folder.iterdir()) == ["image", "kept"]


def test_an_empty_image_becomes_a_hole_where_it_lies(moving_folder: Path) -> None:
    path = moving_folder / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "64M")
    assert move(path)
    assert (path.stat().st_size, allocated(path)) == (64 * MIB, 0)


def stays(path: Path) -> None:
    """Make sure that an image cannot be converted in place, and that it is as it was."""
    before = path.read_bytes()
    assert move(path) is None
    assert path.read_bytes() == before


def test_an_image_stays_where_data_cannot_be_moved(btrfs_folder: Path, small_tmpfs: Path) -> None:
    for folder in (btrfs_folder, small_tmpfs):
        make_image(folder / "image", size=2 * MIB, layout={0: MIB})
        stays(folder / "image")


@pytest.mark.parametrize(
    ("options", "writes"),
    [
        (("-c",), ()),
        (("-o", "cluster_size=512"), ()),  # less than what the file system moves
        (("-o", "extended_l2=on"), ()),
        ((), ("write -P 1 10M 64k", "write -P 2 9M 64k")),  # out of order
    ],
)
def test_an_image_stays_that_is_not_plain_and_in_order(
    moving_folder: Path, options: tuple[str, ...], writes: tuple[str, ...]
) -> None:
    make_image(moving_folder / "image", *options, size=16 * MIB, layout={0: MIB})
    qemu_io(moving_folder / "image", *writes)
    stays(moving_folder / "image")


def test_an_image_of_too_many_pieces_stays(moving_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image(moving_folder / "image")
    monkeypatch.setattr(conversion, "_MOST_MOVES", 3)
    stays(moving_folder / "image")


def test_an_image_that_has_another_name_stays(moving_folder: Path) -> None:
    make_image(moving_folder / "image")
    os.link(moving_folder / "image", moving_folder / "of somebody")
    stays(moving_folder / "image")


def test_clusters_that_share_their_data_are_not_moved(moving_folder: Path) -> None:
    make_image(moving_folder / "image", size=2 * MIB, layout={0: MIB})
    patch(moving_folder / "image", L2_TABLE, struct.pack(">QQ", 1 << 63 | DATA, 1 << 63 | DATA))
    stays(moving_folder / "image")


BLOCK = 4096


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(0, 40)), max_size=12),
    rest=st.integers(0, 3 * BLOCK),
    cut=st.integers(0, BLOCK - 1),
)
def test_any_pieces_in_order_are_moved(
    ext4_mount: Path, xfs_mount: Path, gaps: list[tuple[int, int, int]], rest: int, cut: int
) -> None:
    runs: list[qcow2.Run] = []
    host = guest = 0
    for dropped, length, hole in gaps:
        host, guest = host + dropped * BLOCK, guest + hole * BLOCK
        runs.append(qcow2.Run(guest, host, length * BLOCK))
        host, guest = host + length * BLOCK, guest + length * BLOCK
    if runs:
        runs[-1] = qcow2.Run(runs[-1].guest_offset, runs[-1].host_offset, runs[-1].length - cut)
        guest -= cut
    before = random.Random(1).randbytes(host + 3 * BLOCK + 77)
    expected = bytearray(guest + rest)
    for run in runs:
        expected[run.guest_offset :][: run.length] = b""
        expected[run.guest_offset : run.guest_offset] = before[run.host_offset :][: run.length]
    for mount in (ext4_mount, xfs_mount):
        path = mount / "moved"
        path.write_bytes(before)
        with opened(path) as (descriptor,):
            assert rearranging.is_supported(str(mount), BLOCK)
            rearranging.rearrange(descriptor, runs, len(expected))
        assert path.read_bytes() == expected
        assert allocated(path) <= sum(run.length + BLOCK for run in runs)
        path.unlink()
