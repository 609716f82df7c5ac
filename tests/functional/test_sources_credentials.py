# SPDX-License-Identifier: Apache-2.0
"""Names, passwords and certificates of web servers, and that nobody sees them who should not."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.sources import open_source
from tests.functional import web
from tests.functional.cli_command import Command

CONTENT = b"image" * 1000


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "netrc", "ssl_cert_file"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[web.Nginx]:
    with web.nginx(tmp_path / "nginx") as server:
        server.put("image", CONTENT)
        yield server


def netrc(folder: Path, content: str, mode: int = 0o600) -> Path:
    path = folder / "credentials"
    path.write_text(content)
    path.chmod(mode)
    return path


def fetch(url: str, conf: cfg.ConfigOpts, folder: Path) -> None:
    target = folder / "target"
    target.write_bytes(b"")
    open_source(url, conf).fetch(str(target))
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("lines", "accepted"),
    [
        ("machine 127.0.0.1 login agent password 'se cret'", True),
        ('# comment\nmachine other login x password y\nmachine 127.0.0.1\n login agent\n password "se cret"\n', True),
        ("machine 127.0.0.1:PORT login agent password 'se cret'\nmachine 127.0.0.1 login x password y", True),
        ("machine 127.0.0.1:1 login agent password 'se cret'", False),
        ("machine 127.0.0.1 login agent password wrong", False),
        ("machine localhost login agent password 'se cret'", False),
        ("default login agent password 'se cret'", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("named_by", ["option", "environment"])
def test_file(
    nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str,
    accepted: bool, named_by: str,
) -> None:  # fmt: skip
    path = netrc(tmp_path, lines.replace("PORT", nginx.url.rpartition(":")[2]).replace("'", '"'))
    if named_by == "option":
        conf.set_override("fetch_credentials_file", str(path), group="image_cache")
    else:
        monkeypatch.setenv("NETRC", str(path))
    if accepted:
        fetch(f"{nginx.url}/private/image", conf, tmp_path)
    else:
        with pytest.raises(exceptions.FetchDenied, match="401 Unauthorized"):
            fetch(f"{nginx.url}/private/image", conf, tmp_path)


def test_those_of_the_url_come_first(nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    path = netrc(tmp_path, "machine 127.0.0.1 login agent password wrong")
    conf.set_override("fetch_credentials_file", str(path), group="image_cache")
    fetch(nginx.url.replace("//", "//agent:se%20cret@") + "/private/image", conf, tmp_path)


def test_not_for_another_server(nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    """Not even those that the file has for it: nobody said that they are for this image."""
    path = netrc(tmp_path, 'machine 127.0.0.1 login agent password "se cret"')
    conf.set_override("fetch_credentials_file", str(path), group="image_cache")
    with web.nginx(tmp_path / "first", elsewhere=nginx.url) as first:
        fetch(f"{first.url}/elsewhere/image", conf, tmp_path)
        assert [line[3][:5] for line in first.requests()] == ["Basic"]
    assert [line[3] for line in nginx.requests()] == ["-"]


def test_nobody_sees_them(
    nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = netrc(tmp_path, 'machine 127.0.0.1 login agent password "se cret"')
    conf.set_override("fetch_credentials_file", str(path), group="image_cache")
    cache = TemplateCache(conf)
    template = cache.fetch("image", open_source(f"{nginx.url}/private/image", conf).fetch)
    told = repr(template) + caplog.text + (Path(cache.folder) / ".records" / "image.json").read_text()
    assert "se cret" not in told
    assert "agent" not in told
    assert "YWdlbnQ6c2UgY3JldA==" not in told


@pytest.mark.parametrize("password", ["se cret", "wrongse cret"])
def test_nobody_sees_what_the_executable_uses(nginx: web.Nginx, tmp_path: Path, password: str) -> None:
    """Neither in what it says and writes, nor on the command line of anything that it starts."""
    path = netrc(tmp_path, f'machine 127.0.0.1 login agent password "{password}"')
    command = Command(tmp_path)
    command.configure("[image_cache]", f"fetch_credentials_file = {path}")
    words = command.arguments("-vv", "template", "pull", "--name", "image", f"{nginx.url}/private/image")
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-s", "65536", "-e", "trace=execve", "-o", trace]
    done = subprocess.run([*strace, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (0 if password == "se cret" else 1), done
    assert ("401 Unauthorized" in done.stderr) == (done.returncode == 1)
    written = [each.read_text("latin-1") for each in command.instances.rglob("*") if each.is_file()]
    told = "".join([done.stdout, done.stderr, trace.read_text(), *written])
    for secret in (password, base64.b64encode(f"agent:{password}".encode()).decode()):
        assert secret not in told


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        ("machine x login y password topsecret", 0o640, "others may read or write it; chmod 600"),
        ("machine x login y password topsecret", 0o604, "others may"),
        ("machine x login y passwort topsecret", 0o600, "line 1: not as in ~/.netrc"),
        ("machine x topsecret", 0o600, "line 1: not as in"),
        ("machine x login y password \x80\xff", 0o600, None),
    ],
)
def test_file_that_cannot_be_used(
    conf: cfg.ConfigOpts, tmp_path: Path, content: str, mode: int, reason: str | None
) -> None:
    path = netrc(tmp_path, content, mode)
    conf.set_override("fetch_credentials_file", str(path), group="image_cache")
    with web.refusing_port() as port:
        error = exceptions.InvalidConfiguration if reason else exceptions.FetchFailed
        with pytest.raises(error, match=reason or "refused") as caught:
            fetch(f"http://127.0.0.1:{port}/image", conf, tmp_path)
    assert "topsecret" not in str(caught.value)
    assert caught.value.__cause__ is None or "topsecret" not in str(caught.value.__cause__)


@pytest.mark.parametrize("what", ["absent", "folder", "of another user", "no text"])
def test_no_file_to_be_used(conf: cfg.ConfigOpts, tmp_path: Path, what: str) -> None:
    path = tmp_path / "credentials"
    if what == "folder":
        path.mkdir()
    elif what != "absent":
        path.write_bytes(b"machine x login y password \xff\xfe")
        path.chmod(0o600)
    if what == "of another user":
        os.chown(path, 65534, 65534)
    conf.set_override("fetch_credentials_file", str(path), group="image_cache")
    with pytest.raises(exceptions.InvalidConfiguration, match="fetch_credentials_file"):
        open_source("http://127.0.0.1:9/", conf).metadata()


class TestCertificates:
    def test_of_a_file(self, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        certificate = web.make_certificate(tmp_path)
        with web.nginx(tmp_path / "secure", tls=certificate) as server:
            server.put("image", CONTENT)
            with pytest.raises(exceptions.FetchFailed, match="certificate is not trusted"):
                fetch(f"{server.url}/image", conf, tmp_path)
            conf.set_override("fetch_cafile", str(certificate[0]), group="image_cache")
            fetch(f"{server.url}/image", conf, tmp_path)

    @pytest.mark.parametrize("content", [None, b"", b"-----BEGIN CERTIFICATE-----\nnonsense"])
    def test_file_that_cannot_be_used(self, conf: cfg.ConfigOpts, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "ca.pem"
        if content is not None:
            path.write_bytes(content)
        conf.set_override("fetch_cafile", str(path), group="image_cache")
        with pytest.raises(exceptions.InvalidConfiguration, match="fetch_cafile"):
            open_source("https://127.0.0.1:9/", conf).metadata()
