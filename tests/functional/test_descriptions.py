# SPDX-License-Identifier: Apache-2.0
"""A disk that was described before is described as it is now, whoever changed it, and however soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.backend import Backend
from tests.contract.conftest import MIB, configured
from tests.functional.image_building import qemu_img


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return Backend(configured(tmp_path / "instances", "qcow2"))


def fetch(target: str) -> None:
    os.truncate(target, MIB)


def described(backend: Backend) -> str | None:
    """Describe the disk as an agent does, by an Image of its own each time; return the format that libvirt is told."""
    return backend.image("guest", "disk").libvirt_info("virtio", "vda", "disk", "none", {}).driver_format


def test_a_disk_that_is_gone_is_not_described(backend: Backend) -> None:
    image = backend.image("guest", "disk")
    with pytest.raises(exceptions.DiskNotFound):
        described(backend)
    image.cache(fetch, "template")
    assert [described(backend), described(backend)] == ["qcow2", "qcow2"]

    image.remove()

    with pytest.raises(exceptions.DiskNotFound):
        described(backend)


def test_a_disk_that_was_made_anew_in_another_format_is_described_so(backend: Backend) -> None:
    # Again and again: its inode, and that of its record, may be those of the one before.
    for disk_format in ("raw", "qcow2") * 10:
        image = backend.image("guest", "disk", disk_format)
        image.create_from_func(fetch, MIB)
        assert [described(backend), described(backend)] == [disk_format, disk_format]
        image.remove()


def test_a_record_that_was_changed_is_read_though_its_time_was_set_back(backend: Backend) -> None:
    image = backend.image("guest", "disk", "raw")
    image.create_from_func(fetch, MIB)
    assert described(backend) == "raw"
    record = Path(image.path).with_name("disk.info")
    before = record.stat()

    with record.open("r+") as file:
        file.write(f'{{"{image.path}": "vdi"}}')
    os.utime(record, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert record.stat().st_ino == before.st_ino
    with pytest.raises(exceptions.Unsupported, match="vdi"):
        described(backend)


def test_a_header_that_was_changed_is_looked_at(backend: Backend, tmp_path: Path) -> None:
    image = backend.image("guest", "disk")
    image.cache(fetch, "template")
    assert described(backend) == "qcow2"
    (tmp_path / "secret").write_bytes(bytes(MIB))

    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", image.path)

    for _ in range(2):
        with pytest.raises(exceptions.ImageUnacceptable, match="secret"):
            described(backend)


def test_a_disk_that_lost_its_header_is_refused_each_time(backend: Backend) -> None:
    image = backend.image("guest", "disk")
    image.cache(fetch, "template")
    assert described(backend) == "qcow2"
    with open(image.path, "r+b") as file:
        file.write(b"no longer a header")

    for _ in range(2):
        with pytest.raises(exceptions.ImageUnacceptable):
            described(backend)


def test_a_change_that_was_cut_short_is_finished_first(backend: Backend) -> None:
    image = backend.image("guest", "disk")
    image.cache(fetch, "template")
    assert described(backend) == "qcow2"
    intent = Path(image.path).with_name(".disk.intent")
    intent.write_text('{"operation": "resize"}')

    assert described(backend) == "qcow2"

    assert not intent.exists()


def test_what_one_cache_vouches_for_another_does_not(backend: Backend, tmp_path: Path) -> None:
    backend.image("guest", "disk").cache(fetch, "template")
    assert described(backend) == "qcow2"

    other = configured(tmp_path / "instances", "qcow2", **{"image_cache.subdirectory_name": "_other"})

    with pytest.raises(exceptions.ImageUnacceptable, match="no template in"):
        described(Backend(other))
    assert described(backend) == "qcow2"
