# SPDX-License-Identifier: Apache-2.0
"""Fetching from files, on the file systems that hypervisors have."""

from __future__ import annotations

import email.utils
import hashlib
import os
import random
import socket
from pathlib import Path

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.sources import open_source
from tests.functional import filesystems, web

MIB = 1 << 20


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    return load_config([])


def new_target(folder: Path) -> Path:
    path = folder / "target"
    path.touch(mode=0o600)
    return path


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", ["{}", "file://{}", "file:{}", "file://localhost{}", "FILE://LOCALHOST{}"])
def test_whole_image(tmp_path: Path, conf: cfg.ConfigOpts, form: str) -> None:
    source, target = tmp_path / "image.qcow2", new_target(tmp_path)
    source.write_bytes(content(3 * MIB + 1))
    os.utime(source, (1_700_000_000, 1_700_000_000))
    seen: list[tuple[int, int]] = []
    checksum = f"sha512:{hashlib.sha512(source.read_bytes()).hexdigest()}"
    opened = open_source(form.format(source), conf, checksum=checksum, disk_format="qcow2")
    fetched = opened.fetch(str(target), lambda *done: seen.append(done))
    assert fetched.sha256 == sha256(source) == sha256(target)
    assert (fetched.source, fetched.size) == (source.as_uri(), 3 * MIB + 1)
    assert fetched.disk_format == "qcow2"
    assert fetched.last_modified == email.utils.formatdate(1_700_000_000, usegmt=True)
    assert (seen[0], seen[-1]) == ((0, 3 * MIB + 1), (3 * MIB + 1, 3 * MIB + 1))
    assert target.stat().st_mode & 0o777 == 0o600


def test_metadata(tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    """It is what a fetch says too, without reading the image."""
    path = tmp_path / "image"
    path.write_bytes(content(5000))
    checksum = f"sha512:{hashlib.sha512(path.read_bytes()).hexdigest()}"
    source = open_source(str(path), conf, checksum=checksum, disk_format="raw")
    found = source.metadata()
    fetched = source.fetch(str(new_target(tmp_path)))
    assert (found.source, found.size, found.disk_format) == (path.as_uri(), 5000, "raw")
    assert (found.checksum, found.min_disk) == (checksum, 0)
    assert (found.etag, found.last_modified) == (fetched.etag, fetched.last_modified)
    assert list(source.locations()) == []
    path.unlink()
    with pytest.raises(exceptions.FetchFailed, match="No such file"):
        source.metadata()


@pytest.mark.parametrize(
    ("change", "unchanged"),
    [("nothing", True), ("content", False), ("content within the same second", False), ("length", False)],
)
def test_unchanged(tmp_path: Path, conf: cfg.ConfigOpts, change: str, unchanged: bool) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    source = open_source(str(path), conf)
    fetched = source.fetch(str(new_target(tmp_path)))
    if change != "nothing":
        path.write_bytes(b"two" if change != "length" else b"three")
        later = 10**18 + (1 if "second" in change else 10**9)
        os.utime(path, ns=(later, later))
    assert source.unchanged_since(sha256=fetched.sha256, etag=fetched.etag) is unchanged


@pytest.mark.parametrize("name", ["a b", "100%", "%41", "new\nline", "ünï", b"\xff\xfe", "q?#", "a:b", "-f", "~"])
def test_odd_names(tmp_path: Path, conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch, name: str | bytes) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / os.fsdecode(name)
    path.write_bytes(b"data")
    monkeypatch.chdir(folder)
    for number, url in enumerate([str(path), path.as_uri(), f"./{path.name}"]):
        target = tmp_path / str(number)
        target.touch()
        fetched = open_source(url, conf).fetch(str(target))
        assert (target.read_bytes(), fetched.source) == (b"data", path.as_uri())


def test_relative_path_is_of_the_folder_of_then(
    tmp_path: Path, conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image").write_bytes(b"data")
    monkeypatch.chdir(tmp_path)
    source = open_source("image", conf)
    monkeypatch.chdir("/")
    assert source.fetch(str(new_target(tmp_path))).source == (tmp_path / "image").as_uri()


def test_symbolic_link_is_followed(tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    (tmp_path / "debian-12.1.raw").write_bytes(b"data")
    (tmp_path / "latest").symlink_to("debian-12.1.raw")
    target = new_target(tmp_path)
    assert open_source(str(tmp_path / "latest"), conf).fetch(str(target)).source == (tmp_path / "latest").as_uri()
    assert target.read_bytes() == b"data"


@pytest.mark.parametrize("kind", ["ext4_folder", "xfs_folder", "btrfs_folder"])
@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_holes_stay_holes(request: pytest.FixtureRequest, conf: cfg.ConfigOpts, kind: str, reflink: str) -> None:
    conf.set_override("reflink", reflink)
    folder: Path = request.getfixturevalue(kind)
    source, target = folder / "image", new_target(folder)
    with source.open("wb") as file:
        file.seek(5 * MIB)
        file.write(content(100_000))
        file.seek(40 * MIB)
        file.write(b"x" * 5000)
        file.truncate(300 * MIB + 1)
    fetched = open_source(str(source), conf).fetch(str(target))
    assert fetched.sha256 == sha256(source) == sha256(target)
    assert fetched.size == target.stat().st_size == 300 * MIB + 1
    assert filesystems.allocated(target) <= 2 * MIB


def test_all_hole(tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    source, target = tmp_path / "image", new_target(tmp_path)
    source.touch()
    os.truncate(source, 5 * MIB + 3)
    assert open_source(str(source), conf).fetch(str(target)).sha256 == sha256(source) == sha256(target)
    assert filesystems.allocated(target) == 0


@pytest.mark.parametrize(("reflink", "shares"), [("auto", True), ("always", True), ("never", False)])
def test_blocks_are_shared(xfs_folder: Path, conf: cfg.ConfigOpts, reflink: str, shares: bool) -> None:
    conf.set_override("reflink", reflink)
    source, target = xfs_folder / "image", new_target(xfs_folder)
    source.write_bytes(content(3 * MIB + 1) + bytes(MIB))
    assert open_source(str(source), conf).fetch(str(target)).sha256 == sha256(source) == sha256(target)
    assert (filesystems.shared(target) > 3 * MIB) == shares


def test_onto_another_file_system(xfs_folder: Path, tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    source, target = xfs_folder / "image", new_target(tmp_path)
    source.write_bytes(content(3 * MIB))
    assert open_source(str(source), conf).fetch(str(target)).sha256 == sha256(target) == sha256(source)


@pytest.mark.parametrize("kind", ["absent", "folder", "fifo", "socket", "device", "loop", "empty", "nothing beyond"])
def test_no_image(tmp_path: Path, conf: cfg.ConfigOpts, kind: str) -> None:
    path, target = tmp_path / "image", new_target(tmp_path)
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "loop":
        path.symlink_to("image")
    elif kind == "empty":
        path.touch()
    elif kind == "nothing beyond":
        path.touch()
        path /= "image"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "socket":
            listener.bind(str(path))
        with pytest.raises(exceptions.FetchFailed) as caught:
            open_source(str(path), conf).fetch(str(target))
    assert caught.value.source == path.as_uri()
    assert target.stat().st_size == 0


@pytest.mark.parametrize("change", ["append", "cut", "overwrite"])
@pytest.mark.parametrize("share", [True, False])
def test_changing_while_it_is_copied(xfs_folder: Path, conf: cfg.ConfigOpts, change: str, share: bool) -> None:
    conf.set_override("reflink", "auto" if share else "never")
    source, target = xfs_folder / "image", new_target(xfs_folder)
    source.write_bytes(content(4 * MIB))
    os.utime(source, (1_700_000_000, 1_700_000_000))

    def progress(done: int, total: int) -> None:
        with source.open("r+b") as file:
            if change == "append":
                file.seek(0, os.SEEK_END)
            if change == "cut":
                file.truncate(MIB)
            file.write(b"changed")

    with pytest.raises(exceptions.FetchFailed, match="while it was copied"):
        open_source(str(source), conf).fetch(str(target), progress)


def test_cancelled(tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    source, target = tmp_path / "image", new_target(tmp_path)
    source.touch()
    os.truncate(source, 1 << 40)  # takes minutes to hash

    def progress(done: int, total: int) -> None:
        if done:
            raise exceptions.Cancelled("enough")

    with pytest.raises(exceptions.Cancelled, match="enough"):
        open_source(str(source), conf).fetch(str(target), progress)


def test_wrong_checksum(tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    source, target = tmp_path / "image", new_target(tmp_path)
    source.write_bytes(b"data")
    with pytest.raises(exceptions.ChecksumMismatch):
        open_source(str(source), conf, checksum="sha256:" + "0" * 64).fetch(str(target))


def test_larger_than_the_file_system(small_tmpfs: Path, tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    source, target = tmp_path / "image", new_target(small_tmpfs)
    source.write_bytes(content(9 * MIB))
    filesystems.allocated(source)
    with pytest.raises(exceptions.InsufficientSpace) as caught:
        open_source(str(source), conf).fetch(str(target))
    assert (caught.value.path, caught.value.required) == (str(target), 9 * MIB)
    assert target.stat().st_blocks == 0


def test_holes_need_no_space(small_tmpfs: Path, tmp_path: Path, conf: cfg.ConfigOpts) -> None:
    source, target = tmp_path / "image", new_target(small_tmpfs)
    source.write_bytes(b"data")
    os.truncate(source, 100 * MIB)
    assert open_source(str(source), conf).fetch(str(target)).sha256 == sha256(source)


def test_file_system_becomes_full(small_tmpfs: Path, conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not say how much is to come."""
    monkeypatch.setenv("no_proxy", "*")
    target = new_target(small_tmpfs)
    with web.misbehaving_server(web.respond("200 OK", content(9 * MIB))) as server:
        with pytest.raises(exceptions.InsufficientSpace) as caught:
            open_source(server.url, conf, checksum="sha256:" + "0" * 64).fetch(str(target))
        assert len(server.requests) == 1
    assert caught.value.path == str(target)
