# SPDX-License-Identifier: Apache-2.0
"""Going on with a transfer that another process began, from what it left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.cache import Template, TemplateCache
from imagebackend.templates.sources import open_source, part
from tests.functional import web
from tests.functional.web import respond

MIB = 1 << 20
BODY = random.Random(0).randbytes(300 * 1024)
SHA256 = hashlib.sha256(BODY).hexdigest()
CHECKSUM = f"sha256:{SHA256}"
#: A process of its own that fetches into a cache, and records after every block how far it is.
FETCH = """\
import sys
from imagebackend.conf import load_config
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.sources import http_transfer, open_source
http_transfer._RECORDED_EVERY = 0.0
conf = load_config([])
conf.set_override("instances_path", sys.argv[1])
source = open_source(sys.argv[2], conf)
TemplateCache(conf).fetch("image", source.fetch, progress=lambda *done: print(*done, flush=True))
"""


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Cache:
    """A template cache that fetches in one attempt, so that what breaks off is left to the next call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "instances"
        self.conf = load_config([])
        self.conf.set_override("instances_path", str(self.folder))
        self.conf.set_override("fetch_timeout", 20.0, group="image_cache")
        self.conf.set_override("fetch_retries", 0, group="image_cache")
        self.cache = TemplateCache(self.conf)
        self.download = self.folder / "_base" / ".image.download"
        self.record = self.folder / "_base" / ".image.download.part"

    def fetch(self, url: str, checksum: str | None = None, **options: Any) -> Template:
        return self.cache.fetch("image", open_source(url, self.conf, checksum=checksum).fetch, **options)

    def fails(self, url: str, checksum: str | None = None) -> None:
        with pytest.raises(exceptions.FetchFailed):
            self.fetch(url, checksum)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if not path.is_dir())

    def holds(self, template: Template) -> None:
        """Make sure that the template is whole, and that nothing else is left."""
        assert template.sha256 == SHA256
        assert Path(template.path).read_bytes() == BODY
        assert self.files() == ["image", "image.json"]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def cut(length: int, **headers: str) -> web.Answer:
    return respond("200 OK", BODY[:length], content_length=str(len(BODY)), **headers)


def whole(**headers: str) -> web.Answer:
    return cut(len(BODY), **headers)


def rest(start: int, end: int = len(BODY), **headers: str) -> web.Answer:
    shown = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
    return respond(
        "206 Partial Content", BODY[start:end], content_length=str(len(BODY) - start), content_range=shown, **headers
    )


def asked(server: web.MisbehavingServer) -> list[str | None]:
    return [request.headers.get("range") for request in server.requests]


@pytest.mark.parametrize("checksum", [None, CHECKSUM])
def test_goes_on(cache: Cache, checksum: str | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    answers = [cut(100_000, etag='"v1"'), rest(100_000, 200_000), rest(200_000, etag='"v1"')]
    seen: list[tuple[int, int]] = []
    with web.misbehaving_server(*answers) as server:
        cache.fails(server.url, checksum)
        assert cache.files() == [".image.download", ".image.download.part"]
        assert cache.download.stat().st_mode & 0o777 == cache.record.stat().st_mode & 0o777 == 0o600
        cache.fails(server.url, checksum)
        cache.holds(cache.fetch(server.url, checksum, progress=lambda *done: seen.append(done)))
    assert asked(server) == [None, "bytes=100000-", "bytes=200000-"]
    assert {request.headers.get("if-range") for request in server.requests[1:]} == {'"v1"'}
    assert f"going on after 200000 bytes of {len(BODY)}" in caplog.text
    assert (200_000, len(BODY)) in seen


def test_a_date_identifies_the_content_as_well(cache: Cache) -> None:
    dates = {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT", "date": "Mon, 01 Jan 2024 00:01:00 GMT"}
    with web.misbehaving_server(cut(10, **dates), rest(10)) as server:
        cache.fails(server.url)
        cache.holds(cache.fetch(server.url))
    assert server.requests[1].headers["if-range"] == dates["last_modified"]


@pytest.mark.parametrize("headers", [{}, {"etag": 'W/"v1"'}, {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_nothing_is_left_where_nothing_identifies_the_content(cache: Cache, headers: dict[str, str]) -> None:
    with web.misbehaving_server(cut(100_000, **headers)) as server:
        cache.fails(server.url)
    assert cache.files() == []


def test_the_content_changed_meanwhile(cache: Cache) -> None:
    """The server sends the whole of it then, which may be shorter."""
    other = BODY[:50_000]
    answer = respond("200 OK", other, content_length="50000", etag='"v2"')
    with web.misbehaving_server(cut(100_000, etag='"v1"'), answer) as server:
        cache.fails(server.url)
        template = cache.fetch(server.url)
    assert Path(template.path).read_bytes() == other
    assert cache.files() == ["image", "image.json"]
    assert asked(server) == [None, "bytes=100000-"]


def test_what_changed_under_the_same_etag_is_refused(cache: Cache) -> None:
    with web.misbehaving_server(cut(100_000, etag='"v1"'), rest(100_000, etag='"v1"')) as server:
        cache.fails(server.url, "sha256:" + "0" * 64)
        with pytest.raises(exceptions.ChecksumMismatch):
            cache.fetch(server.url, "sha256:" + "0" * 64)
    assert asked(server) == [None, "bytes=100000-"]
    assert cache.files() == []


def flipped(cache: Cache) -> None:
    with cache.download.open("r+b") as file:
        file.seek(77_000)
        file.write(bytes([BODY[77_000] ^ 1]))


def shortened(cache: Cache) -> None:
    os.truncate(cache.download, 99_999)


def recorded(**changes: Any) -> Callable[[Cache], None]:
    def change(cache: Cache) -> None:
        cache.record.write_text(json.dumps({**json.loads(cache.record.read_text()), **changes}))

    return change


def replaced_by_a_link(cache: Cache) -> None:
    outside = cache.folder.parent / "outside"
    cache.download.rename(outside)
    cache.download.symlink_to(outside)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        shortened,
        replaced_by_a_link,
        recorded(written=int(time.time()) - part.LONGEST_KEPT - 60),
        recorded(size=99_999),
        recorded(sha256="0" * 64),
        lambda cache: cache.download.unlink(),
        lambda cache: cache.record.unlink(),
        lambda cache: cache.record.write_bytes(b"{"),
    ],
)
def test_what_is_not_as_it_was_left_is_thrown_away(cache: Cache, damage: Callable[[Cache], None]) -> None:
    with web.misbehaving_server(cut(100_000, etag='"v1"'), whole(etag='"v1"')) as server:
        cache.fails(server.url)
        damage(cache)
        cache.holds(cache.fetch(server.url))
    assert asked(server) == [None, None]
    outside = cache.folder.parent / "outside"
    assert not outside.exists() or outside.read_bytes() == BODY[:100_000]


def test_what_came_after_the_last_record_is_asked_for_again(cache: Cache) -> None:
    with web.misbehaving_server(cut(100_000, etag='"v1"'), rest(100_000, etag='"v1"')) as server:
        cache.fails(server.url)
        with cache.download.open("ab") as file:
            file.write(b"written, and then killed before it was recorded")
        cache.holds(cache.fetch(server.url))
    assert asked(server) == [None, "bytes=100000-"]


@pytest.mark.parametrize(
    ("first", "second", "goes_on"),
    [
        (("/a", None), ("/b", None), False),
        (("/a", None), ("/a", CHECKSUM), False),
        (("/a", CHECKSUM), ("/a", None), False),
        (("/a", "sha512:" + "0" * 128), ("/a", CHECKSUM), False),
        (("/a", None), ("/a?b=c", None), False),
        (("/a?b=c", CHECKSUM), ("/a?b=d", CHECKSUM), True),
    ],
)
def test_only_for_the_same_image(
    cache: Cache, first: tuple[str, str | None], second: tuple[str, str | None], goes_on: bool
) -> None:
    answers = [cut(100_000, etag='"v1"'), rest(100_000, etag='"v1"') if goes_on else whole(etag='"v1"')]
    with web.misbehaving_server(*answers) as server:
        cache.fails(server.url + first[0], first[1])
        cache.holds(cache.fetch(server.url + second[0], second[1]))
    assert asked(server) == [None, "bytes=100000-" if goes_on else None]


def test_nothing_is_left_where_a_query_may_stand_for_another_image(cache: Cache) -> None:
    with web.misbehaving_server(cut(100_000, etag='"v1"')) as server:
        cache.fails(f"{server.url}/a?image=1")
    assert cache.files() == []


def test_no_secret_is_recorded(cache: Cache) -> None:
    with web.misbehaving_server(cut(100_000, etag='"v1"')) as server:
        cache.fails(server.url.replace("//", "//agent:topsecret@") + "/a?token=topsecret", CHECKSUM)
    assert "topsecret" not in cache.record.read_text()
    assert json.loads(cache.record.read_text())["source"] == f"{server.url}/a"


def test_attempts_in_vain_do_not_make_it_last(cache: Cache) -> None:
    """Its age counts from when the last of it came."""
    with web.misbehaving_server(cut(100_000, etag='"v1"'), respond("503 Busy", content_length="0")) as server:
        cache.fails(server.url)
        recorded(written=int(time.time()) - 3600)(cache)
        before = cache.record.read_text()
        cache.fails(server.url)
        cache.fails(server.url)
    assert cache.record.read_text() == before
    assert cache.download.read_bytes() == BODY[:100_000]


def test_a_cancelled_fetch_leaves_nothing(cache: Cache) -> None:
    def cancel(done: int, total: int) -> None:
        if done:
            raise exceptions.Cancelled

    with web.misbehaving_server(cut(100_000, etag='"v1"'), rest(100_000, etag='"v1"')) as server:
        cache.fails(server.url)
        with pytest.raises(exceptions.Cancelled):
            cache.fetch(server.url, progress=cancel)
    assert cache.files() == []


def test_a_full_disk_gets_its_room_back(small_tmpfs: Path) -> None:
    cache = Cache(small_tmpfs)
    data = random.Random(1).randbytes(6 * MIB)
    answer = respond("200 OK", data[: 4 * MIB], content_length=str(len(data)), etag='"v1"')
    more = respond(
        "206 Partial Content", data[4 * MIB :], content_length=str(2 * MIB), etag='"v1"',
        content_range=f"bytes {4 * MIB}-{len(data) - 1}/{len(data)}",
    )  # fmt: skip
    with web.misbehaving_server(answer, more) as server:
        cache.fails(server.url)
        filler = small_tmpfs / "filler"
        filler.write_bytes(bytes(3 * MIB))
        with pytest.raises(exceptions.InsufficientSpace):
            cache.fetch(server.url)
    assert cache.files() == []
    assert asked(server) == [None, f"bytes={4 * MIB}-"]


def test_another_function_gets_an_empty_file(cache: Cache) -> None:
    def generate(target: str) -> None:
        assert Path(target).read_bytes() == b""
        Path(target).write_bytes(BODY)

    with web.misbehaving_server(cut(100_000, etag='"v1"')) as server:
        cache.fails(server.url)
    cache.holds(cache.cache.fetch("image", generate))


def test_removing_the_template_removes_the_part(cache: Cache) -> None:
    with web.misbehaving_server(cut(100_000, etag='"v1"')) as server:
        cache.fails(server.url)
    cache.cache.remove("image")
    assert cache.files() == []
    with pytest.raises(exceptions.TemplateNotFound):
        cache.cache.remove("image")


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[web.Nginx]:
    with web.nginx(tmp_path / "nginx") as server:
        yield server


def test_a_killed_process_is_followed_by_one_that_goes_on(nginx: web.Nginx, cache: Cache) -> None:
    data = random.Random(2).randbytes(4 * MIB)
    expected = nginx.put("image", data)
    command = [sys.executable, "-c", FETCH, str(cache.folder), f"{nginx.url}/slow/image"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if cache.record.exists() and int(line.split()[0]) > MIB:
                break
        process.send_signal(signal.SIGKILL)
    assert cache.files() == [".image.download", ".image.download.part", "template-image"]
    left = json.loads(cache.record.read_text())["size"]
    template = cache.fetch(f"{nginx.url}/slow/image")
    assert template.sha256 == expected == hashlib.sha256(Path(template.path).read_bytes()).hexdigest()
    assert cache.files() == ["image", "image.json"]
    status, range_asked_for, condition, _, _ = nginx.requests()[-1]
    assert (status, range_asked_for) == ("206", f"bytes={left}-")
    assert left >= MIB // 2
    assert condition != "-"
