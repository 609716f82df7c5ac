# SPDX-License-Identifier: Apache-2.0
"""Templates from a file of this host, named by path or by ``file:`` URL (RFC 8089)."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import logging
import os
import pathlib
import stat
import time
from collections.abc import Callable, Iterator

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.storage import reflink
from imagebackend.templates.sources import Fetched, Metadata, Progress, Source, compression
from imagebackend.templates.sources.document import path_of
from imagebackend.templates.sources.expectation import Expectation
from imagebackend.templates.sources.sink import BLOCK_SIZE, Sink

__all__ = ["FileSource"]

LOG = logging.getLogger(__name__)


class FileSource(Source):
    """A file; symbolic links are followed, since whoever names the file may use them.

    It is cloned if the file system can and ``[DEFAULT] reflink`` is not ``never``. Otherwise it is copied, and its
    holes stay holes. Arguments are those of :func:`imagebackend.templates.sources.open_source`.

    :raises InvalidArgument: the URL or the checksum cannot be used.
    """

    def __init__(
        self, url: str, conf: cfg.ConfigOpts, *, checksum: str | None = None, disk_format: str | None = None
    ) -> None:
        self._path = path_of(url)
        self._source = pathlib.PurePath(self._path).as_uri()
        self._expected = Expectation(checksum, os.path.basename(self._path), conf)
        self._disk_format = disk_format
        self._clone = conf.reflink != "never"
        self._largest: int = conf.image_cache.max_virtual_size

    def metadata(self) -> Metadata:
        with self._open() as (_, found):
            checksum = self._expected.checksum()
            shown = str(checksum) if checksum else None
            return Metadata(self._source, found.st_size, self._disk_format, shown, *_state(found))

    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        started = time.monotonic()
        LOG.info("fetching %s", self._source)
        checksum = self._expected.checksum(progress)
        with (
            self._open() as (descriptor, before),
            Sink(target, self._source, checksum, progress, largest=self._largest) as sink,
        ):
            compressed = self._is_compressed(descriptor)
            if self._clone and not compressed and reflink.clone_file(descriptor, sink.fileno()):
                sink.expect(before.st_size, required=0)
                self._read(sink.fileno(), before.st_size, sink, sink.take)
            else:
                sink.expect(before.st_size, required=min(before.st_size, before.st_blocks * 512))
                self._read(descriptor, before.st_size, sink, sink.write, holes=not compressed)
            sha256 = sink.finish()
            after = os.fstat(descriptor)
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise exceptions.FetchFailed(self._source, "it changed while it was copied")
            LOG.info("fetched %s: %d bytes in %.1f s", self._source, before.st_size, time.monotonic() - started)
            return Fetched(
                self._source, before.st_size, sha256, self._disk_format, *_state(before), sink.compression,
                sink.content_sha256,
            )  # fmt: skip

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[int, os.stat_result]]:
        try:
            # Without O_NONBLOCK a FIFO would hang until somebody writes to it.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            raise exceptions.FetchFailed(self._source, error.strerror or str(error)) from error
        try:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                reason = "not a regular file, but a folder; say that it is ploop, or a tree, to have a disk made of it"
                raise exceptions.FetchFailed(self._source, reason)
            if not stat.S_ISREG(found.st_mode):
                raise exceptions.FetchFailed(self._source, "not a regular file")
            yield descriptor, found
        finally:
            os.close(descriptor)

    def _is_compressed(self, descriptor: int) -> bool:
        try:
            return compression.recognise(os.pread(descriptor, compression.LONGEST_MARK, 0)) is not None
        except OSError as error:
            raise exceptions.FetchFailed(self._source, error.strerror or str(error)) from error

    def _read(
        self, descriptor: int, size: int, sink: Sink, take: Callable[[bytearray], None], *, holes: bool = True
    ) -> None:
        for start, end in self._data(descriptor, size) if holes else [(0, size)]:
            sink.skip(start - sink.size)
            while sink.size < end:
                take(self._block(descriptor, sink.size, end))
                sink.report()
        sink.skip(size - sink.size)

    def _data(self, descriptor: int, size: int) -> Iterator[tuple[int, int]]:
        end = 0
        while end < size:
            try:
                start = os.lseek(descriptor, end, os.SEEK_DATA)
                end = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                raise exceptions.FetchFailed(self._source, error.strerror or str(error)) from error
            if start < size:
                yield start, end

    def _block(self, descriptor: int, start: int, end: int) -> bytearray:
        block = bytearray(min(end - start, BLOCK_SIZE))
        try:
            length = os.preadv(descriptor, [block], start)
        except OSError as error:
            raise exceptions.FetchFailed(self._source, error.strerror or str(error)) from error
        if not length:
            raise exceptions.FetchFailed(self._source, "it became shorter while it was copied")
        del block[length:]
        return block


def _state(found: os.stat_result) -> tuple[str, str]:
    # Dates of HTTP are in whole seconds.
    return f'"{found.st_size:x}-{found.st_mtime_ns:x}"', email.utils.formatdate(found.st_mtime, usegmt=True)
