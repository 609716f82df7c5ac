# SPDX-License-Identifier: Apache-2.0
"""Containers start, by a real libvirt, in root file systems that the library made, and say so from inside."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

import imagebackend
from imagebackend import exceptions
from imagebackend.guest import LibvirtConfigGuestFilesys, LibvirtConfigGuestIDMap, LibvirtConfigGuestIDRange
from imagebackend.images.base import Image
from tests.contract.conftest import configured
from tests.functional.test_trees import mounted
from tools import deadline
from tools.boot import running

MIB = 1 << 20
INIT = """\
#!/bin/sh
b=/bin/busybox
$b awk '$2 == "/" { print $3 }' /proc/mounts >/said.partial
$b cat /etc/template >>/said.partial
$b cat /proc/self/uid_map >/uids
$b mv /said.partial /said
$b sync
while true; do $b sleep 1; done
"""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system of a container, as a folder."""
    folder = tmp_path_factory.mktemp("container") / "root"
    for name in ("bin", "sbin", "dev", "proc", "sys", "etc"):
        (folder / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "bin")
    (folder / "bin" / "sh").symlink_to("busybox")
    (folder / "sbin" / "init").write_text(INIT)
    (folder / "sbin" / "init").chmod(0o755)
    (folder / "etc" / "template").write_text("made by the library")
    return folder


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: libvirt's loop driver takes no long ones."""
    with tempfile.TemporaryDirectory(prefix="c", dir="/tmp") as path:
        yield Path(path)


def domain_xml(*filesystems: LibvirtConfigGuestFilesys, idmap: str = "") -> str:
    elements = "".join(each.to_xml() for each in filesystems)
    return f"""\
<domain type="lxc">
  <name>container-{uuid.uuid4()}</name>
  <memory unit="MiB">64</memory>
  <vcpu>1</vcpu>
  <os><type>exe</type><init>/sbin/init</init></os>
  {idmap}
  <devices>
{elements}    <console type="pty"/>
  </devices>
</domain>
"""


def made(root: Path, folder: Path, image_type: str, size: int = 64 * MIB, filesystem: str = "ext4") -> Image:
    """Return a disk made from the root file system."""
    backend = imagebackend.Backend(configured(folder / "instances", image_type))
    image = backend.image("container", "root")
    source = imagebackend.open_tree(str(root), backend.conf, size=size, filesystem=filesystem)
    image.cache(source.fetch, "template", size)
    return image


def said(image: str) -> str:
    """Return what the container wrote into its root file system, read without mounting that."""
    done = subprocess.run(["debugfs", "-R", "cat /said", image], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_container_starts_from_a_raw_disk(libvirt_lxc: libvirt.virConnect, root: Path, folder: Path) -> None:
    image = made(root, folder, "raw")
    filesystem = image.libvirt_fs_info("/")
    assert (filesystem.driver_type, filesystem.driver_format) == ("loop", "raw")

    with running(libvirt_lxc, domain_xml(filesystem)):
        deadline.wait_for(lambda: said(image.path), seconds=60, what="a word from the container")
        with pytest.raises(exceptions.DiskInUse):
            image.remove()

    assert said(image.path) == "ext4\nmade by the library"
    subprocess.run(["e2fsck", "-fp", image.path], check=True)
    image.remove()


def test_a_container_starts_from_a_disk_with_xfs(libvirt_lxc: libvirt.virConnect, root: Path, folder: Path) -> None:
    image = made(root, folder, "raw", 320 * MIB, "xfs")
    words = b"xfs\nmade by the library"
    with running(libvirt_lxc, domain_xml(image.libvirt_fs_info("/"))):
        deadline.wait_for(lambda: words in Path(image.path).read_bytes(), seconds=60, what="a word from the container")

    subprocess.run(["xfs_repair", "-n", "-f", image.path], check=True, capture_output=True)
    with mounted(image.path, folder / "mount") as mount:
        assert (mount / "said").read_bytes() == words


def test_a_container_starts_from_a_block_device(libvirt_lxc: libvirt.virConnect, root: Path, folder: Path) -> None:
    image = made(root, folder, "raw")
    attach = ["losetup", "--find", "--show", image.path]
    device = subprocess.run(attach, capture_output=True, text=True, check=True).stdout.strip()
    try:
        filesystem = LibvirtConfigGuestFilesys(source_type="block", source_dev=device)
        with running(libvirt_lxc, domain_xml(filesystem)):
            deadline.wait_for(lambda: said(image.path), seconds=60, what="a word from the container")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert said(image.path) == "ext4\nmade by the library"


def test_a_container_starts_from_a_folder(libvirt_lxc: libvirt.virConnect, root: Path, folder: Path) -> None:
    conf = configured(folder / "instances", "raw")
    filesystem = imagebackend.clone_root(conf, str(root), "container")
    with running(libvirt_lxc, domain_xml(filesystem)):
        words = folder / "instances" / "container" / "root" / "said"
        deadline.wait_for(words.exists, seconds=60, what="a word from the container")
        assert words.read_text().endswith("made by the library")
    assert not (root / "said").exists()
    imagebackend.remove_root(conf, "container")


def test_a_container_whose_users_are_others_on_the_host_starts_from_a_folder(
    libvirt_lxc: libvirt.virConnect, root: Path, folder: Path
) -> None:
    filesystem = imagebackend.clone_root(configured(folder / "instances", "raw"), str(root), "container")
    clone = folder / "instances" / "container" / "root"
    subprocess.run(["chown", "--recursive", "100000:200000", clone], check=True)
    folder.chmod(0o755)
    users, groups = (LibvirtConfigGuestIDRange(0, target, 65536) for target in (100000, 200000))
    # The kernel lets nobody but the root user of a network's own namespace mount /sys.
    idmap = LibvirtConfigGuestIDMap(uid=[users], gid=[groups]).to_xml() + "<features><privnet/></features>"

    with running(libvirt_lxc, domain_xml(filesystem, idmap=idmap)):
        deadline.wait_for((clone / "said").exists, seconds=60, what="a word from the container")

    assert (clone / "uids").read_text().split() == ["0", "100000", "65536"]
    assert ((clone / "said").stat().st_uid, (clone / "said").stat().st_gid) == (100000, 200000)


def test_a_path_that_is_too_long_for_libvirt_is_told(
    libvirt_lxc: libvirt.virConnect, root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Here libvirt says 'Unable to set backing file', and no more."""
    room = 63 - len(f"{folder}//instances/container/root")
    for path, works in ((folder / ("x" * room), True), (folder / ("x" * (room + 1)), False)):
        path.mkdir()
        image = made(root, path, "raw")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            filesystem = image.libvirt_fs_info("/")
        assert ("the path may have 63 bytes" in caplog.text) is not works
        if works:
            with running(libvirt_lxc, domain_xml(filesystem)):
                pass
        else:
            with (
                pytest.raises(libvirt.libvirtError, match="backing file"),
                running(libvirt_lxc, domain_xml(filesystem)),
            ):
                pass


@pytest.mark.parametrize("image_type", ["qcow2", "ploop"])
def test_other_disks_are_accepted_and_hold_the_same(
    image_type: str, libvirt_lxc: libvirt.virConnect, root: Path, folder: Path
) -> None:
    """Their drivers need modules of the kernel that are rare, so that only libvirt's own word is had."""
    image = made(root, folder, image_type)
    filesystem = image.libvirt_fs_info("/")
    assert filesystem.driver_type == {"qcow2": "nbd", "ploop": "ploop"}[image_type]
    domain = libvirt_lxc.defineXMLFlags(domain_xml(filesystem), libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    domain.undefine()

    raw = folder / "raw"
    image.snapshot_extract(str(raw), "raw")
    with running(libvirt_lxc, domain_xml(LibvirtConfigGuestFilesys(source_type="file", source_file=str(raw)))):
        deadline.wait_for(lambda: said(str(raw)), seconds=60, what="a word from the container")
    assert said(str(raw)) == "ext4\nmade by the library"
