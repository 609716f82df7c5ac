# SPDX-License-Identifier: Apache-2.0
"""Images of ploop as templates: whoever made them, disks of every type hold what they hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.templates.sources import open_source
from tests.contract.conftest import MIB, PloopStore, Store, template_content
from tests.functional import ploop_tool
from tests.functional.filesystems import allocated

SIZE = 6 * MIB


def by_ploop(folder: Path, raw: Path) -> Path:
    """Version 1, as ploop(8) makes it and a container's file system is in it."""
    image = ploop_tool.init(folder / "disk", SIZE)
    ploop_tool.qemu_img("convert", "-n", "--target-is-zero", "-f", "raw", "-O", "parallels", raw, image)
    return image


def by_qemu(folder: Path, raw: Path) -> Path:
    """Version 2."""
    image = folder / "root.hds"
    ploop_tool.qemu_img("convert", "-f", "raw", "-O", "parallels", raw, image)
    return image


def in_small_clusters(folder: Path, raw: Path) -> Path:
    image = folder / "root.hds"
    ploop_tool.qemu_img("convert", "-f", "raw", "-O", "parallels", "-o", "cluster_size=64k", raw, image)
    return image


@pytest.fixture(params=["raw", "qcow2", "ploop"])
def store(request: pytest.FixtureRequest, xfs_folder: Path) -> Store:
    kind = PloopStore if request.param == "ploop" else Store
    return kind(xfs_folder, request.param, {})


@pytest.mark.parametrize("claim", ["ploop", "parallels", None])
@pytest.mark.parametrize("make", [by_ploop, by_qemu, in_small_clusters])
def test_an_image_of_ploop_becomes_a_template(
    make: Callable[[Path, Path], Path], claim: str | None, store: Store
) -> None:
    os.truncate(store.raw_template, SIZE)
    image = make(store.sources, store.raw_template)
    source = open_source(str(image), store.conf, disk_format=claim)

    disk = store.image()
    disk.cache(source.fetch, "container", 8 * MIB)

    assert store.content(disk) == template_content().ljust(8 * MIB, b"\x00")
    store.check(disk)
    template = store.backend.templates.get("container")
    assert (template.format, template.source_format, template.virtual_size) == ("raw", "parallels", SIZE)
    store.backend.templates.verify("container")
    assert allocated(Path(template.path)) < 4 * MIB


def test_an_image_whose_writer_was_killed_is_refused_and_nothing_stays(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    image = by_qemu(store.sources, store.raw_template)
    with image.open("r+b") as file:
        file.seek(44)
        file.write(b"Ynot")
    with pytest.raises(exceptions.ImageUnacceptable, match="qemu-img check -f parallels -r all"):
        store.image().cache(open_source(str(image), store.conf).fetch, "container", 8 * MIB)
    assert not [name for name in store.files() if "_base/" in name and "/." not in name]

    ploop_tool.qemu_img("check", "-f", "parallels", "-r", "all", image, success=(0, 3))
    store.image().cache(open_source(str(image), store.conf).fetch, "container", 8 * MIB)
    assert store.content(store.image())[: len(template_content())] == template_content()
