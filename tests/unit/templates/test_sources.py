# SPDX-License-Identifier: Apache-2.0
"""Which source stands for which URL, and what a checksum may look like."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.sources import open_source
from imagebackend.templates.sources.file import FileSource
from imagebackend.templates.sources.http import HttpSource
from imagebackend.templates.sources.rbd import RbdSource

ADD_ON = """\
from imagebackend.templates import sources

class Source(sources.Source):
    def __init__(self, url, conf, *, checksum, disk_format):
        self.arguments = (url, checksum, disk_format)

    def metadata(self):
        return sources.Metadata(self.arguments[0], checksum=self.arguments[1], etag='W/"1"', last_modified="then")

    def fetch(self, target, progress=None):
        with open(target, "wb") as file:
            file.write(b"content")
        return sources.Fetched(self.arguments[0], 7, "00" * 32)
"""


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    return load_config([])


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("/images/debian.qcow2", FileSource),
        ("debian.qcow2", FileSource),
        ("./debian:12.qcow2", FileSource),
        ("/debian:12.qcow2", FileSource),
        ("file:///images/debian.qcow2", FileSource),
        ("FILE:/images/debian.qcow2", FileSource),
        ("http://host/path", HttpSource),
        ("HTTPS://host/path", HttpSource),
        ("rbd:pool/image@snapshot", RbdSource),
        ("rbd:pool/namespace/image", RbdSource),
        ("rbd://43ba3e63-fd79-4af3-9a49-74db8899da9e/pool/image/snapshot", RbdSource),
    ],
)
def test_built_in(conf: cfg.ConfigOpts, url: str, kind: type) -> None:
    assert type(open_source(url, conf)) is kind


@pytest.mark.parametrize("url", ["ftp://host/path", "json:{}", "debian:12.qcow2", "c:\\x"])
def test_unknown_scheme(conf: cfg.ConfigOpts, url: str) -> None:
    with pytest.raises(
        exceptions.InvalidArgument, match=r"known are file, glance, http, https, rbd, .*'\./' before it"
    ):
        open_source(url, conf)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a\0b",
        "file:",
        "file:relative",
        "file://host/path",
        "file://user:secret@host/path",
        "file:///path?query",
        "file:///path#part",
        "file:///a%00b",
        "http:",
        "http://",
        "http:///path",
        "https://user:secret@[::1/path",
        "http://user:secret@host:port/",
        "http://host:99999999/",
        "rbd:",
        "rbd:image",
        "rbd:pool/image@",
        "rbd:pool/namespace/more/image",
        "rbd:pool/image@snapshot@snapshot",
        "rbd:pool/image:id=admin:key=secret",
        "rbd://pool/image",
        "rbd://43ba3e63-fd79-4af3-9a49-74db8899da9e/pool/image",
        "glance:",
        "glance:cloud/",
        "glance:user:secret@cloud/image",
        "glance:cloud/more/image",
        "glance:image?token=secret",
        "glance:image%0Aline",
    ],
)
def test_unusable_url(conf: cfg.ConfigOpts, url: str) -> None:
    with pytest.raises(exceptions.InvalidArgument) as caught:
        open_source(url, conf)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


class TestAddedSchemes:
    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A real installed package, as pip would leave it."""
        (tmp_path / "imagebackend_test_source.py").write_text(ADD_ON)
        metadata = tmp_path / "imagebackend_test_source-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: imagebackend-test-source\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(
            "[imagebackend.sources]\n"
            "other = imagebackend_test_source:Source\n"
            "broken = imagebackend_test_source:Absent\n"
            "missing = imagebackend_test_absent:Source\n"
            "http = imagebackend_test_source:Source\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    def test_found(self, conf: cfg.ConfigOpts) -> None:
        source = open_source("OTHER:1234", conf, checksum="any", disk_format="raw")
        assert vars(source) == {"arguments": ("OTHER:1234", "any", "raw")}

    @pytest.mark.parametrize(
        ("checksum", "then", "unchanged"),
        [
            ("sha256:AB", {"sha256": "ab"}, True),
            ("sha256:ab", {"sha256": "cd", "etag": 'W/"1"'}, False),
            ("sha512:ab", {"sha256": "cd", "etag": '"1"'}, True),
            (None, {"sha256": "cd", "etag": '"2"', "last_modified": "then"}, False),
            (None, {"sha256": "cd", "last_modified": "then"}, True),
            (None, {"sha256": "cd", "last_modified": "now"}, False),
            (None, {"sha256": "cd"}, False),
            (None, {}, False),
        ],
    )
    def test_what_need_not_be_written(
        self, conf: cfg.ConfigOpts, checksum: str | None, then: dict[str, str], unchanged: bool
    ) -> None:
        source = open_source("other:1", conf, checksum=checksum)
        assert source.unchanged_since(**then) is unchanged
        assert list(source.locations()) == []

    @pytest.mark.parametrize("scheme", ["broken", "missing"])
    def test_broken(self, conf: cfg.ConfigOpts, scheme: str) -> None:
        with pytest.raises(exceptions.InvalidConfiguration, match=f"entry point {scheme} of imagebackend.sources"):
            open_source(f"{scheme}:x", conf)

    def test_listed(self, conf: cfg.ConfigOpts) -> None:
        with pytest.raises(exceptions.InvalidArgument, match="broken, file, glance, http, https, missing, other, rbd"):
            open_source("ftp:x", conf)

    def test_built_in_comes_first(self, conf: cfg.ConfigOpts) -> None:
        assert type(open_source("http://host/", conf)) is HttpSource


def test_nothing_heavy_is_loaded_for_a_file() -> None:
    program = (
        "import sys; from imagebackend.conf import load_config;"
        "from imagebackend.templates.sources import open_source;"
        "open_source('/x', load_config([])); print([name for name in ('urllib3', 'ssl') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert output.stdout == "[]\n"
