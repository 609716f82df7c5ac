# SPDX-License-Identifier: Apache-2.0
"""Disks in raw files, copied or cloned by reflink from their template."""

from __future__ import annotations

from typing import ClassVar

from imagebackend.images import transfer
from imagebackend.images.base import Progress
from imagebackend.images.file_image import FileImage
from imagebackend.images.qcow2_options import creation_options
from imagebackend.storage import publish, qcow2, qemu_img
from imagebackend.templates.cache import Template

__all__ = ["Raw"]


class Raw(FileImage):
    """A disk in a raw file; in a qcow2 file if its template is one and ``force_raw_images`` is off.

    If it is encrypted, a header of LUKS is in the file, and then every block, the empty ones too. Its data are its own
    from the start: it holds no lease on its template.
    """

    new_format: ClassVar[str] = "raw"
    new_disk_depends: ClassVar[bool] = False

    def _create_from(self, template: Template, size: int, progress: Progress | None) -> None:
        if self.encryption is not None:
            self._encrypt(template, size, progress)
            return
        disk_format = "raw" if self.conf.force_raw_images else template.format
        preallocate = self.conf.preallocate_images == "space"
        with self._file.create(disk_format) as (descriptor, partial):
            if template.format != disk_format:
                transfer.convert(self._file, template.path, template.format, partial, disk_format, progress=progress)
            elif disk_format == "qcow2" and preallocate:
                options = creation_options(self.conf, backed=False)
                transfer.convert(
                    self._file, template.path, "qcow2", partial, "qcow2", options=options, progress=progress
                )
            else:
                with transfer.open_file(template.path) as source:
                    transfer.copy(self.conf, source, descriptor, progress=progress)
            if disk_format == "raw":
                transfer.set_size(self.conf, descriptor, size, partial)
            elif size > template.virtual_size:
                preallocation = "falloc" if preallocate else None
                limits = self._file.tool_options(facts_only=not preallocate)
                qemu_img.resize(partial, "qcow2", size, preallocation=preallocation, **limits)

    def _encrypt(self, template: Template, size: int, progress: Progress | None) -> None:
        """Make the disk, encrypted: from an overlay that has its size, since what is behind the template is empty."""
        scratch = self._file.scratch
        with self._file.create("luks") as (_, partial), publish.new_scratch(scratch) as overlay:
            qcow2.write_overlay(
                overlay,
                virtual_size=size,
                cluster_size=self.conf.libvirt.images_qcow2_cluster_size,
                backing_file=template.path,
                backing_format=template.format,
            )
            encryption = self.encryption
            transfer.convert(self._file, scratch, "qcow2", partial, "luks", encryption=encryption, progress=progress)
