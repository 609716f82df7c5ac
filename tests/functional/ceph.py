# SPDX-License-Identifier: Apache-2.0
"""Real Ceph clusters for tests: a pytest plugin, loaded by tests/conftest.py.

Each worker of the test run starts a cluster when a test first asks for it, which takes it a second; each test gets an
empty pool of its own. Tests that take daemons away have clusters to themselves.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import imagebackend
from imagebackend import Backend
from imagebackend.images.base import Image
from tools import private_ceph
from tools.private_ceph import Cluster


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that lets everybody in, not to be disturbed."""
    with private_ceph.run(tmp_path_factory.mktemp("ceph")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def ceph_cephx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that demands keys, not to be disturbed."""
    with private_ceph.run(tmp_path_factory.mktemp("ceph-cephx"), "cephx") as cluster:
        yield cluster


@pytest.fixture
def own_ceph(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that the test may do with what it likes; what it stores is in memory, and lost with its OSD."""
    folder = tmp_path / "ceph"
    folder.mkdir()
    with private_ceph.run(folder) as cluster:
        yield cluster


@pytest.fixture
def rbd_pool(ceph: Cluster) -> Iterator[str]:
    """The name of an empty pool in the cluster that lets everybody in."""
    with ceph.pool() as name:
        yield name


def rbd_backend(cluster: Cluster, pool: str, folder: Path, **options: Any) -> Backend:
    """Return a backend that keeps disks in a pool, and its template cache and locks in ``folder``.

    :param options: of ``[libvirt]``.
    """
    conf = imagebackend.load_config()
    conf.set_override("instances_path", str(folder))
    conf.set_override("lock_timeout", 30.0)
    rbd = {"images_type": "rbd", "images_rbd_pool": pool, "images_rbd_ceph_conf": str(cluster.configuration)}
    for name, value in {**rbd, "rbd_destroy_volume_retries": 0, **options}.items():
        conf.set_override(name, value, group="libvirt")
    return Backend(conf)


def requests(cluster: Cluster, act: Callable[[], object]) -> int:
    """Return how many requests the cluster's OSD had while ``act`` ran, which nobody else may disturb."""
    asked = json.dumps({"prefix": "perf dump", "logger": "osd", "counter": "op", "format": "json"})
    with cluster.connect() as connection:
        counts = []
        for work in (lambda: None, act):
            work()
            _, answer, _ = connection.osd_command(0, asked, b"")
            counts.append(json.loads(answer)["osd"]["op"])
    return int(counts[1] - counts[0])


@dataclass(frozen=True)
class Contents:
    """What a test put into a template, and what it reads back."""

    path: Path
    content: bytes

    def fetch(self, target: str, **_arguments: Any) -> None:
        shutil.copyfile(self.path, target)


def read(image: Image, target: Path) -> bytes:
    """Return what a guest would read from a disk.

    :param target: a file that may be written.
    """
    image.snapshot_extract(str(target), "raw")
    return target.read_bytes()


@pytest.fixture
def template(tmp_path: Path) -> Contents:
    """A raw template of 24 MiB, whose data lie between holes in several of the objects that store it."""
    content = bytearray(24 << 20)
    for start in range(0, len(content), 3 << 20):
        content[start : start + (1 << 20)] = random.Random(start).randbytes(1 << 20)
    path = tmp_path / "template.raw"
    with path.open("wb") as file:
        file.truncate(len(content))
        for start in range(0, len(content), 3 << 20):
            file.seek(start)
            file.write(content[start : start + (1 << 20)])
    return Contents(path, bytes(content))
