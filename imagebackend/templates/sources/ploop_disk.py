# SPDX-License-Identifier: Apache-2.0
"""Templates from disks of ploop: a single image, or a folder with a descriptor and images, or a tar archive of one."""

from __future__ import annotations

import os
import pathlib
import stat

from oslo_config import cfg

from imagebackend import exceptions, faults
from imagebackend.storage import ploop, publish
from imagebackend.templates.inspection import parallels
from imagebackend.templates.sources import Fetched, Metadata, Progress, Source, scratch
from imagebackend.templates.sources.document import path_of
from imagebackend.templates.sources.file import FileSource

__all__ = ["PloopSource"]

#: Where a tar archive has its mark, in the header of its first member.
_MARK, _MARK_AT = b"ustar", 257


class PloopSource(Source):
    """A disk of ploop. What it delivers is a single image, of all that can be read of the disk.

    Arguments are those of :func:`imagebackend.templates.sources.open_source`.
    """

    def __init__(self, url: str, conf: cfg.ConfigOpts, *, checksum: str | None, disk_format: str) -> None:
        self._file = FileSource(url, conf, checksum=checksum, disk_format=disk_format)
        self._path = path_of(url)
        self._source = pathlib.PurePath(self._path).as_uri()
        self._checksum = checksum
        self._disk_format = disk_format
        self._share = conf.reflink != "never"

    def metadata(self) -> Metadata:
        if self._is_folder():
            return Metadata(self._source, disk_format=self._disk_format)
        return self._file.metadata()

    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        if self._is_folder():
            if self._checksum is not None:
                raise exceptions.InvalidArgument(f"checksum of {self._path}: a folder has none; give an archive")
            with publish.opened(target, os.O_RDWR) as image:
                size = self._write(self._path, image, progress)
            return Fetched(self._source, size, "", self._disk_format)
        fetched = self._file.fetch(target, progress)
        with publish.opened(target, os.O_RDWR) as image:
            if _is_archive(image, target):
                with scratch.scratch_folder(target) as folder:
                    unpacked = scratch.unpack(image, folder, self._source, progress)
                    faults.point("template.ploop.unpacked")
                    _empty(image, target)
                    self._write(_disk_in(unpacked), image, progress)
        return fetched

    def _write(self, folder: str, image: int, progress: Progress | None) -> int:
        """Write what a disk holds into an empty file, and return the size of that."""
        with parallels.opened_disk(folder, self._source) as (header, images):
            written = ploop.write_image(image, header.virtual_size, images, progress=progress, share=self._share)
        return written.file_size

    def _is_folder(self) -> bool:
        try:
            return stat.S_ISDIR(os.stat(self._path).st_mode)
        except OSError as error:
            raise exceptions.FetchFailed(self._source, error.strerror or str(error)) from error


def _is_archive(file: int, path: str) -> bool:
    try:
        return os.pread(file, len(_MARK), _MARK_AT) == _MARK
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def _empty(file: int, path: str) -> None:
    try:
        os.ftruncate(file, 0)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def _disk_in(folder: str) -> str:
    """Return where in an unpacked archive the disk is: there, or in the one folder that there is."""
    below = [entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    if len(below) == 1 and not os.path.lexists(f"{folder}/{ploop.NAME}"):
        return below[0]
    return folder
