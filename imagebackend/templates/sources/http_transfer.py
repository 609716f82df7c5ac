# SPDX-License-Identifier: Apache-2.0
"""One image on its way from a web server, in as many attempts as it takes."""

from __future__ import annotations

import contextlib
import http
import logging
import time

from urllib3.response import HTTPResponse

from imagebackend import exceptions
from imagebackend.storage import publish
from imagebackend.templates.sources import http_headers, part
from imagebackend.templates.sources.http_connection import TransferError
from imagebackend.templates.sources.http_resource import Resource
from imagebackend.templates.sources.sink import Sink

__all__ = ["Transfer"]

LOG = logging.getLogger(__name__)

# Every how many seconds it is recorded how far the transfer is.
_RECORDED_EVERY = 5.0


class Transfer:
    """The transfer of a resource into a sink.

    What has come is kept if the server identifies the content, by a strong ETag or an old enough Last-Modified: an
    attempt that breaks off is followed by one that asks for the rest alone, and starts over otherwise.

    :param sink: what is received goes here.
    :param record: the path of the file that is filled, beside which it is recorded how far the transfer is, and which
        may hold a part; None: the file is empty, and nothing is recorded.
    :param identity: a strong ETag that identifies the content where the server gives none.

    :ivar etag: of what was received.
    :ivar last_modified: of what was received.
    """

    def __init__(self, resource: Resource, sink: Sink, *, record: str | None, identity: str | None = None) -> None:
        self.etag: str | None = None
        self.last_modified: str | None = None
        self._resource = resource
        self._source = resource.shown
        self._sink = sink
        self._record = record
        self._identity = identity
        self._recorded = time.monotonic()
        # What is not shown of the URL may make another image of it, with an ETag that happens to be the same.
        self._recordable = record is not None and (sink.checksum is not None or not resource.has_query)
        # Identifies these very bytes; None: a transfer that breaks off starts over.
        self._validator: str | None = None
        self._taken_up = 0

    def run(self) -> None:
        """Receive all of it.

        :raises FetchFailed, FetchTimeout: it did not come. If a later transfer can go on, that is on record.
        """
        with contextlib.ExitStack() as stack:
            if self._record is not None:
                # Whatever happens to be raised: a part is kept only where the source is to blame.
                stack.callback(self._forget)
                self._take_up()
            try:
                self._resource.persist(self._receive, self._sink.report, lambda: self._sink.size)
            except exceptions.FetchFailed:
                if self._record_part():
                    stack.pop_all()
                raise

    def _receive(self) -> None:
        sink = self._sink
        headers = {}
        resume = bool(sink.size and self._validator)
        if resume:
            headers = {"Range": f"bytes={sink.size}-", "If-Range": self._validator or ""}
        with self._resource.open(headers, sink.report) as (connection, response):
            if resume and response.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._validator = None
                raise TransferError("the content became shorter")
            self._resource.check(response, *([http.HTTPStatus.PARTIAL_CONTENT] if resume else []))
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                self._check_continues(response)
            else:
                self._start(response)
            for block in connection.body():
                sink.write(block)
                if self._record is not None and time.monotonic() - self._recorded > _RECORDED_EVERY:
                    self._record_part()
        if sink.total and sink.size != sink.total:
            self._validator = None
            raise TransferError(f"{sink.total} bytes announced, {sink.size} received")

    def _start(self, response: HTTPResponse) -> None:
        length = http_headers.length(response)
        if length is None and self._sink.checksum is None:
            raise exceptions.FetchFailed(
                self._source, "the server does not announce the length; give a checksum, which tells a whole image"
            )
        if length == 0:
            raise exceptions.FetchFailed(self._source, "the image is empty")
        if self._sink.size:
            LOG.warning("fetching %s: starting over", self._source)
            self._sink.restart()
        self.etag = http_headers.etag(response)
        self.last_modified = http_headers.last_modified(response)
        self._validator = http_headers.validator(response) or self._identity
        self._sink.expect(length or 0)

    def _check_continues(self, response: HTTPResponse) -> None:
        sink = self._sink
        start, end, total = http_headers.content_range(response)
        length = http_headers.length(response)
        if (
            (start, end, total) != (sink.size, total - 1, sink.total or total)
            or http_headers.etag(response) not in (None, self.etag)
            or length not in (None, end + 1 - start)
        ):
            self._validator = None
            raise TransferError("the server did not go on where the transfer ended")
        # What is there already takes no more room.
        sink.expect(total, required=total - start)

    def _take_up(self) -> None:
        """Go on with what an earlier transfer left, if that is what is on record and may be of the same content."""
        assert self._record is not None
        found = part.read(self._record) if self._recordable else None
        if found is None or (found.source, found.checksum) != (self._source, str(self._sink.checksum or "")):
            self._sink.restart()
            return
        self._sink.total = found.total
        if not self._sink.take_up(found.size, found.sha256):
            LOG.warning("fetching %s: the part that there is has changed; starting over", self._source)
            return
        self.etag, self.last_modified = found.etag or None, found.last_modified or None
        self._validator, self._taken_up = found.validator, found.size
        LOG.info("fetching %s: going on after %d bytes of %d", self._source, found.size, found.total)

    def _record_part(self) -> bool:
        """Record how far the transfer is; return whether another one could go on from there."""
        self._recorded = time.monotonic()
        sink = self._sink
        if not self._recordable or not self._validator or not sink.resumable:
            return False
        if sink.size != self._taken_up:  # or it would never get too old
            assert self._record is not None
            part.write(
                self._record, source=self._source, checksum=str(sink.checksum or ""), validator=self._validator,
                etag=self.etag or "", last_modified=self.last_modified or "", size=sink.size, sha256=sink.sha256(),
                total=sink.total,
            )  # fmt: skip
        return True

    def _forget(self) -> None:
        assert self._record is not None
        with contextlib.suppress(exceptions.StorageError):
            publish.remove_file(part.path_for(self._record))
