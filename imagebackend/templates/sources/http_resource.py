# SPDX-License-Identifier: Apache-2.0
"""What a URL of a web server stands for: asked with its credentials, through redirects."""

from __future__ import annotations

import contextlib
import http
import logging
import random
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import urllib3.util
from oslo_config import cfg
from urllib3.exceptions import LocationParseError
from urllib3.response import HTTPResponse
from urllib3.util import Url

from imagebackend import exceptions
from imagebackend.templates.sources import credentials, http_headers
from imagebackend.templates.sources.http_connection import Connection, TransferError
from imagebackend.templates.sources.sink import HEARTBEAT

__all__ = ["Resource"]

LOG = logging.getLogger(__name__)

_MOST_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
# Content that the server compressed for the transfer could not be resumed, and its length would mean nothing.
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "imagebackend"}
_DENIED = (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN, http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)
# Seconds before the first retry, before any, and the most that a server's Retry-After is granted.
_FIRST_DELAY, _LAST_DELAY, _LONGEST_RETRY_AFTER = 0.5, 30.0, 60.0

_T = TypeVar("_T")


class Resource:
    """A URL. Redirects lead to http or https, and not from https to http; credentials are for the first server only.

    :param url: of http or https; it may hold a name and a password.
    :param suffix: what to append to its path.
    :param wait: called with seconds to wait between attempts.
    :param authorize: called for each request, returns the header fields with the credentials; None: they are those of
        the URL, or of ``[image_cache] fetch_credentials_file``.
    :param tls: called for each connection, returns how HTTPS trusts servers; None: as ``[image_cache] fetch_cafile``
        says, or the system.
    :param shown: what to call it in errors and logs, and on record.
    :raises InvalidArgument: it cannot be used.

    :ivar shown: the URL without anything that may be secret.
    :ivar name: the last part of its path, which is its file name for people.
    :ivar has_query: whether there is more to it than is shown.
    """

    def __init__(
        self,
        url: str,
        conf: cfg.ConfigOpts,
        *,
        suffix: str = "",
        wait: Callable[[float], None] = time.sleep,
        authorize: Callable[[], Mapping[str, str]] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
        shown: str = "",
    ) -> None:
        address = _parse(url)
        if suffix:
            address = address._replace(path=f"{address.path or ''}{suffix}")
        self._url = address._replace(auth=None, fragment=None)
        self._conf = conf
        self._auth: str | None = address.auth
        self._authorize = authorize or self._own_credentials
        self._tls = tls or self._own_tls
        self._timeout: float = conf.image_cache.fetch_timeout
        self._retries: int = conf.image_cache.fetch_retries
        self._wait = wait
        self.shown = shown or _shown(address)
        self.has_query = address.query is not None
        self.name = urllib.parse.unquote(address.path or "").rpartition("/")[2]

    @contextlib.contextmanager
    def open(
        self, headers: Mapping[str, str], heartbeat: Callable[[], None] = lambda: None, method: str = "GET"
    ) -> Iterator[tuple[Connection, HTTPResponse]]:
        """Send a request, and give the connection and the head of the response, which is no redirect.

        :param headers: what to say besides the usual.
        :param heartbeat: called while nothing happens; what it raises ends the request.
        :raises TransferError: there is no answer.
        :raises FetchFailed: redirects lead nowhere.
        """
        url = self._url
        for _ in range(_MOST_REDIRECTS + 1):
            # Credentials are for the server that they were given for, and for no other.
            own = self._authorize() if _origin(url) == _origin(self._url) else {}
            tls = self._tls() if url.scheme == "https" else None
            with Connection(url, timeout=self._timeout, heartbeat=heartbeat, tls=tls) as connection:
                response = connection.open({**_HEADERS, **headers, **own}, method)
                if response.status not in _REDIRECTS:
                    yield connection, response
                    return
                url = self._redirected(url, response)
        raise exceptions.FetchFailed(self.shown, f"more than {_MOST_REDIRECTS} redirects")

    def persist(
        self, attempt: Callable[[], _T], report: Callable[[], None], received: Callable[[], int] = lambda: 0
    ) -> _T:
        """Return what an attempt returns, after up to ``[image_cache] fetch_retries`` that raised TransferError.

        :param report: called while waiting between attempts; what it raises ends that.
        :param received: says how many bytes have come, for the log.
        :raises FetchFailed, FetchTimeout: it is given up.
        """
        number = 1
        while True:
            try:
                return attempt()
            except TransferError as error:
                if not error.temporary or number > self._retries:
                    raise self.failure(error, number) from error
                self._pause(error, number, received(), report)
            number += 1

    def check(self, response: HTTPResponse, *accepted: int) -> None:
        """Make sure that a response is an answer to what was asked.

        :param accepted: statuses besides 200.
        :raises TransferError: it may be at a later attempt.
        :raises FetchDenied: the server wants credentials, or others.
        :raises FetchFailed: it is not.
        """
        status = response.status
        text = http_headers.status_text(status)
        if status == http.HTTPStatus.TOO_MANY_REQUESTS or status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
            raise TransferError(text, retry_after=http_headers.retry_after(response))
        if status in _DENIED:
            raise exceptions.FetchDenied(self.shown, text)
        if status != http.HTTPStatus.OK and status not in accepted:
            raise exceptions.FetchFailed(self.shown, text)
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise exceptions.FetchFailed(self.shown, "the server compresses the transfer although asked not to")

    def read(self, largest: int, report: Callable[[], None]) -> bytes:
        """Return the content of a small file.

        :param largest: how many bytes it may have.
        :param report: called while waiting; what it raises ends that.
        :raises FetchFailed, FetchTimeout: it did not come, or is larger.
        """

        def attempt() -> bytes:
            content = bytearray()
            with self.open({}, report) as (connection, response):
                self.check(response)
                for block in connection.body():
                    content += block
                    if len(content) > largest:
                        raise exceptions.FetchFailed(self.shown, f"it has more than {largest} bytes")
                length = http_headers.length(response)
            if length is not None and len(content) != length:
                raise TransferError(f"{length} bytes announced, {len(content)} received")
            return bytes(content)

        return self.persist(attempt, report)

    def failure(self, error: TransferError, attempts: int = 1) -> exceptions.FetchFailed:
        """Return the error to raise when it is given up."""
        if error.stalled:
            return exceptions.FetchTimeout(self.shown, self._timeout)
        return exceptions.FetchFailed(self.shown, error.reason + (f" ({attempts} attempts)" if attempts > 1 else ""))

    def _own_credentials(self) -> Mapping[str, str]:
        if self._auth:
            user, _, password = self._auth.partition(":")
            return credentials.basic(urllib.parse.unquote_to_bytes(user), urllib.parse.unquote_to_bytes(password))
        _, host, port = _origin(self._url)
        return credentials.authorization(self._conf, host.strip("[]"), port)

    def _own_tls(self) -> ssl.SSLContext:
        cafile: str | None = self._conf.image_cache.fetch_cafile
        try:
            # Without a file: the system's store of certificates, or what SSL_CERT_FILE and SSL_CERT_DIR name.
            return ssl.create_default_context(cafile=cafile)
        except OSError as error:  # also SSLError
            reason = f"{cafile}: {error.strerror or 'no certificates are in it'}"
            raise exceptions.InvalidConfiguration("[image_cache] fetch_cafile", reason) from error

    def _pause(self, error: TransferError, attempt: int, received: int, report: Callable[[], None]) -> None:
        delay = min(_FIRST_DELAY * 2.0 ** (attempt - 1), _LAST_DELAY)
        # Hosts that lost the same server at the same time do not come back at the same time.
        delay *= random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        delay = max(delay, min(error.retry_after, _LONGEST_RETRY_AFTER))
        LOG.warning(
            "fetching %s: %s after %d bytes; attempt %d of %d follows in %.1f s",
            self.shown, error.reason, received, attempt + 1, self._retries + 1, delay,
        )  # fmt: skip
        while delay > 0:
            self._wait(min(delay, HEARTBEAT))
            delay -= HEARTBEAT
            report()

    def _redirected(self, url: Url, response: HTTPResponse) -> Url:
        location = response.headers.get("Location")
        if not location:
            raise exceptions.FetchFailed(self.shown, f"redirected ({response.status}) to nowhere")
        try:
            target = _parse(urllib.parse.urljoin(url.url, location))
        except ValueError:  # also InvalidArgument, from which it is one
            raise exceptions.FetchFailed(
                self.shown, "redirected to an address that is not valid, or not of http or https"
            ) from None
        if url.scheme == "https" and target.scheme == "http":
            raise exceptions.FetchFailed(self.shown, f"redirected from https to {_shown(target)}, which is not safe")
        LOG.debug("%s redirects to %s", self.shown, _shown(target))
        return target._replace(auth=None, fragment=None)


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


def _origin(url: Url) -> tuple[str, str, int]:
    return url.scheme or "", url.host or "", url.port or (443 if url.scheme == "https" else 80)
