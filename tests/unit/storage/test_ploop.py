# SPDX-License-Identifier: Apache-2.0
"""Ploop images: the reader on headers and tables that were made to mislead it, the writer, and growing."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions, faults
from imagebackend.storage import ploop
from imagebackend.storage.ploop.header import Header, first_block, pack_header
from imagebackend.storage.ploop.table import pack_table
from imagebackend.storage.run import Run

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
SMALL = 32 * KIB  # the smallest cluster: its table needs a second cluster at 255.5 MiB

#: Where the fields of the header are, and how long they are.
FIELDS = {
    "signature": (0, 16),
    "type": (16, 4),
    "cluster": (28, 4),
    "entries": (32, 4),
    "sectors": (36, 8),
    "state": (44, 4),
    "first": (48, 4),
    "flags": (52, 4),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One file that every example of a property overwrites."""
    descriptor = os.open(tmp_path_factory.mktemp("ploop") / "root.hds", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "root.hds", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


def make(descriptor: int, size: int, stored: dict[int, int], *, version: int = 1, cluster_size: int = MIB) -> Header:
    """Write an image whose clusters ``stored``, by number, are filled with a byte each."""
    os.ftruncate(descriptor, 0)
    entries = -(-size // cluster_size)
    start = first_block(entries, cluster_size)
    file_size = start + len(stored) * cluster_size
    header = Header(version, size, cluster_size, entries, start, in_use=False, file_size=file_size)
    table = array("I", bytes(4 * entries))
    for place, (cluster, byte) in enumerate(stored.items()):
        table[cluster] = start // cluster_size + place
        os.pwrite(descriptor, bytes([byte]) * cluster_size, table[cluster] * cluster_size)
    os.pwrite(descriptor, pack_header(header) + pack_table(table, header), 0)
    os.ftruncate(descriptor, file_size)
    return header


def content(*descriptors: int) -> dict[int, bytes]:
    """Return the clusters that are not zero, of a disk that is made of these deltas, the lowest first."""
    headers = [ploop.read_header(each, "image") for each in descriptors]
    tables = [ploop.read_table(each, header, "image") for each, header in zip(descriptors, headers, strict=True)]
    size = headers[-1].cluster_size
    found: dict[int, bytes] = {}
    for descriptor, runs in zip(descriptors, ploop.data_runs(tables, headers[-1]), strict=True):
        for run in runs:
            for offset in range(0, run.length, size):
                data = os.pread(descriptor, size, run.host_offset + offset)
                assert run.guest_offset + offset not in found
                if any(data):
                    found[run.guest_offset + offset] = data
    return found


def set_field(descriptor: int, field: str, value: int) -> None:
    offset, length = FIELDS[field]
    os.pwrite(descriptor, value.to_bytes(length, "little"), offset)


def set_entry(descriptor: int, index: int, value: int) -> None:
    os.pwrite(descriptor, struct.pack("<I", value), 64 + 4 * index)


@given(
    version=st.sampled_from([1, 2]),
    clusters=st.integers(1, 1 << 24),
    cluster_size=st.sampled_from([SMALL, MIB, 64 * MIB]),
    in_use=st.booleans(),
)
@settings(deadline=None)
def test_a_header_is_read_as_it_was_written(
    version: int, clusters: int, cluster_size: int, in_use: bool, scratch: int
) -> None:
    clusters = min(clusters, (2 * TIB - MIB) // cluster_size) if version == 1 else clusters
    start = first_block(clusters, cluster_size)
    header = Header(version, clusters * cluster_size, cluster_size, clusters, start, in_use, file_size=start)
    os.ftruncate(scratch, 0)
    os.pwrite(scratch, pack_header(header), 0)
    os.ftruncate(scratch, start)

    assert ploop.read_header(scratch, "image") == header


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("signature", int.from_bytes(b"WithoutFreeSpacX", "little"), "does not begin with the signature"),
        ("type", 1, "type 1"),
        ("cluster", 0, "clusters of 0"),
        ("cluster", 63, "clusters of 63"),
        ("cluster", 3000, "power of two"),
        ("cluster", 1 << 18, "clusters of"),
        ("entries", 0, "is not possible"),
        ("entries", 7, "is not possible"),
        ("entries", (1 << 24) + 1, "is the limit"),
        ("entries", 300_000, "overlap"),
        ("sectors", 0, "is not possible"),
        ("sectors", 8 * 2048 + 1, "is not possible"),
        ("sectors", 1 << 63, "is not possible"),
        ("sectors", (1 << 32) + 2048, "is not possible"),
        ("state", 1, "state 0x1"),
        ("first", 0, "overlap"),
        ("first", 2047, "overlap"),
        ("first", 1 << 20, "the file ends at"),
        ("flags", 2, "unknown flags 0x2"),
        ("flags", 1 << 31, "unknown flags"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused(field: str, value: int, reason: str, image: int) -> None:
    make(image, 8 * MIB, {0: 1, 5: 2})
    set_field(image, field, value)

    with pytest.raises(exceptions.ImageUnacceptable, match=reason):
        ploop.read_header(image, "image")


@pytest.mark.parametrize("length", [0, 15, 16, 63, 64, 4096])
def test_a_header_that_was_cut_off_is_refused(length: int, image: int) -> None:
    make(image, 8 * MIB, {})
    os.ftruncate(image, length)

    with pytest.raises(exceptions.ImageUnacceptable):
        ploop.read_header(image, "image")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("index", "cluster"),
    [(1, 0.5), (1, 1), (1, 3), (1, 1 << 20), (1, 2), (0, 3)],
    ids=["between", "twice", "past-the-end", "far", "twice-too", "lost-half"],
)
def test_a_table_that_leads_astray_is_refused(version: int, index: int, cluster: float, image: int) -> None:
    header = make(image, 8 * MIB, {0: 1, 5: 2}, version=version)
    if version == 2 and cluster < 1:
        return  # in version 2 there is nothing between clusters
    set_entry(image, index, int(cluster * header.unit))

    with pytest.raises(exceptions.ImageUnacceptable, match="block table entry"):
        ploop.read_table(image, header, "image")


def test_a_table_that_goes_on_beyond_the_disk_is_refused(image: int) -> None:
    make(image, 8 * MIB, {0: 1, 7: 2})
    set_field(image, "sectors", 7 * 2048)

    with pytest.raises(exceptions.ImageUnacceptable, match="beyond the disk's 7 clusters"):
        ploop.read_table(image, ploop.read_header(image, "image"), "image")


def test_a_file_of_leaks_takes_no_memory(image: int) -> None:
    make(image, 8 * MIB, {0: 1})
    os.ftruncate(image, 1 << 42)

    with pytest.raises(exceptions.ImageUnacceptable, match="can have left"):
        ploop.read_table(image, ploop.read_header(image, "image"), "image")


@given(changes=st.lists(st.tuples(st.integers(0, 4 * 16 + 63), st.integers(0, 255)), max_size=8))
@settings(deadline=None)
def test_no_header_and_table_leads_out_of_the_file(changes: list[tuple[int, int]], scratch: int) -> None:
    make(scratch, 16 * SMALL, {0: 1, 3: 2, 15: 3}, cluster_size=SMALL)
    for offset, byte in changes:
        os.pwrite(scratch, bytes([byte]), offset)

    try:
        header = ploop.read_header(scratch, "image")
        table = ploop.read_table(scratch, header, "image")
    except exceptions.ImageUnacceptable:
        return
    [runs] = ploop.data_runs([table], header)
    assert all(header.first_block <= run.host_offset for run in runs)
    assert all(run.host_offset + run.length <= header.file_size for run in runs)
    assert all(run.guest_offset + run.length <= header.virtual_size for run in runs)


clusters_of_a_disk = st.dictionaries(st.integers(0, 15), st.integers(1, 255), max_size=16)


@given(deltas=st.lists(clusters_of_a_disk, min_size=1, max_size=4), sizes=st.lists(st.integers(1, 16), min_size=4))
@settings(deadline=None, max_examples=50)
def test_of_several_deltas_the_uppermost_that_has_a_cluster_counts(
    deltas: list[dict[int, int]], sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("deltas")
    expected: dict[int, bytes] = {}
    descriptors = []
    for number, delta in enumerate(deltas):
        clusters = max(sizes[: number + 1])  # disks only grow
        stored = {cluster: byte for cluster, byte in delta.items() if cluster < clusters}
        descriptors.append(os.open(folder / str(number), os.O_RDWR | os.O_CREAT))
        make(descriptors[-1], clusters * SMALL, stored, cluster_size=SMALL)
        expected |= {cluster * SMALL: bytes([byte]) * SMALL for cluster, byte in stored.items()}
    try:
        assert content(*descriptors) == expected
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@given(
    runs=st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), max_size=8),
    size=st.integers(17 * MIB + 1, 18 * MIB),
    preallocate=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_an_image_holds_what_it_was_made_from(
    runs: list[tuple[int, int]], size: int, preallocate: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("image")
    source, target = (os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in ("source", "target"))
    try:
        os.ftruncate(source, size)
        wanted, end = [], 0
        for gap, length in runs:
            start = end + gap * 4096
            end = start + length * 65536
            if end <= size:
                wanted.append(Run(start, start, end - start))
                os.pwrite(source, os.urandom(end - start), start)

        header = ploop.write_image(target, size, [(source, wanted)], preallocate=preallocate)

        assert header == ploop.read_header(target, "image")
        assert header.virtual_size == 18 * MIB
        data = os.pread(source, size, 0).ljust(header.virtual_size, b"\0")
        pieces = {offset: data[offset : offset + MIB] for offset in range(0, header.virtual_size, MIB)}
        assert content(target) == {offset: piece for offset, piece in pieces.items() if any(piece)}
        if preallocate:
            assert os.fstat(target).st_blocks * 512 >= header.virtual_size
        else:
            touched = {
                byte // MIB for run in wanted for byte in range(run.guest_offset, run.guest_offset + run.length, 4096)
            }
            assert header.file_size == (1 + len(touched)) * MIB
    finally:
        os.close(source)
        os.close(target)


@pytest.mark.parametrize(
    ("size", "version"), [(MIB, 1), (ploop.MAX_SIZE_V1, 1), (ploop.MAX_SIZE_V1 + MIB, 2), (ploop.MAX_SIZE, 2)]
)
def test_the_version_reaches_as_far_as_the_disk(size: int, version: int, image: int) -> None:
    source = os.memfd_create("source")
    os.pwrite(source, b"end!" * 128, 0)

    header = ploop.write_image(image, size, [(source, [Run(size - 512, 0, 512)])])

    os.close(source)
    assert (header.version, header.virtual_size) == (version, size)
    table = ploop.read_table(image, header, "image")
    assert (table[-1] * MIB, ploop.allocated_clusters(table)) == (header.first_block, 1)
    assert os.pread(image, MIB, header.first_block) == bytes(MIB - 512) + b"end!" * 128


def test_a_disk_that_no_table_reaches_is_refused(image: int) -> None:
    with pytest.raises(exceptions.InvalidSize, match="at most"):
        ploop.write_image(image, ploop.MAX_SIZE + 1, [])


#: Sizes before and after, in small clusters: within a table's cluster, beyond it, and far beyond.
GROWTHS = [(16, 17), (16, 8176), (16, 8177), (8176, 20000), (8177, 30000)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("before", "after"), GROWTHS)
def test_a_grown_image_holds_what_it_held(before: int, after: int, version: int, image: int) -> None:
    stored = {0: 1, 3: 2, 1: 3, 15: 4}
    make(image, before * SMALL, stored, version=version, cluster_size=SMALL)

    ploop.grow(image, after * SMALL, "image", durable=True)

    header = ploop.read_header(image, "image")
    assert header.virtual_size == -(-after * SMALL // MIB) * MIB
    assert content(image) == {cluster * SMALL: bytes([byte]) * SMALL for cluster, byte in stored.items()}
    assert header.file_size == header.first_block + len(stored) * SMALL
    assert not any(ploop.read_table(image, header, "image")[before:])


@pytest.mark.parametrize(("before", "after"), GROWTHS)
def test_a_growth_that_is_cut_short_leaves_the_image_as_it_was(before: int, after: int, image: int) -> None:
    stored = {0: 1, 3: 2, 1: 3, 15: 4}
    passed: list[str] = []
    allowed = 0

    def stop(step: str) -> None:
        passed.append(step)
        if len(passed) > allowed:
            raise KeyboardInterrupt

    for allowed in range(5):  # noqa: B007  stop() reads it
        header = make(image, before * SMALL, stored, cluster_size=SMALL)
        # What a killed QEMU left behind the end must not get into the table.
        os.pwrite(image, b"\xff" * 3 * SMALL, header.file_size)
        passed.clear()
        faults.arm(stop)
        try:
            ploop.grow(image, after * SMALL, "image", durable=False)
        except KeyboardInterrupt:
            pass
        finally:
            faults.arm(None)
        ploop.cut(image, "image")
        found = ploop.read_header(image, "image")
        assert found.virtual_size in (before * SMALL, -(-after * SMALL // MIB) * MIB)
        assert content(image) == {cluster * SMALL: bytes([byte]) * SMALL for cluster, byte in stored.items()}
        assert found.file_size == (1 + max(ploop.read_table(image, found, "image"))) * SMALL
        ploop.grow(image, after * SMALL, "image", durable=False)
        assert ploop.read_header(image, "image").virtual_size == -(-after * SMALL // MIB) * MIB
        assert content(image) == {cluster * SMALL: bytes([byte]) * SMALL for cluster, byte in stored.items()}
    assert "ploop.grow.header" in passed


def test_garbage_where_the_table_will_be_is_cleared(image: int) -> None:
    header = make(image, 16 * SMALL, {0: 1}, cluster_size=SMALL)
    os.pwrite(image, b"\xff" * 4096, 64 + 4 * 16)

    ploop.grow(image, 512 * SMALL, "image", durable=False)

    assert content(image) == {0: b"\1" * header.cluster_size}


def test_version_1_does_not_grow_beyond_what_it_addresses(image: int) -> None:
    make(image, GIB, {0: 1})
    before = os.pread(image, 2 * MIB, 0)

    with pytest.raises(exceptions.Unsupported, match="a copy of the disk can be larger"):
        ploop.grow(image, 2 * TIB, "image", durable=False)

    assert os.pread(image, 2 * MIB, 0) == before


def test_no_image_is_shrunk(image: int) -> None:
    header = make(image, 8 * MIB, {0: 1})

    assert ploop.grow(image, 4 * MIB, "image", durable=False) == header
