# SPDX-License-Identifier: Apache-2.0
"""Disks in files: what Raw, Qcow2 and Ploop have in common, which is all but how a disk is made from a template.

What can be done with a disk depends on the format that it is recorded in, not on the class that it was opened as:
``[libvirt] images_type`` may have changed since it was made, and raw disks may be kept in qcow2.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.images import disk_file, disk_info, transfer
from imagebackend.images.base import Capabilities, Image, Progress, Snapshot
from imagebackend.images.encryption import Encryption
from imagebackend.images.luks_file import LuksFile
from imagebackend.images.model import LocalFileImage
from imagebackend.images.ploop_folder import PloopFolder
from imagebackend.images.qcow2_file import Qcow2File
from imagebackend.images.qcow2_options import creation_options
from imagebackend.images.raw_file import RawFile
from imagebackend.storage import publish, qcow2
from imagebackend.templates.cache import FetchFunction, Template, TemplateCache

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk, LibvirtConfigGuestFilesys

__all__ = ["FileImage"]

LOG = logging.getLogger(__name__)

_Stored = RawFile | Qcow2File | PloopFolder
# For libvirt: the path, the format, and the secret that opens the disk.
_Description = tuple[str, str, str | None]

# What disks and their records were when they were last looked at, and what was found, by disk and folder of templates:
# agents make an Image each time that they describe a disk.
_SEEN: dict[tuple[str, str], tuple[tuple[tuple[int, ...], ...], _Description]] = {}
_MAX_SEEN = 4096


class FileImage(Image):
    """A disk in a file of its instance's folder."""

    source_type: ClassVar[str] = "file"
    #: The format of new disks, and whether they depend on their template.
    new_format: ClassVar[str]
    new_disk_depends: ClassVar[bool]
    can_encrypt: ClassVar[bool] = True

    def __init__(
        self, conf: cfg.ConfigOpts, templates: TemplateCache, instance: str, disk_name: str, path: str | None = None
    ) -> None:
        self._file = disk_file.for_disk(conf, instance, disk_name)
        if path not in (None, self._file.path):
            raise exceptions.InvalidName("disk", path, f"the disk of that instance and name is {self._file.path}")
        super().__init__(conf, templates, instance, disk_name, self._file.path)

    @property
    def encryption(self) -> Encryption | None:
        """How the disk is, or is to be, encrypted, by QEMU.

        Set this before an encrypted disk is made, filled, read or changed; libvirt is told of the secret.
        """
        return self._file.encryption

    @encryption.setter
    def encryption(self, encryption: Encryption | None) -> None:
        if encryption is not None and not self.can_encrypt:
            raise exceptions.Unsupported("encryption", f"{type(self).__name__} disks are not encrypted")
        if encryption is not None and encryption.format == "luks2":
            raise exceptions.Unsupported("LUKS2 in a file", "QEMU itself has LUKS1")
        self._file.encryption = encryption

    def _default_path(self) -> str:
        return self._file.path

    @abc.abstractmethod
    def _create_from(self, template: Template, size: int, progress: Progress | None) -> None:
        """Make the disk from a template that nobody removes meanwhile; under the disk's lock."""

    @property
    def capabilities(self) -> Capabilities:
        stored = self._stored()
        return Capabilities(
            snapshots=stored.can_snapshot(),
            clone=False,
            flatten=stored.depends() if self.exists() else self.new_disk_depends,
            direct_snapshot=False,
            resize_running=stored.grows_running,
        )

    def exists(self) -> bool:
        return self._file.exists()

    def create_image(
        self, prepare_template: FetchFunction, base: str, size: int | None, *args: Any, **kwargs: Any
    ) -> None:
        name = self.templates.name_of(base)
        if size is not None:
            names.check_size(size)
        with self._file.lock():
            if self._file.exists():
                self._settle()
                return
            with self.templates.use(name, prepare_template, *args, size=size, **kwargs) as template:
                self.verify_base_size(template.path, size, template.virtual_size)
                self._create_from(template, size or template.virtual_size, kwargs.get("progress"))
        LOG.info("disk %s made from template %s", self.path, name)

    def create_from_func(self, func: Callable[[str], object], size: int) -> None:
        names.check_size(size)
        with self._file.lock():
            if self._file.exists():
                self._settle()
                return
            self._create_filled(func, size)
        LOG.info("disk %s made: %d bytes", self.path, size)

    def resize_image(self, size: int, domain: Any = None) -> None:
        names.check_size(size)
        with self._file.lock():
            stored = self._settle()
            current = stored.virtual_size()
            if transfer.is_grown(self.path, current, stored.new_size(size)):
                return
            if domain is not None and transfer.is_running(domain):
                if not stored.grows_running:
                    reason = f"QEMU cannot, for a disk in {stored.disk_format}; stop the guest first"
                    raise exceptions.Unsupported("growing a disk under its guest", reason)
                transfer.resize_running(domain, self.path, size)
            else:
                self._file.refuse_in_use()
                stored.grow(size)
        LOG.info("disk %s grown from %d to %d bytes", self.path, current, size)

    def get_disk_size(self, name: str) -> int:
        if name == self.path:
            return self._stored().virtual_size()
        return transfer.virtual_size(name, disk_info.read(name) or self.new_format)

    def create_snap(self, name: str) -> None:
        names.check_name("snapshot", name)
        with self._file.lock():
            stored = self._settle()
            if self._has_snapshot(stored, name):
                raise exceptions.SnapshotExists(name, f"of disk {self.path}")
            self._file.refuse_in_use()
            try:
                stored.create_snapshot(name)
            except exceptions.Unsupported:
                self._warn_no_snapshots("create", name)

    def remove_snap(self, name: str, ignore_errors: bool = False) -> None:
        try:
            with self._snapshot("remove", name) as stored:
                if stored is not None:
                    stored.remove_snapshot(name)
        except exceptions.ImageBackendError as error:
            if not ignore_errors:
                raise
            LOG.warning("snapshot %s of %s may still be there: %s", name, self.path, error)

    def rollback_to_snap(self, name: str) -> None:
        with self._snapshot("roll back to", name) as stored:
            if stored is not None:
                stored.roll_back(name)
                LOG.info("disk %s rolled back to snapshot %s", self.path, name)

    def list_snaps(self) -> list[Snapshot]:
        return self._stored().snapshots()

    def flatten(self, *, progress: Progress | None = None) -> None:
        with self._file.lock():
            stored = self._settle()
            if stored.depends():
                self._file.refuse_in_use()
                stored.flatten(progress)
                LOG.info("disk %s flattened", self.path)

    def backing_chain(self) -> list[qcow2.BackingFile]:
        """Return the files that the disk's data are in, the disk first; the chain's depth is its length less one.

        :raises DiskNotFound: the disk, or a file that it depends on, is not there.
        :raises ImageUnacceptable: a header names a file that it must not, or the chain is too deep.
        """
        stored = self._stored()
        stored.check()
        if isinstance(stored, Qcow2File):
            return qcow2.backing_chain(self.path)
        paths = stored.paths() if isinstance(stored, PloopFolder) else [self.path]
        return [qcow2.BackingFile(path, stored.disk_format, stored.virtual_size()) for path in paths]

    def is_in_use(self) -> bool:
        return self._file.is_in_use()

    def allocated_size(self) -> int:
        """Return how many bytes of storage the disk takes; those that it shares with others count.

        :raises DiskNotFound: it is not there.
        """
        return self._file.allocated_size()

    def parents(self) -> list[str]:
        return [each.path for each in self.backing_chain()[1:]]

    def template_name(self) -> str | None:
        chain = self.backing_chain()
        # What is below an image of ploop is a snapshot of the same disk.
        return os.path.basename(chain[1].path) if len(chain) > 1 and chain[0].format == "qcow2" else None

    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        with self._file.lock():
            stored = self._settle()
            if isinstance(stored, PloopFolder):
                stored.extract(target, out_format, progress)
            else:
                transfer.extract(self._file, stored.disk_format, target, out_format, progress)

    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        disk = disk_file.for_disk(self.conf, instance, remote_name)
        disk.encryption = self.encryption
        with disk.lock():
            if disk.resolve_format(self.new_format) == "ploop":
                PloopFolder(disk).import_file(os.path.abspath(local_file))
            else:
                transfer.import_file(disk, self._new_format(), local_file)
            RawFile(disk).remove_snapshots()
            self.templates.release_all(disk.owner)

    def get_model(self, connection: Any) -> LocalFileImage:
        return LocalFileImage(self.path, self.resolve_driver_format())

    def resolve_driver_format(self) -> str:
        return self._file.resolve_format(self.new_format)

    def remove(self) -> None:
        with self._file.lock_to_remove():
            known, template = False, None
            if self._file.exists():
                self._file.refuse_in_use()
                with contextlib.suppress(exceptions.ImageUnacceptable, exceptions.Unsupported):
                    template = self._stored().template_file()
                    # A change that was cut short may hold another lease, too.
                    known = self._file.is_settled()
            self._file.remove_file()
            RawFile(self._file).remove_snapshots()
            self._file.forget()
            if not known:
                self.templates.release_all(self._file.owner)
            elif template is not None:
                self.templates.release(template, self._file.owner)

    def libvirt_fs_info(self, target: str, driver_type: str | None = None) -> LibvirtConfigGuestFilesys:
        stored = self._sound()
        if not isinstance(stored, PloopFolder):
            return super().libvirt_fs_info(target, driver_type)
        if driver_type not in (None, "ploop"):
            raise exceptions.Unsupported(
                f"a container's file system by {driver_type}",
                f"{self.path} is a ploop disk, which the driver 'ploop' takes; for another, extract it to a raw file",
            )
        from imagebackend import guest

        # The kernel's driver is told of the folder, whose descriptor names the images.
        return guest.LibvirtConfigGuestFilesys(
            source_type="file", source_file=self.path, driver_type="ploop", driver_format="ploop", target_dir=target
        )

    @staticmethod
    def is_file_in_instance_path() -> bool:
        return True

    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        settled, identity = self._file.is_settled(), self._file.identity()
        key = self.path, self.templates.folder
        seen, found = _SEEN.get(key, (None, ("", "", None)))
        if not settled or identity is None or seen != identity:
            stored = self._sound()
            # What QEMU's driver for LUKS opens is a raw disk to libvirt, with a secret.
            disk_format = "raw" if stored.disk_format == "luks" else stored.disk_format
            found = stored.source_path(), disk_format, self._file.secret_uuid()
            if identity is not None and stored.is_closed():
                if len(_SEEN) >= _MAX_SEEN:
                    _SEEN.clear()
                _SEEN[key] = identity, found
        disk.source_path, disk.driver_format, secret_uuid = found
        if secret_uuid is not None:
            from imagebackend import guest

            secret = guest.LibvirtConfigGuestDiskEncryptionSecret(uuid=secret_uuid)
            disk.ephemeral_encryption = guest.LibvirtConfigGuestDiskEncryption(format="luks", secret=secret)

    def _sound(self) -> _Stored:
        """Return what the disk's format makes of it, once nothing remains to be done to it and it may be used."""
        self._file.require()
        stored = self._stored()
        if not (self._file.is_settled() and stored.is_settled()):
            with self._file.lock():
                stored = self._settle()
        stored.check()
        return stored

    def _is_ready(self) -> bool:
        return self._file.exists() and self._file.is_settled()

    def _stored(self) -> _Stored:
        """Return what the disk's recorded format makes of it.

        :raises Unsupported: there are no disks in that format here.
        """
        disk_format = self.resolve_driver_format()
        if disk_format == "qcow2":
            return Qcow2File(self._file, self.templates)
        if disk_format == "raw":
            return RawFile(self._file)
        if disk_format == "luks":
            return LuksFile(self._file)
        if disk_format == "ploop":
            return PloopFolder(self._file)
        raise exceptions.Unsupported(f"a disk in {disk_format}", "files hold raw, luks, qcow2 or ploop disks")

    def _settle(self) -> _Stored:
        """Make sure that the disk is there and sound, finishing what was cut short; under its lock."""
        self._file.require()
        stored = self._stored()
        stored.settle()
        return stored

    @contextlib.contextmanager
    def _snapshot(self, operation: str, name: str) -> Iterator[_Stored | None]:
        """Give the disk, locked and not in use, if it has the snapshot; None where it can have none."""
        names.check_name("snapshot", name)
        with self._file.lock():
            stored = self._settle()
            if self._has_snapshot(stored, name):
                self._file.refuse_in_use()
                yield stored
            elif stored.can_snapshot():
                raise exceptions.SnapshotNotFound(name, f"disk {self.path} has no such snapshot")
            else:
                self._warn_no_snapshots(operation, name)
                yield None

    @staticmethod
    def _has_snapshot(stored: _Stored, name: str) -> bool:
        return any(snapshot.name == name for snapshot in stored.snapshots())

    def _create_filled(self, func: Callable[[str], object], size: int) -> None:
        """Make a disk that is filled by ``func``; under its lock."""
        disk_format = self._new_format()
        with self._file.create(disk_format) as (descriptor, partial):
            if disk_format == "raw":
                transfer.set_length(descriptor, size, partial)
                func(partial)
                transfer.check_filled(partial, size)
                transfer.set_size(self.conf, descriptor, size, partial)
                return
            with self._filled_scratch(func, size) as scratch:
                options = creation_options(self.conf, backed=False) if disk_format == "qcow2" else None
                encryption = self.encryption
                transfer.convert(
                    self._file, scratch, "raw", partial, disk_format, options=options, encryption=encryption
                )

    def _new_format(self) -> str:
        """Return the format that a new disk is recorded in."""
        return "luks" if self.new_format == "raw" and self.encryption is not None else self.new_format

    @contextlib.contextmanager
    def _filled_scratch(self, func: Callable[[str], object], size: int) -> Iterator[str]:
        """Give the path of a raw file that ``func`` filled; it is gone at the end of the block."""
        scratch = self._file.scratch
        with publish.new_scratch(scratch) as descriptor:
            transfer.set_length(descriptor, size, scratch)
            func(scratch)
            transfer.check_filled(scratch, size)
            yield scratch
