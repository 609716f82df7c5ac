# SPDX-License-Identifier: Apache-2.0
"""The contract that every backend fulfils."""

from __future__ import annotations

import abc
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.images.model import Model
from imagebackend.keys import Keys
from imagebackend.storage import direct_io
from imagebackend.templates.cache import FetchFunction, TemplateCache
from imagebackend.templates.native import NativeTemplates

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk, LibvirtConfigGuestFilesys

__all__ = ["Capabilities", "Image", "Progress", "Snapshot", "Usage"]

LOG = logging.getLogger(__name__)

#: Called with the bytes done and the bytes in all while something long runs; an exception that it raises, usually
#: :class:`~imagebackend.exceptions.Cancelled`, stops the work, and everything is undone.
Progress = Callable[[int, int], None]

# LVM's names are the shortest (lvm(8): 127 characters), and Nova doubles underscores there.
_LONGEST_NAME = 120
# The types of domain that QEMU runs: libvirt has several drivers for their disks, and is to be told which.
_QEMU = ("kvm", "qemu")
# virFileLoopDeviceAssociate of libvirt gives up where lo_file_name of <linux/loop.h> is too short.
_LONGEST_LOOP_PATH = 63


@dataclass(frozen=True)
class Capabilities:
    """What a disk's backend, on the storage that it is on, can do.

    :ivar snapshots: create, list, roll back and remove snapshots.
    :ivar clone: make a disk from an image that is in the same store, without a template.
    :ivar flatten: the disk depends on its template until it is flattened.
    :ivar direct_snapshot: a snapshot inside the store that an image service can reference.
    :ivar resize_running: grow under a running guest.
    """

    snapshots: bool
    clone: bool
    flatten: bool
    direct_snapshot: bool
    resize_running: bool


@dataclass(frozen=True)
class Snapshot:
    """A snapshot of a disk.

    :ivar name: its name.
    :ivar created: when it was made, as ISO 8601 in UTC.
    :ivar virtual_size: the disk's size at that time, in bytes.
    """

    name: str
    created: str
    virtual_size: int


@dataclass(frozen=True)
class Usage:
    """What a disk takes, where its store tells.

    :ivar provisioned: its virtual size in bytes.
    :ivar used: the bytes of storage that are allocated for it, by itself or together with others.
    """

    provisioned: int
    used: int


class Image(abc.ABC):
    """A guest's disk in one kind of storage.

    Making the object does no I/O.

    :param conf: options of this library.
    :param templates: the template cache.
    :param instance: the name (a UUID, usually) of the instance that the disk is of.
    :param disk_name: the name of the disk in that instance: ``disk``, ``disk.local``, ``disk.swap``.
    :param path: where the disk is, if not where this backend would put it.
    :raises InvalidName: one of the names is not safe.
    """

    #: How libvirt calls the kind of source: ``file``, ``block``, ``network``.
    source_type: ClassVar[str]

    #: Gives the keys of disks that ``[ephemeral_storage_encryption]`` has encrypted.
    keys: Keys | None = None

    def __init__(
        self, conf: cfg.ConfigOpts, templates: TemplateCache, instance: str, disk_name: str, path: str | None = None
    ) -> None:
        self.conf = conf
        self.templates = templates
        self.instance = names.instance_id(instance)
        self.disk_name = names.check_name("disk", disk_name)
        if len(self.instance) + len(self.disk_name) >= _LONGEST_NAME:
            reason = f"instance and disk name together may have {_LONGEST_NAME - 1} characters"
            raise exceptions.InvalidName("disk", f"{instance}_{disk_name}", reason)
        self.path = path or self._default_path()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.instance!r}, {self.disk_name!r}, path={self.path!r})"

    @classmethod
    def names_of_path(cls, path: str) -> tuple[str, str]:
        """Return the instance and the disk name that a libvirt path of this backend ends in.

        :raises InvalidName: the path is not absolute, or does not end in names.
        """
        # POSIX lets '//' at the beginning mean something else, so that normpath leaves it.
        if not os.path.isabs(path) or path.startswith("//") or os.path.normpath(path) != path:
            raise exceptions.InvalidName("disk", path, "an absolute path without '.', '..' and '//' is needed")
        folder, disk_name = os.path.split(path)
        return os.path.basename(folder), disk_name

    @classmethod
    def stored(cls, conf: cfg.ConfigOpts) -> Iterable[tuple[str, str]]:
        """Return instance and name of every disk that is in a store of this backend's own; none for files."""
        return ()

    @classmethod
    def sweep_disks(cls, conf: cfg.ConfigOpts) -> Sequence[str]:
        """Remove what killed processes left of disks in a store of this backend's own, without waiting for anybody.

        What other hosts may be at stays. Whatever cannot be removed is logged, and does not keep the rest.

        :returns: the names, in the store, of what was removed.
        :raises StorageError: the store does not tell what is there.
        """
        return ()

    @classmethod
    def native_templates(cls, conf: cfg.ConfigOpts) -> NativeTemplates | None:
        """Return the templates that this backend's store keeps; None where disks are made from the cache's files."""
        return None

    # What every backend has to do itself.

    @abc.abstractmethod
    def _default_path(self) -> str:
        """Return where this backend puts the disk."""

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """What this disk can do, on the storage that it is on."""

    @abc.abstractmethod
    def exists(self) -> bool:
        """Return whether the disk is there, whole."""

    @abc.abstractmethod
    def create_image(
        self, prepare_template: FetchFunction, base: str, size: int | None, *args: Any, **kwargs: Any
    ) -> None:
        """Make the disk from a template; do nothing if it exists.

        :param prepare_template: called as ``prepare_template(*args, target=path, **kwargs)`` if the template is not
            in the cache: writes it to ``path``.
        :param base: the template: its name, or its path in the cache.
        :param size: bytes; None: as large as the template.
        :raises DiskTooSmall: the template does not fit into ``size``; nothing was made.
        :raises ImageUnacceptable: the template must not be used; nothing was made.
        """

    @abc.abstractmethod
    def create_from_func(self, func: Callable[[str], object], size: int) -> None:
        """Make a disk without a template, filled by ``func(target)``; do nothing if it exists.

        :param func: gets the path of a raw disk of ``size`` bytes that reads as zeros, and writes to it in place: a
            file system, a config drive.
        :param size: bytes.

        An exception of ``func`` propagates; nothing was made.
        """

    @abc.abstractmethod
    def resize_image(self, size: int, domain: Any = None) -> None:
        """Grow the disk; an equal size is a no-op.

        :param size: bytes.
        :param domain: the running ``libvirt.virDomain`` that has the disk; its guest then sees the new size.
        :raises DiskTooSmall: the disk is larger already; it is not shrunk.
        :raises DiskInUse: a guest holds the disk, and no domain was given.
        :raises DiskNotFound: there is no such disk.
        """

    @abc.abstractmethod
    def get_disk_size(self, name: str) -> int:
        """Return the virtual size of a disk in bytes.

        :param name: the disk's path; backends that ask their store ignore it.
        :raises DiskNotFound: there is no such disk.
        """

    @abc.abstractmethod
    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        """Write a standalone copy of the disk to a file, which appears when it is whole.

        :param target: the file's path; what is there is replaced.
        :param out_format: raw, qcow2, vmdk, vdi, vpc or vhdx; None: ``[libvirt] snapshot_image_format``, or as the
            disk is.
        :param progress: called with the bytes done and in all.
        :raises DiskInUse: a guest holds the disk: its copy would be torn.
        """

    @abc.abstractmethod
    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        """Put a local file into the store as a disk, replacing the disk of that name, in one step.

        :param instance: the instance that the disk is of.
        :param local_file: the file; it stays.
        :param remote_name: the disk's name.
        :raises ImageUnacceptable: the file must not be used.
        :raises DiskInUse: a guest holds the disk that would be replaced.
        """

    @abc.abstractmethod
    def get_model(self, connection: Any) -> Model:
        """Return where the disk is, for code that has to open it itself.

        :param connection: a libvirt connection, for backends whose secrets it keeps; others ignore it.
        """

    @abc.abstractmethod
    def resolve_driver_format(self) -> str:
        """Return the disk's format as QEMU names it: the recorded one, recorded now if it has never been.

        A disk that a guest may have written is never looked at to find out.
        """

    @abc.abstractmethod
    def remove(self) -> None:
        """Remove the disk, its snapshots, its record and its lease; do nothing if it is not there.

        :raises DiskInUse: a guest holds the disk.
        """

    @abc.abstractmethod
    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        """Fill in what of the disk's XML says where it is and how it is stored."""

    # What follows from that.

    def cache(
        self, fetch_func: FetchFunction, filename: str, size: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Make the disk from the template ``filename``, which is fetched if it is absent; do nothing if it exists.

        The template is fetched once, however many threads, processes and hosts that share the folder ask.

        :param fetch_func: called as ``fetch_func(*args, target=path, **kwargs)``: writes the image to ``path``.
        :param filename: the template's name.
        :param size: the disk's size in bytes; None: as large as the template.
        :raises InvalidName, InvalidSize: no template can be called that, no disk can have that size.
        :raises DiskTooSmall: the template's virtual size exceeds ``size``.
        :raises ImageUnacceptable: what was fetched must not be used.
        :raises InsufficientSpace, PermissionDenied, StorageError: the storage refused.
        :raises LockTimeout: someone else was at it for longer than ``[DEFAULT] lock_timeout``.

        An exception of ``fetch_func`` propagates. After any exception everything is as it was. With ``progress=``, a
        callable, ``fetch_func`` is called with it too, and conversions and copies report to it.
        """
        base = self.templates.path(filename)
        if size is not None:
            names.check_size(size)
        if not self._is_ready():
            self.create_image(fetch_func, base, size, *args, **kwargs)

    def verify_base_size(self, base: str, size: int | None, base_size: int = 0) -> None:
        """Refuse a template that does not fit.

        :param base: the template's path.
        :param size: the size that the disk is to have, in bytes; None and 0: no check.
        :param base_size: the template's virtual size, if it is known.
        :raises DiskTooSmall: it exceeds ``size``.
        """
        if not size:
            return
        required = base_size or self.templates.get(base.rpartition("/")[2]).virtual_size
        if required > size:
            raise exceptions.DiskTooSmall(base, size, required, "the template's virtual size")

    def allocated_size(self) -> int | None:
        """Return how many bytes of storage the disk takes; None: the storage does not tell.

        :raises DiskNotFound: it is not there.
        """
        return None

    def is_in_use(self) -> bool | None:
        """Return whether a guest or a tool has the disk open for writing; None: the storage does not tell."""
        return None

    def parents(self) -> list[str]:
        """Return what the disk has its data from besides itself, nearest first: paths, or names in the store.

        :raises DiskNotFound: it is not there.
        """
        return []

    def template_name(self) -> str | None:
        """Return the name of the template that the disk depends on, if it does.

        :raises DiskNotFound: it is not there.
        """
        return None

    def clone(self, context: Any, image_id_or_uri: str) -> None:
        """Make the disk from an image inside the store, if one of the image's locations allows.

        :param context: the image's :class:`~imagebackend.templates.sources.Source`, which tells its locations.
        :param image_id_or_uri: the image's id, or one of its locations.
        :raises ImageUnacceptable: none does; says why for each.
        """
        raise exceptions.ImageUnacceptable(
            image_id_or_uri, f"{type(self).__name__} disks are not cloned from images; make them with cache()"
        )

    def create_snap(self, name: str) -> None:
        """Make a snapshot of the disk.

        :raises SnapshotExists: it has one of that name.
        :raises DiskInUse: a guest holds the disk.

        Where ``capabilities`` has no snapshots, this logs a warning and does nothing, as do the other three.
        """
        self._warn_no_snapshots("create", name)

    def remove_snap(self, name: str, ignore_errors: bool = False) -> None:
        """Remove a snapshot.

        :param ignore_errors: only log what goes wrong.
        :raises SnapshotNotFound: the disk has none of that name.
        """
        self._warn_no_snapshots("remove", name)

    def rollback_to_snap(self, name: str) -> None:
        """Make the disk what it was when the snapshot was made, its size included.

        :raises SnapshotNotFound: the disk has none of that name.
        :raises DiskInUse: a guest holds the disk.
        """
        self._warn_no_snapshots("roll back to", name)

    def list_snaps(self) -> list[Snapshot]:
        """Return the disk's snapshots, oldest first."""
        return []

    def flatten(self, *, progress: Progress | None = None) -> None:
        """Cut the tie to the template: the disk holds all its data itself from then on. Idempotent."""
        LOG.debug("disk %s holds all its data itself", self.path)

    def direct_snapshot(
        self, context: Any, snapshot_name: str, image_format: str, image_id: str, base_image_id: str
    ) -> str:
        """Make a snapshot inside the store that an image service can reference.

        :returns: its URL.
        :raises Unsupported: this store has no image service beside it.
        """
        raise exceptions.Unsupported("direct_snapshot", f"{type(self).__name__} disks are extracted instead")

    def cleanup_direct_snapshot(
        self, location: str | None, also_destroy_volume: bool = False, ignore_errors: bool = False
    ) -> None:
        """Remove what :meth:`direct_snapshot` made; nothing where it makes nothing."""
        LOG.debug("no direct snapshot of %s to clean up: %s", self.path, location)

    def libvirt_info(
        self,
        disk_bus: str,
        disk_dev: str,
        device_type: str,
        cache_mode: str | None,
        extra_specs: Mapping[str, str],
        hypervisor_version: int | None = None,
        *,
        boot_order: int | None = None,
        disk_unit: int | None = None,
        serial: str | None = None,
    ) -> LibvirtConfigGuestDisk:
        """Return the libvirt description of the disk.

        :param disk_bus: ``virtio``, ``scsi``, ``sata``, ``ide``, ``usb``, ``fdc``.
        :param disk_dev: the name of the device in the guest: ``vda``.
        :param device_type: ``disk``, ``cdrom``, ``floppy``, ``lun``.
        :param cache_mode: libvirt's name for it; None: as ``[libvirt] disk_cachemodes`` says, or as the storage can.
        :param extra_specs: the flavor's; those that begin with ``quota:disk_`` limit the disk's I/O.
        :param hypervisor_version: accepted for callers of the older interface; nothing depends on it.
        :param boot_order: the place in the boot order, from 1.
        :param disk_unit: the unit on the SCSI controller; nothing depends on it where the bus is another.
        :param serial: the serial number that the guest sees.
        :raises InvalidArgument: a value that libvirt would refuse.
        :raises DiskNotFound: there is no such disk.
        :raises CorruptDisk: it was found damaged, and must not be used.
        """
        from imagebackend import guest

        options = self.conf.libvirt
        disk = guest.LibvirtConfigGuestDisk(source_type=self.source_type, source_device=device_type)
        if options.virt_type in _QEMU:
            disk.driver_name = "qemu"
        self._describe_source(disk)
        if cache_mode is None:
            modes = guest.parse_disk_cachemodes(options.disk_cachemodes)
            takes_direct_io = self.source_type != "file" or direct_io.reads(disk.source_path or self.path)
            cache_mode = guest.choose_cache_mode(self.source_type, modes, direct_io=takes_direct_io)
        disk.driver_cache = cache_mode
        disk.driver_io = guest.choose_io_mode(self.source_type, cache_mode, preallocated=self._is_preallocated())
        disk.driver_discard = options.hw_disk_discard
        disk.target_dev = disk_dev
        disk.target_bus = disk_bus
        disk.boot_order = boot_order
        disk.serial = serial
        if disk_bus == "scsi" and disk_unit is not None:
            # All units on one virtio-scsi controller, which takes 256 of them.
            disk.device_addr = guest.LibvirtConfigGuestDeviceAddressDrive(controller=0, unit=disk_unit)
        if extra_specs:
            guest.disk_qos(disk, extra_specs)
        return disk

    def libvirt_fs_info(self, target: str, driver_type: str | None = None) -> LibvirtConfigGuestFilesys:
        """Return the libvirt description of the disk as a container's file system.

        :param target: where the container mounts it.
        :param driver_type: ``loop``, ``nbd`` or ``ploop``; None: ``loop`` for raw, ``nbd`` for other formats.
        :raises DiskNotFound: there is no such disk.
        :raises Unsupported: containers cannot be given such a disk.
        """
        from imagebackend import guest

        disk = guest.LibvirtConfigGuestDisk()
        self._describe_source(disk)
        if disk.ephemeral_encryption is not None:
            reason = "QEMU is what decrypts the disk, and containers have none; extract it"
            raise exceptions.Unsupported("a container's file system", reason)
        filesystem = guest.LibvirtConfigGuestFilesys(source_type=self.source_type, target_dir=target)
        if self.source_type == "file":
            filesystem.source_file = disk.source_path
            filesystem.driver_format = disk.driver_format
            filesystem.driver_type = driver_type or ("loop" if disk.driver_format == "raw" else "nbd")
            if filesystem.driver_type == "loop" and len(os.fsencode(disk.source_path or "")) > _LONGEST_LOOP_PATH:
                LOG.warning(
                    "libvirt starts no container on %s: by the driver 'loop' the path may have %d bytes, as with a "
                    "shorter [DEFAULT] instances_path, or through a symbolic link",
                    *(disk.source_path, _LONGEST_LOOP_PATH),
                )
        elif self.source_type == "block":
            filesystem.source_dev = disk.source_path
        else:
            reason = f"a container needs a file or a device, and this is a {self.source_type} disk: map it, or copy it"
            raise exceptions.Unsupported("a container's file system", reason)
        return filesystem

    @staticmethod
    def is_shared_block_storage() -> bool:
        """Return whether every host sees the disk as the same block device."""
        return False

    @staticmethod
    def is_file_in_instance_path() -> bool:
        """Return whether the disk is a file in the instance's folder."""
        return False

    def _is_ready(self) -> bool:
        """Return whether the disk is there and nothing remains to be done to it."""
        return self.exists()

    def _is_preallocated(self) -> bool:
        """Return whether every block of a new disk has its place on the storage."""
        return bool(self.conf.preallocate_images == "space")

    def _warn_no_snapshots(self, operation: str, name: str) -> None:
        names.check_name("snapshot", name)
        LOG.warning("did not %s snapshot %s of %s: this storage has no snapshots", operation, name, self.path)
