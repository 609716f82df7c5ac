# SPDX-License-Identifier: Apache-2.0
"""Images that are published compressed, by the tools that publishers use."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.sources import Fetched, open_source, sink
from imagebackend.templates.sources.http import HttpSource
from tests.functional import web
from tests.functional.filesystems import allocated
from tests.functional.image_building import make_disk
from tests.functional.web import respond

MIB = 1 << 20
TOOLS = {
    "gzip": ["gzip", "-n"],
    "bzip2": ["bzip2"],
    "xz": ["xz", "-T2", "--block-size=1MiB"],
    "xz -9e": ["xz", "-9e"],
    "zstd": ["zstd", "-q", "--check"],
    "zstd --ultra -22": ["zstd", "-q", "--ultra", "-22", "--long=27"],
    "pzstd": ["pzstd", "-q", "-p2"],
}
IMAGE = random.Random(0).randbytes(MIB) + bytes(8 * MIB) + random.Random(1).randbytes(MIB // 4) + bytes(2 * MIB)


def compress(how: str, content: bytes) -> bytes:
    command = [*TOOLS[how], "-c"]
    return subprocess.run(command, input=content, check=True, capture_output=True, timeout=120).stdout


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[web.Nginx]:
    with web.nginx(tmp_path / "nginx") as server:
        yield server


def fetch(url: str, conf: cfg.ConfigOpts, folder: Path, checksum: str | None = None) -> tuple[Fetched, bytes]:
    target = folder / "target"
    target.write_bytes(b"")
    fetched = open_source(url, conf, checksum=checksum).fetch(str(target))
    return fetched, target.read_bytes()


@pytest.mark.parametrize("how", TOOLS)
def test_decompressed(nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, how: str) -> None:
    """The name may say anything; the digest of what is published counts, and that of what comes out is told too."""
    compressed = compress(how, IMAGE)
    checksum = f"sha512:{hashlib.sha512(compressed).hexdigest()}"
    nginx.put("image.raw", compressed)
    for url in (f"{nginx.url}/image.raw", str(nginx.folder / "www" / "image.raw")):
        fetched, content = fetch(url, conf, tmp_path, checksum)
        assert content == IMAGE
        assert (fetched.sha256, fetched.size) == (sha256(compressed), len(compressed))
        kind = {"pzstd": "zstd"}.get(how, how.split()[0])
        assert (fetched.compression, fetched.content_sha256) == (kind, sha256(IMAGE))
        assert allocated(tmp_path / "target") <= 2 * MIB, "zeros become holes"
        with pytest.raises(exceptions.ChecksumMismatch):
            fetch(url, conf, tmp_path, f"sha256:{sha256(IMAGE)}")


def test_not_compressed(nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    for content in (b"\x1f", b"\x1f\x8b", b"BZh9", b"short", IMAGE):
        nginx.put("image.gz", content)
        for url in (f"{nginx.url}/image.gz", str(nginx.folder / "www" / "image.gz")):
            fetched, found = fetch(url, conf, tmp_path)
            assert (found, fetched.compression, fetched.content_sha256) == (content, None, None)


@pytest.mark.parametrize("how", ["gzip", "bzip2", "xz", "zstd"])
@pytest.mark.parametrize("damage", ["truncated", "followed by something else", "damaged", "empty"])
def test_damaged(nginx: web.Nginx, conf: cfg.ConfigOpts, tmp_path: Path, how: str, damage: str) -> None:
    compressed = compress(how, b"" if damage == "empty" else IMAGE)
    middle = len(compressed) // 2
    nginx.put("image", {
        "truncated": compressed[:-1],
        "followed by something else": compressed + b"something else",
        "damaged": compressed[:middle] + bytes(64) + compressed[middle + 64 :],
        "empty": compressed,
    }[damage])  # fmt: skip
    for url in (f"{nginx.url}/image", str(nginx.folder / "www" / "image")):
        with pytest.raises(exceptions.FetchFailed, match=rf"{how} stream (is empty|cannot be decompressed)"):
            fetch(url, conf, tmp_path)
        with pytest.raises(exceptions.FetchFailed):
            TemplateCache(conf).fetch("image", open_source(url, conf).fetch)
    assert [path for path in (tmp_path / "instances").rglob("*") if not path.is_dir()] == []


def test_goes_on_after_a_broken_connection(conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    compressed = compress("gzip", IMAGE)
    conf.set_override("fetch_retries", 2, group="image_cache")

    def part(start: int, end: int) -> web.Answer:
        head = {"content_length": str(len(compressed) - start), "etag": '"v1"'}
        if start:
            head["content_range"] = f"bytes {start}-{len(compressed) - 1}/{len(compressed)}"
        return respond("206 Partial Content" if start else "200 OK", compressed[start:end], **head)

    (tmp_path / "target").touch()
    answers = [part(0, 5), part(5, 1_000_000), part(1_000_000, len(compressed))]
    with web.misbehaving_server(*answers) as server:
        source = HttpSource(server.url, conf, wait=lambda seconds: None)
        assert source.fetch(str(tmp_path / "target")).content_sha256 == sha256(IMAGE)
    assert (tmp_path / "target").read_bytes() == IMAGE
    assert [request.headers.get("range") for request in server.requests] == [None, "bytes=5-", "bytes=1000000-"]


def test_starts_over(conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    """From a stream of one kind to one of another, which is shorter."""
    conf.set_override("fetch_retries", 1, group="image_cache")
    first, second = compress("gzip", IMAGE), compress("xz", IMAGE[: MIB // 2])
    answers = [
        respond("200 OK", first[:900_000], content_length=str(len(first))),
        respond("200 OK", second, content_length=str(len(second))),
    ]
    (tmp_path / "target").touch()
    with web.misbehaving_server(*answers) as server:
        source = HttpSource(server.url, conf, wait=lambda seconds: None)
        fetched = source.fetch(str(tmp_path / "target"))
    assert (fetched.compression, fetched.sha256) == ("xz", sha256(second))
    assert (tmp_path / "target").read_bytes() == IMAGE[: MIB // 2]


def test_no_part_of_it_is_left_for_later(conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    compressed = compress("gzip", IMAGE)
    answer = respond("200 OK", compressed[: len(compressed) // 2], content_length=str(len(compressed)), etag='"v1"')
    with web.misbehaving_server(answer) as server, pytest.raises(exceptions.FetchFailed):
        TemplateCache(conf).fetch("image", open_source(server.url, conf).fetch)
    assert [path for path in (tmp_path / "instances").rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("raw", [True, False])
def test_as_a_template(conf: cfg.ConfigOpts, tmp_path: Path, image_format: str, raw: bool) -> None:
    conf.set_override("force_raw_images", raw)
    make_disk(tmp_path / "disk.raw")
    image = tmp_path / "disk"
    command = ["qemu-img", "convert", "-f", "raw", "-O", image_format, str(tmp_path / "disk.raw"), str(image)]
    subprocess.run(command, check=True, timeout=60)
    content = image.read_bytes()
    compressed = compress("xz", content)
    (tmp_path / "disk.xz").write_bytes(compressed)
    cache = TemplateCache(conf)
    template = cache.fetch("image", open_source(str(tmp_path / "disk.xz"), conf, disk_format=image_format).fetch)
    assert (template.source_format, template.sha256) == (image_format, sha256(compressed))
    assert (template.compression, template.content_sha256) == ("xz", sha256(content))
    if image_format == "raw" or not raw:
        assert template.digest == f"sha256:{sha256(content)}"
    cache.verify("image")


class TestBombs:
    def test_larger_than_any_template_may_be(self, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        conf.set_override("max_virtual_size", 64 * MIB, group="image_cache")
        for size, accepted in ((128 * MIB, True), (160 * MIB, False)):
            (tmp_path / "bomb").write_bytes(compress("zstd", bytes(size)))
            if accepted:  # so far: the inspection says what its virtual size is
                assert len(fetch(str(tmp_path / "bomb"), conf, tmp_path)[1]) == size
                continue
            with pytest.raises(exceptions.ImageUnacceptable, match="max_virtual_size allows"):
                fetch(str(tmp_path / "bomb"), conf, tmp_path)

    def test_much_more_data_than_came(
        self, conf: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sink, "_DATA", 16 * MIB)
        (tmp_path / "bomb").write_bytes(compress("xz", b"x" * (64 * MIB)))
        with pytest.raises(exceptions.ImageUnacceptable, match="more than 200 times its size"):
            fetch(str(tmp_path / "bomb"), conf, tmp_path)
        assert allocated(tmp_path / "target") <= 18 * MIB, "it is noticed while it is decompressed"
        (tmp_path / "sound").write_bytes(compress("gzip", random.Random(1).randbytes(32 * MIB)))
        fetch(str(tmp_path / "sound"), conf, tmp_path)

    def test_endless_zeros(self, conf: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sink, "_CONTENT", 64 * MIB)
        (tmp_path / "bomb").write_bytes(compress("zstd", bytes(160 * MIB)))
        with pytest.raises(exceptions.ImageUnacceptable, match="more than is sound"):
            fetch(str(tmp_path / "bomb"), conf, tmp_path)

    def test_a_full_disk_gets_its_room_back(self, conf: cfg.ConfigOpts, small_tmpfs: Path, tmp_path: Path) -> None:
        conf.set_override("instances_path", str(small_tmpfs / "instances"))
        (tmp_path / "large.xz").write_bytes(compress("xz", b"compressible" * MIB))
        with pytest.raises(exceptions.InsufficientSpace):
            TemplateCache(conf).fetch("image", open_source(str(tmp_path / "large.xz"), conf).fetch)
        assert [path for path in small_tmpfs.rglob("*") if not path.is_dir()] == []

    def test_cancelled_while_nothing_but_zeros_come_out(self, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        def cancel(done: int, total: int) -> None:
            if done:
                raise exceptions.Cancelled

        (tmp_path / "bomb").write_bytes(compress("zstd", bytes(1024 * MIB)))
        (tmp_path / "target").touch()
        with pytest.raises(exceptions.Cancelled):
            open_source(str(tmp_path / "bomb"), conf).fetch(str(tmp_path / "target"), cancel)
        assert (tmp_path / "target").stat().st_size < 1024 * MIB
