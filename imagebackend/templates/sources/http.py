# SPDX-License-Identifier: Apache-2.0
"""Templates from a web server (HTTP semantics: RFC 9110)."""

from __future__ import annotations

import base64
import contextlib
import datetime
import http
import itertools
import logging
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import urllib3.util
from oslo_config import cfg
from urllib3.exceptions import InvalidHeader, LocationParseError
from urllib3.response import HTTPResponse
from urllib3.util import Url

from imagebackend import exceptions
from imagebackend.templates.sources import Fetched, Metadata, Progress, Source, is_same
from imagebackend.templates.sources.http_connection import Connection, TransferError
from imagebackend.templates.sources.sink import HEARTBEAT, Sink, parse_checksum

__all__ = ["HttpSource"]

LOG = logging.getLogger(__name__)

_MOST_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
# What servers say to HEAD that they do not answer; a signature in the URL may be for GET alone.
_NO_HEAD = (403, 405, 501)
# Content that the server compressed for the transfer could not be resumed, and its length would mean nothing.
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "imagebackend"}
# Seconds before the first retry, before any, and the most that a server's Retry-After is granted.
_FIRST_DELAY, _LAST_DELAY, _LONGEST_RETRY_AFTER = 0.5, 30.0, 60.0
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", re.ASCII | re.IGNORECASE)
# RFC 9110, section 8.8.3, in ASCII and with a limit, as it is recorded and sent back; and the one form of dates that
# servers may generate (section 5.6.7).
_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]{0,256}"')
_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT", re.ASCII)
# By how many seconds the server's clock must be ahead of Last-Modified before the date identifies the content, even
# if two clocks were at work (RFC 9110, section 8.8.2.2).
_DATE_MARGIN = 60.0


@dataclass(slots=True)
class _Content:
    """What is known of the content that is being received, so that it can be taken up again."""

    etag: str | None = None
    last_modified: str | None = None
    #: Identifies these very bytes; None: a transfer that breaks off starts over.
    validator: str | None = None


class HttpSource(Source):
    """An image on a web server. Arguments are those of :func:`imagebackend.templates.sources.open_source`.

    A transfer that breaks off or stalls, and a server's error (5xx, 429), are followed by another attempt, up to
    ``[image_cache] fetch_retries`` in all, with growing delays. It goes on where it ended if the server identifies
    the content by a strong ETag or an old enough Last-Modified, and starts over otherwise. Without a checksum the
    server must announce the length. Redirects lead to http or https, and not from https to http.

    :param wait: called with seconds to wait between attempts.
    :raises InvalidArgument: the URL or the checksum cannot be used.
    """

    def __init__(
        self,
        url: str,
        conf: cfg.ConfigOpts,
        *,
        checksum: str | None = None,
        disk_format: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        address = _parse(url)
        self._url = address._replace(auth=None, fragment=None)
        self._authorization = _basic(address.auth) if address.auth else {}
        self._source = _shown(address)
        self._checksum = parse_checksum(checksum) if checksum is not None else None
        self._disk_format = disk_format
        self._timeout: float = conf.image_cache.fetch_timeout
        self._retries: int = conf.image_cache.fetch_retries
        self._wait = wait

    def metadata(self) -> Metadata:
        with self._ask({}) as response:
            return self._metadata_of(response)

    def unchanged_since(self, *, sha256: str = "", etag: str | None = None, last_modified: str | None = None) -> bool:
        if sha256 and self._checksum is not None and self._checksum.algorithm == "sha256":
            return self._checksum.hexdigest == sha256
        if etag and _ETAG.fullmatch(etag):
            condition = {"If-None-Match": etag}
        elif last_modified and _date(last_modified):
            condition = {"If-Modified-Since": last_modified}
        else:
            return False
        with self._ask(condition) as response:
            if response.status == http.HTTPStatus.NOT_MODIFIED:
                return True
            return is_same(self._metadata_of(response), sha256=sha256, etag=etag, last_modified=last_modified)

    def fetch(self, target: str, progress: Progress | None = None) -> Fetched:
        started = time.monotonic()
        LOG.info("fetching %s", self._source)
        content = _Content()
        with Sink(target, self._source, self._checksum, progress) as sink:
            for attempt in itertools.count(1):
                try:
                    self._receive(sink, content)
                    break
                except TransferError as error:
                    if not error.temporary or attempt > self._retries:
                        raise self._failure(error, attempt) from error
                    self._pause(error, attempt, sink)
            sha256 = sink.finish()
        LOG.info("fetched %s: %d bytes in %.1f s", self._source, sink.size, time.monotonic() - started)
        return Fetched(self._source, sink.size, sha256, self._disk_format, content.etag, content.last_modified)

    @contextlib.contextmanager
    def _ask(self, headers: dict[str, str]) -> Iterator[HTTPResponse]:
        """Give the head of the image's response; there is one attempt, since whoever asks may do without."""
        headers = {**_HEADERS, **headers}
        with contextlib.ExitStack() as stack:
            try:
                _, response = stack.enter_context(self._open(headers, _do_nothing, "HEAD"))
                if response.status in _NO_HEAD:
                    _, response = stack.enter_context(self._open(headers, _do_nothing))
            except TransferError as error:
                raise self._failure(error, 1) from error
            yield response

    def _metadata_of(self, response: HTTPResponse) -> Metadata:
        if response.status != http.HTTPStatus.OK:
            raise exceptions.FetchFailed(self._source, _status_text(response.status))
        checksum = str(self._checksum) if self._checksum else None
        etag, last_modified = _etag(response), _last_modified(response)
        return Metadata(self._source, _length(response), self._disk_format, checksum, etag, last_modified)

    def _receive(self, sink: Sink, content: _Content) -> None:
        headers = dict(_HEADERS)
        resume = bool(sink.size and content.validator)
        if resume:
            headers |= {"Range": f"bytes={sink.size}-", "If-Range": content.validator or ""}
        with self._open(headers, sink.report) as (connection, response):
            self._check_status(response, content, resume)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                _check_continues(response, sink, content)
            else:
                self._start(response, sink, content)
            for block in connection.body():
                sink.write(block)
        if sink.total and sink.size != sink.total:
            content.validator = None
            raise TransferError(f"{sink.total} bytes announced, {sink.size} received")

    @contextlib.contextmanager
    def _open(
        self, headers: dict[str, str], heartbeat: Callable[[], None], method: str = "GET"
    ) -> Iterator[tuple[Connection, HTTPResponse]]:
        url = self._url
        for _ in range(_MOST_REDIRECTS + 1):
            # Credentials are for the server that they were given for, and for no other.
            own = self._authorization if _origin(url) == _origin(self._url) else {}
            with Connection(url, timeout=self._timeout, heartbeat=heartbeat) as connection:
                response = connection.open({**headers, **own}, method)
                if response.status not in _REDIRECTS:
                    yield connection, response
                    return
                url = self._redirected(url, response)
        raise exceptions.FetchFailed(self._source, f"more than {_MOST_REDIRECTS} redirects")

    def _redirected(self, url: Url, response: HTTPResponse) -> Url:
        location = response.headers.get("Location")
        if not location:
            raise exceptions.FetchFailed(self._source, f"redirected ({response.status}) to nowhere")
        try:
            target = _parse(urllib.parse.urljoin(url.url, location))
        except ValueError:  # also InvalidArgument, from which it is one
            raise exceptions.FetchFailed(
                self._source, "redirected to an address that is not valid, or not of http or https"
            ) from None
        if url.scheme == "https" and target.scheme == "http":
            raise exceptions.FetchFailed(self._source, f"redirected from https to {_shown(target)}, which is not safe")
        LOG.debug("%s redirects to %s", self._source, _shown(target))
        return target._replace(auth=None, fragment=None)

    def _check_status(self, response: HTTPResponse, content: _Content, resume: bool) -> None:
        status = response.status
        if status == http.HTTPStatus.TOO_MANY_REQUESTS or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise TransferError(_status_text(status), retry_after=_retry_after(response))
        if resume and status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            content.validator = None
            raise TransferError("the content became shorter")
        if status != http.HTTPStatus.OK and not (resume and status == http.HTTPStatus.PARTIAL_CONTENT):
            raise exceptions.FetchFailed(self._source, _status_text(status))
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise exceptions.FetchFailed(self._source, "the server compresses the transfer although asked not to")

    def _start(self, response: HTTPResponse, sink: Sink, content: _Content) -> None:
        length = _length(response)
        if length is None and self._checksum is None:
            raise exceptions.FetchFailed(
                self._source, "the server does not announce the length; give a checksum, which tells a whole image"
            )
        if length == 0:
            raise exceptions.FetchFailed(self._source, "the image is empty")
        if sink.size:
            LOG.warning("fetching %s: starting over", self._source)
            sink.restart()
        content.etag = _etag(response)
        content.last_modified = _last_modified(response)
        content.validator = _validator(response, content)
        sink.expect(length or 0)

    def _pause(self, error: TransferError, attempt: int, sink: Sink) -> None:
        delay = min(_FIRST_DELAY * 2.0 ** (attempt - 1), _LAST_DELAY)
        # Hosts that lost the same server at the same time do not come back at the same time.
        delay *= random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        delay = max(delay, min(error.retry_after, _LONGEST_RETRY_AFTER))
        LOG.warning(
            "fetching %s: %s after %d bytes; attempt %d of %d follows in %.1f s",
            self._source, error.reason, sink.size, attempt + 1, self._retries + 1, delay,
        )  # fmt: skip
        while delay > 0:
            self._wait(min(delay, HEARTBEAT))
            delay -= HEARTBEAT
            sink.report()

    def _failure(self, error: TransferError, attempts: int) -> exceptions.FetchFailed:
        if error.stalled:
            return exceptions.FetchTimeout(self._source, self._timeout)
        return exceptions.FetchFailed(self._source, error.reason + (f" ({attempts} attempts)" if attempts > 1 else ""))


def _do_nothing() -> None:
    pass


def _parse(url: str) -> Url:
    try:
        address = urllib3.util.parse_url(url)
    except LocationParseError:
        # Neither shown nor chained: it may hold a password.
        raise exceptions.InvalidArgument("the URL cannot be parsed; 'https://host/path' is needed") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise exceptions.InvalidArgument("the URL has no host, or is not of http or https")
    return address


def _shown(url: Url) -> str:
    # Tokens and signatures are in the query as often as passwords are before the host.
    return url._replace(auth=None, query=None, fragment=None).url


def _origin(url: Url) -> tuple[str | None, str | None, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def _basic(userinfo: str) -> dict[str, str]:
    user, _, password = userinfo.partition(":")
    joined = urllib.parse.unquote_to_bytes(user) + b":" + urllib.parse.unquote_to_bytes(password)
    return {"Authorization": "Basic " + base64.b64encode(joined).decode()}


def _status_text(status: int) -> str:
    # Not the server's own phrase, which may be anything.
    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status}"


def _length(response: HTTPResponse) -> int | None:
    text = response.headers.get("Content-Length", "").strip()
    return int(text) if _NUMBER.fullmatch(text) and not response.chunked else None


def _retry_after(response: HTTPResponse) -> float:
    try:
        return max(0.0, urllib3.util.Retry().parse_retry_after(response.headers.get("Retry-After", "0")))
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def _etag(response: HTTPResponse) -> str | None:
    text = response.headers.get("ETag", "").strip()
    return text if _ETAG.fullmatch(text) else None


def _last_modified(response: HTTPResponse) -> str | None:
    text = response.headers.get("Last-Modified", "").strip()
    return text if _date(text) else None


def _validator(response: HTTPResponse, content: _Content) -> str | None:
    if content.etag and not content.etag.startswith("W/"):
        return content.etag
    modified, now = _date(content.last_modified or ""), _date(response.headers.get("Date", ""))
    if modified and now and (now - modified).total_seconds() >= _DATE_MARGIN:
        return content.last_modified
    return None


def _date(text: str) -> datetime.datetime | None:
    if not _DATE.fullmatch(text):
        return None
    try:
        return parsedate_to_datetime(text).replace(tzinfo=datetime.UTC)
    except ValueError:
        return None


def _check_continues(response: HTTPResponse, sink: Sink, content: _Content) -> None:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    start, end, total = (int(number) for number in match.groups()) if match else (-1, -1, -1)
    expected = (sink.size, total - 1, sink.total or total)
    etag = _etag(response)
    if (
        (start, end, total) != expected
        or etag not in (None, content.etag)
        or _length(response) not in (None, end + 1 - start)
    ):
        content.validator = None
        raise TransferError("the server did not go on where the transfer ended")
    sink.total = total
