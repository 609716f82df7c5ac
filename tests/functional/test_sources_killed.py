# SPDX-License-Identifier: Apache-2.0
"""A fetch that is killed at any system call that changes a file: what is left is absent or whole."""

from __future__ import annotations

import collections
import contextlib
import gzip
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.sources import http_transfer, open_source
from tests.functional import web
from tests.functional.filesystems import mounted_tmpfs

MIB = 1 << 20
CONTENT = random.Random(4).randbytes(MIB) + bytes(2 * MIB) + random.Random(5).randbytes(MIB // 2)
CALLS = ("fallocate", "fdatasync", "fsync", "ftruncate", "link", "pwrite64", "rename", "symlink", "unlink", "write")


@pytest.fixture
def nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[web.Nginx]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with web.nginx(tmp_path / "nginx") as server:
        yield server


@pytest.fixture
def instances(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: hundreds of times something is synced, which is of no use to those who outlive a kill."""
    with mounted_tmpfs(tmp_path, 64 * MIB) as mount_point:
        yield mount_point / "instances"


@pytest.fixture
def conf(instances: Path) -> cfg.ConfigOpts:
    conf = load_config([])
    conf.set_override("instances_path", str(instances))
    conf.set_override("reflink", "never")
    return conf


def traced(act: Callable[[], object], trace: Path, *options: str) -> int:
    """Do ``act`` in a child process that strace watches; return how it ended."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(go)
            os.read(ready, 1)
            act()
            code = 0
        finally:
            os._exit(code)
    os.close(ready)
    command = ["strace", "-f", "-e", f"trace={','.join(CALLS)}", "-o", str(trace), *options, "-p", str(child)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as tracer:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        os.close(go)
        assert "attached" in attached, attached
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def calls_of(act: Callable[[], object], trace: Path) -> dict[str, int]:
    """How often ``act`` makes each call."""
    assert traced(act, trace) == 0
    return collections.Counter(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))


def files(folder: Path) -> set[str]:
    """What is there, without the files of locks: those that a killed process held are free, and may stay."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    return {name for name in found if not name.startswith("locks/")}


@pytest.mark.parametrize("kind", ["file", "web server", "compressed"])
def test_what_is_left_is_absent_or_whole_and_the_next_fetch_succeeds(
    nginx: web.Nginx, conf: cfg.ConfigOpts, instances: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(http_transfer, "_RECORDED_EVERY", 0.0)
    published = gzip.compress(CONTENT) if kind == "compressed" else CONTENT
    checksum = f"sha256:{nginx.put('image', published)}"
    url = str(nginx.folder / "www" / "image") if kind == "file" else f"{nginx.url}/image"

    def fetch() -> None:
        TemplateCache(conf).fetch("image", open_source(url, conf, checksum=checksum).fetch)

    def check() -> None:
        template = TemplateCache(conf).get("image")
        assert hashlib.sha256(Path(template.path).read_bytes()).digest() == hashlib.sha256(CONTENT).digest()

    calls = calls_of(fetch, tmp_path / "trace")
    expected = files(instances)
    assert {"pwrite64", "fdatasync", "rename"} <= calls.keys()
    for call, times in calls.items():
        for number in range(1, times + 1):
            shutil.rmtree(instances)
            kill = ("-e", f"inject={call}:signal=KILL:when={number}")
            assert traced(fetch, tmp_path / "trace", *kill) == -signal.SIGKILL, (call, number)
            with contextlib.suppress(exceptions.TemplateNotFound):
                check()
            fetch()
            check()
            assert files(instances) == expected, (call, number)
