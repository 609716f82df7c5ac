# SPDX-License-Identifier: Apache-2.0
"""Guests boot from the disks that the library makes, and the two agree about who may do what to them."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

import imagebackend
from imagebackend import exceptions
from tools.guest_image import ROOT_SAYS, SIZE_SAYS, GuestImage

GIB = 1 << 30


@pytest.fixture(params=["raw", "qcow2"])
def template(request: pytest.FixtureRequest, guest: GuestImage, tmp_path: Path) -> Path:
    """The guest as a template in one format, that keeps it in the cache."""
    path = tmp_path / f"template.{request.param}"
    command = ["qemu-img", "convert", "-f", "raw", "-O", request.param, guest.disk, path]
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture
def backend(tmp_path: Path) -> imagebackend.Backend:
    ini = tmp_path / "imagebackend.conf"
    ini.write_text(f"[DEFAULT]\ninstances_path = {tmp_path}/instances\nforce_raw_images = false\n")
    return imagebackend.Backend(imagebackend.load_config([str(ini)]))


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
def test_guest_boots_and_sees_its_disk_grow(
    start_guest, backend: imagebackend.Backend, template: Path, image_type: str
) -> None:
    source = imagebackend.open_source(str(template), backend.conf)
    image = backend.image("guest", "disk", image_type)
    image.cache(source.fetch, "template", GIB)
    cached = backend.templates.get("template")
    assert cached.format == template.suffix[1:]

    running = start_guest(image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml())
    assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
    assert running.wait_for(SIZE_SAYS) == str(GIB)

    with pytest.raises(exceptions.DiskInUse):
        image.resize_image(2 * GIB)
    image.resize_image(2 * GIB, domain=running.domain)
    running.wait_for(f"imagebackend-guest: size=({2 * GIB})")
    with pytest.raises(exceptions.DiskInUse):
        image.remove()

    running.domain.destroy()
    assert image.get_disk_size(image.path) == 2 * GIB
    assert backend.templates.verify("template") == cached
    image.remove()
    assert not image.exists()


def test_guest_boots_from_a_ploop_disk_and_again_after_it_was_rolled_back(
    start_guest, backend: imagebackend.Backend, template: Path, tmp_path: Path
) -> None:
    source = imagebackend.open_source(str(template), backend.conf)
    image = backend.image("guest", "disk", "ploop")
    image.cache(source.fetch, "template", GIB)
    image.create_snap("untouched")
    disk = image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml()
    image.snapshot_extract(str(tmp_path / "before"), "raw")

    running = start_guest(disk)
    assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
    assert running.wait_for(SIZE_SAYS) == str(GIB)
    for change in (image.remove, lambda: image.resize_image(2 * GIB), lambda: image.rollback_to_snap("untouched")):
        with pytest.raises(exceptions.DiskInUse):
            change()
    running.domain.destroy()  # as if it was killed: the header says that somebody writes

    image.resize_image(2 * GIB)
    running = start_guest(image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml())
    running.wait_for(f"imagebackend-guest: size=({2 * GIB})")
    running.domain.destroy()
    image.rollback_to_snap("untouched")
    image.snapshot_extract(str(tmp_path / "after"), "raw")
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "before", tmp_path / "after"]
    subprocess.run(compare, check=True, timeout=60)
    assert start_guest(disk).wait_for(ROOT_SAYS) == "/dev/vda1 ext4"


def test_guest_boots_again_after_its_disk_was_rolled_back(
    start_guest, backend: imagebackend.Backend, guest: GuestImage, tmp_path: Path
) -> None:
    source = imagebackend.open_source(str(guest.disk), backend.conf)
    image = backend.image("guest", "disk", "qcow2")
    image.cache(source.fetch, "template")
    image.create_snap("untouched")
    disk = image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml()

    running = start_guest(disk)
    running.wait_for(ROOT_SAYS)
    running.domain.destroy()
    image.snapshot_extract(str(tmp_path / "written"), "raw")
    image.rollback_to_snap("untouched")
    image.snapshot_extract(str(tmp_path / "rolled-back"), "raw")
    assert digest(tmp_path / "written") != digest(guest.disk)
    assert digest(tmp_path / "rolled-back") == digest(guest.disk)

    image.remove_snap("untouched")
    image.flatten()
    backend.templates.remove("template")
    assert start_guest(disk).wait_for(ROOT_SAYS) == "/dev/vda1 ext4"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
