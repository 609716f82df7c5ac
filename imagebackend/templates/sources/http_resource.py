# SPDX-License-Identifier: Apache-2.0
"""What a URL of a web server stands for: asked with its credentials, through redirects."""

from __future__ import annotations

import base64
import contextlib
import logging
import urllib.parse
from collections.abc import Callable, Iterator, Mapping

import urllib3.util
from oslo_config import cfg
from urllib3.exceptions import LocationParseError
from urllib3.response import HTTPResponse
from urllib3.util import Url

from imagebackend import exceptions
from imagebackend.templates.sources.http_connection import Connection, TransferError

__all__ = ["Resource"]

LOG = logging.getLogger(__name__)

_MOST_REDIRECTS = 10
_REDIRECTS = (301, 302, 303, 307, 308)
# Content that the server compressed for the transfer could not be resumed, and its length would mean nothing.
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "imagebackend"}


class Resource:
    """A URL. Redirects lead to http or https, and not from https to http; credentials are for the first server only.

    :param url: of http or https; it may hold a name and a password.
    :raises InvalidArgument: it cannot be used.

    :ivar shown: the URL without anything that may be secret.
    :ivar has_query: whether there is more to it than is shown.
    """

    def __init__(self, url: str, conf: cfg.ConfigOpts) -> None:
        address = _parse(url)
        self._url = address._replace(auth=None, fragment=None)
        self._authorization = _basic(address.auth) if address.auth else {}
        self._timeout: float = conf.image_cache.fetch_timeout
        self.shown = _shown(address)
        self.has_query = address.query is not None

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
            own = self._authorization if _origin(url) == _origin(self._url) else {}
            with Connection(url, timeout=self._timeout, heartbeat=heartbeat) as connection:
                response = connection.open({**_HEADERS, **headers, **own}, method)
                if response.status not in _REDIRECTS:
                    yield connection, response
                    return
                url = self._redirected(url, response)
        raise exceptions.FetchFailed(self.shown, f"more than {_MOST_REDIRECTS} redirects")

    def failure(self, error: TransferError, attempts: int = 1) -> exceptions.FetchFailed:
        """Return the error to raise when it is given up."""
        if error.stalled:
            return exceptions.FetchTimeout(self.shown, self._timeout)
        return exceptions.FetchFailed(self.shown, error.reason + (f" ({attempts} attempts)" if attempts > 1 else ""))

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


def _origin(url: Url) -> tuple[str | None, str | None, int]:
    return url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80)


def _basic(userinfo: str) -> dict[str, str]:
    user, _, password = userinfo.partition(":")
    joined = urllib.parse.unquote_to_bytes(user) + b":" + urllib.parse.unquote_to_bytes(password)
    return {"Authorization": "Basic " + base64.b64encode(joined).decode()}
