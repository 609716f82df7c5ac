# SPDX-License-Identifier: Apache-2.0
"""Small files that say something of an image: a publisher's checksums, and their signature."""

from __future__ import annotations

import os
import pathlib
import time
import urllib.parse
from collections.abc import Callable

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.storage import publish

__all__ = ["Document", "path_of"]

_LARGEST = 4 << 20
_WEB = ("http:", "https:")


class Document:
    """A file of this host or of a web server. Making the object touches nothing.

    :param url: ``http:``, ``https:``, ``file:``, or a path.
    :param suffix: what to append to its path.
    :param wait: called with seconds to wait between attempts.
    :raises InvalidArgument: the URL cannot be used.

    :ivar shown: the URL without anything that may be secret.
    """

    def __init__(
        self, url: str, conf: cfg.ConfigOpts, *, suffix: str = "", wait: Callable[[float], None] = time.sleep
    ) -> None:
        self._path = ""
        if url.lower().startswith(_WEB):
            # Imported late: urllib3 and ssl take longer to load than everything else together.
            from imagebackend.templates.sources.http_resource import Resource

            self._resource = Resource(url, conf, suffix=suffix, wait=wait)
            self.shown = self._resource.shown
        else:
            self._path = path_of(url) + suffix
            self.shown = pathlib.PurePath(self._path).as_uri()

    def read(self, report: Callable[[], None]) -> bytes:
        """Return its content.

        :param report: called while waiting; what it raises ends that.
        :raises FetchFailed, FetchTimeout: it cannot be had, or is too large.
        """
        if not self._path:
            return self._resource.read(_LARGEST, report)
        try:
            content = publish.read_file(os.path.realpath(self._path), _LARGEST + 1)
        except exceptions.StorageError as error:
            raise exceptions.FetchFailed(self.shown, error.reason) from error
        if content is None:
            raise exceptions.FetchFailed(self.shown, "No such file or directory")
        if len(content) > _LARGEST:
            raise exceptions.FetchFailed(self.shown, f"it has more than {_LARGEST} bytes")
        return content


def path_of(url: str) -> str:
    """Return the absolute path that a ``file:`` URL (RFC 8089) or a path means.

    :raises InvalidArgument: it means none on this host.
    """
    path = _path_of_url(url) if url.lower().startswith("file:") else url
    if not path or "\0" in path:
        raise exceptions.InvalidArgument(f"path {path!r}: empty, or with a zero byte")
    # Not normalized: '..' behind a symbolic link does not lead where the text says.
    return os.path.join(os.getcwd(), path)


def _path_of_url(url: str) -> str:
    # Not urlsplit, which drops line feeds and tabs without a word.
    rest = url.partition(":")[2]
    if "?" in rest or "#" in rest:
        raise exceptions.InvalidArgument("file URL: '?' and '#' in a file name are written %3F and %23")
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise exceptions.InvalidArgument("file URL: it names another host; 'file:///path' is a file of this one")
        rest = slash + path
    if not rest.startswith("/"):
        raise exceptions.InvalidArgument("file URL: an absolute path is needed, as in 'file:///path'")
    return os.fsdecode(urllib.parse.unquote_to_bytes(rest))
