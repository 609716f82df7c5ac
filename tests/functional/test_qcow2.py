# SPDX-License-Identifier: Apache-2.0
"""The qcow2 reader and writer against QEMU's own tools."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions, process
from imagebackend.storage import qcow2
from tests.functional.image_building import make_disk, qemu_img, qemu_io

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


def limit(cluster_size: int) -> int:
    """Return what an L1 table of 32 MiB covers."""
    return (32 * MIB // 8) * (cluster_size // 8) * cluster_size


def covered(cluster_size: int) -> int:
    """Return what one L1 entry covers."""
    return cluster_size // 8 * cluster_size


def sizes(cluster_size: int) -> list[int]:
    border = covered(cluster_size)
    wanted = {512, 1536, MIB + 512, border - 512, border, border + 512, 7 * border, GIB, 64 * TIB}
    return sorted(size for size in wanted if 0 < size <= limit(cluster_size))


MATRIX = [(cluster_size, size) for cluster_size in (512, 4 * KIB, 64 * KIB, 2 * MIB) for size in sizes(cluster_size)]


def overlay(path: Path, size: int, cluster_size: int, backing: Path, backing_format: str) -> None:
    with path.open("xb") as image:
        qcow2.write_overlay(
            image.fileno(),
            virtual_size=size,
            cluster_size=cluster_size,
            backing_file=str(backing),
            backing_format=backing_format,
        )


def check(path: Path) -> None:
    """Fail on damage and on leaked clusters."""
    process.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], timeout=60, silent=True)


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        process.run(["qemu-img", "info", "--output=json", "-f", "qcow2", str(path)], timeout=60).stdout
    )
    return found


def header_of(path: Path) -> qcow2.Header:
    with path.open("rb") as image:
        return qcow2.read_header(image.fileno(), str(path))


def runs_of(path: Path) -> list[qcow2.Run]:
    with path.open("rb") as image:
        header = qcow2.read_header(image.fileno(), str(path))
        return list(qcow2.data_runs(image.fileno(), header, str(path)))


@pytest.fixture(scope="module")
def backings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backing")
    found = {"raw": folder / "base.raw", "qcow2": folder / "base.qcow2"}
    make_disk(found["raw"])
    qemu_img("convert", "-f", "raw", "-O", "qcow2", found["raw"], found["qcow2"])
    return found


@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
@pytest.mark.parametrize(("cluster_size", "size"), MATRIX)
def test_overlay_is_what_qemu_img_makes(
    cluster_size: int, size: int, backing_format: str, backings: dict[str, Path], tmp_path: Path
) -> None:
    backing = backings[backing_format]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    overlay(ours, size, cluster_size, backing, backing_format)
    options = f"cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", backing_format, "-o", options, theirs, size)

    check(ours)
    qemu_img("compare", "-q", "-s", "-f", "qcow2", "-F", "qcow2", ours, theirs)
    agreed = ("virtual-size", "cluster-size", "backing-filename", "backing-filename-format")
    assert {key: info(ours)[key] for key in agreed} == {key: info(theirs)[key] for key in agreed}

    middle = size // 2 // 512 * 512
    writes = [f"write -P {n} {offset} 512" for n, offset in enumerate(dict.fromkeys((0, middle, size - 512)), 1)]
    qemu_io(ours, *writes)
    qemu_io(theirs, *writes)
    qemu_io(ours, *(write.replace("write", "read") for write in writes))
    check(ours)
    # Not strictly: that would also compare which blocks of a new cluster the file system has allocated so far.
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "qcow2", ours, theirs)


def test_data_runs_refuse_an_overlay(backings: dict[str, Path], tmp_path: Path) -> None:
    overlay(tmp_path / "disk", MIB, 64 * KIB, backings["raw"], "raw")
    with pytest.raises(exceptions.Unsupported, match="backing file"):
        runs_of(tmp_path / "disk")


@pytest.mark.parametrize("cluster_size", [1 << bits for bits in range(9, 22)])
def test_overlay_at_the_limit(cluster_size: int, backings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "disk"
    size = limit(cluster_size)
    overlay(path, size, cluster_size, backings["raw"], "raw")
    check(path)
    qemu_io(path, f"write -P 7 {size - 512} 512", f"read -P 7 {size - 512} 512")
    check(path)
    assert info(path)["virtual-size"] == size == header_of(path).virtual_size


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M", "lazy_refcounts=on", "refcount_bits=1",
        "refcount_bits=64", "extended_l2=on", "compression_type=zstd", "preallocation=metadata", "preallocation=full",
    ],
)  # fmt: skip
def test_header_agrees_with_qemu_img(options: str, backings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, backings["raw"], path)
    header, theirs = header_of(path), info(path)
    specific = theirs["format-specific"]["data"]
    assert header.virtual_size == theirs["virtual-size"]
    assert header.cluster_size == theirs["cluster-size"]
    assert {2: "0.10", 3: "1.1"}[header.version] == specific["compat"]
    assert 1 << header.refcount_order == specific["refcount-bits"]
    assert ["zlib", "zstd"][header.compression_type] == specific["compression-type"]
    assert header.extended_l2 == specific.get("extended-l2", False)
    assert bool(header.compatible_features & 1) == specific.get("lazy-refcounts", False)
    assert (header.backing_file, header.backing_format, header.snapshot_count) == (None, None, 0)
    assert header.file_size == path.stat().st_size


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10", "cluster_size=512", "cluster_size=64k", "cluster_size=2M", "lazy_refcounts=on",
        "preallocation=metadata", "preallocation=falloc", "preallocation=full",
    ],
)  # fmt: skip
def test_data_runs_rebuild_the_disk(options: str, backings: dict[str, Path], tmp_path: Path) -> None:
    path, rebuilt = tmp_path / "image", tmp_path / "rebuilt"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", options, backings["raw"], path)
    # Zero clusters, a cluster out of order, and one at the very end.
    qemu_io(path, "write -P 3 5M 70k", "write -P 4 2M 512", "write -z 3M 64k", "write -P 9 8388096 512")
    rebuild(path, rebuilt)
    qemu_img("compare", "-q", "-f", "qcow2", "-F", "raw", path, rebuilt)


def rebuild(path: Path, target: Path) -> None:
    content = path.read_bytes()
    with target.open("xb") as disk:
        disk.truncate(header_of(path).virtual_size)
        end = 0
        for run in runs_of(path):
            assert run.guest_offset >= end
            end = run.guest_offset + run.length
            disk.seek(run.guest_offset)
            disk.write(content[run.host_offset : run.host_offset + run.length])
            assert run.host_offset + run.length <= len(content)


def test_data_runs_of_a_fresh_image_are_joined(backings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", backings["raw"], path)
    # The disk has 128 KiB of data at 0 and 200 000 bytes at 3 MiB, in clusters of 64 KiB.
    assert [(run.guest_offset, run.length) for run in runs_of(path)] == [(0, 128 * KIB), (3 * MIB, 256 * KIB)]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-o", "extended_l2=on"], "extended L2"),
        (["-o", "data_file=%s.data"], "a data file"),
    ],
)
def test_data_runs_refuse_what_qemu_img_must_read(
    words: list[str], reason: str, backings: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "image"
    words = [word.replace("%s", str(path)) for word in words]
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *words, backings["raw"], path)
    with pytest.raises(exceptions.Unsupported, match=reason):
        runs_of(path)


def test_data_runs_of_compressed_clusters(backings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", backings["raw"], path)
    found = runs_of(path)
    assert [(run.guest_offset, run.length) for run in found] == [
        (offset, 64 * KIB) for offset in (0, 64 * KIB, *range(3 * MIB, 3 * MIB + 200_000, 64 * KIB))
    ]
    content = path.read_bytes()
    for run in found:
        assert 0 < run.compressed_length <= 2 * 64 * KIB
        piece = content[run.host_offset :][: run.compressed_length]
        assert (
            zlib.decompressobj(-12).decompress(piece) == backings["raw"].read_bytes()[run.guest_offset :][: run.length]
        )


def test_snapshots_agree_with_qemu_img(tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    assert snapshots_of(path) == []
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 3 1M 64k")
    qemu_img("resize", "-q", "-f", "qcow2", path, "16M")
    qemu_img("snapshot", "-c", "näch st\u200b", path)
    theirs = info(path)["snapshots"]
    ours = snapshots_of(path)
    assert [(each.id, each.name) for each in ours] == [("1", "first"), ("2", "näch st\u200b")]
    assert [(each.id, each.name) for each in ours] == [(each["id"], each["name"]) for each in theirs]
    assert [each.created.timestamp() for each in ours] == pytest.approx(
        [each["date-sec"] + each["date-nsec"] / 1e9 for each in theirs], abs=1e-5
    )
    assert [each.virtual_size for each in ours] == [8 * MIB, 16 * MIB]
    assert [each.vm_state_size for each in ours] == [0, 0]
    qemu_img("snapshot", "-d", "first", path)
    assert [each.name for each in snapshots_of(path)] == ["näch st\u200b"]


def snapshots_of(path: Path) -> list[qcow2.Snapshot]:
    with path.open("rb") as image:
        header = qcow2.read_header(image.fileno(), str(path))
        return qcow2.read_snapshots(image.fileno(), header, str(path))


def test_backing_chain(backings: dict[str, Path], tmp_path: Path) -> None:
    middle, top = tmp_path / "middle", tmp_path / "top"
    overlay(middle, 16 * MIB, 64 * KIB, backings["raw"], "raw")
    overlay(top, 32 * MIB, 64 * KIB, Path("middle"), "qcow2")
    theirs = json.loads(
        process.run(["qemu-img", "info", "--backing-chain", "--output=json", str(top)], timeout=60).stdout
    )
    ours = qcow2.backing_chain(str(top))
    assert [(each.path, each.format, each.virtual_size) for each in ours] == [
        (str(top), "qcow2", 32 * MIB),
        (str(middle), "qcow2", 16 * MIB),
        (str(backings["raw"]), "raw", 8 * MIB),
    ]
    assert [(each.format, each.virtual_size) for each in ours] == [
        (each["format"], each["virtual-size"]) for each in theirs
    ]


def test_backing_chain_that_returns(tmp_path: Path) -> None:
    overlay(tmp_path / "a", MIB, 64 * KIB, tmp_path / "b", "qcow2")
    overlay(tmp_path / "b", MIB, 64 * KIB, tmp_path / "a", "qcow2")
    with pytest.raises(exceptions.ImageUnacceptable, match="returns to"):
        qcow2.backing_chain(str(tmp_path / "a"))


def test_backing_chain_that_is_too_long(tmp_path: Path) -> None:
    with (tmp_path / "0").open("xb") as base:
        base.truncate(MIB)
    for number in range(1, 5):
        overlay(tmp_path / str(number), MIB, 64 * KIB, tmp_path / str(number - 1), "qcow2" if number > 1 else "raw")
    assert len(qcow2.backing_chain(str(tmp_path / "4"), limit=5)) == 5
    with pytest.raises(exceptions.ImageUnacceptable, match="more than 4 files"):
        qcow2.backing_chain(str(tmp_path / "4"), limit=4)


def test_backing_chain_does_not_guess_a_format(backings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-b", backings["raw"], "-F", "raw", path)
    # Rename the extension that holds the format, as an old QEMU would have left it out.
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1))
    with pytest.raises(exceptions.ImageUnacceptable, match="does not record the format"):
        qcow2.backing_chain(str(path))


def test_backing_chain_with_a_file_that_is_gone(tmp_path: Path) -> None:
    overlay(tmp_path / "disk", MIB, 64 * KIB, tmp_path / "gone", "raw")
    with pytest.raises(exceptions.DiskNotFound, match="gone"):
        qcow2.backing_chain(str(tmp_path / "disk"))


def test_backing_chain_with_a_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    overlay(tmp_path / "disk", MIB, 64 * KIB, tmp_path / "fifo", "raw")
    with pytest.raises(exceptions.ImageUnacceptable, match="neither a regular file"):
        qcow2.backing_chain(str(tmp_path / "disk"))


def test_backing_chain_with_a_name_that_cannot_be(tmp_path: Path) -> None:
    overlay(tmp_path / "disk", MIB, 64 * KIB, Path("/some/base"), "raw")
    content = (tmp_path / "disk").read_bytes()
    (tmp_path / "disk").write_bytes(content.replace(b"/some/base", b"/some\x00base"))
    with pytest.raises(exceptions.ImageUnacceptable, match="not a local file"):
        qcow2.backing_chain(str(tmp_path / "disk"))


def test_backing_chain_with_a_url(backings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "nbd:localhost:1", "-F", "raw", path, "1M")
    with pytest.raises(exceptions.ImageUnacceptable, match="not a local file"):
        qcow2.backing_chain(str(path))
