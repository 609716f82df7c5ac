# SPDX-License-Identifier: Apache-2.0
"""Fetching from a real nginx."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.sources import open_source
from imagebackend.templates.sources.http import HttpSource
from tests.functional import web

MIB = 1 << 20
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy but those of the tests, and no thread left behind."""
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("imagebackend")] == []


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    conf = load_config([])
    conf.set_override("fetch_timeout", 20.0, group="image_cache")
    conf.set_override("fetch_retries", 2, group="image_cache")
    return conf


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[web.Nginx]:
    with web.nginx(tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target"
    path.touch(mode=0o600)
    return path


class Waits(list[float]):
    """Instead of waiting between attempts: notes for how long, and may do something the first time."""

    def __init__(self, first: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._first = first

    def __call__(self, seconds: float) -> None:
        if not self:
            self._first()
        self.append(seconds)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def once_received(action: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress callback that does something when the first bytes are there."""
    pending = [action]

    def progress(done: int, total: int) -> None:
        if done and pending:
            pending.pop()()

    return progress


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_whole_image(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    expected = nginx.put("image", content(3 * MIB + 5))
    seen: list[tuple[int, int]] = []
    source = open_source(f"{nginx.url}/image?token=secret#part", conf, disk_format="qcow2")
    fetched = source.fetch(str(target), lambda *done: seen.append(done))
    assert fetched.sha256 == expected == sha256(target)
    assert fetched.source == f"{nginx.url}/image"
    assert (fetched.size, fetched.disk_format) == (3 * MIB + 5, "qcow2")
    assert fetched.etag is not None
    assert fetched.last_modified is not None
    assert (seen[0], seen[-1]) == ((0, 3 * MIB + 5), (3 * MIB + 5, 3 * MIB + 5))
    assert seen == sorted(seen)
    assert target.stat().st_mode & 0o777 == 0o600


def test_zeros_become_holes(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    expected = nginx.put("image", content(65536) + bytes(8 * MIB) + b"end" + bytes(3 * MIB))
    assert open_source(f"{nginx.url}/image", conf).fetch(str(target)).sha256 == expected == sha256(target)
    assert target.stat().st_size == 11 * MIB + 65536 + 3
    assert target.stat().st_blocks * 512 <= 4 * 65536


def test_memory_stays_flat(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    nginx.put("image", content(MIB) * 64)
    source = open_source(f"{nginx.url}/image", conf)
    tracemalloc.start()
    try:
        source.fetch(str(target))
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512", "sha1", "md5"])
def test_checksum(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, algorithm: str) -> None:
    data = content(2 * MIB)
    expected = nginx.put("image", data)
    checksum = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest().upper()}"
    assert open_source(f"{nginx.url}/image", conf, checksum=checksum).fetch(str(target)).sha256 == expected


def test_checksum_differs(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    data = content(1000)
    nginx.put("image", data)
    source = open_source(f"{nginx.url}/image", conf, checksum="sha512:" + "0" * 128)
    with pytest.raises(exceptions.ChecksumMismatch) as caught:
        source.fetch(str(target))
    assert (caught.value.algorithm, caught.value.expected) == ("sha512", "0" * 128)
    assert caught.value.actual == hashlib.sha512(data).hexdigest()
    assert len(nginx.requests()) == 1


def test_metadata(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    """It is what a fetch says too, without a transfer."""
    data = content(64 * MIB)
    nginx.put("image", data)
    checksum = f"sha512:{hashlib.sha512(data).hexdigest()}"
    source = open_source(f"{nginx.url}/stalled/image?token=secret", conf, checksum=checksum, disk_format="raw")
    found = source.metadata()
    assert (found.source, found.size, found.disk_format) == (f"{nginx.url}/stalled/image", 64 * MIB, "raw")
    assert (found.checksum, found.min_disk) == (checksum, 0)
    assert list(source.locations()) == []
    fetched = open_source(f"{nginx.url}/image", conf).fetch(str(target))
    assert (found.etag, found.last_modified) == (fetched.etag, fetched.last_modified)


@pytest.mark.parametrize("known", ["sha256", "etag", "weak etag", "date", "nothing"])
def test_unchanged(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, known: str) -> None:
    nginx.put("image", content(1000))
    fetched = open_source(f"{nginx.url}/image", conf).fetch(str(target))
    then = {
        "sha256": {"sha256": fetched.sha256},
        "etag": {"etag": fetched.etag, "last_modified": fetched.last_modified},
        "weak etag": {"etag": f"W/{fetched.etag}"},
        "date": {"last_modified": fetched.last_modified},
        "nothing": {},
    }[known]
    # What the publisher says that the image is today tells without a request.
    checksum = f"sha256:{fetched.sha256}" if known == "sha256" else None
    source = open_source(f"{nginx.url}/image", conf, checksum=checksum)
    assert source.unchanged_since(**then) is (known != "nothing")
    if known != "sha256":
        nginx.put("image", content(1001))
        os.utime(nginx.folder / "www" / "image", (1_900_000_000, 1_900_000_000))
        assert source.unchanged_since(**then) is False
    asked = {"sha256": [], "nothing": []}.get(known, ["304", "200"])
    assert [line[0] for line in nginx.requests()[1:]] == asked


def test_unchanged_cannot_be_known(nginx: web.Nginx, conf: cfg.ConfigOpts) -> None:
    source = open_source(f"{nginx.url}/absent", conf)
    with pytest.raises(exceptions.FetchFailed, match="404"):
        source.unchanged_since(etag='"v1"')
    nginx.kill()
    conf.set_override("fetch_timeout", 0.3, group="image_cache")
    with pytest.raises(exceptions.FetchTimeout):
        open_source(f"{nginx.url}/absent", conf).metadata()


def test_goes_on_where_the_connection_was_cut(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    expected = nginx.put("image", content(3 * MIB))
    waits = Waits(nginx.start)
    fetched = HttpSource(f"{nginx.url}/slow/image", conf, wait=waits).fetch(str(target), once_received(nginx.kill))
    assert fetched.sha256 == expected == sha256(target)
    assert waits
    (status, asked, condition, _, _) = nginx.requests()[-1]
    assert status == "206"
    assert MIB <= int(asked.removeprefix("bytes=").removesuffix("-")) < 3 * MIB
    assert condition.replace("\\x22", '"') == fetched.etag


def test_starts_over_when_the_content_changed(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    nginx.put("image", content(3 * MIB))
    changed: list[str] = []

    def change() -> None:
        nginx.kill()
        changed.append(nginx.put("image", content(2 * MIB + 1)))

    source = HttpSource(f"{nginx.url}/slow/image", conf, wait=Waits(nginx.start))
    fetched = source.fetch(str(target), once_received(change))
    assert [fetched.sha256] == changed == [sha256(target)]
    assert (fetched.size, target.stat().st_size) == (2 * MIB + 1, 2 * MIB + 1)
    assert [line[0] for line in nginx.requests()] == ["200"]


@pytest.mark.parametrize(("age", "status"), [(86400, "206"), (0, "200")])
def test_date_identifies_the_content_when_it_is_old(
    nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, age: int, status: str
) -> None:
    expected = nginx.put("image", content(2 * MIB))
    path = nginx.folder / "www" / "image"
    changed = path.stat().st_mtime - age
    os.utime(path, (changed, changed))
    source = HttpSource(f"{nginx.url}/dated/image", conf, wait=Waits(nginx.start))
    fetched = source.fetch(str(target), once_received(nginx.kill))
    assert fetched.sha256 == expected == sha256(target)
    assert fetched.etag is None
    assert nginx.requests()[-1][:3] == [
        status,
        nginx.requests()[-1][1] if age else "-",
        fetched.last_modified if age else "-",
    ]


def test_password(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    expected = nginx.put("image", content(100))
    address = nginx.url.replace("//", "//agent:se%20cret@") + "/private/image"
    fetched = open_source(address, conf).fetch(str(target))
    assert fetched.sha256 == expected
    assert "agent" not in repr(fetched) + caplog.text
    assert nginx.requests()[-1][3].startswith("Basic ")


@pytest.mark.parametrize(("userinfo", "status"), [("", "401"), ("agent:wrong@", "401"), ("agent@", "401")])
def test_wrong_password(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, userinfo: str, status: str) -> None:
    nginx.put("image", content(100))
    source = open_source(nginx.url.replace("//", f"//{userinfo}") + "/private/image", conf)
    with pytest.raises(exceptions.FetchFailed, match="401 Unauthorized") as caught:
        source.fetch(str(target))
    assert caught.value.source == f"{nginx.url}/private/image"
    assert [line[0] for line in nginx.requests()] == [status]


def test_redirect_within_the_server_keeps_the_password(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    expected = nginx.put("image", content(100))
    address = nginx.url.replace("//", "//agent:se%20cret@") + "/moved/private/image"
    assert open_source(address, conf).fetch(str(target)).sha256 == expected
    assert [line[0] for line in nginx.requests()] == ["302", "200"]


def test_redirect_to_another_server_does_not_tell_the_password(
    nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, tmp_path: Path
) -> None:
    expected = nginx.put("image", content(100))
    with web.nginx(tmp_path / "first", elsewhere=nginx.url) as first:
        address = first.url.replace("//", "//agent:se%20cret@") + "/elsewhere/image"
        fetched = open_source(address, conf).fetch(str(target))
        assert fetched.sha256 == expected
        assert fetched.source == f"{first.url}/elsewhere/image"
        assert [line[3][:5] for line in first.requests()] == ["Basic"]
    assert [line[3] for line in nginx.requests()] == ["-"]


def test_not_there(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    waits = Waits()
    with pytest.raises(exceptions.FetchFailed, match="404 Not Found"):
        HttpSource(f"{nginx.url}/absent", conf, wait=waits).fetch(str(target))
    assert waits == []
    assert len(nginx.requests()) == 1


def test_server_error_passes(
    nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = nginx.put("image", content(100))
    down = nginx.folder / "down"
    down.touch()
    waits = Waits(down.unlink)
    assert HttpSource(f"{nginx.url}/fragile/image", conf, wait=waits).fetch(str(target)).sha256 == expected
    assert 0.25 <= sum(waits) <= 0.5
    assert [line[0] for line in nginx.requests()] == ["503", "200"]
    assert "503 Service Unavailable after 0 bytes; attempt 2 of 3 follows" in caplog.text


def test_compressed_transfer(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    nginx.put("image", content(100))
    with pytest.raises(exceptions.FetchFailed, match="compresses"):
        open_source(f"{nginx.url}/compressed/image", conf).fetch(str(target))


def test_stalled_transfer_is_taken_up_again_and_then_given_up(
    nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path
) -> None:
    nginx.put("image", content(4 * MIB))
    conf.set_override("fetch_timeout", 0.5, group="image_cache")
    conf.set_override("fetch_retries", 1, group="image_cache")
    waits = Waits()
    with pytest.raises(exceptions.FetchTimeout) as caught:
        HttpSource(f"{nginx.url}/stalled/image", conf, wait=waits).fetch(str(target))
    assert (caught.value.seconds, caught.value.source) == (0.5, f"{nginx.url}/stalled/image")
    assert waits
    assert target.stat().st_size > MIB + MIB // 2, "the second attempt went on"
    assert [line[0] for line in nginx.requests()] == ["200", "206"]


def test_cancelled(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    nginx.put("image", content(4 * MIB))

    def cancel() -> None:
        raise exceptions.Cancelled("enough")

    with pytest.raises(exceptions.Cancelled, match="enough"):
        open_source(f"{nginx.url}/stalled/image", conf).fetch(str(target), once_received(cancel))
    assert [line[0] for line in nginx.requests()] == ["200"]


def test_nobody_listens(conf: cfg.ConfigOpts, target: Path) -> None:
    waits = Waits()
    with web.refusing_port() as port:
        source = HttpSource(f"http://user:password@127.0.0.1:{port}/image", conf, wait=waits)
        with pytest.raises(exceptions.FetchFailed, match=r"Connection refused \(3 attempts\)") as caught:
            source.fetch(str(target))
    assert caught.value.source == f"http://127.0.0.1:{port}/image"
    assert "password" not in str(caught.value)
    assert 0.75 <= sum(waits) <= 1.5


class TestHttps:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> tuple[Path, Path]:
        return web.make_certificate(tmp_path)

    def test_trusted(
        self,
        tmp_path: Path,
        conf: cfg.ConfigOpts,
        target: Path,
        certificate: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with web.nginx(tmp_path / "nginx", tls=certificate) as nginx:
            expected = nginx.put("image", content(3 * MIB))
            source = HttpSource(f"{nginx.url}/slow/image", conf, wait=Waits(nginx.start))
            assert source.fetch(str(target), once_received(nginx.kill)).sha256 == expected == sha256(target)
            assert nginx.requests()[-1][0] == "206"

    def test_cancelled(
        self,
        tmp_path: Path,
        conf: cfg.ConfigOpts,
        target: Path,
        certificate: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

        def cancel() -> None:
            raise exceptions.Cancelled

        with web.nginx(tmp_path / "nginx", tls=certificate) as nginx:
            nginx.put("image", content(4 * MIB))
            with pytest.raises(exceptions.Cancelled):
                open_source(f"{nginx.url}/stalled/image", conf).fetch(str(target), once_received(cancel))

    @pytest.mark.parametrize(("trusted", "reason"), [(False, "not trusted"), (True, "mismatch")])
    def test_not_trusted(
        self, tmp_path: Path, conf: cfg.ConfigOpts, target: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool,
        reason: str,
    ) -> None:  # fmt: skip
        certificate = web.make_certificate(tmp_path, "127.0.0.2" if trusted else "127.0.0.1")
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        waits = Waits()
        with web.nginx(tmp_path / "nginx", tls=certificate) as nginx:
            nginx.put("image", content(100))
            with pytest.raises(
                exceptions.FetchFailed, match=f"certificate is not trusted.*{reason if trusted else ''}"
            ):
                HttpSource(f"{nginx.url}/image", conf, wait=waits).fetch(str(target))
            assert nginx.requests() == []
        assert waits == []

    def test_redirect_to_http_is_refused(
        self,
        tmp_path: Path,
        nginx: web.Nginx,
        conf: cfg.ConfigOpts,
        target: Path,
        certificate: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with (
            web.nginx(tmp_path / "secure", tls=certificate, elsewhere=nginx.url) as secure,
            pytest.raises(exceptions.FetchFailed, match="from https to http://127"),
        ):
            open_source(f"{secure.url}/elsewhere/image", conf).fetch(str(target))
        assert nginx.requests() == []

    def test_through_a_proxy(
        self,
        tmp_path: Path,
        conf: cfg.ConfigOpts,
        target: Path,
        certificate: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with web.nginx(tmp_path / "nginx", tls=certificate) as nginx, web.misbehaving_server(web.tunnel) as proxy:
            monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//agent:secret@"))
            expected = nginx.put("image", content(MIB))
            assert open_source(f"{nginx.url}/image", conf).fetch(str(target)).sha256 == expected
            assert proxy.requests[0].line.startswith(f"CONNECT {nginx.url.removeprefix('https://')} ")
            assert proxy.requests[0].headers["proxy-authorization"] == "Basic YWdlbnQ6c2VjcmV0"


def test_type_of_the_fetch_function(nginx: web.Nginx, conf: cfg.ConfigOpts, target: Path) -> None:
    """``fetch`` can be handed over as an agent's ``fetch_func``, which gets its target by keyword."""
    expected = nginx.put("image", content(10))
    fetch_func: Callable[..., Any] = open_source(f"{nginx.url}/image", conf).fetch
    assert fetch_func(target=str(target)).sha256 == expected
