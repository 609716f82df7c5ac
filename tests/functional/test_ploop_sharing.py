# SPDX-License-Identifier: Apache-2.0
"""Why disks of ploop do not share their template's image by a hard link, with an image of their own on top.

That would cost the same whatever the template's size where files share no blocks. As long as these tests pass, such a
disk cannot be given to a guest, and what ploop(8) does to one disk happens to all of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import libvirt
import pytest

from imagebackend.storage import ploop
from tests.contract.conftest import MIB
from tests.functional import ploop_tool

BASE, SIBLING = (f"{{{digit * 8}-{digit * 4}-4{digit * 3}-8{digit * 3}-{digit * 12}}}" for digit in "12")
SIZE = 8 * MIB


def image(path: Path) -> Path:
    """Make an image that holds nothing."""
    with path.open("w+b") as file:
        ploop.write_image(file.fileno(), SIZE, [])
    return path


def disk_on(base: Path, folder: Path, *, with_sibling: bool = False) -> Path:
    """Make a disk whose lower image is a hard link, and return the upper one."""
    folder.mkdir()
    os.link(base, folder / "root.hds.base")
    deltas = [ploop.Delta(BASE, None, "root.hds.base"), ploop.Delta(ploop.TOP, BASE, "root.hds")]
    if with_sibling:
        deltas.append(ploop.Delta(SIBLING, BASE, image(folder / "root.hds.sibling").name))
    descriptor = ploop.Descriptor(SIZE, MIB, tuple(deltas))
    (folder / ploop.NAME).write_bytes(ploop.format_descriptor(descriptor))
    return image(folder / "root.hds")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = image(tmp_path / "base")
    ploop_tool.qemu_io(path, "write -P 1 0 8M")
    return path


def test_libvirt_gives_no_guest_an_image_of_ploop_on_top_of_another(base: Path, tmp_path: Path, start_guest) -> None:
    top = disk_on(base, tmp_path / "disk")
    disk = f"""
<disk type='file' device='disk'>
  <driver name='qemu' type='ploop'/>
  <source file='{top}'/>
  <backingStore type='file'><format type='ploop'/><source file='{top}.base'/><backingStore/></backingStore>
  <target dev='vda' bus='virtio'/>
</disk>"""
    with pytest.raises(libvirt.libvirtError, match="does not support backing store"):
        start_guest(disk)


def test_what_ploop_merges_in_one_disk_all_that_share_its_base_have(base: Path, tmp_path: Path) -> None:
    one, other = disk_on(base, tmp_path / "one"), disk_on(base, tmp_path / "other")
    ploop_tool.qemu_io(one, "write -P 7 1M 1M")
    before = ploop_tool.read(tmp_path / "read", Path(f"{other}.base"), other)

    ploop_tool.ploop("snapshot-merge", one.parent / ploop.NAME)

    assert ploop_tool.read(tmp_path / "read", Path(f"{other}.base"), other) != before


def test_a_sibling_keeps_ploop_from_merging_but_not_from_writing_there(base: Path, tmp_path: Path) -> None:
    """It merges into no image that two are on, until one of them goes: then the shared one is what is written to."""
    disk = disk_on(base, tmp_path / "disk", with_sibling=True)
    descriptor = disk.parent / ploop.NAME
    ploop_tool.ploop("snapshot-merge", descriptor, success=(38,))

    ploop_tool.ploop("snapshot-delete", "-u", BASE, descriptor)
    ploop_tool.ploop("snapshot-switch", "-u", SIBLING, descriptor)
    ploop_tool.ploop("snapshot-delete", "-u", SIBLING, descriptor)

    top = disk.parent / ploop.parse_descriptor(descriptor.read_bytes(), "descriptor").top.file
    assert os.path.samefile(top, base)
