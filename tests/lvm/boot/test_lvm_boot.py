# SPDX-License-Identifier: Apache-2.0
"""A guest boots from logical volumes, by libvirt, on the kernel that has device-mapper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import imagebackend
from imagebackend import exceptions
from imagebackend.storage.lvm2 import VolumeGroup
from tests.functional.conftest import guest, libvirt_qemu, libvirtd, start_guest
from tests.lvm.volume_groups import MIB, POOL
from tools.guest_image import ROOT_SAYS, GuestImage

__all__ = ["guest", "libvirt_qemu", "libvirtd", "start_guest"]


@pytest.fixture(scope="session")
def virt_type() -> str:
    """KVM if there is any: where this kernel is emulated itself, trying it takes longer than people wait for it."""
    return "kvm" if os.path.exists("/dev/kvm") else "qemu"


@pytest.fixture
def backend(tmp_path: Path, group: VolumeGroup) -> imagebackend.Backend:
    conf = imagebackend.load_config()
    conf.set_override("instances_path", str(tmp_path / "instances"))
    options = {"images_type": "lvm", "images_volume_group": group.name, "images_thin_pool": POOL}
    for name, value in options.items():
        conf.set_override(name, value, group="libvirt")
    return imagebackend.Backend(conf, keys=lambda instance, disk: bytes(range(64)))


@pytest.mark.parametrize("encrypted", [False, True], ids=["thin", "encrypted"])
def test_a_guest_boots_from_a_volume_and_sees_it_grow(
    start_guest: Any,
    guest: GuestImage,
    backend: imagebackend.Backend,
    encrypted: bool,
) -> None:
    backend.conf.set_override("enabled", encrypted, group="ephemeral_storage_encryption")
    image = backend.image("guest", "disk")
    image.cache(imagebackend.open_source(str(guest.disk), backend.conf).fetch, "guest", 128 * MIB)

    running = start_guest(image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml())
    assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
    running.wait_for(f"imagebackend-guest: size=({128 * MIB})")

    with pytest.raises(exceptions.DiskInUse):
        image.resize_image(160 * MIB)
    image.resize_image(160 * MIB, domain=running.domain)
    running.wait_for(f"imagebackend-guest: size=({160 * MIB})")
    with pytest.raises(exceptions.DiskInUse):
        image.remove()

    running.domain.destroy()
    image.remove()
    assert not image.exists()
