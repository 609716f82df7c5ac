# SPDX-License-Identifier: Apache-2.0
"""One request over one connection, which the caller can watch and end at any moment.

The network is waited for in a thread of its own. The caller's thread keeps reporting progress meanwhile, may raise
out of that, and enforces the time limits, also against a server that sends a byte now and then.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
import types
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, ParamSpec, TypeVar

import urllib3.connection
from urllib3 import exceptions as urllib3_exceptions
from urllib3.response import HTTPResponse
from urllib3.util import Url, make_headers, parse_url

from imagebackend.templates.sources.sink import BLOCK_SIZE, HEARTBEAT

__all__ = ["Connection", "TransferError"]

# The most seconds for one address to answer: time for three attempts of TCP (RFC 6298: after 1, 3 and 7 seconds).
_CONNECT_TIMEOUT = 10.0
# Less than this many bytes a second is a stall too, so that a transfer ends in bounded time.
_SLOWEST = 1024
# What the network and whoever is at the other end of it may cause.
_ERRORS = (OSError, http.client.HTTPException, urllib3_exceptions.HTTPError, UnicodeError)
# For how long a block is filled before it is handed over as it is, in seconds.
_FILL_TIME = 0.2


_P = ParamSpec("_P")
_T = TypeVar("_T")


class TransferError(Exception):
    """A request got no usable answer, or the answer broke off.

    :ivar reason: what happened, without the URL.
    :ivar stalled: nothing came for too long.
    :ivar temporary: a later attempt may do better.
    :ivar retry_after: for how many seconds the server wants to be left alone.
    """

    def __init__(
        self, reason: str, *, stalled: bool = False, temporary: bool = True, retry_after: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.stalled = stalled
        self.temporary = temporary
        self.retry_after = retry_after


class Connection:
    """A request to one URL, as a context manager; leaving the block ends it.

    The proxies that ``http_proxy``, ``https_proxy``, ``all_proxy`` and ``no_proxy`` name are used, as curl does.

    :param url: an http or https URL; its credentials are not used.
    :param timeout: how many seconds may pass without data.
    :param tls: how HTTPS trusts servers.
    :param heartbeat: called every quarter of a second or more often while nothing happens; what it raises ends the
        request.
    :raises TransferError: the proxy cannot be used; from every method: the request failed.
    """

    def __init__(
        self, url: Url, *, timeout: float, heartbeat: Callable[[], None], tls: ssl.SSLContext | None = None
    ) -> None:
        self._timeout = timeout
        self._heartbeat = heartbeat
        self._connection, self._request_target, self._proxy_headers = _prepare(
            url, min(timeout, _CONNECT_TIMEOUT), tls
        )
        self._thread = futures.ThreadPoolExecutor(1, "imagebackend-http")
        self._job: futures.Future[Any] | None = None
        self._socket: socket.socket | None = None
        self._response: HTTPResponse | None = None
        self._body: _Response | None = None
        self._error: Exception | None = None
        self._stalled = False
        self._stopped = threading.Event()
        # Called like the class that it stands for.
        self._connection.response_class = self._make_response  # type: ignore[assignment]

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None
    ) -> None:
        ending = self._job is None or self._job.done() or self._interrupt()
        self._thread.submit(self._close)
        # Looking up a name and shaking hands cannot be interrupted: they end by themselves, within their time limit.
        self._thread.shutdown(wait=ending)

    def open(self, headers: Mapping[str, str], method: str = "GET") -> HTTPResponse:
        """Send the request and return the head of the response."""
        return self._wait(self._start(self._request, method, {**headers, **self._proxy_headers}))

    def body(self) -> Iterator[bytearray]:
        """Yield the body in blocks; the next one is received while the caller works on one."""
        started, received = time.monotonic(), 0
        job = self._start(self._receive)
        while block := self._wait(job):
            job = self._start(self._receive)
            received += len(block)
            elapsed = time.monotonic() - started
            yield block
            if elapsed > self._timeout:
                if received < _SLOWEST * elapsed:
                    raise TransferError("next to no data", stalled=True)
                started, received = time.monotonic(), 0
        if self._stalled:
            raise TransferError("no data", stalled=True)

    def _start(self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> futures.Future[_T]:
        job = self._thread.submit(function, *args, **kwargs)
        self._job = job
        return job

    def _wait(self, job: futures.Future[_T]) -> _T:
        deadline = time.monotonic() + self._timeout
        while not futures.wait([job], timeout=min(HEARTBEAT, self._timeout)).done:
            self._heartbeat()
            if time.monotonic() >= deadline:
                self._stalled = True
                # What has come of the block until now counts.
                if self._interrupt() and futures.wait([job], timeout=HEARTBEAT).done:
                    break
                raise TransferError("no data", stalled=True)
        try:
            return job.result()
        except _ERRORS as error:
            raise TransferError("no data", stalled=True) if self._stalled else _transfer_error(error) from error

    def _interrupt(self) -> bool:
        self._stopped.set()
        if self._socket is None:
            return False
        with contextlib.suppress(OSError):
            # Not the method of TLS sockets, after which undeciphered bytes would be read.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        return True

    # From here on: in the other thread.

    def _request(self, method: str, headers: Mapping[str, str]) -> HTTPResponse:
        self._connection.connect()
        self._socket = self._connection.sock
        if self._stopped.is_set():
            raise ConnectionAbortedError
        # The caller's thread keeps the time; this is for when it was torn away.
        self._connection.timeout = 2 * self._timeout
        self._connection.request(
            method, self._request_target, headers=headers, preload_content=False, decode_content=False
        )
        self._response = self._connection.getresponse()
        return self._response

    def _make_response(self, *args: Any, **kwargs: Any) -> _Response:
        self._body = _Response(self._stopped, *args, **kwargs)
        return self._body

    def _receive(self) -> bytearray:
        assert self._body is not None
        if self._error is not None:
            raise self._error
        block, filled = bytearray(BLOCK_SIZE), 0
        deadline = time.monotonic() + _FILL_TIME
        view = memoryview(block)
        try:
            while filled < BLOCK_SIZE and not (filled and time.monotonic() > deadline):
                length = self._body.receive_into(view[filled:])
                if not length:
                    break
                filled += length
        except _ERRORS as error:
            if not filled:
                raise
            self._error = error  # what came before it counts, or a poor line would never get anywhere
        return block if filled == BLOCK_SIZE else block[:filled]

    def _close(self) -> None:
        with contextlib.suppress(*_ERRORS):
            if self._response is not None:
                self._response.close()
        with contextlib.suppress(*_ERRORS):
            self._connection.close()


class _Response(http.client.HTTPResponse):
    """A response whose reading can be stopped, also while the server sends trailers or interim responses for ever."""

    def __init__(self, stopped: threading.Event, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_StoppableReader(self.fp.detach(), stopped))

    def receive_into(self, buffer: memoryview) -> int:
        """Put into a buffer what ``read1`` would return, and return its length; 0: the body has ended."""
        if self.chunked or self.length is None:
            piece = self.read1(len(buffer))
            buffer[: len(piece)] = piece
            return len(piece)
        if not self.length:
            return 0
        # Without a copy, which would take as long as receiving it.
        length = self.fp.readinto1(buffer[: self.length])
        if not length:
            raise http.client.IncompleteRead(b"", self.length)
        self.length -= length
        return length


class _StoppableReader(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, stopped: threading.Event) -> None:
        self._raw = raw
        self._stopped = stopped

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._stopped.is_set():
            raise ConnectionAbortedError
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _prepare(
    url: Url, timeout: float, tls: ssl.SSLContext | None
) -> tuple[urllib3.connection.HTTPConnection, str, dict[str, str]]:
    proxy = _proxy(url)
    host, port = (proxy or url).host or "", (proxy or url).port
    proxy_headers = {}
    if proxy is not None and proxy.auth:
        proxy_headers = make_headers(proxy_basic_auth=urllib.parse.unquote(proxy.auth))
    if url.scheme == "https":
        secure = urllib3.connection.HTTPSConnection(host, port, timeout=timeout, proxy=proxy, ssl_context=tls)
        if proxy is not None:
            secure.set_tunnel(url.host or "", url.port or 443, proxy_headers)
        return secure, url.request_uri, {}
    plain = urllib3.connection.HTTPConnection(host, port, timeout=timeout, proxy=proxy)
    return plain, url._replace(auth=None, fragment=None).url if proxy else url.request_uri, proxy_headers


def _proxy(url: Url) -> Url | None:
    named = urllib.request.getproxies_environment()
    address = named.get(url.scheme or "") or named.get("all")
    if not address or urllib.request.proxy_bypass(url.netloc or "", named):
        return None
    try:
        proxy = parse_url(address if "://" in address else f"http://{address}")
    except urllib3_exceptions.LocationParseError:
        # Not chained: it would show the proxy's password.
        raise TransferError("the address of the proxy cannot be parsed", temporary=False) from None
    if proxy.scheme != "http" or not proxy.host:
        raise TransferError("only proxies that are reached by 'http://host:port' are supported", temporary=False)
    return proxy._replace(port=proxy.port or 80)


def _transfer_error(error: Exception) -> TransferError:
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    # urllib3 counts every failure to connect among the timeouts.
    refused = isinstance(error, urllib3_exceptions.NewConnectionError)
    if isinstance(error, TimeoutError | urllib3_exceptions.TimeoutError) and not refused:
        return TransferError("no data", stalled=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return TransferError(f"its certificate is not trusted: {error.verify_message}", temporary=False)
    if isinstance(error, urllib3_exceptions.LocationParseError | UnicodeError):
        return TransferError("its host name is not valid", temporary=False)
    text = (cause.strerror if isinstance(cause, OSError) else None) or str(error) or type(error).__name__
    # Parts of it may come from the server.
    return TransferError("".join(sign if sign.isprintable() else "?" for sign in text[:200]))
