# SPDX-License-Identifier: Apache-2.0
"""Disks in raw files, copied or cloned by reflink from their template."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from imagebackend import exceptions, faults, names
from imagebackend.images import disk_file, disk_info, transfer
from imagebackend.images.base import Capabilities, Image, Progress, Snapshot
from imagebackend.images.model import LocalFileImage
from imagebackend.storage import image_lock, publish, qemu_img, reflink, sparse_copy
from imagebackend.templates.cache import FetchFunction, Template

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["Raw"]

LOG = logging.getLogger(__name__)


class Raw(Image):
    """A disk in a raw file; in a qcow2 file if its template is one and ``force_raw_images`` is off.

    Its data are its own from the start: it holds no lease on its template.
    """

    source_type: ClassVar[str] = "file"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = disk_file.DiskFile(self.conf, self.instance, self.disk_name, self.path)

    def _default_path(self) -> str:
        return disk_file.default_path(self.conf, self.instance, self.disk_name)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            snapshots=self._can_share(),
            clone=False,
            flatten=False,
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
                return
            with self.templates.use(name, prepare_template, *args, size=size, **kwargs) as template:
                self.verify_base_size(template.path, size, template.virtual_size)
                self._create_from(template, size or template.virtual_size, kwargs.get("progress"))
        LOG.info("disk %s made from template %s", self.path, name)

    def create_from_func(self, func: Callable[[str], object], size: int) -> None:
        names.check_size(size)
        with self._file.lock():
            if self._file.exists():
                return
            with self._file.create("raw") as (descriptor, partial):
                os.ftruncate(descriptor, size)
                func(partial)
                transfer.check_filled(partial, size)
                self._preallocate(descriptor, size)
        LOG.info("disk %s made: %d bytes", self.path, size)

    def resize_image(self, size: int, domain: Any = None) -> None:
        names.check_size(size)
        with self._file.lock():
            self._settle()
            current = self.get_disk_size(self.path)
            if transfer.is_grown(self.path, current, size):
                return
            if domain is not None and domain.isActive():
                transfer.resize_running(domain, self.path, size)
            elif self.resolve_driver_format() == "raw":
                self._grow(size)
            else:
                self._file.refuse_in_use()
                with self._file.change("qcow2", "resize"):
                    self._resize_container(self.path, size)
        LOG.info("disk %s grown from %d to %d bytes", self.path, current, size)

    def get_disk_size(self, name: str) -> int:
        return transfer.virtual_size(name, self._format_of(name))

    def create_snap(self, name: str) -> None:
        target = self._snapshot_path(name)
        if not self.capabilities.snapshots:
            self._warn_no_snapshots("create", name)
            return
        with self._file.lock():
            self._settle()
            if os.path.lexists(target):
                raise exceptions.SnapshotExists(name, f"of disk {self.path}")
            with image_lock.hold(self.path, shared=True):
                self._share(self.path, target)

    def remove_snap(self, name: str, ignore_errors: bool = False) -> None:
        path = self._snapshot_path(name)
        try:
            with self._file.lock():
                if publish.remove_file(path):
                    publish.sync_folder(self._file.folder)
                elif self.capabilities.snapshots:
                    raise exceptions.SnapshotNotFound(name, f"disk {self.path} has no such snapshot")
                else:
                    self._warn_no_snapshots("remove", name)
        except exceptions.ImageBackendError as error:
            if not ignore_errors:
                raise
            LOG.warning("snapshot %s of %s may still be there: %s", name, self.path, error)

    def rollback_to_snap(self, name: str) -> None:
        source = self._snapshot_path(name)
        if not self.capabilities.snapshots:
            self._warn_no_snapshots("roll back to", name)
            return
        with self._file.lock():
            self._settle()
            if not os.path.lexists(source):
                raise exceptions.SnapshotNotFound(name, f"disk {self.path} has no such snapshot")
            with image_lock.hold(self.path):
                self._share(source, self.path)
        LOG.info("disk %s rolled back to snapshot %s", self.path, name)

    def list_snaps(self) -> list[Snapshot]:
        found = []
        for path in self._snapshot_paths():
            created = datetime.datetime.fromtimestamp(os.stat(path).st_mtime, datetime.UTC)
            size = transfer.virtual_size(path, self._format_of(self.path))
            found.append(Snapshot(path.rpartition("@")[2], created.isoformat(timespec="seconds"), size))
        return sorted(found, key=lambda snapshot: (snapshot.created, snapshot.name))

    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        with self._file.lock():
            self._settle()
            transfer.extract(self._file, self.resolve_driver_format(), target, out_format, progress)

    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        transfer.import_file(disk_file.for_disk(self.conf, instance, remote_name), "raw", local_file)

    def get_model(self, connection: Any) -> LocalFileImage:
        return LocalFileImage(self.path, self.resolve_driver_format())

    def resolve_driver_format(self) -> str:
        return self._file.resolve_format("raw")

    def remove(self) -> None:
        with self._file.lock():
            if self._file.exists():
                self._file.refuse_in_use()
            snapshots = self._snapshot_paths()
            self._file.remove_file()
            for path in snapshots:
                publish.remove_file(path)
                faults.point("disk.remove.snapshot")
            self._file.forget()

    @staticmethod
    def is_file_in_instance_path() -> bool:
        return True

    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        self._file.require()
        disk.source_path = self.path
        disk.driver_format = self.resolve_driver_format()

    def _create_from(self, template: Template, size: int, progress: Progress | None) -> None:
        disk_format = "raw" if self.conf.force_raw_images else template.format
        preallocate = self.conf.preallocate_images == "space"
        with self._file.create(disk_format) as (descriptor, partial):
            if template.format == disk_format and not (disk_format == "qcow2" and preallocate):
                with transfer.open_file(template.path) as source:
                    transfer.copy(self.conf, source, descriptor, share=not preallocate, progress=progress)
            else:
                options = {"preallocation": "falloc"} if disk_format == "qcow2" else {}
                qemu_img.convert(
                    template.path,
                    template.format,
                    partial,
                    disk_format,
                    options=options,
                    progress=progress,
                    **self._file.tool_options(),
                )
            if disk_format == "raw":
                os.ftruncate(descriptor, size)
                self._preallocate(descriptor, size)
            elif size > template.virtual_size:
                self._resize_container(partial, size)

    def _grow(self, size: int) -> None:
        with image_lock.hold(self.path), transfer.open_file(self.path, writable=True) as descriptor:
            try:
                if self.conf.preallocate_images == "space":
                    sparse_copy.allocate(descriptor, size)
                else:
                    os.ftruncate(descriptor, size)
                faults.point("disk.resize.changed")
                if self.conf.durable_writes:
                    os.fdatasync(descriptor)
            except OSError as error:
                raise exceptions.storage_error(error, self.path) from error

    def _resize_container(self, path: str, size: int) -> None:
        preallocation = "falloc" if self.conf.preallocate_images == "space" else None
        qemu_img.resize(path, "qcow2", size, preallocation=preallocation, **self._file.tool_options())

    def _preallocate(self, descriptor: int, size: int) -> None:
        if self.conf.preallocate_images == "space":
            sparse_copy.allocate(descriptor, size)

    def _settle(self) -> None:
        self._file.require()
        if self._file.repair(self.resolve_driver_format()) is not None:
            self._file.settle()

    def _format_of(self, path: str) -> str:
        return self.resolve_driver_format() if path == self.path else disk_info.read(path) or "raw"

    def _can_share(self) -> bool:
        folder = self._file.folder
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)  # the disk's own may be still to be made
        return self.conf.reflink != "never" and reflink.is_supported(folder)

    def _share(self, source: str, target: str) -> None:
        durable = self.conf.durable_writes
        with transfer.open_file(source) as descriptor, publish.new_file(target, durable=durable) as (clone, _):
            if not reflink.clone_file(descriptor, clone):
                raise exceptions.Unsupported("a snapshot", f"the file system of {source} does not share blocks")

    def _snapshot_path(self, name: str) -> str:
        # No name that a user can give contains '@'.
        return f"{self.path}@{names.check_name('snapshot', name)}"

    def _snapshot_paths(self) -> list[str]:
        prefix = f"{os.path.basename(self.path)}@"
        try:
            entries = os.listdir(self._file.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise exceptions.storage_error(error, self._file.folder) from error
        return [f"{self._file.folder}/{entry}" for entry in sorted(entries) if entry.startswith(prefix)]
