# SPDX-License-Identifier: Apache-2.0
"""The stores that the contract suite runs on: a new backend adds a row to STORES."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rbd

import imagebackend
from imagebackend.backend import Backend
from imagebackend.guest import LibvirtConfigGuestDisk
from imagebackend.images.base import Image
from imagebackend.images.model import LocalBlockImage, LocalFileImage, RBDImage
from imagebackend.storage import ceph
from imagebackend.storage.lvm2 import VolumeGroup
from tests.lvm import volume_groups
from tools.private_ceph import Cluster

MIB = 1 << 20
#: Not a power of two, and with its last data in the last sector: what is cut off or rounded shows.
TEMPLATE_SIZE = 5 * MIB + 512

#: Name of the store: image type, fixture of the folder, options.
STORES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "raw-ext4": ("raw", "ext4_folder", {}),
    "raw-xfs": ("raw", "xfs_folder", {}),
    "raw-btrfs": ("raw", "btrfs_folder", {}),
    "raw-preallocated": ("raw", "xfs_folder", {"preallocate_images": "space"}),
    "raw-of-qcow2": ("raw", "ext4_folder", {"force_raw_images": False}),
    "qcow2": ("qcow2", "ext4_folder", {}),
    "qcow2-preallocated": ("qcow2", "ext4_folder", {"preallocate_images": "space"}),
    "qcow2-options": (
        "qcow2",
        "xfs_folder",
        {
            "libvirt.images_qcow2_extended_l2": True,
            "libvirt.images_qcow2_lazy_refcounts": True,
            "libvirt.images_qcow2_compression_type": "zstd",
            "libvirt.images_qcow2_cluster_size": 131072,
        },
    ),
    "qcow2-on-qcow2": ("qcow2", "ext4_folder", {"force_raw_images": False}),
    "ploop-ext4": ("ploop", "ext4_folder", {}),
    "ploop-xfs": ("ploop", "xfs_folder", {}),
    "ploop-preallocated": ("ploop", "ext4_folder", {"preallocate_images": "space"}),
    "ploop-of-qcow2": ("ploop", "xfs_folder", {"force_raw_images": False}),
    "rbd-v1": ("rbd", "ext4_folder", {"libvirt.images_rbd_clone_format": "1"}),
    "rbd-v2": ("rbd", "ext4_folder", {"libvirt.images_rbd_clone_format": "2"}),
    "lvm-thin": ("lvm", "group_folder", {"libvirt.images_thin_pool": volume_groups.POOL}),
    "lvm-sparse": ("lvm", "group_folder", {"libvirt.sparse_logical_volumes": True}),
    "lvm-thick": ("lvm", "group_folder", {}),
    "lvm-encrypted": ("lvm", "group_folder", {"ephemeral_storage_encryption.enabled": True}),
}


def chosen_stores(config: pytest.Config) -> list[str]:
    """Return the names of the stores that this run is for; those that need device-mapper must be asked for."""
    asked = config.getoption("--stores")
    return asked.split(",") if asked else [name for name, (image_type, _, _) in STORES.items() if image_type != "lvm"]


def configured(folder: Path, image_type: str, **options: Any) -> Any:
    """Return a configuration that keeps everything in ``folder``; ``libvirt.x`` is option x of that group."""
    conf = imagebackend.load_config()
    conf.set_override("instances_path", str(folder))
    conf.set_override("lock_timeout", 30.0)
    conf.set_override("images_type", image_type, group="libvirt")
    for name, value in options.items():
        group, _, option = name.rpartition(".")
        conf.set_override(option, value, group=group or None)
    return conf


def template_content() -> bytes:
    """Return what the template holds: data, holes, and a last sector that is not zero."""
    content = bytearray(TEMPLATE_SIZE)
    content[:MIB] = b"first" * (MIB // 5) + b"!"
    content[3 * MIB : 3 * MIB + 4096] = b"\x55" * 4096
    content[-512:] = b"e" * 512
    return bytes(content)


class Store:
    """A backend on real storage, and the ways to look at its disks from outside."""

    #: How QEMU does I/O on a disk that is not preallocated.
    io_mode: str | None = "threads"
    #: Whether every block of a new disk has its place, whatever ``preallocate_images`` says.
    preallocated = False

    def __init__(self, folder: Path, image_type: str, options: dict[str, Any]) -> None:
        self.folder = folder / "instances"
        self.sources = folder / "sources"
        self.sources.mkdir()
        self.image_type = image_type
        self.conf = configured(self.folder, image_type, **options)
        self.backend = Backend(self.conf)
        self.fetches: list[str] = []
        self._disks = itertools.count()
        self.raw_template = self.sources / "template.raw"
        _write_sparse(self.raw_template, template_content())

    @functools.cached_property
    def qcow2_template(self) -> Path:
        """The same image as ``raw_template``."""
        path = self.sources / "template.qcow2"
        self.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.raw_template, path)
        return path

    @property
    def source(self) -> Path:
        """The image that this store's templates are fetched from."""
        return self.raw_template if self.conf.force_raw_images else self.qcow2_template

    def fetch(self, target: str, **kwargs: Any) -> None:
        """Write the template, as an agent's own function would, and count the call."""
        self.fetches.append(target)
        shutil.copyfile(self.source, target)

    def rounded(self, size: int) -> int:
        """Return the size of a disk that is asked to have this one."""
        return size

    def image(self, disk_name: str = "disk", instance: str = "5a3c2b1e-0000-4000-8000-000000000001") -> Image:
        return self.backend.image(instance, disk_name)

    def make(self, size: int | None = 8 * MIB, disk_name: str = "disk") -> Image:
        """Return a disk made from the template."""
        image = self.image(disk_name)
        image.cache(self.fetch, "template", size)
        return image

    def format(self, image: Image) -> str:
        return image.resolve_driver_format()

    def qemu(self, image: Image) -> tuple[str, str]:
        """Return the format and the path that QEMU's tools are told for a disk."""
        return self.format(image), image.path

    def content(self, image: Image) -> bytes:
        """Return what a guest would read."""
        return self._read(*self.qemu(image))

    def _read(self, disk_format: str, path: str) -> bytes:
        target = self.sources / f"content{next(self._disks)}"
        self.run("qemu-img", "convert", "-f", disk_format, "-O", "raw", path, target)
        return target.read_bytes()

    def snapshot_content(self, image: Image, name: str) -> bytes:
        """Return what a guest would have read when the snapshot was made."""
        if self.format(image) == "raw":
            return Path(f"{image.path}@{name}").read_bytes()
        target = self.sources / f"content{next(self._disks)}"
        self.run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", image.path, target)
        return target.read_bytes()

    def write(self, image: Image, offset: int, length: int, pattern: int) -> None:
        """Write to the disk as a guest would."""
        disk_format, path = self.qemu(image)
        self.run("qemu-io", "-f", disk_format, "-c", f"write -P {pattern} {offset} {length}", path)

    def check(self, image: Image) -> None:
        """Make sure that the disk is sound, leaks included."""
        if self.format(image) == "qcow2":
            self.run("qemu-img", "check", "-f", "qcow2", image.path)

    def files(self) -> set[str]:
        """Return everything that the store holds, folders included; lock files aside."""
        return {
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if "locks" not in path.relative_to(self.folder).parts
        }

    def check_model(self, image: Image) -> None:
        """Make sure that the image's model leads to the disk."""
        model = image.get_model(None)
        assert isinstance(model, LocalFileImage)
        assert (model.path, model.format) == (image.path, self.format(image))

    def check_source(self, image: Image, disk: LibvirtConfigGuestDisk) -> None:
        """Make sure that a description leads to the disk."""
        assert (disk.source_type, disk.source_path) == ("file", image.path)

    def fence(self) -> None:
        """Make the storage notice at once that a process was killed."""

    @staticmethod
    def run(*command: object) -> str:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout


class PloopStore(Store):
    """A backend that makes ploop disks, looked at with QEMU's driver and with ploop."""

    def qemu(self, image: Image) -> tuple[str, str]:
        return "parallels", f"{image.path}/root.hds"

    def rounded(self, size: int) -> int:
        return -(-size // MIB) * MIB

    def snapshot_content(self, image: Image, name: str) -> bytes:
        return self._read("parallels", f"{image.path}/root.hds@{name}")

    def check(self, image: Image) -> None:
        for path in Path(image.path).glob("root.hds*"):
            self.run("qemu-img", "check", "-f", "parallels", path)
        descriptor = f"{image.path}/DiskDescriptor.xml"
        assert f"size:\t\t{image.get_disk_size(image.path) // 512}\n" in self.run("ploop", "info", "-s", descriptor)
        listed = self.run("ploop", "snapshot-list", "-H", "-o", "fname", descriptor).split()
        assert {Path(path).name for path in listed} == {path.name for path in Path(image.path).glob("root.hds*")}

    def files(self) -> set[str]:
        """Leave out the lock file that ploop makes and leaves."""
        return {path for path in super().files() if not path.endswith(".lck")}

    def check_model(self, image: Image) -> None:
        assert image.get_model(None) == LocalFileImage(image.path, "ploop")

    def check_source(self, image: Image, disk: LibvirtConfigGuestDisk) -> None:
        assert (disk.source_type, disk.source_path) == ("file", f"{image.path}/root.hds")


class RbdStore(Store):
    """A backend on an empty pool of a real Ceph cluster."""

    io_mode = None

    def __init__(self, folder: Path, options: dict[str, Any], cluster: Cluster, pool: str) -> None:
        self.cluster = cluster
        self.pool = pool
        where = {"libvirt.images_rbd_ceph_conf": str(cluster.configuration), "libvirt.images_rbd_pool": pool}
        super().__init__(folder, "rbd", {**options, **where, "libvirt.rbd_destroy_volume_retries": 0})

    def snapshot_content(self, image: Image, name: str) -> bytes:
        target = self.sources / f"content{next(self._disks)}"
        source = image.path.replace(":conf=", f"@{name}:conf=")
        self.run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, target)
        return target.read_bytes()

    def check(self, image: Image) -> None:
        assert image.get_disk_size(image.path) % 512 == 0

    def check_model(self, image: Image) -> None:
        model = image.get_model(None)
        assert isinstance(model, RBDImage)
        assert (f"rbd:{model.pool}/{model.name}", model.format) == (image.path.partition(":conf=")[0], "raw")
        assert model.servers

    def check_source(self, image: Image, disk: LibvirtConfigGuestDisk) -> None:
        monitors = ceph.Pool(self._settings(), self.pool).monitors()
        assert (disk.source_type, disk.source_protocol, disk.source_path) == ("network", "rbd", None)
        assert image.path.startswith(f"rbd:{disk.source_name}:")
        assert tuple(zip(disk.source_hosts, disk.source_ports, strict=True)) == monitors

    def files(self) -> set[str]:
        """Return what is in the folder and in the pool: images, snapshots, the trash, intents."""
        found = super().files()
        with self._context() as context:
            for name in rbd.RBD().list(context):
                with rbd.Image(context, name, read_only=True) as image:
                    found |= {f"{name}@{each['name']}" for each in image.list_snaps()}
                found.add("zombie" if name.startswith("zombie:") else name)
            found |= {f"trash {each['name']}" for each in rbd.RBD().trash_list(context)}
        intents = ceph.Pool(self._settings(), self.pool).intents()
        return found | {f"intent {each}" for each in intents}

    def fence(self) -> None:
        """Have the cluster cut off every client that has an image open: what it does itself after half a minute."""
        with self._context() as context, self.cluster.connect() as connection:
            for name in rbd.RBD().list(context):
                with rbd.Image(context, name, read_only=True) as image:
                    for watcher in list(image.watchers_list()):
                        connection.blocklist_add(watcher["addr"], 3600)

    def empty(self) -> None:
        """Remove everything from the pool."""
        with self._context() as context:
            for name in sorted(rbd.RBD().list(context), key=is_source):
                with rbd.Image(context, name) as image:
                    for snapshot in [each["name"] for each in image.list_snaps()]:
                        if image.is_protected_snap(snapshot):
                            image.unprotect_snap(snapshot)
                        image.remove_snap(snapshot)
                rbd.RBD().remove(context, name)

    def _settings(self) -> ceph.Settings:
        return ceph.Settings(str(self.cluster.configuration), None, 5, 60, "auto")

    @contextlib.contextmanager
    def _context(self) -> Iterator[Any]:
        with self.cluster.connect() as connection, connection.open_ioctx(self.pool) as context:
            yield context


class LvmStore(Store):
    """A backend on an empty volume group."""

    def __init__(self, folder: Path, options: dict[str, Any], group: VolumeGroup) -> None:
        self.group = group
        super().__init__(folder, "lvm", {**options, "libvirt.images_volume_group": group.name})
        self.backend = Backend(self.conf, keys=_key)
        self.preallocated = not (options.get("libvirt.images_thin_pool") or self.conf.libvirt.sparse_logical_volumes)

    def rounded(self, size: int) -> int:
        return -(-size // volume_groups.EXTENT) * volume_groups.EXTENT

    def qemu(self, image: Image) -> tuple[str, str]:
        model = image.get_model(None)
        assert isinstance(model, LocalBlockImage)
        return model.format, model.path

    def content(self, image: Image) -> bytes:
        return Path(self.qemu(image)[1]).read_bytes()

    def write(self, image: Image, offset: int, length: int, pattern: int) -> None:
        """Write to the disk as a guest would, without starting QEMU: where the kernel is emulated, that takes long."""
        with open(self.qemu(image)[1], "r+b") as device:
            device.seek(offset)
            device.write(bytes([pattern]) * length)
            device.flush()
            os.fsync(device.fileno())

    def snapshot_content(self, image: Image, name: str) -> bytes:
        (snapshot,) = self.group.report(tags=[f"imagebackend.snapshot={name}"])
        self.group.activate(snapshot.name)
        content = Path(self.group.device(snapshot.name)).read_bytes()
        self.group.deactivate(snapshot.name)
        return content

    def check_model(self, image: Image) -> None:
        assert image.get_model(None) == LocalBlockImage(self.device(image))

    def check_source(self, image: Image, disk: LibvirtConfigGuestDisk) -> None:
        assert (disk.source_type, disk.source_path) == ("block", self.device(image))

    def device(self, image: Image) -> str:
        """Return the path of the device by which a guest gets the disk."""
        encrypted = self.conf.ephemeral_storage_encryption.enabled
        return f"/dev/mapper/{Path(image.path).name}-dmcrypt" if encrypted else image.path

    def files(self) -> set[str]:
        """Return what is in the folder and in the volume group; what is random in a name is left out."""
        return super().files() | {re.sub(r"\+[0-9a-f]{8}$", "", volume.name) for volume in self.group.report()}

    def empty(self) -> None:
        """Remove everything from the volume group."""
        volume_groups.empty(self.group)


def _key(instance: str, disk_name: str) -> bytes:
    return hashlib.sha512(f"{instance}/{disk_name}".encode()).digest()


def open_store(name: str, request: pytest.FixtureRequest) -> Store:
    """Return the store of that name in :data:`STORES`, empty."""
    image_type, fixture, options = STORES[name]
    folder = request.getfixturevalue(fixture)
    if image_type == "rbd":
        return RbdStore(folder, options, request.getfixturevalue("ceph"), request.getfixturevalue("rbd_pool"))
    if image_type == "ploop":
        return PloopStore(folder, image_type, options)
    if image_type == "lvm":
        return LvmStore(folder, options, request.getfixturevalue("group"))
    return Store(folder, image_type, options)


def is_source(image: str) -> bool:
    """Return whether a disk may be a clone of an image: it is none itself, and goes last."""
    return "_" not in image or ":" in image


def _write_sparse(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.truncate(len(content))
        for start in range(0, len(content), 4096):
            block = content[start : start + 4096]
            if block.strip(b"\0"):
                file.seek(start)
                file.write(block)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "store" in metafunc.fixturenames:
        metafunc.parametrize("store", chosen_stores(metafunc.config), indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """Each backend on each kind of storage."""
    opened = open_store(request.param, request)
    yield opened
    shutil.rmtree(opened.folder.parent)  # the file systems are small, and all tests share them
