# SPDX-License-Identifier: Apache-2.0
"""Templates from an image in a Ceph pool, of the cluster that ``[libvirt]`` leads to."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.storage import ceph, ceph_options, rbd_data, rbd_url
from imagebackend.templates.sources import Fetched, Metadata, Progress, Source
from imagebackend.templates.sources.expectation import Expectation
from imagebackend.templates.sources.sink import Sink

__all__ = ["RbdSource"]

LOG = logging.getLogger(__name__)


class _Name(NamedTuple):
    """What a URL names; empty where it does not say."""

    fsid: str
    pool: str
    namespace: str
    image: str
    snapshot: str


class RbdSource(Source):
    """An image in Ceph: ``rbd:POOL/IMAGE@SNAPSHOT``, ``rbd:POOL/NAMESPACE/IMAGE@SNAPSHOT``, or a location as an image
    service has it, ``rbd://FSID/POOL/IMAGE/SNAPSHOT``.

    Without a snapshot the image is refused while anybody has it open for writing, and never counts as unchanged. Its
    holes stay holes. Other arguments are those of :func:`imagebackend.templates.sources.open_source`; without a claim
    the format is raw.

    :raises InvalidArgument: the URL or the checksum cannot be used.
    """

    def __init__(
        self, url: str, conf: cfg.ConfigOpts, *, checksum: str | None = None, disk_format: str | None = None
    ) -> None:
        self._name = name = _parse(url)
        self._pool = ceph.Pool(ceph_options.settings(conf), name.pool, name.namespace)
        spec = self._pool.spec(name.image) + (f"@{name.snapshot}" if name.snapshot else "")
        self._source = f"rbd:{spec}"
        self._expected = Expectation(checksum, name.image, conf)
        self._disk_format = disk_format or "raw"
        self._largest: int = conf.image_cache.max_virtual_size

    def metadata(self) -> Metadata:
        checksum = self._expected.checksum()
        with self._opened() as image, self._errors():
            self._state(image)
            size, etag = image.size(), self._etag(image)
        return Metadata(self._source, size, self._disk_format, str(checksum) if checksum else None, etag)

    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        started = time.monotonic()
        LOG.info("fetching %s", self._source)
        checksum = self._expected.checksum(progress)
        with (
            self._opened() as image,
            Sink(target, self._source, checksum, progress, largest=self._largest) as sink,
        ):
            with self._errors():
                before = self._state(image)
                etag = self._etag(image)
            self._read(image, sink)
            sha256 = sink.finish()
            with self._errors():
                if self._state(image) != before:
                    raise exceptions.FetchFailed(self._source, "it changed while it was read")
            LOG.info("fetched %s: %d bytes in %.1f s", self._source, sink.size, time.monotonic() - started)
            return Fetched(
                self._source, sink.size, sha256, self._disk_format, etag, None, sink.compression, sink.content_sha256
            )

    def locations(self) -> Sequence[str]:
        if not self._name.snapshot or self._name.namespace:
            return ()  # there is no such URL for it
        with self._opened(), self._errors():
            fsid = self._pool.fsid()
        return (str(rbd_url.Location(fsid, self._name.pool, self._name.image, self._name.snapshot)),)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """Give the image, open for reading."""
        with contextlib.ExitStack() as stack:
            with self._errors():
                if self._name.fsid and self._name.fsid != self._pool.fsid():
                    reason = "it is in another cluster than the one that [libvirt] images_rbd_ceph_conf leads to"
                    raise exceptions.FetchFailed(self._source, reason)
                snapshot = self._name.snapshot or None
                image = stack.enter_context(self._pool.open(self._name.image, read_only=True, snapshot=snapshot))
            yield image

    def _read(self, image: Any, sink: Sink) -> None:
        with self._errors():
            size = image.size()
        sink.expect(size, required=0)
        with contextlib.closing(rbd_data.read(image)) as pieces:
            while True:
                with self._errors():
                    start, data = next(pieces, (size, b""))
                sink.skip(start - sink.size)
                if not data:
                    return
                sink.write(bytearray(data))

    def _etag(self, image: Any) -> str | None:
        """Return what identifies the content; None: nothing does, since Ceph notes a change only now and then."""
        if not self._name.snapshot:
            return None
        return f'"{image.id()}@{image.snap_get_id(self._name.snapshot)}"'

    def _state(self, image: Any) -> object:
        """Return what changes with the content, as far as it can be told.

        :raises FetchFailed: somebody may be changing it.
        """
        if self._name.snapshot:
            return None
        if list(image.watchers_list()):
            reason = "somebody has it open; name a snapshot of it, as in rbd:POOL/IMAGE@SNAPSHOT"
            raise exceptions.FetchFailed(self._source, reason)
        return image.size(), image.modify_timestamp()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Translate what the cluster says of the image."""
        try:
            with self._pool.errors(self._name.image):
                yield
        except exceptions.InvalidConfiguration as error:
            if error.option != "[libvirt] images_rbd_pool":
                raise
            raise exceptions.FetchFailed(self._source, f"the cluster has no pool {self._name.pool!r}") from error
        except exceptions.DiskNotFound as error:
            raise exceptions.FetchFailed(self._source, "there is no such image, or no such snapshot of it") from error
        except exceptions.PermissionDenied as error:
            raise exceptions.FetchDenied(self._source, error.reason) from error
        except exceptions.StorageTimeout as error:
            raise exceptions.FetchTimeout(self._source, error.seconds) from error
        except (exceptions.StorageError, exceptions.Busy) as error:
            raise exceptions.FetchFailed(self._source, error.reason) from error


def _parse(url: str) -> _Name:
    rest = url.partition(":")[2]
    try:
        if rest.startswith("//"):
            location = rbd_url.parse_url(f"rbd:{rest}")
            return _Name(location.fsid, location.pool, "", location.image, location.snapshot)
        pool, *more, image = rest.split("/")
        image, at, snapshot = image.partition("@")
        for part in (pool, *more, image, *([snapshot] if at else [])):
            names.check_name("image", part)
        [namespace] = more or [""]
        return _Name("", pool, namespace, image, snapshot)
    except (exceptions.ImageUnacceptable, ValueError):  # also InvalidName
        # Neither shown nor chained: QEMU's form may hold a key.
        raise exceptions.InvalidArgument(
            "an rbd URL is needed as in 'rbd:POOL/IMAGE@SNAPSHOT' or 'rbd://FSID/POOL/IMAGE/SNAPSHOT', without options"
        ) from None
