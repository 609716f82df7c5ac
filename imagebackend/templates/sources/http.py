# SPDX-License-Identifier: Apache-2.0
"""Templates from a web server (HTTP semantics: RFC 9110)."""

from __future__ import annotations

import contextlib
import http
import logging
import time
from collections.abc import Callable, Iterator

from oslo_config import cfg
from urllib3.response import HTTPResponse

from imagebackend.templates.sources import Fetched, Metadata, Progress, Source, http_headers, is_same
from imagebackend.templates.sources.checksum import Checksum
from imagebackend.templates.sources.expectation import Expectation
from imagebackend.templates.sources.http_connection import TransferError
from imagebackend.templates.sources.http_resource import Resource
from imagebackend.templates.sources.http_transfer import Transfer
from imagebackend.templates.sources.sink import Sink

__all__ = ["HttpSource"]

LOG = logging.getLogger(__name__)

# What servers say to HEAD that they do not answer; a signature in the URL may be for GET alone.
_NO_HEAD = (403, 405, 501)


class HttpSource(Source):
    """An image on a web server. Arguments are those of :func:`imagebackend.templates.sources.open_source`.

    A transfer that breaks off or stalls, and a server's error (5xx, 429), are followed by another attempt, up to
    ``[image_cache] fetch_retries`` in all, with growing delays. It goes on where it ended if the server identifies
    the content by a strong ETag or an old enough Last-Modified, and starts over otherwise. Without a checksum the
    server must announce the length. Redirects lead to http or https, and not from https to http.

    :param wait: called with seconds to wait between attempts.
    :raises InvalidArgument: the URL or the checksum cannot be used.
    """

    resumable = True

    def __init__(
        self,
        url: str,
        conf: cfg.ConfigOpts,
        *,
        checksum: str | None = None,
        disk_format: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._resource = Resource(url, conf, wait=wait)
        self._source = self._resource.shown
        self._expected = Expectation(checksum, self._resource.name, conf, wait=wait)
        self._disk_format = disk_format
        self._largest: int = conf.image_cache.max_virtual_size

    def metadata(self) -> Metadata:
        checksum = self._expected.checksum()
        with self._ask({}) as response:
            return self._metadata_of(response, checksum)

    def unchanged_since(self, *, sha256: str = "", etag: str | None = None, last_modified: str | None = None) -> bool:
        checksum = self._expected.checksum()
        if sha256 and checksum is not None and checksum.algorithm == "sha256":
            return checksum.hexdigest == sha256
        if etag and http_headers.is_etag(etag):
            condition = {"If-None-Match": etag}
        elif last_modified and http_headers.is_date(last_modified):
            condition = {"If-Modified-Since": last_modified}
        else:
            return False
        with self._ask(condition, http.HTTPStatus.NOT_MODIFIED) as response:
            if response.status == http.HTTPStatus.NOT_MODIFIED:
                return True
            return is_same(
                self._metadata_of(response, checksum), sha256=sha256, etag=etag, last_modified=last_modified
            )

    def fetch(self, target: str, progress: Progress | None = None, *, resume: bool = False) -> Fetched:
        started = time.monotonic()
        LOG.info("fetching %s", self._source)
        checksum = self._expected.checksum(progress)
        with Sink(target, self._source, checksum, progress, part=resume, largest=self._largest) as sink:
            transfer = Transfer(self._resource, sink, record=target if resume else None)
            transfer.run()
            sha256 = sink.finish()
            LOG.info("fetched %s: %d bytes in %.1f s", self._source, sink.size, time.monotonic() - started)
            return Fetched(
                self._source, sink.size, sha256, self._disk_format, transfer.etag, transfer.last_modified,
                sink.compression, sink.content_sha256,
            )  # fmt: skip

    @contextlib.contextmanager
    def _ask(self, headers: dict[str, str], *accepted: int) -> Iterator[HTTPResponse]:
        """Give the head of the image's response; there is one attempt, since whoever asks may do without.

        :param accepted: statuses besides 200.
        """
        with contextlib.ExitStack() as stack:
            try:
                _, response = stack.enter_context(self._resource.open(headers, method="HEAD"))
                if response.status in _NO_HEAD:
                    _, response = stack.enter_context(self._resource.open(headers))
                self._resource.check(response, *accepted)
            except TransferError as error:
                raise self._resource.failure(error) from error
            yield response

    def _metadata_of(self, response: HTTPResponse, checksum: Checksum | None) -> Metadata:
        return Metadata(
            self._source,
            http_headers.length(response),
            self._disk_format,
            str(checksum) if checksum else None,
            http_headers.etag(response),
            http_headers.last_modified(response),
        )
