# SPDX-License-Identifier: Apache-2.0
"""The descriptor of a ploop disk: read strictly, written as it is read."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.storage import ploop
from imagebackend.storage.ploop import Delta, Descriptor

MIB = 1 << 20
ROOT = "{11111111-1111-4111-8111-111111111111}"
NONE = "{00000000-0000-0000-0000-000000000000}"
OTHER = "{f0e1d2c3-0000-4000-8000-000000000000}"

PLAIN = Descriptor(
    64 * MIB, MIB, (Delta(ROOT, None, "root.hds"), Delta(ploop.TOP, ROOT, f"root.hds.{OTHER}"))
)  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> tuple[Delta, ...]:
    """Any tree with the top as one of its leaves."""
    guids = [f"{{{uuid.UUID(int=number)}}}" for number in draw(st.sets(st.integers(1, 1 << 127), max_size=7))]
    count = len(guids) + 1
    parents = [None, *(draw(st.integers(0, number - 1)) for number in range(1, count))]
    deltas = [
        Delta(guid, None if parent is None else guids[parent], f"root.hds.{guid}")
        for guid, parent in zip(guids, parents, strict=False)
    ]
    below = None if parents[-1] is None else guids[parents[-1]]
    return (*draw(st.permutations(deltas)), Delta(ploop.TOP, below, ploop.ROOT_IMAGE))


@given(
    deltas=trees(),
    clusters=st.integers(1, 1 << 24),
    cluster=st.sampled_from([1 << 15, MIB]),
    preallocated=st.booleans(),
)
@settings(deadline=None)
def test_a_descriptor_is_read_as_it_was_written(
    deltas: tuple[Delta, ...], clusters: int, cluster: int, preallocated: bool
) -> None:
    descriptor = Descriptor(clusters * cluster, cluster, deltas, preallocated)

    read = ploop.parse_descriptor(ploop.format_descriptor(descriptor), "descriptor")

    assert read == descriptor
    assert read.chain(ploop.TOP)[0].parent is None
    assert read.chain(ploop.TOP)[-1] == read.top


def test_what_ploop_wrote_is_read() -> None:
    content = (Path(__file__).parent / "DiskDescriptor.xml").read_bytes()

    snapshot = "{11111111-1111-1111-1111-111111111111}"
    assert ploop.parse_descriptor(content, "descriptor") == Descriptor(
        4194304 * 512,
        MIB,
        (
            Delta(snapshot, None, "root.hds"),
            Delta(ploop.TOP, snapshot, "root.hds.{491d68d5-bfa0-4e12-8bed-3426a64e906e}"),
        ),
    )


def replaced(old: str, new: str, count: int = 1) -> bytes:
    content = ploop.format_descriptor(PLAIN).decode()
    assert old in content
    return content.replace(old, new, count).encode()


def _shot(guid: str, parent: str) -> str:
    return f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"


_SHOT = f"<Shot>\n      <GUID>{ROOT}</GUID>\n      <ParentGUID>{NONE}"

HOSTILE = {
    "absolute": (("root.hds<", "/etc/shadow<"), "a plain name"),
    "dots": (("root.hds<", "../other/root.hds<"), "a plain name"),
    "dot-dot": (("root.hds<", "..<"), "a plain name"),
    "folder": (("root.hds<", "sub/root.hds<"), "a plain name"),
    "hidden": (("root.hds<", ".root.hds<"), "a plain name"),
    "option": (("root.hds<", "-root.hds<"), "a plain name"),
    "protocol": (("root.hds<", "nbd:host<"), "a plain name"),
    "empty-name": (("root.hds<", "<"), "a plain name"),
    "line-feed": (("root.hds<", "root\n.hds<"), "a plain name"),
    "long": (("root.hds<", "r" * 256 + "<"), "a plain name"),
    "itself": (("root.hds<", "DiskDescriptor.xml<"), "a plain name"),
    "its-lock": (("root.hds<", "DiskDescriptor.xml.lck<"), "a plain name"),
    "file-twice": ((f"root.hds.{OTHER}", "root.hds"), "named twice"),
    "entity": (('<?xml version="1.0"?>', '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'), "document type"),
    "dtd": (('<?xml version="1.0"?>', '<!DOCTYPE a SYSTEM "http://127.0.0.1/x">'), "document type"),
    "no-entity": (("root.hds<", "&x;<"), "x"),
    "two-roots": ((f"<ParentGUID>{ROOT}", f"<ParentGUID>{NONE}"), "2 of its images have no parent"),
    "no-root": ((f"<ParentGUID>{NONE}", f"<ParentGUID>{ROOT}"), "0 of its images have no parent"),
    "below-the-top": ((f"<ParentGUID>{NONE}", f"<ParentGUID>{ploop.TOP}"), "is below another"),
    "missing-parent": ((f"<ParentGUID>{ROOT}", f"<ParentGUID>{ROOT.replace('1', '2')}"), "do not lead to its root"),
    "own-parent": ((f"<ParentGUID>{ROOT}", f"<ParentGUID>{ploop.TOP}"), "is below another"),
    "no-top": ((ploop.TOP, ROOT.replace("1", "3"), 9), "its top is not"),
    "old-top": ((f"<TopGUID>{ploop.TOP}", f"<TopGUID>{ROOT}"), "its top is not"),
    "bad-guid": ((ROOT, "{1111}"), "not a GUID"),
    "none-as-guid": ((f"<GUID>{ROOT}", f"<GUID>{NONE}", 2), "have no parent"),
    "shot-without-image": ((_SHOT, _shot(OTHER, ROOT) + _SHOT), "do not have the same"),
    "shot-twice": ((_SHOT, _shot(ROOT, NONE) + _SHOT), "named twice"),
    "raw": (("<Type>Compressed", "<Type>Plain"), "Plain"),
    "no-size": (("<Disk_size>131072", "<Disk_size>"), "not a number"),
    "zero-size": (("<Disk_size>131072", "<Disk_size>0"), "not possible"),
    "half-a-cluster": (("131072<", "131073<", 2), "not possible"),
    "huge": (("131072<", "9999999999999999<", 2), "not a number"),
    "large": (("131072<", f"{(1 << 24) * 2048 + 2048}<", 2), "not possible"),
    "negative": (("131072<", "-131072<", 2), "not a number"),
    "arabic": (("131072<", "١٣١٠٧٢<", 2), "not a number"),
    "hexadecimal": (("131072<", "0x20000<", 2), "not a number"),
    "other-end": (("<End>131072", "<End>2048"), "stored from 0 to 2048"),
    "other-start": (("<Start>0", "<Start>2048"), "stored from 2048"),
    "no-cylinders": (("<Heads>16", "<Heads>0"), "do not make"),
    "many-heads": (("<Heads>16", "<Heads>999999"), "do not make"),
    "odd-cluster": (("<Blocksize>2048", "<Blocksize>2047"), "clusters of 2047"),
    "tiny-cluster": (("<Blocksize>2048", "<Blocksize>1"), "clusters of 1 "),
    "large-sectors": (("<Padding>", "<LogicSectorSize>4096</LogicSectorSize><Padding>"), "do not have 512"),
    "two-storages": (("<Storage>", "<Storage></Storage><Storage>"), "2 times"),
    "two-sizes": (("<Disk_size>", "<Disk_size>4096</Disk_size><Disk_size>"), "2 times"),
    "markup-in-text": (("root.hds<", "root.hds<b/><"), "more than text"),
    "encrypted": (("<Blocksize>", "<Encryption><KeyId>1</KeyId></Encryption><Blocksize>"), "encrypted"),
    "another-root": (("Parallels_disk_image", "domain", 2), "not a ploop disk's"),
    "not-closed": (("</Snapshots>", ""), "mismatch"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_descriptor_that_means_no_good_is_refused(case: str) -> None:
    change, reason = HOSTILE[case]

    with pytest.raises(exceptions.ImageUnacceptable, match=reason):
        ploop.parse_descriptor(replaced(*change), "descriptor")


def test_a_circle_is_refused() -> None:
    one, two = ROOT.replace("1", "5"), ROOT.replace("1", "6")
    circle = (*PLAIN.deltas, Delta(one, two, "one"), Delta(two, one, "two"))

    with pytest.raises(exceptions.ImageUnacceptable, match="do not lead to its root"):
        ploop.parse_descriptor(ploop.format_descriptor(Descriptor(64 * MIB, MIB, circle)), "descriptor")


def test_a_descriptor_of_very_many_images_is_refused() -> None:
    images = "<Image></Image>" * 1000

    with pytest.raises(exceptions.ImageUnacceptable, match="is the limit"):
        ploop.parse_descriptor(replaced("<Image>", f"{images}<Image>"), "descriptor")
    with pytest.raises(exceptions.ImageUnacceptable, match="at most"):
        ploop.parse_descriptor(replaced("<Image>", f"{'<Image></Image>' * 100_000}<Image>"), "descriptor")


@given(position=st.integers(0, 1200), insertion=st.binary(max_size=6), drop=st.integers(0, 40))
@settings(deadline=None)
def test_a_damaged_descriptor_is_refused_or_names_plain_files(position: int, insertion: bytes, drop: int) -> None:
    content = ploop.format_descriptor(PLAIN)
    try:
        read = ploop.parse_descriptor(content[:position] + insertion + content[position + drop :], "descriptor")
    except exceptions.ImageUnacceptable:
        return
    assert all("/" not in delta.file and not delta.file.startswith((".", "-")) for delta in read.deltas)
    assert read.virtual_size % read.cluster_size == 0
