# SPDX-License-Identifier: Apache-2.0
"""Disks in qcow2 files: overlays of their template, or files that stand alone."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from imagebackend import exceptions, faults, names
from imagebackend.images import disk_file, disk_info, transfer
from imagebackend.images.base import Capabilities, Image, Progress, Snapshot
from imagebackend.images.model import LocalFileImage
from imagebackend.storage import publish, qcow2, qemu_img
from imagebackend.templates.cache import FetchFunction, Template

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["Qcow2"]

LOG = logging.getLogger(__name__)

_PLAIN_COMPRESSION = "zlib"
_SMALLEST_EXTENDED = 16384


class Qcow2(Image):
    """A disk in a qcow2 file: an overlay that holds what its guest wrote, on top of the template."""

    source_type: ClassVar[str] = "file"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = disk_file.DiskFile(self.conf, self.instance, self.disk_name, self.path)

    def _default_path(self) -> str:
        return disk_file.default_path(self.conf, self.instance, self.disk_name)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(snapshots=True, clone=False, flatten=True, direct_snapshot=False, resize_running=True)

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
            with (
                self.templates.use(name, prepare_template, *args, size=size, **kwargs) as template,
                contextlib.ExitStack() as undo,
            ):
                self.verify_base_size(template.path, size, template.virtual_size)
                self.templates.lease(name, self._file.owner)
                undo.callback(self._release_quietly, name)
                faults.point("disk.create.leased")
                self._create_overlay(template, size or template.virtual_size)
                undo.pop_all()
        LOG.info("disk %s made on template %s", self.path, name)

    def create_from_func(self, func: Callable[[str], object], size: int) -> None:
        names.check_size(size)
        with self._file.lock():
            if self._file.exists():
                self._settle()
                return
            with self._file.create("qcow2") as (_, partial), self._scratch(size) as scratch:
                func(scratch)
                transfer.check_filled(scratch, size)
                options = self._options(backed=False)
                transfer.convert(self._file, scratch, "raw", partial, "qcow2", options=options)
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
            else:
                self._file.refuse_in_use()
                preallocation = "falloc" if self._preallocates() else None
                with self._file.change("qcow2", "resize"):
                    options = self._file.tool_options()
                    qemu_img.resize(self.path, "qcow2", size, preallocation=preallocation, **options)
        LOG.info("disk %s grown from %d to %d bytes", self.path, current, size)

    def get_disk_size(self, name: str) -> int:
        recorded = None if name == self.path else disk_info.read(name)
        return transfer.virtual_size(name, recorded or "qcow2")

    def create_snap(self, name: str) -> None:
        self._check_snapshot_name(name)
        with self._file.lock():
            self._settle()
            if name in self._snapshot_names():
                raise exceptions.SnapshotExists(name, f"of disk {self.path}")
            self._file.refuse_in_use()
            with self._file.change("qcow2", "snapshot"):
                qemu_img.snapshot_create(self.path, name, **self._file.tool_options())

    def remove_snap(self, name: str, ignore_errors: bool = False) -> None:
        self._check_snapshot_name(name)
        try:
            with self._file.lock():
                self._settle()
                self._require_snapshot(name)
                self._file.refuse_in_use()
                with self._file.change("qcow2", "snapshot-remove"):
                    qemu_img.snapshot_delete(self.path, name, **self._file.tool_options())
        except exceptions.ImageBackendError as error:
            if not ignore_errors:
                raise
            LOG.warning("snapshot %s of %s may still be there: %s", name, self.path, error)

    def rollback_to_snap(self, name: str) -> None:
        self._check_snapshot_name(name)
        with self._file.lock():
            self._settle()
            self._require_snapshot(name)
            self._file.refuse_in_use()
            with self._file.change("qcow2", "rollback", snapshot=name):
                qemu_img.snapshot_apply(self.path, name, **self._file.tool_options())
        LOG.info("disk %s rolled back to snapshot %s", self.path, name)

    def list_snaps(self) -> list[Snapshot]:
        with transfer.open_file(self.path) as descriptor:
            header = qcow2.read_header(descriptor, self.path)
            found = qcow2.read_snapshots(descriptor, header, self.path)
        return [Snapshot(each.name, each.created.isoformat(timespec="seconds"), each.virtual_size) for each in found]

    def flatten(self, *, progress: Progress | None = None) -> None:
        with self._file.lock():
            self._settle()
            if self._header().backing_file is None:
                return
            self._file.refuse_in_use()
            template = self._template_name()
            with self._file.change("qcow2", "flatten", leases=[template]):
                qemu_img.rebase(self.path, "qcow2", None, None, progress=progress, **self._file.tool_options())
                self._release_unused([template])
        LOG.info("disk %s flattened", self.path)

    def rebase(self, template: str, *, unsafe: bool = False, progress: Progress | None = None) -> None:
        """Put the disk on another template; what its guest reads stays the same.

        :param template: the name of a template that is in the cache.
        :param unsafe: only change the name in the header (``qemu-img rebase -u``): right only if both templates hold
            the same data.
        :raises TemplateNotFound: it is not in the cache.
        :raises DiskInUse: a guest holds the disk.
        """
        with self._file.lock(), self.templates.use(template) as base:
            self._settle()
            self._file.refuse_in_use()
            leases = [self._template_name(), template]
            with self._file.change("qcow2", "rebase", leases=leases):
                self.templates.lease(template, self._file.owner)
                options = self._file.tool_options()
                qemu_img.rebase(
                    self.path, "qcow2", base.path, base.format, unsafe=unsafe, progress=progress, **options
                )
                self._release_unused(leases)
        LOG.info("disk %s rebased to template %s", self.path, template)

    def backing_chain(self) -> list[qcow2.BackingFile]:
        """Return the files that the disk's data are in, the disk first; the chain's depth is its length less one.

        :raises ImageUnacceptable: a header names a file that it must not, or the chain is too deep.
        """
        return qcow2.backing_chain(self.path)

    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        with self._file.lock():
            self._settle()
            transfer.extract(self._file, "qcow2", target, out_format, progress)

    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        disk = disk_file.for_disk(self.conf, instance, remote_name)
        transfer.import_file(disk, "qcow2", local_file)
        self.templates.release_all(disk.owner)

    def get_model(self, connection: Any) -> LocalFileImage:
        return LocalFileImage(self.path, self.resolve_driver_format())

    def resolve_driver_format(self) -> str:
        return self._file.resolve_format("qcow2")

    def remove(self) -> None:
        with self._file.lock():
            template = None
            if self._file.exists():
                self._file.refuse_in_use()
                with contextlib.suppress(exceptions.ImageUnacceptable):
                    template = self._template_name()
            self._file.remove_file()
            self._file.forget()
            if template is not None:
                self.templates.release(template, self._file.owner)
            else:
                self.templates.release_all(self._file.owner)

    @staticmethod
    def is_file_in_instance_path() -> bool:
        return True

    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        if not self._file.is_settled():
            with self._file.lock():
                self._settle()
        self._file.require()
        disk.source_path = self.path
        disk.driver_format = self.resolve_driver_format()

    def _is_ready(self) -> bool:
        return self._file.exists() and self._file.is_settled()

    def _create_overlay(self, template: Template, size: int) -> None:
        options = self._options(backed=True)
        with self._file.create("qcow2") as (descriptor, partial):
            if options:
                options["cluster_size"] = str(self._cluster_size())
                qemu_img.create(
                    partial,
                    "qcow2",
                    size,
                    backing_file=template.path,
                    backing_format=template.format,
                    options=options,
                    **self._file.tool_options(),
                )
            else:
                qcow2.write_overlay(
                    descriptor,
                    virtual_size=size,
                    cluster_size=self._cluster_size(),
                    backing_file=template.path,
                    backing_format=template.format,
                )

    def _cluster_size(self) -> int:
        size: int = self.conf.libvirt.images_qcow2_cluster_size
        return size

    def _preallocates(self) -> bool:
        return bool(self.conf.preallocate_images == "space")

    def _options(self, *, backed: bool) -> dict[str, str]:
        """Return what a new file needs besides its cluster size; nothing for a plain one."""
        libvirt = self.conf.libvirt
        options = {}
        if libvirt.images_qcow2_lazy_refcounts:
            options["lazy_refcounts"] = "on"
        if libvirt.images_qcow2_compression_type != _PLAIN_COMPRESSION:
            options["compression_type"] = libvirt.images_qcow2_compression_type
        if self._preallocates():
            options["preallocation"] = "falloc"
        # With a template, allocating a cluster must not hide what is below: only subclusters can tell the two apart.
        if libvirt.images_qcow2_extended_l2 or (backed and self._preallocates()):
            if self._cluster_size() < _SMALLEST_EXTENDED:
                raise exceptions.InvalidConfiguration(
                    "[libvirt] images_qcow2_cluster_size",
                    f"{self._cluster_size()} is too small for extended L2 entries, which images_qcow2_extended_l2 and "
                    f"the preallocation of disks with templates need; set {_SMALLEST_EXTENDED} or more",
                )
            options["extended_l2"] = "on"
        return options

    @contextlib.contextmanager
    def _scratch(self, size: int) -> Iterator[str]:
        path = self._file.scratch
        try:
            descriptor = publish.create(path)
            try:
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
            yield path
        except OSError as error:
            raise exceptions.storage_error(error, path) from error
        finally:
            publish.remove_quietly(path)

    def _header(self) -> qcow2.Header:
        with transfer.open_file(self.path) as descriptor:
            return qcow2.read_header(descriptor, self.path)

    def _template_name(self) -> str | None:
        """Return the name of the template that the disk's header names, if it is one of the cache."""
        backing_file = self._header().backing_file
        if backing_file is None:
            return None
        folder, _, name = backing_file.rpartition("/")
        return name if folder == self.templates.folder else None

    def _settle(self) -> None:
        """Finish, or undo, a change that was cut short; the caller holds the lock."""
        self._file.require()
        intent = self._file.repair("qcow2")
        if intent is None:
            return
        if intent["operation"] == "rollback":
            # Half of the old state and half of the snapshot's is neither.
            qemu_img.snapshot_apply(self.path, intent["snapshot"], **self._file.tool_options())
        self._release_unused(intent.get("leases", []))
        self._file.settle()

    def _release_unused(self, templates: Iterable[str | None]) -> None:
        """Drop the leases on those of ``templates`` that the disk does not depend on, or no longer."""
        used = self._template_name()
        for name in templates:
            if name is not None and name != used:
                self.templates.release(name, self._file.owner)

    def _check_snapshot_name(self, name: str) -> None:
        names.check_name("snapshot", name)
        if name.isdigit():
            raise exceptions.InvalidName("snapshot", name, "digits alone would be taken for a snapshot's number")

    def _snapshot_names(self) -> list[str]:
        return [snapshot.name for snapshot in self.list_snaps()]

    def _require_snapshot(self, name: str) -> None:
        if name not in self._snapshot_names():
            raise exceptions.SnapshotNotFound(name, f"disk {self.path} has no such snapshot")

    def _release_quietly(self, template: str) -> None:
        # The error that led here matters more; the next attempt, or removing the disk, drops the lease.
        with contextlib.suppress(exceptions.ImageBackendError):
            self.templates.release(template, self._file.owner)
