# SPDX-License-Identifier: Apache-2.0
"""Which format a file is taken for, what its descriptor may say, and how much is read to find out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.templates import inspection
from imagebackend.templates.inspection import detection, vhdx, vmdk_descriptor
from imagebackend.templates.inspection.subject import Subject, round_up, upper_bound

GIB, TIB = 1 << 30, 1 << 40


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """One file that every test overwrites."""
    descriptor = os.open(tmp_path_factory.mktemp("inspection") / "image", os.O_RDWR | os.O_CREAT, 0o600)
    yield descriptor
    os.close(descriptor)


def filled(descriptor: int, content: bytes, size: int | None = None) -> Subject:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    if size is not None:
        os.ftruncate(descriptor, size)
    return Subject(descriptor, "image")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "raw"),
        (b"QFI", "raw"),
        (b" QFI\xfb\x00\x00\x00\x03", "raw"),
        (b"QFI\xfb", "qcow2"),
        (b"QFI\xfb\x00\x00\x00\x02", "qcow2"),
        (b"QFI\xfb\x00\x00\x00\x63", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\x00") + b"\x7f\x10\xda\xbe", "vdi"),
        (b"version 1\n", "raw"),
        (b"#!/bin/sh\necho\nversion=1\n", "raw"),
        (b"#" * 5000 + b"\nversion=1\n", "raw"),
    ],
)
def test_detected_format(content: bytes, expected: str, scratch: int) -> None:
    assert detected(scratch, content) == expected


@pytest.mark.parametrize("comment", [b"", b"# x\n", b"#\r\n", b"\n", b"   \n", b" \r\n", b"#a\n\n#b\n   \n"])
@pytest.mark.parametrize("version", [b"version=1\n", b"version=2\r\n", b"version=3\n"])
def test_every_text_that_qemu_takes_for_a_vmdk_is_refused(comment: bytes, version: bytes, scratch: int) -> None:
    with pytest.raises(exceptions.ImageUnacceptable, match="VMDK descriptor, whose extents are other files"):
        detection.detect(filled(scratch, comment + version))


@settings(deadline=None)
@given(before=st.lists(st.sampled_from([b"#", b" ", b"\t", b"\n", b"\r\n", b"version", b"=", b"1"]), max_size=40))
def test_descriptor_search_ends(scratch: int, before: list[bytes]) -> None:
    text = b"".join(before) * 40 + b"!"
    assert detection._is_vmdk_descriptor(text) == (detected(scratch, text) != "raw")


def detected(descriptor: int, text: bytes) -> str:
    try:
        return detection.detect(filled(descriptor, text))
    except exceptions.ImageUnacceptable as refusal:
        return refusal.reason


def test_a_disk_of_holes_is_read_within_a_bound(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return pread(descriptor, length, offset)

    filled(scratch, b"", 15 * TIB)
    monkeypatch.setattr(os, "pread", counted)
    verdict = inspection.inspect(scratch, "image", "raw")
    assert verdict == inspection.Verdict("raw", 15 * TIB, 15 * TIB, ())
    assert len(lengths) <= 5
    assert sum(lengths) <= 80 << 10


def test_more_than_the_bound_is_refused(scratch: int) -> None:
    subject = filled(scratch, b"", GIB)
    for _ in range(160):
        assert len(subject.read_up_to(0, 1 << 20)) == 1 << 20
    with pytest.raises(exceptions.ImageUnacceptable, match="tables take more than 167772160 bytes"):
        subject.read_up_to(0, 1)


@pytest.mark.parametrize("size", [0, -512, 1, 511, 513, (1 << 62) + 512, 1 << 64])
def test_impossible_virtual_size(size: int, scratch: int) -> None:
    with pytest.raises(exceptions.ImageUnacceptable, match=f"virtual size of {size} bytes"):
        filled(scratch, b"x").check_virtual_size(size)


def test_what_is_not_in_the_file(scratch: int) -> None:
    subject = filled(scratch, b"0123456789")
    assert subject.read(2, 8, "tail") == b"23456789"
    assert subject.read_up_to(8, 100) == b"89"
    assert subject.read_up_to(100, 1) == b""
    for offset, length in ((3, 8), (11, 0), (-1, 1), (1 << 70, 1)):
        with pytest.raises(exceptions.ImageUnacceptable, match=r"its tail .* is not in the file of 10 bytes"):
            subject.read(offset, length, "tail")


def test_entries_come_in_pieces_and_host_order(scratch: int) -> None:
    content = b"".join(number.to_bytes(4, "big") for number in range(300_000))
    subject = filled(scratch, content)
    pieces = list(subject.entries(0, 300_000, "I", "big", "table"))
    assert [first for first, _ in pieces] == [0, 262_144]
    assert [entry for _, piece in pieces for entry in piece] == list(range(300_000))


def test_bound_of_what_is_occupied() -> None:
    assert round_up(0, 512) == 0
    assert round_up(1, 512) == round_up(512, 512) == 512
    # QEMU allocates the first block of what it makes.
    assert upper_bound(0, GIB) == 4096
    assert upper_bound(65536, GIB) == 65536 + 4096
    assert upper_bound(GIB, GIB) == GIB
    assert upper_bound(65536, 1000) == 4096


def test_checksum_of_vhdx() -> None:
    # RFC 3720, appendix B.4.
    assert vhdx._crc32c(bytes(32)) == 0x8A9136AA
    assert vhdx._crc32c(b"\xff" * 32) == 0x62A8AB43
    assert vhdx._crc32c(bytes(range(32))) == 0x46DD794E


DESCRIPTOR = b"""# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW 16 SPARSE "disk.vmdk"

# The Disk Data Base
#DDB
ddb.adapterType = "lsilogic"
ddb.uuid = "60 00 C2 9e"
"""


def check(subject: Subject, text: bytes) -> str:
    return vmdk_descriptor.check_descriptor(subject, text.ljust(10240, b"\x00"), 8192)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n", b"\r\n"),
        (b"monolithicSparse", b"streamOptimized"),
        (b"parentCID=ffffffff", b"parentCID=FFFFFFFF"),
        (b"CID=fffffffe", b'encoding="UTF-8"\nCID=fffffffe'),
        (b"createType=", b"createType = "),
        (b"disk.vmdk", "Büro.vmdk".encode()),
        (b"# The Disk", b"# \xff\xfe"),
    ],
)
def test_good_descriptor(old: bytes, new: bytes, scratch: int) -> None:
    assert old in DESCRIPTOR
    assert check(filled(scratch, b"x"), DESCRIPTOR.replace(old, new)) in vmdk_descriptor.CREATE_TYPES


def test_descriptor_whose_cid_became_shorter(scratch: int) -> None:
    subject = filled(scratch, b"x")
    longer, shorter = DESCRIPTOR, DESCRIPTOR.replace(b"CID=fffffffe", b"CID=fe")
    left_behind = shorter + b"\x00" + longer[len(shorter) + 1 :]
    assert left_behind != shorter + b"\x00"
    assert check(subject, left_behind) == "monolithicSparse"
    for tail in (b'9"\n', b"x", DESCRIPTOR[-8:]):
        with pytest.raises(exceptions.ImageUnacceptable, match="goes on after its end"):
            check(subject, DESCRIPTOR + b"\x00" + tail)


def test_line_that_would_be_slow_to_match(scratch: int) -> None:
    with pytest.raises(exceptions.ImageUnacceptable, match="a line of 60004 characters"):
        check(filled(scratch, b"x"), DESCRIPTOR + b"a=" + b" " * 60_000 + b'"x\n')


@settings(deadline=None, max_examples=300)
@given(
    position=st.integers(0, len(DESCRIPTOR)),
    length=st.integers(0, 30),
    piece=st.one_of(
        st.binary(max_size=20),
        st.sampled_from(
            [b'RW 16 FLAT "/etc/passwd" 0', b"parentFileNameHint=", b"PARENTCID=1", b"\n", b"\x00", b'"', b"rw 1 "]
        ),
    ),
)
def test_changed_descriptor_is_refused_or_harmless(scratch: int, position: int, length: int, piece: bytes) -> None:
    text = DESCRIPTOR[:position] + piece + DESCRIPTOR[position + length :]
    try:
        check(filled(scratch, b"x"), text)
    except exceptions.ImageUnacceptable:
        return
    lines = [line.strip().lower() for line in text.decode("ascii", "replace").split("\n")]
    assert b"parentfilenamehint" not in text.lower()
    assert [line for line in lines if line.startswith(("rw", "rdonly", "noaccess"))] in (
        [line] for line in lines if line.startswith('rw 16 sparse "')
    )
    assert [line.partition("=")[2].strip(' "') for line in lines if line.startswith("parentcid")] == ["ffffffff"]
