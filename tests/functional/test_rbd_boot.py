# SPDX-License-Identifier: Apache-2.0
"""Guests boot from disks in a real Ceph cluster, with keys and without."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from imagebackend import Backend, exceptions
from imagebackend.images.rbd import Encryption, Rbd
from tests.functional.ceph import rbd_backend
from tests.functional.libvirt_secret import secret
from tools.guest_image import ROOT_SAYS, SIZE_SAYS, GuestImage
from tools.private_ceph import Cluster

GIB = 1 << 30


@pytest.fixture(params=["none", "cephx"])
def backend(request: pytest.FixtureRequest, libvirt_qemu: libvirt.virConnect, tmp_path: Path) -> Iterator[Backend]:
    """A backend on a cluster that lets everybody in, and as a user whose key libvirt keeps."""
    with contextlib.ExitStack() as stack:
        options = {}
        if request.param == "none":
            cluster: Cluster = request.getfixturevalue("ceph")
            pool = stack.enter_context(cluster.pool())
        else:
            cluster = request.getfixturevalue("ceph_cephx")
            pool = stack.enter_context(cluster.pool())
            user = f"guests-{pool}"
            key = cluster.user(user, mon="profile rbd", osd=f"profile rbd pool={pool}")
            identifier = stack.enter_context(secret(libvirt_qemu, base64.b64decode(key)))
            options = {"rbd_user": user, "rbd_secret_uuid": identifier}
        yield rbd_backend(cluster, pool, tmp_path / "instances", **options)


def test_guest_boots_from_a_clone_and_sees_it_grow(start_guest, backend: Backend, guest: GuestImage) -> None:
    image = backend.image("guest", "disk")
    image.cache(lambda target: Path(target).write_bytes(guest.disk.read_bytes()), "template", GIB)

    running = start_guest(image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml())
    assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
    assert running.wait_for(SIZE_SAYS) == str(GIB)

    with pytest.raises(exceptions.DiskInUse):
        image.resize_image(2 * GIB)
    image.resize_image(2 * GIB, domain=running.domain)
    running.wait_for(f"imagebackend-guest: size=({2 * GIB})")
    with pytest.raises(exceptions.DiskInUse):
        image.create_snap("running")
    with pytest.raises(exceptions.DiskInUse):
        image.remove()

    running.domain.destroy()
    assert image.get_disk_size(image.path) == 2 * GIB
    assert backend.image("another", "disk").exists() is False
    image.remove()
    assert not image.exists()


def test_guest_boots_again_after_its_disk_was_rolled_back_and_flattened(
    start_guest, ceph: Cluster, rbd_pool: str, guest: GuestImage, tmp_path: Path
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    image = backend.image("guest", "disk")
    image.cache(lambda target: Path(target).write_bytes(guest.disk.read_bytes()), "template")
    image.create_snap("untouched")
    disk = image.libvirt_info("virtio", "vda", "disk", "writeback", {}).to_xml()

    running = start_guest(disk)
    running.wait_for(ROOT_SAYS)
    running.domain.destroy()
    image.snapshot_extract(str(tmp_path / "written"), "raw")
    image.rollback_to_snap("untouched")
    image.snapshot_extract(str(tmp_path / "rolled-back"), "raw")
    original = guest.disk.read_bytes()
    assert (tmp_path / "written").read_bytes() != original
    assert (tmp_path / "rolled-back").read_bytes() == original

    image.flatten()
    assert start_guest(disk).wait_for(ROOT_SAYS) == "/dev/vda1 ext4"


@pytest.mark.parametrize("luks", ["luks1", "luks2"])
def test_guest_boots_from_an_encrypted_disk(
    start_guest,
    ceph: Cluster,
    rbd_pool: str,
    guest: GuestImage,
    libvirt_qemu: libvirt.virConnect,
    tmp_path: Path,
    luks: str,
) -> None:
    passphrase = "correct horse battery staple"
    with secret(libvirt_qemu, passphrase.encode(), "volume") as identifier:
        image = rbd_backend(ceph, rbd_pool, tmp_path / "instances").image("guest", "disk")
        assert isinstance(image, Rbd)
        image.encryption = Encryption(passphrase, identifier, luks)
        image.cache(lambda target: Path(target).write_bytes(guest.disk.read_bytes()), "template", 128 << 20)

        running = start_guest(image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml())
        assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
        assert running.wait_for(SIZE_SAYS) == str(128 << 20)
        running.domain.destroy()
        image.remove()


def test_the_model_has_the_key_that_libvirt_keeps(
    ceph_cephx: Cluster, libvirt_qemu: libvirt.virConnect, tmp_path: Path
) -> None:
    with ceph_cephx.pool() as pool:
        user = f"guests-{pool}"
        key = ceph_cephx.user(user, mon="profile rbd", osd=f"profile rbd pool={pool}")
        with secret(libvirt_qemu, base64.b64decode(key)) as identifier:
            options = {"rbd_user": user, "rbd_secret_uuid": identifier}
            image = rbd_backend(ceph_cephx, pool, tmp_path, **options).image("guest", "disk")
            model = image.get_model(libvirt_qemu)

    assert (model.pool, model.name, model.user) == (pool, "guest_disk", user)
    assert model.password == key
    assert key not in repr(model)
    monitor = ceph_cephx.command("mon dump")["mons"][0]["public_addrs"]["addrvec"]
    assert list(model.servers) == [each["addr"] for each in monitor if each["type"] == "v1"]
