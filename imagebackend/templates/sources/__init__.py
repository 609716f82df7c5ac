# SPDX-License-Identifier: Apache-2.0
"""Where templates come from: one module for each kind of source, chosen by the scheme of a URL.

Other packages add schemes through the entry-point group ``imagebackend.sources``: the name is the scheme, the object
is called as ``factory(url, conf, checksum=…, disk_format=…)``, with the whole URL and what :func:`open_source` was
given, and returns a :class:`Source`.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oslo_config import cfg

from imagebackend import exceptions

__all__ = ["Fetched", "Metadata", "Progress", "Source", "open_source", "open_tree"]

Progress = Callable[[int, int], None]

_ENTRY_POINTS = "imagebackend.sources"
_BUILT_IN = ("file", "glance", "http", "https", "rbd")
# RFC 3986, section 3.1.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):", re.ASCII)


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a source says of its image, without delivering it. None and 0: it does not say.

    :ivar source: the URL, without credentials and without the query, which may be a signature.
    :ivar size: bytes that would be transferred.
    :ivar disk_format: the format that the image is claimed to have, by its name in qemu-img.
    :ivar checksum: of the bytes that would be transferred, as ``algorithm:hex``.
    :ivar etag: what identifies this state of the image at its source: for HTTP the entity tag as it is written there.
    :ivar last_modified: when the image was changed last, as a date of HTTP.
    :ivar min_disk: the size of the smallest disk that the image is meant for, in bytes.
    """

    source: str
    size: int | None = None
    disk_format: str | None = None
    checksum: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    min_disk: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source delivered.

    :ivar source: the URL, without credentials and without the query, which may be a signature.
    :ivar size: bytes, as published.
    :ivar sha256: of the bytes as published, in hexadecimal digits; empty for what was generated here.
    :ivar disk_format: the format that the image is claimed to have, by its name in qemu-img; None: no claim.
    :ivar etag: as in :class:`Metadata`; None: the source gave none.
    :ivar last_modified: as in :class:`Metadata`; None: the source did not say.
    :ivar compression: ``gzip``, ``bzip2``, ``xz`` or ``zstd``, if the image was published so and decompressed here.
    :ivar content_sha256: of what was written, if that is not what was published; None: it is.
    :ivar min_disk: as in :class:`Metadata`; 0: the source did not say.
    """

    source: str
    size: int
    sha256: str
    disk_format: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    compression: str | None = None
    content_sha256: str | None = None
    min_disk: int = 0


class Source(abc.ABC):
    """An image that can be fetched. Making the object touches nothing.

    :ivar resumable: :meth:`fetch` takes ``resume=True``: the target may hold what an earlier call left there. A call
        that fails because of the source leaves a file ``TARGET.part`` beside it, if another one can go on from there.
    """

    resumable = False

    @abc.abstractmethod
    def metadata(self) -> Metadata:
        """Ask the source about the image, without downloading it.

        :raises FetchFailed: the source cannot be reached, or has no such image; ``FetchTimeout``: it did not answer.
        """

    @abc.abstractmethod
    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        """Write the image into an empty file, taking its digest on the way.

        Nothing is synced to stable storage: whoever publishes the file does that.

        :param target: the path of an empty regular file. After an error, what it holds is of no use.
        :param progress: called with the bytes done and in all (0: unknown), at least twice a second. An exception
            that it raises ends the transfer at once and propagates.
        :raises FetchFailed: the source did not deliver; ``FetchTimeout``: it stalled; ``ChecksumMismatch``: it
            delivered something else.
        :raises ImageUnacceptable: it is too large, or compressed in a way that is not accepted.
        :raises InsufficientSpace: the image does not fit into the file system of ``target``.
        :raises PermissionDenied, StorageError: ``target`` cannot be written.
        """

    def unchanged_since(self, *, sha256: str = "", etag: str | None = None, last_modified: str | None = None) -> bool:
        """Tell whether the source still has what was fetched from it then; False if that cannot be known.

        :param sha256, etag, last_modified: as in what :meth:`fetch` returned then.
        :raises FetchFailed: the source cannot be reached, or has no such image; ``FetchTimeout``: it did not answer.
        """
        return is_same(self.metadata(), sha256=sha256, etag=etag, last_modified=last_modified)

    def locations(self) -> Sequence[str]:
        """Return URLs of the image inside stores that may be able to clone it, best first; most sources have none.

        :raises FetchFailed: the source cannot be reached, or has no such image; ``FetchTimeout``: it did not answer.
        """
        return ()


def is_same(found: Metadata, *, sha256: str, etag: str | None, last_modified: str | None) -> bool:
    """Tell whether metadata are of what was fetched earlier: by its digest, else by its ETag, else by its date."""
    algorithm, _, value = (found.checksum or "").partition(":")
    if sha256 and algorithm == "sha256":
        return value.lower() == sha256
    if etag and found.etag:
        # Weak comparison (RFC 9110, section 8.8.3.2): for the same image it does not have to be the same bytes.
        return etag.removeprefix("W/") == found.etag.removeprefix("W/")
    return last_modified is not None and last_modified == found.last_modified


def open_source(
    url: str, conf: cfg.ConfigOpts, *, checksum: str | None = None, disk_format: str | None = None
) -> Source:
    """Return the source for a URL, without touching it yet.

    :param url: ``file:``, ``http:``, ``https:``, ``glance:``, ``rbd:``, a scheme that another package adds, or the
        path of a file. A path that has a colon in its first part is written with ``./`` before it.
    :param conf: options of this library.
    :param checksum: what the image must hash to, as it is published, as ``algorithm:hex``, where algorithm is sha256,
        sha384, sha512, or, against accidents only, sha1 or md5; or the URL of a publisher's checksum file
        (``SHA256SUMS``), or its path, with a ``/`` in it, where the image's file name is looked up.
    :param disk_format: the format that the image is claimed to have, by its name in qemu-img. For ``ploop``, a file
        may also be a folder with a descriptor and images, which nobody changes meanwhile, or a tar archive of one,
        which takes root.
    :raises InvalidArgument: the URL or the checksum cannot be used, or nothing knows the scheme.
    :raises InvalidConfiguration: the package that adds the scheme is broken.
    :raises Unsupported: a package that the scheme needs is not installed.
    """
    match = _SCHEME.match(url)
    scheme = match[1].lower() if match else "file"
    # Imported late: urllib3 and ssl take longer to load than everything else together.
    if scheme == "file" and disk_format in ("ploop", "parallels"):
        from imagebackend.templates.sources.ploop_disk import PloopSource

        return PloopSource(url, conf, checksum=checksum, disk_format=disk_format)
    if scheme == "file":
        from imagebackend.templates.sources.file import FileSource

        return FileSource(url, conf, checksum=checksum, disk_format=disk_format)
    if scheme in ("http", "https"):
        from imagebackend.templates.sources.http import HttpSource

        return HttpSource(url, conf, checksum=checksum, disk_format=disk_format)
    if scheme == "glance":
        from imagebackend.templates.sources.glance import GlanceSource

        return GlanceSource(url, conf, checksum=checksum, disk_format=disk_format)
    if scheme == "rbd":
        from imagebackend.templates.sources.rbd import RbdSource

        return RbdSource(url, conf, checksum=checksum, disk_format=disk_format)
    return _added_source(scheme)(url, conf, checksum=checksum, disk_format=disk_format)


def open_tree(
    url: str,
    conf: cfg.ConfigOpts,
    *,
    size: int | None = None,
    filesystem: str = "ext4",
    label: str | None = None,
    checksum: str | None = None,
) -> Source:
    """Return the source for a root file system, whose image is a raw disk, without touching it yet.

    It is made without mounting anything. Owners, modes, times, links and capabilities are kept; devices, FIFOs and
    sockets are refused, and so are names in an archive that lead out of it. That takes root. XFS holds neither hard
    links nor extended attributes nor names with white space then: a tree that has one is refused.

    :param url: a folder of this host, which nobody changes meanwhile, or a tar archive that :func:`open_source` can
        fetch: plain, or compressed in a way that images may be.
    :param conf: options of this library.
    :param size: of the disk, in bytes; None: what the files take, and some room.
    :param filesystem: ``ext4`` or ``xfs``, which takes 300 MiB at least.
    :param label: of the file system.
    :param checksum: what the archive must hash to, as in :func:`open_source`.
    :raises InvalidArgument: the URL or the checksum cannot be used, or there is no such file system. InvalidSize: no
        disk can have that size.
    """
    from imagebackend.templates.sources.tree import TreeSource

    return TreeSource(url, conf, size=size, filesystem=filesystem, label=label, checksum=checksum)


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
