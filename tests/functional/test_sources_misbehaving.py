# SPDX-License-Identifier: Apache-2.0
"""Fetching from web servers that stall, lie, break off or change their mind."""

from __future__ import annotations

import email.utils
import hashlib
import logging
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.sources import Fetched
from imagebackend.templates.sources.http import HttpSource
from tests.functional import web
from tests.functional.web import respond

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
RETRIES = 3


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy but those of the tests, and no thread left behind."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("imagebackend")] == []


class Client:
    """Fetches with no real wait between attempts.

    :ivar waits: for how many seconds each attempt would have waited.
    """

    def __init__(self, folder: Path) -> None:
        self.target = folder / "target"
        self.target.touch(mode=0o600)
        self.conf: cfg.ConfigOpts = load_config([])
        self.conf.set_override("fetch_timeout", 20.0, group="image_cache")
        self.conf.set_override("fetch_retries", RETRIES, group="image_cache")
        self.waits: list[float] = []

    def fetch(self, url: str, checksum: str | None = None) -> Fetched:
        fetched = HttpSource(url, self.conf, checksum=checksum, wait=self.waits.append).fetch(str(self.target))
        assert hashlib.sha256(self.target.read_bytes()).hexdigest() == fetched.sha256
        assert self.target.stat().st_size == fetched.size
        return fetched


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def whole(**headers: str) -> web.Answer:
    return respond("200 OK", BODY, content_length=str(len(BODY)), **headers)


def cut(length: int, **headers: str) -> web.Answer:
    """The announced length, but only some of it."""
    return respond("200 OK", BODY[:length], content_length=str(len(BODY)), **headers)


def rest(start: int, content_range: str | None = None, **headers: str) -> web.Answer:
    shown = content_range or f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    return respond(
        "206 Partial Content",
        BODY[start:],
        content_length=str(len(BODY) - start),
        content_range=shown,
        **headers,
    )


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> web.Answer:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return respond("200 OK", body + end, transfer_encoding="chunked")


class TestBrokenOff:
    def test_goes_on_with_a_strong_etag(self, client: Client) -> None:
        with web.misbehaving_server(cut(100_000, etag='"v1"'), rest(100_000, etag='"v1"')) as server:
            assert client.fetch(server.url).sha256 == SHA256
        asked = server.requests[1].headers
        assert (asked["range"], asked["if-range"]) == ("bytes=100000-", '"v1"')
        assert asked["accept-encoding"] == "identity"
        assert "range" not in server.requests[0].headers

    def test_goes_on_again_and_again(self, client: Client) -> None:
        def part(start: int, end: int) -> web.Answer:
            return respond(
                "206 Partial Content",
                BODY[start:end],
                content_length=str(len(BODY) - start),
                content_range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}",
            )

        answers = [cut(1, etag='"v1"'), part(1, 70_000), part(70_000, 70_001), part(70_001, len(BODY))]
        with web.misbehaving_server(*answers) as server:
            assert client.fetch(server.url).sha256 == SHA256
        assert [request.headers.get("range") for request in server.requests] == [
            None,
            "bytes=1-",
            "bytes=70000-",
            "bytes=70001-",
        ]

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"etag": 'W/"v1"'},
            {"etag": "v1"},
            {"etag": '"v1'},
            {"etag": f'"{"v" * 1000}"'},
            {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
            {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT", "date": "Mon, 01 Jan 2024 00:00:59 GMT"},
            {"last_modified": "Mon, 99 Jan 2024 00:00:00 GMT", "date": "Mon, 01 Jan 2025 00:00:00 GMT"},
            {"last_modified": "yesterday", "date": "today"},
        ],
    )
    def test_starts_over_when_nothing_identifies_the_content(self, client: Client, headers: dict[str, str]) -> None:
        with web.misbehaving_server(cut(100_000, **headers), whole(**headers)) as server:
            assert client.fetch(server.url).sha256 == SHA256
        assert "range" not in server.requests[1].headers

    def test_goes_on_with_an_old_date(self, client: Client) -> None:
        dates = {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT", "date": "Mon, 01 Jan 2024 00:01:00 GMT"}
        with web.misbehaving_server(cut(10, **dates), rest(10)) as server:
            assert client.fetch(server.url).last_modified == dates["last_modified"]
        assert server.requests[1].headers["if-range"] == dates["last_modified"]

    def test_starts_over_when_the_range_is_ignored(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        with web.misbehaving_server(cut(100_000, etag='"v1"'), whole(etag='"v2"')) as server:
            fetched = client.fetch(server.url)
        assert (fetched.sha256, fetched.etag) == (SHA256, '"v2"')
        assert "starting over" in caplog.text

    @pytest.mark.parametrize(
        "answer",
        [
            rest(5, f"bytes 6-{len(BODY) - 1}/{len(BODY)}"),
            rest(5, f"bytes 5-{len(BODY) - 1}/{len(BODY) + 1}"),
            rest(5, f"bytes 5-{len(BODY) - 2}/{len(BODY)}"),
            rest(5, f"bytes 5-{len(BODY) - 1}/*"),
            rest(5, "nonsense"),
            rest(5, etag='"v2"'),
            respond(
                "206 Partial Content",
                BODY[4:-1],
                content_length=str(len(BODY) - 5),
                content_range=f"bytes 4-{len(BODY) - 2}/{len(BODY)}",
            ),
            respond("206 Partial Content", BODY[5:], content_length=str(len(BODY) - 5)),
            respond(
                "206 Partial Content",
                BODY[5:-1],
                content_length=str(len(BODY) - 6),
                content_range=f"bytes 5-{len(BODY) - 1}/{len(BODY)}",
            ),
            respond("416 Range Not Satisfiable", content_length="0"),
        ],
    )
    def test_starts_over_when_the_rest_does_not_fit(self, client: Client, answer: web.Answer) -> None:
        with web.misbehaving_server(cut(5, etag='"v1"'), answer, whole()) as server:
            assert client.fetch(server.url).sha256 == SHA256
        assert ["range" in request.headers for request in server.requests] == [False, True, False]

    def test_gives_up(self, client: Client) -> None:
        with (
            web.misbehaving_server(cut(1000)) as server,
            pytest.raises(exceptions.FetchFailed, match=r"\(4 attempts\)"),
        ):
            client.fetch(server.url)
        assert len(server.requests) == RETRIES + 1

    def test_no_retries(self, client: Client) -> None:
        client.conf.set_override("fetch_retries", 0, group="image_cache")
        with web.misbehaving_server(cut(1000)) as server, pytest.raises(exceptions.FetchFailed):
            client.fetch(server.url)
        assert len(server.requests) == 1
        assert client.waits == []

    def test_delays_grow(self, client: Client) -> None:
        client.conf.set_override("fetch_retries", 9, group="image_cache")
        with web.misbehaving_server(cut(0)) as server, pytest.raises(exceptions.FetchFailed):
            client.fetch(server.url)
        # 0.5 s, doubled eight times but at most 30 s, each shortened by up to a half.
        assert 60.75 <= sum(client.waits) <= 121.5
        assert max(client.waits) <= 0.25, "progress is reported, and can cancel, while waiting"


class TestLength:
    def test_more_than_announced_is_not_taken(self, client: Client) -> None:
        with web.misbehaving_server(respond("200 OK", BODY + b"more", content_length=str(len(BODY)))) as server:
            assert client.fetch(server.url).sha256 == SHA256

    @pytest.mark.parametrize("length", [None, "-1", "abc", "1_0", "+5", "9" * 30])
    def test_not_announced(self, client: Client, length: str | None) -> None:
        headers = {} if length is None else {"content_length": length}
        with (
            web.misbehaving_server(respond("200 OK", BODY, **headers)) as server,
            pytest.raises(exceptions.FetchFailed, match="does not announce the length"),
        ):
            client.fetch(server.url)

    def test_not_announced_with_a_checksum(self, client: Client) -> None:
        with web.misbehaving_server(respond("200 OK", BODY)) as server:
            assert client.fetch(server.url, f"sha256:{SHA256}").size == len(BODY)

    def test_not_announced_and_cut(self, client: Client) -> None:
        with (
            web.misbehaving_server(respond("200 OK", BODY[:-1])) as server,
            pytest.raises(exceptions.ChecksumMismatch),
        ):
            client.fetch(server.url, f"sha256:{SHA256}")

    def test_chunked(self, client: Client) -> None:
        with web.misbehaving_server(chunked(BODY[:10], BODY[10:])) as server:
            assert client.fetch(server.url, f"sha256:{SHA256}").sha256 == SHA256

    def test_chunked_and_cut(self, client: Client) -> None:
        with web.misbehaving_server(chunked(BODY, end=b""), chunked(BODY)) as server:
            assert client.fetch(server.url, f"sha256:{SHA256}").sha256 == SHA256
        assert len(server.requests) == 2

    def test_chunked_without_checksum(self, client: Client) -> None:
        with (
            web.misbehaving_server(chunked(BODY)) as server,
            pytest.raises(exceptions.FetchFailed, match="does not announce the length"),
        ):
            client.fetch(server.url)

    @pytest.mark.parametrize("checksum", [None, f"sha256:{hashlib.sha256().hexdigest()}"])
    def test_empty(self, client: Client, checksum: str | None) -> None:
        with (
            web.misbehaving_server(respond("200 OK", content_length="0")) as server,
            pytest.raises(exceptions.FetchFailed, match="empty"),
        ):
            client.fetch(server.url, checksum)

    def test_empty_and_chunked(self, client: Client) -> None:
        with web.misbehaving_server(chunked()) as server, pytest.raises(exceptions.FetchFailed, match="empty"):
            client.fetch(server.url, f"sha256:{hashlib.sha256().hexdigest()}")

    def test_larger_than_the_file_system(self, client: Client) -> None:
        with (
            web.misbehaving_server(respond("200 OK", BODY, content_length=str(10**17))) as server,
            pytest.raises(exceptions.InsufficientSpace) as caught,
        ):
            client.fetch(server.url)
        assert caught.value.required == 10**17
        assert caught.value.available is not None
        assert client.target.stat().st_size == 0
        assert len(server.requests) == 1

    def test_changing_between_requests(self, client: Client) -> None:
        other = respond("200 OK", b"other", content_length="5", etag='"v2"')
        with web.misbehaving_server(cut(100, etag='"v1"'), other) as server:
            fetched = client.fetch(server.url)
        assert (fetched.size, fetched.etag) == (5, '"v2"')


class TestStatus:
    @pytest.mark.parametrize(
        ("status", "shown"),
        [
            ("204 No Content", "204 No Content"),
            ("206 Partial Content", "206 Partial Content"),
            ("304 Not Modified", "304 Not Modified"),
            ("400 \x1b[31mred", "400 Bad Request"),
            ("403 Forbidden", "403 Forbidden"),
            ("408 Request Timeout", "408 Request Timeout"),
            ("410 Gone", "410 Gone"),
            ("416 Range Not Satisfiable", "416 "),
            ("499 Odd", "499$"),
        ],
    )
    def test_not_repeated(self, client: Client, status: str, shown: str) -> None:
        with (
            web.misbehaving_server(respond(status, content_length="0")) as server,
            pytest.raises(exceptions.FetchFailed, match=shown),
        ):
            client.fetch(server.url)
        assert len(server.requests) == 1

    @pytest.mark.parametrize("status", ["429 Too Many Requests", "500 Oops", "502 Bad Gateway", "504 Gateway Timeout"])
    def test_repeated(self, client: Client, status: str) -> None:
        with web.misbehaving_server(respond(status, content_length="0"), whole()) as server:
            assert client.fetch(server.url).sha256 == SHA256
        assert 0.25 <= sum(client.waits) <= 0.5

    def test_repeated_in_vain(self, client: Client) -> None:
        with (
            web.misbehaving_server(respond("503 Busy", content_length="0")) as server,
            pytest.raises(exceptions.FetchFailed, match=r"503 Service Unavailable \(4 attempts\)"),
        ):
            client.fetch(server.url)
        assert len(server.requests) == RETRIES + 1

    @pytest.mark.parametrize(
        ("asked", "least", "most"),
        [
            ("7", 7, 7),
            ("0", 0.25, 0.5),
            ("99999999999999999999", 60, 60),
            ("-7", 0.25, 0.5),
            ("soon", 0.25, 0.5),
            ("Wed, 21 Oct 2015 07:28:00 GMT", 0.25, 0.5),
            (email.utils.formatdate(4102444800, usegmt=True), 60, 60),
        ],
    )
    def test_retry_after(self, client: Client, asked: str, least: float, most: float) -> None:
        answer = respond("429 Too Many Requests", content_length="0", retry_after=asked)
        with web.misbehaving_server(answer, whole()) as server:
            client.fetch(server.url)
        assert least - 1e-6 <= sum(client.waits) <= most + 1e-6

    def test_error_while_going_on(self, client: Client) -> None:
        answers = [cut(5, etag='"v1"'), respond("503 Busy", content_length="0"), rest(5)]
        with web.misbehaving_server(*answers) as server:
            assert client.fetch(server.url).sha256 == SHA256
        assert [request.headers.get("range") for request in server.requests] == [None, "bytes=5-", "bytes=5-"]

    @pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
    def test_compressed(self, client: Client, encoding: str) -> None:
        with (
            web.misbehaving_server(whole(content_encoding=encoding)) as server,
            pytest.raises(exceptions.FetchFailed, match="compresses"),
        ):
            client.fetch(server.url)


class TestMetadata:
    @pytest.mark.parametrize("status", ["403 Forbidden", "405 Method Not Allowed", "501 Not Implemented"])
    def test_servers_without_head(self, client: Client, status: str) -> None:
        answers = [respond(status, content_length="0"), whole(etag='"v1"')]
        with web.misbehaving_server(*answers) as server:
            found = HttpSource(f"{server.url}/a", client.conf).metadata()
        assert (found.size, found.etag, found.last_modified) == (len(BODY), '"v1"', None)
        assert [request.line.split()[0] for request in server.requests] == ["HEAD", "GET"]

    def test_redirected(self, client: Client) -> None:
        with web.misbehaving_server(respond("302 Found", location="/b"), whole()) as server:
            found = HttpSource(f"{server.url}/a", client.conf).metadata()
        assert (found.source, found.size) == (f"{server.url}/a", len(BODY))
        assert [request.line.split()[:2] for request in server.requests] == [["HEAD", "/a"], ["HEAD", "/b"]]

    @pytest.mark.parametrize("status", ["304 Not Modified", "404 Not Found", "429 Too Many", "503 Busy"])
    def test_asked_once(self, client: Client, status: str) -> None:
        """Whoever asks may do without an answer, and does not want to wait for it."""
        with (
            web.misbehaving_server(respond(status, content_length="0")) as server,
            pytest.raises(exceptions.FetchFailed, match=status[:3]),
        ):
            HttpSource(server.url, client.conf, wait=client.waits.append).metadata()
        assert len(server.requests) == 1
        assert client.waits == []

    @pytest.mark.parametrize("etag", ["v1", '"v1', '"\x80"', f'"{"v" * 1000}"', '"a\r\nX: y"'])
    def test_nothing_unsound_is_sent(self, client: Client, etag: str) -> None:
        assert HttpSource("http://127.0.0.1:9/", client.conf).unchanged_since(etag=etag) is False

    def test_server_that_ignores_the_condition(self, client: Client) -> None:
        with web.misbehaving_server(whole(etag='"v1"')) as server:
            source = HttpSource(server.url, client.conf)
            assert source.unchanged_since(etag='"v1"') is True
            assert source.unchanged_since(etag='"v2"') is False
        assert [request.headers["if-none-match"] for request in server.requests] == ['"v1"', '"v2"']


class TestRedirects:
    def test_relative(self, client: Client) -> None:
        with web.misbehaving_server(respond("308 Moved", location="../b?c=d"), whole()) as server:
            client.fetch(f"{server.url}/a/x")
        assert server.requests[1].line == "GET /b?c=d HTTP/1.1"

    def test_loop(self, client: Client) -> None:
        with (
            web.misbehaving_server(respond("302 Found", location="/again")) as server,
            pytest.raises(exceptions.FetchFailed, match="more than 10 redirects"),
        ):
            client.fetch(server.url)
        assert len(server.requests) == 11

    @pytest.mark.parametrize(
        "location",
        ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher:x", "http://[", "//:99999999/", "javascript:1"],
    )
    def test_to_another_scheme_or_nowhere(self, client: Client, location: str) -> None:
        with (
            web.misbehaving_server(respond("302 Found", location=location)) as server,
            pytest.raises(exceptions.FetchFailed, match="not valid, or not of http"),
        ):
            client.fetch(server.url)
        assert len(server.requests) == 1

    def test_without_location(self, client: Client) -> None:
        with (
            web.misbehaving_server(respond("301 Moved")) as server,
            pytest.raises(exceptions.FetchFailed, match="to nowhere"),
        ):
            client.fetch(server.url)

    def test_credentials(self, client: Client) -> None:
        with web.misbehaving_server(whole()) as other:
            first = respond("302 Found", location=f"http://evil:pass@127.0.0.1:{other.port}/")
            with web.misbehaving_server(first) as server:
                client.fetch(server.url.replace("//", "//agent:secret@"))
        assert "authorization" in server.requests[0].headers
        assert "authorization" not in other.requests[0].headers

    def test_followed_anew_by_each_attempt(self, client: Client) -> None:
        answers = [respond("302 Found", location="/1"), cut(5, etag='"v1"'), respond("302 Found", location="/2")]
        with web.misbehaving_server(*answers, rest(5)) as server:
            assert client.fetch(f"{server.url}/0").sha256 == SHA256
        assert [request.line.split()[1] for request in server.requests] == ["/0", "/1", "/0", "/2"]


class TestStalls:
    @pytest.mark.parametrize("before", ["head", "body", "rest", "rest of a chunk"])
    def test_given_up(self, client: Client, before: str) -> None:
        client.conf.set_override("fetch_timeout", 0.3, group="image_cache")
        client.conf.set_override("fetch_retries", 1, group="image_cache")
        start = {"body": cut(0), "rest": cut(99), "rest of a chunk": chunked(BODY[:9], end=b"ff\r\nx")}.get(before)

        def stall(connection: socket.socket, request: web.Request) -> None:
            if start is not None:
                start(connection, request)
            server.wait_until_gone(connection, request)

        with web.misbehaving_server(stall) as server, pytest.raises(exceptions.FetchTimeout) as caught:
            client.fetch(server.url, f"sha256:{SHA256}")
        assert isinstance(caught.value, exceptions.FetchFailed)
        assert caught.value.source == server.url
        assert len(server.requests) == 2

    def test_until_the_connection_ends_is_no_end(self, client: Client) -> None:
        client.conf.set_override("fetch_timeout", 0.3, group="image_cache")
        client.conf.set_override("fetch_retries", 0, group="image_cache")

        def stall(connection: socket.socket, request: web.Request) -> None:
            respond("200 OK", BODY[:100_000])(connection, request)
            server.wait_until_gone(connection, request)

        with web.misbehaving_server(stall) as server, pytest.raises(exceptions.FetchTimeout):
            client.fetch(server.url, f"sha256:{SHA256}")

    @pytest.mark.parametrize("part", ["head", "body"])
    def test_a_byte_now_and_then_is_a_stall(self, client: Client, part: str) -> None:
        client.conf.set_override("fetch_timeout", 0.4, group="image_cache")
        client.conf.set_override("fetch_retries", 0, group="image_cache")
        stop = threading.Event()

        def trickle(connection: socket.socket, request: web.Request) -> None:
            if part == "body":
                cut(0)(connection, request)
            for _ in range(250):
                connection.sendall(b"x")
                stop.wait(0.02)

        with web.misbehaving_server(trickle) as server:
            with pytest.raises(exceptions.FetchTimeout):
                client.fetch(server.url)
            stop.set()

    @pytest.mark.parametrize(
        ("start", "again"),
        [
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", b"X: x\r\n"),
        ],
    )
    def test_endless(self, client: Client, start: bytes, again: bytes) -> None:
        """Interim responses and trailers that go on for ever are as good as no data."""
        client.conf.set_override("fetch_timeout", 0.3, group="image_cache")
        client.conf.set_override("fetch_retries", 0, group="image_cache")

        def endless(connection: socket.socket, request: web.Request) -> None:
            connection.sendall(start)
            while True:
                connection.sendall(again * 100)

        with web.misbehaving_server(endless) as server, pytest.raises(exceptions.FetchTimeout):
            client.fetch(server.url, f"sha256:{SHA256}")

    @pytest.mark.parametrize("answer", [None, cut(99)])
    def test_cancelled_at_once(self, client: Client, answer: web.Answer | None) -> None:
        """The connection is closed although its time limit is far away, and the server notices."""
        client.conf.set_override("fetch_timeout", 3600.0, group="image_cache")

        def stall(connection: socket.socket, request: web.Request) -> None:
            if answer is not None:
                answer(connection, request)
            waiting.set()
            server.wait_until_gone(connection, request)

        def cancel(done: int, total: int) -> None:
            if waiting.is_set():
                raise exceptions.Cancelled("enough")

        waiting = threading.Event()
        with web.misbehaving_server(stall) as server:
            with pytest.raises(exceptions.Cancelled, match="enough"):
                HttpSource(server.url, client.conf).fetch(str(client.target), cancel)
            assert server.gone.wait(10)
        assert len(server.requests) == 1

    def test_cancelled_between_attempts(self, client: Client) -> None:
        def wait(seconds: float) -> None:
            client.waits.append(seconds)

        def cancel(done: int, total: int) -> None:
            if client.waits:
                raise exceptions.Cancelled

        with (
            web.misbehaving_server(respond("503 Busy", content_length="0")) as server,
            pytest.raises(exceptions.Cancelled),
        ):
            HttpSource(server.url, client.conf, wait=wait).fetch(str(client.target), cancel)
        assert len(client.waits) == len(server.requests) == 1

    def test_progress_is_reported_while_nothing_comes(self, client: Client) -> None:
        client.conf.set_override("fetch_timeout", 1.2, group="image_cache")
        client.conf.set_override("fetch_retries", 0, group="image_cache")
        seen: list[tuple[int, int]] = []

        def stall(connection: socket.socket, request: web.Request) -> None:
            cut(0)(connection, request)
            server.wait_until_gone(connection, request)

        with web.misbehaving_server(stall) as server, pytest.raises(exceptions.FetchTimeout):
            HttpSource(server.url, client.conf).fetch(str(client.target), lambda *done: seen.append(done))
        assert len(seen) >= 3
        assert set(seen) == {(0, len(BODY))}

    def test_nobody_accepts(self, client: Client) -> None:
        """The queue of a listening socket is full, so that connecting stalls."""
        client.conf.set_override("fetch_timeout", 0.5, group="image_cache")
        client.conf.set_override("fetch_retries", 0, group="image_cache")
        with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for waiting in (first, second):
                waiting.setblocking(False)
                waiting.connect_ex(listener.getsockname())
            with pytest.raises(exceptions.FetchTimeout):
                client.fetch(f"http://127.0.0.1:{listener.getsockname()[1]}/")
            # Connecting cannot be interrupted, but it ends with its own time limit.
            for thread in threading.enumerate():
                if thread.name.startswith("imagebackend"):
                    thread.join(10)

    def test_cancelled_while_connecting(self, client: Client) -> None:
        """The connection that comes about after that is closed without a request."""

        def cancel(done: int, total: int) -> None:
            raise exceptions.Cancelled

        with socket.socket() as listener, socket.socket() as first:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            listener.settimeout(10)
            first.connect(listener.getsockname())
            with pytest.raises(exceptions.Cancelled):
                HttpSource(f"http://127.0.0.1:{listener.getsockname()[1]}/", client.conf).fetch(
                    str(client.target), cancel
                )
            listener.accept()[0].close()
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                assert connection.recv(4096) == b""
            for thread in threading.enumerate():
                if thread.name.startswith("imagebackend"):
                    thread.join(10)


class TestHostileHeads:
    @pytest.mark.parametrize(
        "answer",
        [
            b"\x1b[2Jnonsense\r\n\r\n",
            b"HTTP/1.1 abc OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
            b"",
        ],
    )
    def test_refused(self, client: Client, answer: bytes) -> None:
        def answer_raw(connection: socket.socket, request: web.Request) -> None:
            connection.sendall(answer)

        with web.misbehaving_server(answer_raw) as server, pytest.raises(exceptions.FetchFailed) as caught:
            client.fetch(server.url, f"sha256:{SHA256}")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400

    def test_header_fields_are_not_recorded_unless_they_are_sound(self, client: Client) -> None:
        with web.misbehaving_server(whole(etag='"\x1b"', last_modified="x" * 9000)) as server:
            fetched = client.fetch(server.url)
        assert (fetched.etag, fetched.last_modified) == (None, None)

    def test_folded_etag_is_not_sent_back(self, client: Client) -> None:
        with web.misbehaving_server(cut(5, etag='"a\r\n b"'), whole()) as server:
            client.fetch(server.url)
        assert "if-range" not in server.requests[1].headers


class TestProxy:
    def test_used(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        with web.misbehaving_server(whole()) as proxy:
            monkeypatch.setenv("http_proxy", f"http://agent:secret@127.0.0.1:{proxy.port}")
            fetched = client.fetch("http://images.invalid/a?b=c")
        assert (fetched.sha256, fetched.source) == (SHA256, "http://images.invalid/a")
        assert proxy.requests[0].line == "GET http://images.invalid/a?b=c HTTP/1.1"
        assert proxy.requests[0].headers["proxy-authorization"] == "Basic YWdlbnQ6c2VjcmV0"
        assert proxy.requests[0].headers["host"] == "images.invalid"

    def test_not_used(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        with web.refusing_port() as port, web.misbehaving_server(whole()) as server:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            assert client.fetch(server.url).sha256 == SHA256

    @pytest.mark.parametrize("address", ["socks5://127.0.0.1:1", "http://agent:secret@[", "http://"])
    def test_unusable(self, client: Client, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        monkeypatch.setenv("all_proxy", address)
        with pytest.raises(exceptions.FetchFailed, match="prox") as caught:
            client.fetch("http://127.0.0.1:9/")
        assert "secret" not in str(caught.value)
        assert client.waits == []

    def test_refuses_the_tunnel(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        with web.misbehaving_server(respond("403 Forbidden", content_length="0")) as proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
            with pytest.raises(exceptions.FetchFailed, match="403"):
                client.fetch("https://images.invalid/a")
        assert proxy.requests[0].line.startswith("CONNECT images.invalid:443 ")


def test_no_secret_is_shown(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [cut(5), respond("302 Found", location="/b?sig=topsecret"), respond("404 Not Found")]
    with web.misbehaving_server(*answers) as server, pytest.raises(exceptions.FetchFailed) as caught:
        client.fetch(server.url.replace("//", "//agent:topsecret@") + "/a?token=topsecret")
    assert "attempt 2 of 4" in caplog.text
    assert "topsecret" not in caplog.text + str(caught.value) + repr(caught.value) + caught.value.source
    assert caught.value.source == f"{server.url}/a"
