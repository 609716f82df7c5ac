# SPDX-License-Identifier: Apache-2.0
"""Real Ceph clusters for tests: a pytest plugin, loaded by tests/conftest.py.

Each worker of the test run starts a cluster when a test first asks for it, which takes it a second; each test gets an
empty pool of its own. Tests that take daemons away have clusters to themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
