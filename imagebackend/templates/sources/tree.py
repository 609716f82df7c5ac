# SPDX-License-Identifier: Apache-2.0
"""Templates from a root file system: a folder of this host, or a tar archive from anywhere, made into a disk."""

from __future__ import annotations

import logging
import os
import pathlib
import stat

from oslo_config import cfg

from imagebackend import exceptions, faults
from imagebackend.names import check_size
from imagebackend.storage import digest, mkfs, publish, tree
from imagebackend.templates.sources import Fetched, Metadata, Progress, Source, is_same, open_source, scratch
from imagebackend.templates.sources.document import path_of

__all__ = ["TreeSource"]

LOG = logging.getLogger(__name__)


class TreeSource(Source):
    """A root file system. Arguments are those of :func:`imagebackend.templates.sources.open_tree`.

    What it delivers differs from call to call, as file systems do; an archive itself is held to its checksum.
    """

    def __init__(
        self,
        url: str,
        conf: cfg.ConfigOpts,
        *,
        size: int | None,
        filesystem: str,
        label: str | None,
        checksum: str | None,
    ) -> None:
        if size is not None:
            check_size(size)
        if filesystem not in mkfs.ROOT_FILESYSTEMS:
            raise exceptions.InvalidArgument(
                f"file system {filesystem!r}: not among {', '.join(mkfs.ROOT_FILESYSTEMS)}"
            )
        self._archive = open_source(url, conf, checksum=checksum)
        self._folder = None if url.lower().startswith(("http:", "https:")) else path_of(url)
        self._checksum = checksum
        self._size = size
        self._filesystem = filesystem
        self._label = label
        self._timeout: int = conf.libvirt.images_tool_timeout

    def metadata(self) -> Metadata:
        found = self._stat()
        return self._archive.metadata() if found is None else Metadata(_shown(self._folder))

    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        if self._stat() is not None:
            assert self._folder is not None
            if self._checksum is not None:
                raise exceptions.InvalidArgument(f"checksum of {self._folder}: a folder has none; give an archive")
            return self._make(target, self._folder, Metadata(_shown(self._folder)), progress)
        with scratch.scratch_folder(target) as folder:
            fetched, root = self._unpack(folder, progress)
            known = Metadata(fetched.source, etag=fetched.etag, last_modified=fetched.last_modified)
            return self._make(target, root, known, progress)

    def unchanged_since(self, *, sha256: str = "", etag: str | None = None, last_modified: str | None = None) -> bool:
        # The digest is of the disk, and not of the archive.
        return is_same(self.metadata(), sha256="", etag=etag, last_modified=last_modified)

    def _unpack(self, folder: str, progress: Progress | None) -> tuple[Fetched, str]:
        """Fetch the archive into a folder, and unpack it there; return where, too."""
        path = f"{folder}/archive"
        with publish.new_scratch(path) as descriptor:
            fetched = self._archive.fetch(path, progress)
            faults.point("template.tree.fetched")
            root = scratch.unpack(descriptor, folder, fetched.source, progress)
        faults.point("template.tree.unpacked")
        return fetched, root

    def _make(self, target: str, folder: str, known: Metadata, progress: Progress | None) -> Fetched:
        """Make the disk of what is in a folder."""
        measured = tree.measure(folder, known.source)
        size = self._size or mkfs.root_size(measured, self._filesystem)
        with publish.opened(target, os.O_RDWR) as descriptor:

            def report(_: str) -> None:
                if progress is not None:
                    progress(min(os.fstat(descriptor).st_blocks * 512, size), size)

            try:
                os.ftruncate(descriptor, size)
            except OSError as error:
                raise exceptions.storage_error(error, target) from error
            mkfs.make_root(
                target,
                folder,
                measured,
                filesystem=self._filesystem,
                name=known.source,
                label=self._label,
                timeout=self._timeout,
                on_output=report,
            )
            LOG.info("made a file system of %s: %d files, %d bytes", known.source, measured.files, measured.size)
            sha256 = digest.compute(descriptor, digest.SHA256, target, progress).partition(":")[2]
        return Fetched(known.source, size, sha256, "raw", known.etag, known.last_modified)

    def _stat(self) -> os.stat_result | None:
        """Return what the folder is; None if it is none."""
        if self._folder is None:
            return None
        try:
            found = os.stat(self._folder)
        except OSError as error:
            raise exceptions.FetchFailed(_shown(self._folder), error.strerror or str(error)) from error
        return found if stat.S_ISDIR(found.st_mode) else None


def _shown(path: str | None) -> str:
    return pathlib.PurePath(path or "/").as_uri()
