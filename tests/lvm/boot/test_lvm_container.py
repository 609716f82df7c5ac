# SPDX-License-Identifier: Apache-2.0
"""A container starts, by libvirt, in a root file system that is in a logical volume."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import imagebackend
from imagebackend import exceptions
from tests.functional.conftest import libvirt_lxc, libvirtd
from tests.functional.test_containers import domain_xml, root, said
from tests.lvm.boot.test_lvm_boot import backend
from tests.lvm.volume_groups import MIB
from tools import deadline
from tools.boot import running

__all__ = ["backend", "libvirt_lxc", "libvirtd", "root"]


@pytest.fixture(scope="session", autouse=True)
def kernel_for_containers() -> None:
    """Set up what containers need of a kernel, where nothing else has done so."""
    subprocess.run(["modprobe", "fuse"], check=False, capture_output=True)
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"], check=True)


@pytest.fixture
def tree(root: Path) -> Iterator[Path]:
    """The container's root file system, in one file system: where an overlay takes a file from shows in its number."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(shutil.copytree(root, f"{folder}/root", symlinks=True))


def test_a_container_starts_from_a_volume(
    libvirt_lxc: libvirt.virConnect, tree: Path, backend: imagebackend.Backend
) -> None:
    image = backend.image("container", "root")
    source = imagebackend.open_tree(str(tree), backend.conf, size=64 * MIB, filesystem="ext4")
    image.cache(source.fetch, "template", 64 * MIB)
    filesystem = image.libvirt_fs_info("/")
    assert (filesystem.source_type, filesystem.source_dev) == ("block", image.path)

    with running(libvirt_lxc, domain_xml(filesystem)):
        deadline.wait_for(lambda: said(image.path), seconds=120, what="a word from the container")
        with pytest.raises(exceptions.DiskInUse):
            image.remove()

    assert said(image.path) == "ext4\nmade by the library"
    image.remove()
    assert not image.exists()
