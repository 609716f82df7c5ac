# SPDX-License-Identifier: Apache-2.0
"""Ploop disks, cloned by reflink or copied from their template."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

from oslo_config import cfg

from imagebackend.images import ploop_content, transfer
from imagebackend.images.base import Progress
from imagebackend.images.file_image import FileImage
from imagebackend.images.ploop_folder import PloopFolder
from imagebackend.images.ploop_template import PloopTemplates
from imagebackend.storage import ploop
from imagebackend.templates import inspection
from imagebackend.templates.cache import Template

__all__ = ["Ploop"]


class Ploop(FileImage):
    """A disk in a folder, as ``ploop`` and containers of OpenVZ have it, whose image QEMU can open, too.

    It is one image from the start, with all data its own or in blocks that the file system shares, not a base image
    of its template with another one on top: libvirt gives QEMU one image, and ploop's commands, of which some merge
    an image into the one below, would write into what other disks are made of; see test_ploop_sharing.py.
    """

    new_format: ClassVar[str] = "ploop"
    new_disk_depends: ClassVar[bool] = False
    can_encrypt: ClassVar[bool] = False

    def __init__(
        self, conf: cfg.ConfigOpts, templates: Any, instance: str, disk_name: str, path: str | None = None
    ) -> None:
        super().__init__(conf, templates, instance, disk_name, None if path is None else _folder(path))

    @classmethod
    def names_of_path(cls, path: str) -> tuple[str, str]:
        return super().names_of_path(_folder(path))

    @classmethod
    def native_templates(cls, conf: cfg.ConfigOpts) -> PloopTemplates:
        return PloopTemplates(conf)

    def _create_from(self, template: Template, size: int, progress: Progress | None) -> None:
        size = ploop.round_size(size)
        same_version = ploop.version_for(size) == ploop.version_for(template.virtual_size)
        if same_version and PloopTemplates(self.conf).serve(self._file.folder):
            self._clone(template, size, progress)
        else:
            self._copy(template, size, progress)

    def _clone(self, template: Template, size: int, progress: Progress | None) -> None:
        """Make the disk share all blocks of the template's image, in one step whatever its size."""

        def write(image: int) -> ploop.Header:
            with PloopTemplates(self.conf).open(template, progress) as source:
                transfer.copy(self.conf, source, image, progress=progress)
            return ploop.grow(image, size, self.path, durable=False)

        PloopFolder(self._file).create(write)

    def _copy(self, template: Template, size: int, progress: Progress | None) -> None:
        verdict = inspection.Verdict(template.format, template.virtual_size, 0)
        path, scratch = template.path, self._file.scratch

        def write(image: int) -> ploop.Header:
            with transfer.open_file(path) as source:
                return ploop_content.write_from_image(
                    self.conf, image, size, source, path, verdict, scratch=scratch, progress=progress
                )

        PloopFolder(self._file).create(write)

    def _create_filled(self, func: Callable[[str], object], size: int) -> None:
        verdict = inspection.Verdict("raw", ploop.round_size(size), 0)

        def write(image: int) -> ploop.Header:
            # It is gone before the disk is there, so that nobody has to look for it afterwards.
            with self._filled_scratch(func, size) as scratch, transfer.open_file(scratch) as source:
                return ploop_content.write_from_image(
                    self.conf, image, size, source, scratch, verdict, scratch=scratch
                )

        PloopFolder(self._file).create(write)


def _folder(path: str) -> str:
    """Return the folder of a disk whose image, or folder, libvirt knows."""
    folder, name = os.path.split(path)
    return folder if name == ploop.ROOT_IMAGE else path
