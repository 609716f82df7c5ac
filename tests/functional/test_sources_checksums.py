# SPDX-License-Identifier: Apache-2.0
"""Checksums from the files that publishers keep beside their images, signed and not."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.templates.sources import Fetched, open_source
from imagebackend.templates.sources.http import HttpSource
from tests.functional import web
from tests.functional.web import respond

CONTENT = b"image" * 1000
SHA256, SHA512 = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha512(CONTENT).hexdigest()
SUMS = f"{'0' * 64}  other.qcow2\n{SHA256} *my image.qcow2\n"
WRONG = f"{'1' * 64} *my image.qcow2\n"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Nginx]:
    with web.nginx(tmp_path_factory.mktemp("publisher")) as server:
        server.put("my image.qcow2", CONTENT)
        server.put("SHA256SUMS", SUMS.encode())
        server.put("CHECKSUM", f"SHA512 (my image.qcow2) = {SHA512}\n".encode())
        server.put("wrong", WRONG.encode())
        server.put("without", f"{SHA256}  another.qcow2\n".encode())
        server.put("large", b"#\n" * (3 << 20))
        yield server


def fetch(publisher: web.Nginx, conf: cfg.ConfigOpts, folder: Path, checksum: str) -> Fetched:
    target = folder / "target"
    target.write_bytes(b"")
    return open_source(f"{publisher.url}/my%20image.qcow2?token=x", conf, checksum=checksum).fetch(str(target))


@pytest.mark.parametrize(("name", "checksum"), [("SHA256SUMS", f"sha256:{SHA256}"), ("CHECKSUM", f"sha512:{SHA512}")])
def test_found(publisher: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, name: str, checksum: str) -> None:
    assert fetch(publisher, conf, tmp_path, f"{publisher.url}/{name}").sha256 == SHA256
    source = open_source(f"{publisher.url}/my%20image.qcow2", conf, checksum=f"{publisher.url}/{name}")
    assert source.metadata().checksum == checksum
    assert source.unchanged_since(sha256=SHA256) is (name == "SHA256SUMS"), "that of the image says nothing of sha256"


@pytest.mark.parametrize("form", ["path", "url", "link"])
def test_in_a_file_of_this_host(conf: cfg.ConfigOpts, tmp_path: Path, form: str) -> None:
    (tmp_path / "my image.qcow2").write_bytes(CONTENT)
    (tmp_path / "SHA256SUMS").write_text(SUMS)
    (tmp_path / "link").symlink_to("SHA256SUMS")
    (tmp_path / "target").write_bytes(b"")
    checksum = {
        "path": str(tmp_path / "SHA256SUMS"), "url": (tmp_path / "SHA256SUMS").as_uri(), "link": f"{tmp_path}/link"
    }[form]  # fmt: skip
    source = open_source(str(tmp_path / "my image.qcow2"), conf, checksum=checksum)
    assert source.fetch(str(tmp_path / "target")).sha256 == SHA256
    assert source.metadata().checksum == f"sha256:{SHA256}"
    assert source.unchanged_since(sha256=SHA256)
    (tmp_path / "SHA256SUMS").write_text(WRONG)
    assert not source.unchanged_since(sha256=SHA256), "it is read anew"
    os.truncate(tmp_path / "target", 0)
    with pytest.raises(exceptions.ChecksumMismatch):
        source.fetch(str(tmp_path / "target"))


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("wrong", exceptions.ChecksumMismatch, "expected 1111"),
        ("without", exceptions.FetchFailed, "no checksum of 'my image.qcow2'"),
        ("absent", exceptions.FetchFailed, "404 Not Found"),
        ("large", exceptions.FetchFailed, "more than 4194304 bytes"),
        ("private/SHA256SUMS", exceptions.FetchDenied, "401 Unauthorized"),
    ],
)
def test_refused(
    publisher: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, name: str, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason) as caught:
        fetch(publisher, conf, tmp_path, f"{publisher.url}/{name}?token=topsecret")
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize("path", ["/absent/SHA256SUMS", "file:///", "/dev/zero"])
def test_no_file_of_this_host(conf: cfg.ConfigOpts, tmp_path: Path, path: str) -> None:
    (tmp_path / "image").write_bytes(CONTENT)
    with pytest.raises(exceptions.FetchFailed):
        open_source(str(tmp_path / "image"), conf, checksum=path).metadata()


@pytest.mark.parametrize("checksum", ["http://", "https://user:secret@[/", "file://host/path", "SHA256SUMS"])
def test_unusable(conf: cfg.ConfigOpts, checksum: str) -> None:
    with pytest.raises(exceptions.InvalidArgument) as caught:
        open_source("/image", conf, checksum=checksum)
    assert "secret" not in str(caught.value)


def test_broken_off_and_asked_again(conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    conf.set_override("fetch_retries", 2, group="image_cache")
    whole = respond("200 OK", SUMS.encode(), content_length=str(len(SUMS)))
    cut = respond("200 OK", SUMS[:-5].encode(), content_length=str(len(SUMS)))
    image = respond("200 OK", CONTENT, content_length=str(len(CONTENT)))
    waits: list[float] = []
    with web.misbehaving_server(respond("503 Busy", content_length="0"), cut, whole, image) as server:
        address = f"{server.url}/my%20image.qcow2"
        (tmp_path / "target").touch()
        source = HttpSource(address, conf, checksum=f"{server.url}/SUMS", wait=waits.append)
        assert source.fetch(str(tmp_path / "target")).sha256 == SHA256
    assert len(server.requests) == 4
    assert waits


def test_can_be_cancelled_while_it_stalls(conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    def cancel(done: int, total: int) -> None:
        raise exceptions.Cancelled

    def stall(connection: socket.socket, request: web.Request) -> None:
        server.wait_until_gone(connection, request)

    with web.misbehaving_server(stall) as server:
        source = open_source("/image", conf, checksum=f"{server.url}/SHA256SUMS")
        with pytest.raises(exceptions.Cancelled):
            source.fetch(str(tmp_path / "target"), cancel)
        assert server.gone.wait(10)


class Signer:
    """Somebody with an OpenPGP key."""

    def __init__(self, folder: Path, name: str) -> None:
        self.home = folder / name
        self.home.mkdir(mode=0o700)
        self.name = name
        self.gpg("--passphrase", "", "--quick-generate-key", f"{name}@example.org", "ed25519", "sign", "never")
        self.keyring = folder / f"{name}.gpg"
        self.keyring.write_bytes(self.gpg("--export"))

    def gpg(self, *arguments: str, text: bytes = b"") -> bytes:
        command = ["gpg", "--homedir", str(self.home), "--batch", "--quiet", *arguments]
        return subprocess.run(command, input=text, check=True, capture_output=True, timeout=60).stdout

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "gpg-agent"], check=True, timeout=60)


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Signer, Signer]]:
    folder = tmp_path_factory.mktemp("gpg")
    made = Signer(folder, "trusted"), Signer(folder, "other")
    yield made
    for signer in made:
        signer.close()


class TestSigned:
    @pytest.mark.parametrize("how", ["in itself", ".gpg", ".sign", ".asc", ".sig"])
    @pytest.mark.parametrize("by", ["trusted", "other", "nobody", "trusted, but changed since"])
    def test_by_whom(
        self, publisher: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, signers: tuple[Signer, Signer], how: str,
        by: str,
    ) -> None:  # fmt: skip
        conf.set_override("checksum_keyring", str(signers[0].keyring), group="image_cache")
        signer = signers[by == "other"]
        text = SUMS.encode()
        if how == "in itself":
            text = signer.gpg("--clearsign", text=text) if by != "nobody" else text
        elif by != "nobody":
            armor = ["--armor"] if how in (".sign", ".asc") else []
            publisher.put(f"{by}{how}{how}", signer.gpg("--detach-sign", *armor, text=text))
        publisher.put(f"{by}{how}", text.replace(b"0", b"1") if "changed" in by else text)
        address = f"{publisher.url}/{by}{how}".replace(" ", "%20")
        if by == "trusted":
            assert fetch(publisher, conf, tmp_path, address).sha256 == SHA256
            return
        with pytest.raises(exceptions.SignatureInvalid) as caught:
            fetch(publisher, conf, tmp_path, address)
        assert caught.value.source == address
        assert ("it is not signed" if by == "nobody" else "no key of") in str(caught.value)

    def test_only_what_is_signed_counts(
        self, publisher: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, signers: tuple[Signer, Signer]
    ) -> None:
        conf.set_override("checksum_keyring", str(signers[0].keyring), group="image_cache")
        signed = signers[0].gpg("--clearsign", text=b"nothing of interest\n")
        publisher.put("followed", signed + SUMS.encode())
        with pytest.raises(exceptions.FetchFailed):
            fetch(publisher, conf, tmp_path, f"{publisher.url}/followed")

    def test_without_a_keyring_nothing_has_to_be(
        self, publisher: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, signers: tuple[Signer, Signer]
    ) -> None:
        publisher.put("clear", signers[1].gpg("--clearsign", text=SUMS.encode()))
        assert fetch(publisher, conf, tmp_path, f"{publisher.url}/clear").sha256 == SHA256

    def test_the_keyring_is_not_there(self, publisher: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        conf.set_override("checksum_keyring", str(tmp_path / "absent.gpg"), group="image_cache")
        publisher.put("unverifiable.gpg", b"signature")
        publisher.put("unverifiable", SUMS.encode())
        with pytest.raises(exceptions.SignatureInvalid, match=r"absent\.gpg"):
            fetch(publisher, conf, tmp_path, f"{publisher.url}/unverifiable")
