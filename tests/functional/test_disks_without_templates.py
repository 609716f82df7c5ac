# SPDX-License-Identifier: Apache-2.0
"""Disks that a function filled, and flattened ones: whole disks, that stand alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagebackend.images.base import Image
from tests.contract.conftest import MIB, STORES, Store, template_content

SIZE = 8 * MIB


@pytest.fixture(params=["raw-xfs", "raw-btrfs", "qcow2", "qcow2-options", "qcow2-preallocated"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    image_type, fixture, options = STORES[request.param]
    folder = request.getfixturevalue(fixture)
    yield Store(folder, image_type, options)
    shutil.rmtree(folder)


def filled(store: Store) -> Image:
    image = store.image()
    image.create_from_func(lambda target: Path(target).write_bytes(template_content().ljust(SIZE, b"f")), SIZE)
    return image


def flattened(store: Store) -> Image:
    image = store.make(SIZE)
    image.flatten()
    store.backend.templates.remove("template")
    return image


@pytest.mark.parametrize("made", [filled, flattened])
def test_a_disk_without_a_template_is_a_disk(store: Store, made: Callable[[Store], Image]) -> None:
    image, extract = made(store), store.sources / "extract"
    content = store.content(image)
    assert not image.capabilities.flatten
    assert [each.path for each in image.backing_chain()] == [image.path]

    image.create_snap("one")
    store.write(image, 0, MIB, 1)
    image.resize_image(2 * SIZE)
    assert store.content(image) == b"\x01" * MIB + content[MIB:] + bytes(SIZE)
    image.rollback_to_snap("one")
    assert (store.content(image), image.get_disk_size(image.path)) == (content, SIZE)
    for out_format in ("raw", "qcow2"):
        image.snapshot_extract(str(extract), out_format)
        store.run("qemu-img", "convert", "-f", out_format, "-O", "raw", extract, f"{extract}.raw")
        assert Path(f"{extract}.raw").read_bytes() == content
    image.flatten()
    image.remove_snap("one")
    store.check(image)
    image.remove()
    assert list(store.backend.disks()) == []


@pytest.mark.parametrize(
    ("name", "chain"),
    [
        ("qcow2", [("qcow2", 2 * SIZE), ("raw", len(template_content()))]),
        ("qcow2-on-qcow2", [("qcow2", 2 * SIZE), ("qcow2", len(template_content()))]),
        ("raw-ext4", [("raw", 2 * SIZE)]),
        ("raw-of-qcow2", [("qcow2", 2 * SIZE)]),
    ],
)
def test_the_chain_is_as_deep_as_the_disk_depends(ext4_folder: Path, name: str, chain: list[tuple[str, int]]) -> None:
    image_type, _, options = STORES[name]
    store = Store(ext4_folder, image_type, options)
    image = store.make(2 * SIZE)

    found = image.backing_chain()

    assert [(each.format, each.virtual_size) for each in found] == chain
    assert [each.path for each in found] == [image.path, store.backend.templates.path("template")][: len(chain)]
    image.flatten()
    assert [(each.path, *chain[0]) for each in image.backing_chain()] == [(image.path, *chain[0])]
    shutil.rmtree(ext4_folder)


@pytest.mark.parametrize(
    "error", [TimeoutError("no answer"), BrokenPipeError(32, "peer left"), OSError(28, "elsewhere"), ValueError("x")]
)
def test_what_fills_a_disk_raises_what_it_likes(store: Store, error: Exception) -> None:
    files = store.files()
    image = store.image()

    def fail(target: str) -> None:
        Path(target).write_bytes(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        image.create_from_func(fail, SIZE)

    assert caught.value is error
    assert not image.exists()
    assert {path for path in store.files() - files if not (store.folder / path).is_dir()} == set()
    assert filled(store).get_disk_size(image.path) == SIZE
