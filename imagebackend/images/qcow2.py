# SPDX-License-Identifier: Apache-2.0
"""Disks in qcow2 files: overlays of their template, or files that stand alone."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import ClassVar

from imagebackend import exceptions, faults
from imagebackend.images.base import Progress
from imagebackend.images.file_image import FileImage
from imagebackend.images.qcow2_file import Qcow2File
from imagebackend.images.qcow2_options import creation_options, is_plain
from imagebackend.storage import qcow2, qemu_img
from imagebackend.templates.cache import Template

__all__ = ["Qcow2"]

LOG = logging.getLogger(__name__)


class Qcow2(FileImage):
    """A disk in a qcow2 file: an overlay that holds what its guest wrote, on top of the template."""

    new_format: ClassVar[str] = "qcow2"
    new_disk_depends: ClassVar[bool] = True

    def rebase(self, template: str, *, unsafe: bool = False, progress: Progress | None = None) -> None:
        """Put the disk on another template; what its guest reads stays the same.

        :param template: the name of a template that is in the cache.
        :param unsafe: only change the name in the header (``qemu-img rebase -u``): right only if both templates hold
            the same data.
        :param progress: called with the bytes done and in all.
        :raises TemplateNotFound: it is not in the cache.
        :raises DiskInUse: a guest holds the disk.
        :raises Unsupported: the disk is not in qcow2, or has snapshots, which would read the new template.
        """
        with self._file.lock(), self.templates.use(template) as base:
            stored = self._settle()
            if not isinstance(stored, Qcow2File):
                raise exceptions.Unsupported("rebase", f"{self.path} is in {stored.disk_format}")
            self._file.refuse_in_use()
            stored.rebase(base, unsafe=unsafe, progress=progress)
        LOG.info("disk %s rebased to template %s", self.path, template)

    def _create_from(self, template: Template, size: int, progress: Progress | None) -> None:
        options = creation_options(self.conf, backed=True)
        with contextlib.ExitStack() as undo:
            self.templates.lease(template.file, self._file.owner)
            undo.callback(self._release_quietly, template.file)
            faults.point("disk.create.leased")
            with self._file.create("qcow2") as (descriptor, partial):
                if is_plain(options) and self.encryption is None:
                    qcow2.write_overlay(
                        descriptor,
                        virtual_size=size,
                        cluster_size=self.conf.libvirt.images_qcow2_cluster_size,
                        backing_file=template.path,
                        backing_format=template.format,
                    )
                else:
                    qemu_img.create(
                        partial,
                        "qcow2",
                        size,
                        backing_file=template.path,
                        backing_format=template.format,
                        options=options,
                        passphrase=self.encryption.passphrase if self.encryption else None,
                        iter_time=self.encryption.iter_time if self.encryption else None,
                        **self._file.tool_options(facts_only="preallocation" not in options),
                    )
            undo.pop_all()

    def _release_quietly(self, file: str) -> None:
        # An undo step: the error that led here matters more. A disk that got its name all the same needs the lease.
        with contextlib.suppress(exceptions.ImageBackendError):
            if not os.path.lexists(self.path):
                self.templates.release(file, self._file.owner)
