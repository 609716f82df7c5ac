# SPDX-License-Identifier: Apache-2.0
"""The qcow2 reader on headers and tables that were made to mislead it, and the writer's limits and costs."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.storage import qcow2

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BACKING = "/var/lib/base"


def write(
    descriptor: int,
    *,
    virtual_size: int = GIB,
    cluster_size: int = 64 * KIB,
    backing_file: str = BACKING,
    backing_format: str = "raw",
) -> None:
    qcow2.write_overlay(
        descriptor,
        virtual_size=virtual_size,
        cluster_size=cluster_size,
        backing_file=backing_file,
        backing_format=backing_format,
    )


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One file that every example of a property overwrites."""
    descriptor = os.open(tmp_path_factory.mktemp("qcow2") / "image", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


def refill(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def _counted(function: Callable[..., object], results: list[int]) -> Callable[..., object]:
    def counted(*arguments: object) -> object:
        result = function(*arguments)
        results.append(len(result) if isinstance(result, bytes) else result if isinstance(result, int) else 0)
        return result

    return counted


def count_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, list[int]]:
    """Return the results of each call of these functions of ``os`` from now on; those of reads by their length."""
    calls: dict[str, list[int]] = {}
    for name in names:
        monkeypatch.setattr(os, name, _counted(getattr(os, name), calls.setdefault(name, [])))
    return calls


@pytest.mark.parametrize("cluster_size", [8 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("virtual_size", [512, GIB, 64 * TIB])
def test_overlay_costs_the_same_at_every_size(
    virtual_size: int, cluster_size: int, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = (32 * MIB // 8) * cluster_size * cluster_size // 8
    calls = count_calls(monkeypatch, "pwrite", "ftruncate", "write", "fsync", "fdatasync", "pread")
    write(image, virtual_size=min(virtual_size, largest), cluster_size=cluster_size, backing_file="/" + "b" * 1022)
    assert len(calls["pwrite"]) == 3
    assert len(calls["ftruncate"]) == 1
    assert sum(calls["pwrite"]) <= 16 * KIB
    assert calls["write"] == calls["fsync"] == calls["fdatasync"] == calls["pread"] == []
    # The L1 table is a hole.
    assert os.fstat(image).st_blocks * 512 <= 64 * KIB


def test_header_is_read_at_once(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write(image)
    calls = count_calls(monkeypatch, "pread", "read")
    qcow2.read_header(image, "disk")
    assert calls == {"pread": [4096], "read": []}


@settings(deadline=None)
@given(
    sectors=st.integers(1, 64 * TIB // 512),
    cluster_bits=st.integers(9, 21),
    backing_file=st.text(
        st.characters(exclude_characters="\x00:", exclude_categories=["Cs"]), min_size=1, max_size=90
    ),
    backing_format=st.sampled_from(["raw", "qcow2"]),
)
def test_what_was_written_is_read(
    scratch: int, sectors: int, cluster_bits: int, backing_file: str, backing_format: str
) -> None:
    cluster_size = 1 << cluster_bits
    virtual_size = min(sectors * 512, (32 * MIB // 8) * cluster_size * cluster_size // 8)
    refill(scratch, b"")
    write(
        scratch,
        virtual_size=virtual_size,
        cluster_size=cluster_size,
        backing_file=backing_file,
        backing_format=backing_format,
    )
    header = qcow2.read_header(scratch, "disk")
    assert (header.version, header.virtual_size, header.cluster_size) == (3, virtual_size, cluster_size)
    assert (header.backing_file, header.backing_format) == (backing_file, backing_format)
    assert (header.incompatible_features, header.compatible_features, header.autoclear_features) == (0, 0, 0)
    assert header.file_size % cluster_size == 0
    assert qcow2.read_snapshots(scratch, header, "disk") == []
    assert qcow2.allocated_size(scratch, header, "disk") == 0


def test_backing_name_that_is_not_utf_8(image: int) -> None:
    name = os.fsdecode(b"/base/\xff\xfe")
    write(image, backing_file=name)
    assert qcow2.read_header(image, "disk").backing_file == name


@pytest.mark.parametrize(
    ("cluster_size", "limit"), [(512, 128 * GIB), (4 * KIB, 8 * TIB), (64 * KIB, 2048 * TIB), (2 * MIB, 1 << 61)]
)
def test_overlay_beyond_the_limit_is_refused(cluster_size: int, limit: int, image: int) -> None:
    write(image, virtual_size=limit, cluster_size=cluster_size)
    with pytest.raises(exceptions.InvalidSize, match=f"holds at most {limit} bytes"):
        write(image, virtual_size=limit + 512, cluster_size=cluster_size)


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"virtual_size": 0}, exceptions.InvalidSize, "a positive multiple of 512"),
        ({"virtual_size": -512}, exceptions.InvalidSize, "a positive multiple of 512"),
        ({"virtual_size": 1000}, exceptions.InvalidSize, "a positive multiple of 512"),
        ({"cluster_size": 0}, exceptions.InvalidArgument, "cluster size 0"),
        ({"cluster_size": -512}, exceptions.InvalidArgument, "cluster size -512"),
        ({"cluster_size": 256}, exceptions.InvalidArgument, "cluster size 256"),
        ({"cluster_size": 4 * MIB}, exceptions.InvalidArgument, "cluster size 4194304"),
        ({"cluster_size": 65537}, exceptions.InvalidArgument, "cluster size 65537"),
        ({"backing_file": ""}, exceptions.InvalidArgument, "not the name of a file"),
        ({"backing_file": "a\x00b"}, exceptions.InvalidArgument, "not the name of a file"),
        ({"backing_file": "rbd:pool/image"}, exceptions.InvalidArgument, "takes this for a URL"),
        ({"backing_file": "json:{}"}, exceptions.InvalidArgument, "takes this for a URL"),
        ({"backing_file": "/" + "b" * 1023}, exceptions.InvalidArgument, "has 1024 bytes"),
        ({"backing_file": "/" + "ä" * 512}, exceptions.InvalidArgument, "has 1025 bytes"),
        ({"backing_file": "/" + "b" * 400, "cluster_size": 512}, exceptions.InvalidArgument, "512 bytes holds 384"),
        ({"backing_format": ""}, exceptions.InvalidArgument, "1 to 15 ASCII"),
        ({"backing_format": "x" * 16}, exceptions.InvalidArgument, "1 to 15 ASCII"),
        ({"backing_format": "räw"}, exceptions.InvalidArgument, "1 to 15 ASCII"),
    ],
)
def test_overlay_that_cannot_be_is_refused_before_a_write(
    change: dict[str, object], error: type[Exception], reason: str, image: int
) -> None:
    with pytest.raises(error, match=reason):
        write(image, **change)  # type: ignore[arg-type]  # the table mixes sizes and names
    assert os.fstat(image).st_size == 0


def test_overlay_on_a_full_device() -> None:
    descriptor = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(exceptions.StorageError):
            write(descriptor)
    finally:
        os.close(descriptor)


def plain(*entries: int, clusters: int = 8, cluster_size: int = 512, **fields: int) -> bytes:
    """Return a qcow2 image of 512-byte clusters: header, refcount table, block, L1 and L2 table, then data."""
    values = {
        "virtual_size": cluster_size * cluster_size // 8,
        "incompatible": 0,
        "version": 3,
    } | fields
    head = qcow2.header.V2.pack(
        b"QFI\xfb", values["version"], 0, 0, cluster_size.bit_length() - 1, values["virtual_size"], 0, 1,
        3 * cluster_size, cluster_size, 1, 0, 0,
    ) + qcow2.header.V3.pack(values["incompatible"], 0, 0, 4, 104)  # fmt: skip
    tables = [
        head,
        struct.pack(">Q", 2 * cluster_size),
        struct.pack(">H", 1) * clusters,
        struct.pack(">Q", 1 << 63 | 4 * cluster_size),
        struct.pack(f">{len(entries)}Q", *entries),
    ]
    padded = b"".join(table.ljust(cluster_size, b"\x00") for table in tables)
    return padded + b"d" * (clusters - len(tables)) * cluster_size


def runs(descriptor: int) -> list[tuple[int, int, int]]:
    header = qcow2.read_header(descriptor, "disk")
    found = qcow2.data_runs(descriptor, header, "disk")
    return [(run.guest_offset, run.host_offset, run.length) for run in found]


COPIED = 1 << 63


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], []),
        ([COPIED | 2560], [(0, 2560, 512)]),
        ([2560], [(0, 2560, 512)]),
        ([COPIED | 2560, COPIED | 3072, COPIED | 3584], [(0, 2560, 1536)]),
        ([COPIED | 3584, COPIED | 3072, COPIED | 2560], [(0, 3584, 512), (512, 3072, 512), (1024, 2560, 512)]),
        ([COPIED | 2560, 0, COPIED | 3072], [(0, 2560, 512), (1024, 3072, 512)]),
        ([COPIED | 2560, 1, COPIED | 3072 | 1, COPIED | 3584], [(0, 2560, 512), (1536, 3584, 512)]),
    ],
)
def test_data_runs(entries: list[int], expected: list[tuple[int, int, int]], image: int) -> None:
    refill(image, plain(*entries))
    assert runs(image) == expected


def test_data_run_ends_with_the_disk(image: int) -> None:
    refill(image, plain(COPIED | 2560, COPIED | 3072, virtual_size=600))
    assert runs(image) == [(0, 2560, 600)]


def test_data_run_ends_with_the_file(image: int) -> None:
    refill(image, plain(COPIED | 3072, COPIED | 3584)[:-100])
    assert runs(image) == [(0, 3072, 924)]


def test_data_run_of_version_2_has_no_zero_flag(image: int) -> None:
    refill(image, plain(COPIED | 2560 | 1, version=2))
    with pytest.raises(exceptions.ImageUnacceptable, match="sets reserved bits"):
        runs(image)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([], 0),
        ([1, 1 | 2560], 0),
        ([COPIED | 2560], 4096),
        ([1 << 62 | 2560], 4096),
        ([COPIED | 2560] * 3, 3 * 4096),
        ([COPIED | 2560] * 64, 32 * KIB),
    ],
)
def test_allocated_size_counts_blocks_of_a_file_system(entries: list[int], expected: int, image: int) -> None:
    refill(image, plain(*entries))
    assert qcow2.allocated_size(image, qcow2.read_header(image, "disk"), "disk") == expected


def read_all(descriptor: int) -> None:
    """Do everything that reads a qcow2 image."""
    header = qcow2.read_header(descriptor, "disk")
    qcow2.read_snapshots(descriptor, header, "disk")
    qcow2.allocated_size(descriptor, header, "disk")
    for _ in qcow2.data_runs(descriptor, header, "disk"):
        pass


def assert_bounded(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        calls = count_calls(patched, "pread")
        with contextlib.suppress(exceptions.ImageUnacceptable, exceptions.Unsupported):
            read_all(descriptor)
    # The file has 4 KiB; the tables are read twice, an entry of the snapshot table is small, the header is read anew
    # for each of at most 32 extensions.
    assert sum(calls["pread"]) <= 256 * KIB


MUTATIONS = st.lists(
    st.tuples(st.integers(0, 8 * 512 - 1), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 8))),
    min_size=1,
    max_size=6,
)
HEADER_MUTATIONS = st.lists(
    st.tuples(st.integers(0, 159), st.one_of(st.binary(min_size=1, max_size=8), st.just(b"\xff" * 4))),
    min_size=1,
    max_size=4,
)


def mutated(mutations: list[tuple[int, bytes]]) -> bytes:
    content = bytearray(plain(COPIED | 2560, 1 << 62 | 3072, COPIED | 3584))
    for offset, piece in mutations:
        content[offset : offset + len(piece)] = piece
    return bytes(content)


@settings(deadline=None, max_examples=300)
@given(mutations=st.one_of(MUTATIONS, HEADER_MUTATIONS), length=st.integers(0, 8 * 512))
def test_no_mutation_escapes_the_typed_errors(scratch: int, mutations: list[tuple[int, bytes]], length: int) -> None:
    refill(scratch, mutated(mutations)[: length if length % 3 == 0 else None])
    with pytest.MonkeyPatch.context() as patched:
        assert_bounded(scratch, patched)


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=300))
def test_noise_is_refused(scratch: int, content: bytes) -> None:
    refill(scratch, b"QFI\xfb\x00\x00\x00\x03" + content)
    with pytest.raises(exceptions.ImageUnacceptable):
        qcow2.read_header(scratch, "disk")


def test_tables_in_a_file_of_holes_are_read_within_a_bound(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_size = 2 * MIB
    head = qcow2.header.V2.pack(
        b"QFI\xfb", 3, 0, 0, 21, 1 << 61, 0, 4 * MIB, cluster_size, 32 * MIB, 4, 65536, 64 * MIB
    ) + qcow2.header.V3.pack(0, 0, 0, 4, 104)
    os.pwrite(image, head, 0)
    # 256 L2 tables, each in a hole of its own: twice what is read of an image, and none of it is.
    entries = [GIB + index * cluster_size for index in range(256)]
    os.pwrite(image, struct.pack(">256Q", *entries), cluster_size)
    os.ftruncate(image, 8 * TIB)
    header = qcow2.read_header(image, "disk")
    calls = count_calls(monkeypatch, "pread")
    with pytest.raises(exceptions.ImageUnacceptable, match="take more than 268435456 bytes"):
        qcow2.allocated_size(image, header, "disk")
    assert sum(calls["pread"]) <= 32 * MIB + 8 * MIB
    qcow2.read_snapshots(image, header, "disk")
    assert sum(calls["pread"]) <= 32 * MIB + 8 * MIB + 16 * MIB
