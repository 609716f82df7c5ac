# SPDX-License-Identifier: Apache-2.0
"""Images from the pools of a real Ceph cluster."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rbd
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.sources import Fetched, open_source
from tests.functional.ceph import rbd_backend
from tools.private_ceph import Cluster

MIB = 1 << 20
SIZE = 24 * MIB + 512
DATA = {0: b"first" * 1000, 9 * MIB: b"second" * MIB, SIZE - 512: b"last" * 128}


def whole(data: dict[int, bytes] = DATA) -> bytes:
    content = bytearray(SIZE)
    for start, piece in data.items():
        content[start : start + len(piece)] = piece
    return bytes(content)


@pytest.fixture
def conf(ceph: Cluster, rbd_pool: str, tmp_path: Path) -> cfg.ConfigOpts:
    return rbd_backend(ceph, rbd_pool, tmp_path / "instances").conf


@contextlib.contextmanager
def pool_of(cluster: Cluster, pool: str, namespace: str = "") -> Iterator[Any]:
    with cluster.connect() as connection, connection.open_ioctx(pool) as opened:
        opened.set_namespace(namespace)
        yield opened


@contextlib.contextmanager
def image_of(cluster: Cluster, pool: str) -> Iterator[Any]:
    with pool_of(cluster, pool) as opened, rbd.Image(opened, "image") as image:
        yield image


def make(opened: Any, data: dict[int, bytes] = DATA, *, snapshot: str = "snap", name: str = "image") -> None:
    rbd.RBD().create(opened, name, SIZE)
    with rbd.Image(opened, name) as image:
        for start, piece in data.items():
            image.write(piece, start)
        if snapshot:
            image.create_snap(snapshot)


@pytest.fixture
def image(ceph: Cluster, rbd_pool: str) -> str:
    """The URL of a snapshot of an image."""
    with pool_of(ceph, rbd_pool) as opened:
        make(opened)
    return f"rbd:{rbd_pool}/image@snap"


def fetch(url: str, conf: cfg.ConfigOpts, folder: Path, **options: Any) -> Fetched:
    target = folder / "target"
    target.write_bytes(b"")
    return open_source(url, conf, **options).fetch(str(target))


def test_whole_image(image: str, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    checksum = f"sha512:{hashlib.sha512(whole()).hexdigest()}"
    fetched = fetch(image, conf, tmp_path, checksum=checksum)
    assert (tmp_path / "target").read_bytes() == whole()
    assert (tmp_path / "target").stat().st_blocks * 512 < 9 * MIB  # its holes are holes
    assert (fetched.source, fetched.size, fetched.disk_format) == (image, SIZE, "raw")
    assert fetched.sha256 == hashlib.sha256(whole()).hexdigest()
    found = open_source(image, conf, checksum=checksum).metadata()
    assert (found.source, found.size, found.checksum) == (image, SIZE, checksum)
    assert found.etag == fetched.etag is not None


def test_location_of_an_image_service(
    image: str, ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts, tmp_path: Path
) -> None:
    location = f"rbd://{ceph.fsid}/{rbd_pool}/image/snap"
    assert list(open_source(image, conf).locations()) == [location]
    assert fetch(location, conf, tmp_path).source == image
    other = location.replace(ceph.fsid, "43ba3e63-fd79-4af3-9a49-74db8899da9e")
    with pytest.raises(exceptions.FetchFailed, match="in another cluster"):
        fetch(other, conf, tmp_path)


def test_image_in_a_namespace(ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    with pool_of(ceph, rbd_pool) as opened:
        rbd.RBD().namespace_create(opened, "tenant")
    with pool_of(ceph, rbd_pool, "tenant") as opened:
        make(opened)
    url = f"rbd:{rbd_pool}/tenant/image@snap"
    assert fetch(url, conf, tmp_path).source == url
    assert (tmp_path / "target").read_bytes() == whole()
    assert list(open_source(url, conf).locations()) == []


def test_what_a_clone_has_from_its_parent(
    image: str, ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts, tmp_path: Path
) -> None:
    with pool_of(ceph, rbd_pool) as opened:
        with rbd.Image(opened, "image") as parent:
            parent.protect_snap("snap")
        rbd.RBD().clone(opened, "image", "snap", opened, "clone", 1)
        with rbd.Image(opened, "clone") as clone:
            clone.write(b"own", 20 * MIB)
    fetch(f"rbd:{rbd_pool}/clone", conf, tmp_path)
    assert (tmp_path / "target").read_bytes() == whole({**DATA, 20 * MIB: b"own"})


def test_as_a_template(image: str, ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts) -> None:
    cache = TemplateCache(conf)
    source = open_source(image, conf)
    template = cache.pull("template", source, "newer")
    assert Path(template.path).read_bytes() == whole()
    assert cache.pull("template", source, "newer") == template
    with image_of(ceph, rbd_pool) as opened:
        opened.remove_snap("snap")
        opened.write(b"changed", 0)
        opened.create_snap("snap")
    newer = cache.pull("template", source, "newer")
    assert Path(newer.path).read_bytes()[:7] == b"changed"


def test_without_a_snapshot(ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    with pool_of(ceph, rbd_pool) as opened:
        make(opened, snapshot="")
    url = f"rbd:{rbd_pool}/image"
    fetched = fetch(url, conf, tmp_path)
    assert (tmp_path / "target").read_bytes() == whole()
    assert fetched.etag is None
    assert not open_source(url, conf).unchanged_since(sha256=fetched.sha256)
    assert list(open_source(url, conf).locations()) == []
    with image_of(ceph, rbd_pool):
        for act in (lambda: fetch(url, conf, tmp_path), open_source(url, conf).metadata):
            with pytest.raises(exceptions.FetchFailed, match="somebody has it open; name a snapshot"):
                act()


def test_opened_for_writing_while_it_is_read(
    ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts, tmp_path: Path
) -> None:
    with pool_of(ceph, rbd_pool) as opened:
        make(opened, snapshot="")
    with contextlib.ExitStack() as stack:
        writers: list[Any] = []

        def write(done: int, total: int) -> None:
            if not writers:
                writers.append(stack.enter_context(image_of(ceph, rbd_pool)))

        (tmp_path / "target").write_bytes(b"")
        with pytest.raises(exceptions.FetchFailed, match="somebody has it open"):
            open_source(f"rbd:{rbd_pool}/image", conf).fetch(str(tmp_path / "target"), write)
    assert writers


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("rbd:{pool}/absent@snap", "no such image"),
        ("rbd:{pool}/image@absent", "no such snapshot"),
        ("rbd:{pool}/absent/image@snap", "no such image"),
        ("rbd:no-such-pool/image@snap", "no pool 'no-such-pool'"),
    ],
)
def test_not_there(image: str, rbd_pool: str, conf: cfg.ConfigOpts, tmp_path: Path, url: str, reason: str) -> None:
    with pytest.raises(exceptions.FetchFailed, match=reason):
        fetch(url.format(pool=rbd_pool), conf, tmp_path)


def test_wrong_checksum(image: str, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    with pytest.raises(exceptions.ChecksumMismatch):
        fetch(image, conf, tmp_path, checksum="sha256:" + "0" * 64)


def test_cancelled(image: str, ceph: Cluster, rbd_pool: str, conf: cfg.ConfigOpts) -> None:
    """The pieces that are on their way are waited for: the image is closed, and the cluster works."""

    def cancel(done: int, total: int) -> None:
        if done:
            raise exceptions.Cancelled("enough")

    cache = TemplateCache(conf)
    source = open_source(image, conf)
    with pytest.raises(exceptions.Cancelled):
        cache.fetch("template", source.fetch, progress=cancel)
    assert [path.name for path in Path(cache.folder).iterdir() if not path.is_dir()] == []
    assert Path(cache.fetch("template", source.fetch).path).read_bytes() == whole()


def test_a_full_disk_gets_its_room_back(image: str, conf: cfg.ConfigOpts, small_tmpfs: Path) -> None:
    conf.set_override("instances_path", str(small_tmpfs))
    cache = TemplateCache(conf)
    (small_tmpfs / "other").write_bytes(b"x" * 4 * MIB)
    with pytest.raises(exceptions.InsufficientSpace):
        cache.fetch("template", open_source(image, conf).fetch)
    (small_tmpfs / "other").unlink()
    assert Path(cache.fetch("template", open_source(image, conf).fetch).path).read_bytes() == whole()


def test_a_cluster_that_does_not_answer(own_ceph: Cluster, tmp_path: Path) -> None:
    with own_ceph.pool() as pool:
        conf = rbd_backend(own_ceph, pool, tmp_path / "instances", rbd_operation_timeout=2).conf
        with pool_of(own_ceph, pool) as opened:
            make(opened)
        url = f"rbd:{pool}/image@snap"
        open_source(url, conf).metadata()
        with own_ceph.paused("osd.0"), pytest.raises(exceptions.FetchTimeout):
            fetch(url, conf, tmp_path)
        fetch(url, conf, tmp_path)
        assert (tmp_path / "target").read_bytes() == whole()


def test_what_a_user_may_read(ceph_cephx: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with ceph_cephx.pool() as pool, ceph_cephx.pool() as other:
        for name in (pool, other):
            with pool_of(ceph_cephx, name) as opened:
                make(opened)
        key = ceph_cephx.user("reader", mon="profile rbd", osd=f"profile rbd-read-only pool={pool}")
        conf = rbd_backend(ceph_cephx, other, tmp_path / "instances", rbd_user="reader").conf
        TemplateCache(conf).fetch("template", open_source(f"rbd:{pool}/image@snap", conf).fetch)
        fetch(f"rbd:{pool}/image", conf, tmp_path)
        with pytest.raises(exceptions.FetchDenied) as caught:
            fetch(f"rbd:{other}/image@snap", conf, tmp_path)
        record = (tmp_path / "instances" / "_base" / ".records" / "template.json").read_text()
        assert key not in f"{caught.value} {caplog.text} {record}"
