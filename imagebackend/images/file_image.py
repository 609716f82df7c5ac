# SPDX-License-Identifier: Apache-2.0
"""Disks in files: what Raw and Qcow2 have in common, which is all but how a disk is made from a template.

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
from imagebackend.images.model import LocalFileImage
from imagebackend.images.qcow2_file import Qcow2File
from imagebackend.images.qcow2_options import creation_options
from imagebackend.images.raw_file import RawFile
from imagebackend.storage import publish, qcow2
from imagebackend.templates.cache import FetchFunction, Template, TemplateCache

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["FileImage"]

LOG = logging.getLogger(__name__)

# What disks and their records were when they were last looked at, and the format that was found, by disk and folder of
# templates: agents make an Image each time that they describe a disk.
_SEEN: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
_MAX_SEEN = 4096


class FileImage(Image):
    """A disk in a file of its instance's folder."""

    source_type: ClassVar[str] = "file"
    #: The format of new disks, and whether they depend on their template.
    new_format: ClassVar[str]
    new_disk_depends: ClassVar[bool]

    def __init__(
        self, conf: cfg.ConfigOpts, templates: TemplateCache, instance: str, disk_name: str, path: str | None = None
    ) -> None:
        self._file = disk_file.for_disk(conf, instance, disk_name)
        if path not in (None, self._file.path):
            raise exceptions.InvalidName("disk", path, f"the disk of that instance and name is {self._file.path}")
        super().__init__(conf, templates, instance, disk_name, self._file.path)

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
            flatten=stored.template_file() is not None if self.exists() else self.new_disk_depends,
            direct_snapshot=False,
            resize_running=True,
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
            with self._file.create(self.new_format) as (descriptor, partial):
                if self.new_format == "raw":
                    transfer.set_length(descriptor, size, partial)
                    func(partial)
                    transfer.check_filled(partial, size)
                    transfer.set_size(self.conf, descriptor, size, partial)
                else:
                    self._convert_filled(func, size, partial)
        LOG.info("disk %s made: %d bytes", self.path, size)

    def resize_image(self, size: int, domain: Any = None) -> None:
        names.check_size(size)
        with self._file.lock():
            stored = self._settle()
            current = stored.virtual_size()
            if transfer.is_grown(self.path, current, size):
                return
            if domain is not None and transfer.is_running(domain):
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
            if isinstance(stored, Qcow2File) and stored.template_file() is not None:
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
        return [qcow2.BackingFile(self.path, "raw", stored.virtual_size())]

    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        with self._file.lock():
            stored = self._settle()
            transfer.extract(self._file, stored.disk_format, target, out_format, progress)

    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        disk = disk_file.for_disk(self.conf, instance, remote_name)
        with disk.lock():
            transfer.import_file(disk, self.new_format, local_file)
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

    @staticmethod
    def is_file_in_instance_path() -> bool:
        return True

    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        settled = self._file.is_settled()
        identity = self._file.identity()
        key = self.path, self.templates.folder
        seen, disk_format = _SEEN.get(key, (None, ""))
        if not settled or identity is None or seen != identity:
            if not settled:
                with self._file.lock():
                    self._settle()
            self._file.require()
            stored = self._stored()
            stored.check()
            disk_format = stored.disk_format
            if identity is not None:
                if len(_SEEN) >= _MAX_SEEN:
                    _SEEN.clear()
                _SEEN[key] = identity, disk_format
        disk.source_path = self.path
        disk.driver_format = disk_format

    def _is_ready(self) -> bool:
        return self._file.exists() and self._file.is_settled()

    def _stored(self) -> RawFile | Qcow2File:
        """Return what the disk's recorded format makes of it.

        :raises Unsupported: files hold no disks in that format.
        """
        disk_format = self.resolve_driver_format()
        if disk_format == "qcow2":
            return Qcow2File(self._file, self.templates)
        if disk_format == "raw":
            return RawFile(self._file)
        raise exceptions.Unsupported(f"a disk in {disk_format}", "files hold raw or qcow2 disks")

    def _settle(self) -> RawFile | Qcow2File:
        """Make sure that the disk is there and sound, finishing what was cut short; under its lock."""
        self._file.require()
        stored = self._stored()
        stored.settle()
        return stored

    @contextlib.contextmanager
    def _snapshot(self, operation: str, name: str) -> Iterator[RawFile | Qcow2File | None]:
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
    def _has_snapshot(stored: RawFile | Qcow2File, name: str) -> bool:
        return any(snapshot.name == name for snapshot in stored.snapshots())

    def _convert_filled(self, func: Callable[[str], object], size: int, target: str) -> None:
        scratch = self._file.scratch
        with contextlib.ExitStack() as undo:
            try:
                descriptor = publish.create(scratch)
            except OSError as error:
                raise exceptions.storage_error(error, scratch) from error
            undo.callback(os.close, descriptor)
            with contextlib.ExitStack() as discard:
                discard.callback(publish.remove_quietly, scratch)
                transfer.set_length(descriptor, size, scratch)
                func(scratch)
                transfer.check_filled(scratch, size)
                options = creation_options(self.conf, backed=False)
                transfer.convert(self._file, scratch, "raw", target, "qcow2", options=options)
                # As large as the disk's data: it must not stay without anybody being told.
                publish.remove_file(scratch)
                discard.pop_all()
