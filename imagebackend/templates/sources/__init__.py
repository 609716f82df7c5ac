# SPDX-License-Identifier: Apache-2.0
"""Where templates come from: one module for each kind of source, chosen by the scheme of a URL.

Other packages add schemes through the entry-point group ``imagebackend.sources``: the name is the scheme, the object
is called like :func:`open_source`, whose first argument is then the whole URL, and returns a :class:`Source`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from oslo_config import cfg

from imagebackend import exceptions

__all__ = ["Fetched", "Progress", "Source", "open_source"]

Progress = Callable[[int, int], None]

_ENTRY_POINTS = "imagebackend.sources"
_BUILT_IN = ("file", "http", "https")
# RFC 3986, section 3.1.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):", re.ASCII)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source delivered.

    :ivar source: the URL, without credentials and without the query, which may be a signature.
    :ivar size: bytes.
    :ivar sha256: of the content, in hexadecimal digits; empty for what was generated here.
    :ivar disk_format: the format that the image is claimed to have, by its name in qemu-img; None: no claim.
    :ivar etag: the entity tag that the source gave, as it is written in HTTP; None: it gave none.
    :ivar last_modified: when the image was changed last, as a date of HTTP; None: the source did not say.
    """

    source: str
    size: int
    sha256: str
    disk_format: str | None = None
    etag: str | None = None
    last_modified: str | None = None


class Source(Protocol):
    """An image that can be fetched."""

    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        """Write the image into an empty file, taking its digest on the way.

        Nothing is synced to stable storage: whoever publishes the file does that.

        :param target: the path of an empty regular file. After an error, what it holds is of no use.
        :param progress: called with the bytes done and in all (0: unknown), at least twice a second. An exception
            that it raises ends the transfer at once and propagates.
        :raises FetchFailed: the source did not deliver; ``FetchTimeout``: it stalled; ``ChecksumMismatch``: it
            delivered something else.
        :raises InsufficientSpace: the image does not fit into the file system of ``target``.
        :raises PermissionDenied, StorageError: ``target`` cannot be written.
        """


def open_source(
    url: str, conf: cfg.ConfigOpts, *, checksum: str | None = None, disk_format: str | None = None
) -> Source:
    """Return the source for a URL, without touching it yet.

    :param url: ``file:``, ``http:``, ``https:``, a scheme that another package adds, or the path of a file. A path
        that has a colon in its first part is written with ``./`` before it.
    :param conf: options of this library.
    :param checksum: what the image must hash to, as ``algorithm:hex``, where algorithm is sha256, sha384, sha512, or,
        against accidents only, sha1 or md5.
    :param disk_format: the format that the image is claimed to have, by its name in qemu-img.
    :raises InvalidArgument: the URL or the checksum cannot be used, or nothing knows the scheme.
    :raises InvalidConfiguration: the package that adds the scheme is broken.
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    # Imported late: urllib3 and ssl take longer to load than everything else together.
    if scheme == "file":
        from imagebackend.templates.sources.file import FileSource

        return FileSource(url, conf, checksum=checksum, disk_format=disk_format)
    if scheme in ("http", "https"):
        from imagebackend.templates.sources.http import HttpSource

        return HttpSource(url, conf, checksum=checksum, disk_format=disk_format)
    return _added_source(scheme)(url, conf, checksum=checksum, disk_format=disk_format)


def _added_source(scheme: str) -> Callable[..., Source]:
    from importlib import metadata

    added = {entry.name.lower(): entry for entry in metadata.entry_points(group=_ENTRY_POINTS)}
    if scheme not in added:
        known = ", ".join(sorted({*_BUILT_IN, *added}))
        raise exceptions.InvalidArgument(
            f"no source for URLs that begin with '{scheme}:'; known are {known}, "
            "and a file whose name has a colon is written with './' before it"
        )
    try:
        factory: Callable[..., Source] = added[scheme].load()
    except (ImportError, AttributeError) as error:
        raise exceptions.InvalidConfiguration(
            f"entry point {scheme} of {_ENTRY_POINTS}", f"{added[scheme].value} cannot be loaded: {error}"
        ) from error
    return factory
