# SPDX-License-Identifier: Apache-2.0
"""Images that real tools made, changed at random: refused with the typed error, or seen as QEMU sees them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions, process
from imagebackend.templates import inspection
from tests.functional.image_building import converted

BUILDS = {
    "qcow2": converted("qcow2"),
    "qcow2 compressed": converted("qcow2", "-c", "-o", "cluster_size=4k"),
    "ploop": converted("parallels"),
    "vdi": converted("vdi"),
    "vhdx": converted("vhdx"),
    "vmdk": converted("vmdk", "-o", "subformat=monolithicSparse"),
    "vmdk stream": converted("vmdk", "-o", "subformat=streamOptimized"),
    "vpc": converted("vpc", "-o", "subformat=dynamic"),
    "vpc fixed": converted("vpc", "-o", "subformat=fixed"),
}


@dataclass(frozen=True)
class Image:
    """An image of which each example changes a few bytes, and takes the change back."""

    path: Path
    content: bytes = field(repr=False)

    def change(self, mutations: list[tuple[int, bytes]]) -> None:
        with self.path.open("r+b") as image:
            for offset, piece in mutations:
                image.seek(offset % len(self.content))
                image.write(piece)

    def restore(self, mutations: list[tuple[int, bytes]]) -> None:
        with self.path.open("r+b") as image:
            for offset, piece in mutations:
                place = offset % len(self.content)
                image.seek(place)
                image.write(self.content[place : place + len(piece)])
            image.truncate(len(self.content))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Image]]:
    folder = tmp_path_factory.mktemp("mutations")
    found = {}
    for number, (name, build) in enumerate(BUILDS.items()):
        path = folder / str(number)
        build(path)
        found[name] = Image(path, path.read_bytes())
    return found


PIECES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\x00" * 4, b"\x00" * 8, b"\x01", b"\x80"]),
)
#: Headers, tables at the start, tables a little further, the footer.
PLACES = st.one_of(
    st.integers(0, 120),
    st.integers(0, 2048),
    st.integers(0, 128).map(lambda entry: 0x10000 + 8 * entry),
    st.integers(0, 128).map(lambda entry: 0x30000 + 8 * entry),
    st.integers(0, 128).map(lambda entry: 0x40000 + 8 * entry),
    st.integers(-512, -1),
)
MUTATIONS = st.lists(st.tuples(PLACES, PIECES), min_size=1, max_size=4)


@pytest.mark.parametrize("name", BUILDS)
@settings(deadline=None, max_examples=100)
@given(mutations=MUTATIONS)
def test_changed_image_is_refused_or_seen_as_qemu_sees_it(
    name: str, images: dict[str, Image], mutations: list[tuple[int, bytes]]
) -> None:
    image = images[name]
    image_format = name.split()[0]
    image.change(mutations)
    try:
        verdict = inspected(image, image_format)
        if verdict is not None:
            assert_qemu_agrees(image.path, verdict)
    finally:
        image.restore(mutations)


def inspected(image: Image, claimed_format: str) -> inspection.Verdict | None:
    """Return the verdict, or None for a refusal; fail if more was read than such a small image can need."""
    lengths = []
    pread = os.pread

    def counted(descriptor: int, length: int, offset: int) -> bytes:
        found = pread(descriptor, length, offset)
        lengths.append(len(found))
        return found

    with image.path.open("rb") as opened, pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "pread", counted)
        try:
            return inspection.inspect(opened.fileno(), "image", claimed_format)
        except exceptions.ImageUnacceptable:
            return None
        finally:
            assert sum(lengths) <= 2 * len(image.content) + (1 << 20)


def assert_qemu_agrees(path: Path, verdict: inspection.Verdict) -> None:
    command = ["qemu-img", "info", "--output=json", "-f", verdict.format, str(path)]
    # QEMU may be stricter, then it opens nothing; but it must not crash on what was accepted.
    answer = process.run(command, timeout=60, success=(0, 1)).stdout
    if not answer:
        return
    said = json.loads(answer)
    assert said["virtual-size"] == verdict.virtual_size
    assert "backing-filename" not in said
    assert "encrypted" not in said
