# SPDX-License-Identifier: Apache-2.0
"""A disk in a qcow2 file: what its format makes of growing, snapshots and templates."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from imagebackend import exceptions
from imagebackend.images import transfer
from imagebackend.images.base import Progress, Snapshot
from imagebackend.images.disk_file import DiskFile
from imagebackend.storage import qcow2, qemu_img
from imagebackend.templates.cache import Template, TemplateCache

__all__ = ["Qcow2File"]


class Qcow2File:
    """A disk in a qcow2 file, whose snapshots are inside it.

    Its header is the host's, and no guest can write it; that it is one, and not what a guest wrote onto a raw disk, is
    known from the record.
    """

    disk_format = "qcow2"
    grows_running = True

    def __init__(self, disk: DiskFile, templates: TemplateCache) -> None:
        self._disk = disk
        self._conf = disk.conf
        self._templates = templates

    def check(self) -> None:
        """Make sure that a tool may open the disk.

        :raises ImageUnacceptable: it depends on a file that is no template of this cache.
        """
        self._header()

    def settle(self) -> None:
        """Finish, or undo, a change that was cut short, and hold the lease that the disk needs; under its lock.

        :raises ImageUnacceptable: the disk depends on a file that is no template of this cache.
        :raises CorruptDisk: it is damaged.
        """
        self.check()
        intent = self._disk.repair()
        if intent is not None:
            if intent["operation"] == "rollback":
                # Half of the old state and half of the snapshot's is neither.
                qemu_img.snapshot_apply(self._disk.path, intent["snapshot"], **self._disk.image_options())
            if "template" in intent:
                self._put_back(intent["template"])
            self._release_unused(intent.get("leases", []))
            self._disk.settle()
        template = self.template_file()
        if template is not None:
            self._templates.lease(template, self._disk.owner)

    def is_settled(self) -> bool:
        """Return True: QEMU itself mends what a killed guest left, when it opens the image."""
        return True

    def is_closed(self) -> bool:
        """Return True: what QEMU notes in the image while it writes to it keeps nobody from opening it."""
        return True

    def source_path(self) -> str:
        """Return the path for QEMU."""
        return self._disk.path

    def virtual_size(self) -> int:
        """Return the disk's size in bytes."""
        return self._header().virtual_size

    def new_size(self, size: int) -> int:
        """Return the size that the disk gets when it is asked to have this one."""
        return size

    def grow(self, size: int) -> None:
        """Make the disk ``size`` bytes large; allocated, if that is wanted."""
        preallocation = "falloc" if self._conf.preallocate_images == "space" else None
        with self._disk.change("resize"):
            # QEMU checks all of an image that a crash left with reference counts which are behind.
            facts_only = preallocation is None and not self._header().dirty
            limits = self._disk.image_options(facts_only=facts_only)
            qemu_img.resize(self._disk.path, "qcow2", size, preallocation=preallocation, **limits)

    def depends(self) -> bool:
        """Return whether the disk depends on a template."""
        return self.template_file() is not None

    def template_file(self) -> str | None:
        """Return the name, in the cache, of the template's file that the disk depends on, or None."""
        backing_file = self._header().backing_file
        return None if backing_file is None else os.path.basename(backing_file)

    def can_snapshot(self) -> bool:
        """Return True."""
        return True

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots, oldest first."""
        path = self._disk.path
        with transfer.open_file(path) as descriptor:
            found = qcow2.read_snapshots(descriptor, self._read_header(descriptor), path)
        return [Snapshot(each.name, each.created.isoformat(timespec="seconds"), each.virtual_size) for each in found]

    def create_snapshot(self, name: str) -> None:
        """Make a snapshot inside the file."""
        _refuse_number(name)
        with self._disk.change("snapshot"):
            qemu_img.snapshot_create(self._disk.path, name, **self._disk.image_options())

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot that is there."""
        with self._disk.change("snapshot-remove"):
            qemu_img.snapshot_delete(self._disk.path, name, **self._disk.image_options())

    def roll_back(self, name: str) -> None:
        """Make the disk what it was at a snapshot that is there."""
        with self._disk.change("rollback", snapshot=name):
            qemu_img.snapshot_apply(self._disk.path, name, **self._disk.image_options())

    def flatten(self, progress: Progress | None) -> None:
        """Copy what the template has into the disk, and drop the lease."""
        template = self.template_file()
        if template is None:
            return
        self._refuse_snapshots("flatten")
        with contextlib.ExitStack() as undo:
            with self._disk.change("flatten", template=template, leases=[template]):
                undo.callback(self._settle_quietly)
                options = self._disk.image_options()
                qemu_img.rebase(self._disk.path, "qcow2", None, None, progress=progress, **options)
                self._release_unused([template])
            undo.pop_all()

    def rebase(self, template: Template, *, unsafe: bool, progress: Progress | None) -> None:
        """Put the disk on another template, which the caller keeps from being removed."""
        old = self.template_file()
        leases = [old, template.file]
        self._refuse_snapshots("rebase")
        with contextlib.ExitStack() as undo:
            with self._disk.change("rebase", template=old, leases=leases):
                undo.callback(self._settle_quietly)
                self._templates.lease(template.file, self._disk.owner)
                options = self._disk.image_options()
                path, form = template.path, template.format
                qemu_img.rebase(self._disk.path, "qcow2", path, form, unsafe=unsafe, progress=progress, **options)
                self._release_unused(leases)
            undo.pop_all()

    def _header(self) -> qcow2.Header:
        with transfer.open_file(self._disk.path) as descriptor:
            return self._read_header(descriptor)

    def _read_header(self, descriptor: int) -> qcow2.Header:
        path = self._disk.path
        header = qcow2.read_header(descriptor, path)
        if header.data_file:
            raise exceptions.ImageUnacceptable(path, "its data lie in another file")
        if header.crypt_method and self._disk.secret_uuid() is None:
            raise exceptions.CorruptRecord(f"{self._disk.folder}/disk.info", f"does not say which secret opens {path}")
        if header.backing_file is not None and not self._is_template(header.backing_file):
            reason = f"its backing file {header.backing_file} is no template in {self._templates.folder}"
            raise exceptions.ImageUnacceptable(path, reason)
        return header

    def _is_template(self, path: str) -> bool:
        try:
            return path == self._templates.path(os.path.basename(path))
        except exceptions.InvalidName:
            return False

    def _refuse_snapshots(self, operation: str) -> None:
        found = [snapshot.name for snapshot in self.snapshots()]
        if found:
            raise exceptions.Unsupported(
                f"{operation} of a disk with snapshots",
                f"{', '.join(found)} would lose what they have from the template; remove them first",
            )

    def _put_back(self, template: str | None) -> None:
        """Put the disk back on the template that it was on before a flatten or rebase that was cut short, or failed.

        qemu-img writes the new name into the header before the tables that lead to what it has copied, so that the
        disk may have lost what it had from the template. What did get copied is the same as there: it does no harm.
        """
        if template is None:
            backing: tuple[str | None, str | None] = None, None
        elif self._templates.is_leased(template, self._disk.owner):
            found = self._templates.by_file(template)
            backing = found.path, found.format
        else:
            return  # the lease was dropped when all had been done
        qemu_img.rebase(self._disk.path, "qcow2", *backing, unsafe=True, **self._disk.image_options())

    def _release_unused(self, templates: Iterable[str | None]) -> None:
        """Drop the leases on those of ``templates`` that the disk does not depend on, or no longer."""
        used = self.template_file()
        for name in templates:
            if name is not None and name != used:
                self._templates.release(name, self._disk.owner)

    def _settle_quietly(self) -> None:
        # An undo step: the error that led here matters more, and the next access to the disk tries again.
        with contextlib.suppress(exceptions.ImageBackendError):
            self.settle()


def _refuse_number(name: str) -> None:
    if name.isdigit():
        raise exceptions.InvalidName("snapshot", name, "digits alone would be taken for a snapshot's number")
