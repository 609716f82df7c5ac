# SPDX-License-Identifier: Apache-2.0
"""Disks in files that QEMU encrypts: made, changed and read with qemu-img, booted by libvirt."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import libvirt
import pytest

import imagebackend
from imagebackend import exceptions, process
from imagebackend.images.encryption import Encryption
from imagebackend.images.file_image import FileImage
from tests.contract.conftest import MIB, TEMPLATE_SIZE, Store, template_content
from tests.functional.libvirt_secret import secret
from tests.functional.test_faults import run
from tools.guest_image import ROOT_SAYS, SIZE_SAYS, GuestImage

PASSPHRASE = "correct, horse; battery=staple"
SECRET = "8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10"
ENCRYPTION = Encryption(PASSPHRASE, SECRET, iter_time=1)
SIZE = 8 * MIB


@pytest.fixture(params=["raw", "qcow2"])
def store(request: pytest.FixtureRequest, xfs_folder: Path) -> Store:
    return Store(xfs_folder, request.param, {})


def disk(store: Store, encryption: Encryption | None = ENCRYPTION) -> FileImage:
    image = store.image()
    assert isinstance(image, FileImage)
    image.encryption = encryption
    return image


def content(image: FileImage, tmp_path: Path) -> bytes:
    image.snapshot_extract(str(tmp_path / "copy"), "raw")
    return (tmp_path / "copy").read_bytes()


def write(store: Store, image: FileImage, tmp_path: Path, text: bytes) -> None:
    """Write to the beginning of the disk as a guest would."""
    key, data = tmp_path / "key", tmp_path / "data"
    key.write_text(PASSPHRASE)
    data.write_bytes(text)
    secret = "encrypt.key-secret" if store.image_type == "qcow2" else "key-secret"
    options = f"driver={store.format(image)},{secret}=key,file.driver=file,file.filename={image.path}"
    store.run(
        *("qemu-io", "--object", f"secret,id=key,file={key}", "--image-opts", options),
        *("-c", f"write -s {data} 0 {len(text)}"),
    )


def test_an_encrypted_disk_holds_the_template_keeps_it_secret_and_is_described(
    store: Store, tmp_path: Path, libvirt_qemu: libvirt.virConnect, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    start = subprocess.Popen

    def noted(command: list[str], *arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        commands.append(command)
        return start(command, *arguments, **options)

    monkeypatch.setattr(process.subprocess, "Popen", noted)
    image = disk(store)
    image.cache(store.fetch, "template", SIZE)

    assert image.get_disk_size(image.path) == SIZE
    assert content(image, tmp_path) == template_content() + bytes(SIZE - TEMPLATE_SIZE)
    write(store, image, tmp_path, b"written" * 1000)
    stored = Path(image.path).read_bytes()
    assert template_content()[:4096] not in stored
    assert b"written" * 10 not in stored
    assert PASSPHRASE not in f"{commands} {ENCRYPTION!r}"
    record = Path(image.path).parent / "disk.info"
    assert PASSPHRASE.encode() not in record.read_bytes()

    describe(disk(store, None), libvirt_qemu)
    record.write_text(json.dumps({image.path: store.format(image)}))
    if store.image_type == "qcow2":
        with pytest.raises(exceptions.CorruptRecord, match="which secret opens"):
            image.libvirt_info("virtio", "vda", "disk", "none", {})


def describe(image: FileImage, connection: libvirt.virConnect) -> None:
    """Have a disk described by who does not know its passphrase, twice: the second time from memory."""
    for _ in range(2):
        described = image.libvirt_info("virtio", "vda", "disk", "none", {})
        assert described.driver_format == ("qcow2" if image.resolve_driver_format() == "qcow2" else "raw")
        assert described.ephemeral_encryption is not None
        assert described.ephemeral_encryption.secret.uuid == SECRET
    xml = (
        "<domain type='qemu'><name>encrypted</name><memory>65536</memory><os><type>hvm</type></os>"
        f"<devices>{described.to_xml()}</devices></domain>"
    )
    domain = connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    assert f"<secret type='passphrase' uuid='{SECRET}'/>" in domain.XMLDesc()
    domain.undefine()
    with pytest.raises(exceptions.Unsupported, match="containers"):
        image.libvirt_fs_info("/")


def test_what_can_be_done_with_a_disk_can_be_done_with_an_encrypted_one(store: Store, tmp_path: Path) -> None:
    image = disk(store)
    image.cache(store.fetch, "template", SIZE)
    image.create_snap("one")
    write(store, image, tmp_path, b"written" * 1024)

    image.resize_image(2 * SIZE)
    assert image.get_disk_size(image.path) == 2 * SIZE
    assert [snapshot.virtual_size for snapshot in image.list_snaps()] == [SIZE]
    found = content(image, tmp_path)
    assert len(found) == 2 * SIZE
    assert found[: 7 * 1024] == b"written" * 1024
    assert found[7 * 1024 : TEMPLATE_SIZE] == template_content()[7 * 1024 :]

    image.rollback_to_snap("one")
    assert content(image, tmp_path) == template_content() + bytes(SIZE - TEMPLATE_SIZE)
    image.remove_snap("one")
    image.flatten()
    store.backend.templates.remove("template")
    assert content(image, tmp_path)[:TEMPLATE_SIZE] == template_content()

    image.import_file(image.instance, str(store.qcow2_template), "disk")
    assert content(image, tmp_path) == template_content()
    assert [each.path for each in store.backend.disks()] == [image.path]
    image.remove()
    assert not image.exists()
    assert not Path(image.path).parent.exists()


def test_only_who_has_the_passphrase_can_work_on_the_disk(store: Store, tmp_path: Path) -> None:
    image = disk(store)
    image.create_from_func(lambda target: Path(target).write_bytes(template_content()[:MIB]) and None, MIB)
    assert content(image, tmp_path) == template_content()[:MIB]

    for encryption, reason in (
        (None, f"is encrypted, with secret {SECRET}"),
        (Encryption(PASSPHRASE, SECRET.replace("8", "9")), f"is encrypted, with secret {SECRET}"),
        (Encryption("wrong", SECRET), "it is another"),
    ):
        other = disk(store, encryption)
        with pytest.raises(exceptions.InvalidArgument, match=reason):
            other.snapshot_extract(str(tmp_path / "secret"), "raw")
    assert not (tmp_path / "secret").exists()
    with pytest.raises(exceptions.InvalidArgument, match="is encrypted"):
        disk(store, None).import_file(image.instance, str(store.raw_template), "disk")
    assert content(image, tmp_path) == template_content()[:MIB]

    plain = store.make(disk_name="plain")
    assert isinstance(plain, FileImage)
    plain.encryption = ENCRYPTION
    with pytest.raises(exceptions.InvalidArgument, match="is not encrypted"):
        plain.import_file(image.instance, str(store.raw_template), "plain")


def test_what_cannot_be_encrypted_is_refused(store: Store) -> None:
    with pytest.raises(exceptions.Unsupported, match="LUKS1"):
        disk(store, Encryption(PASSPHRASE, SECRET, "luks2"))
    with pytest.raises(exceptions.InvalidArgument):
        Encryption(PASSPHRASE, SECRET, "rot13")
    with pytest.raises(exceptions.InvalidArgument):
        Encryption(PASSPHRASE, SECRET, iter_time=0)
    ploop = store.backend.image("guest", "disk", "ploop")
    with pytest.raises(exceptions.Unsupported, match="Ploop"):
        ploop.encryption = ENCRYPTION


def test_a_change_that_was_cut_short_is_mended_with_the_passphrase(ext4_folder: Path) -> None:
    store = Store(ext4_folder, "qcow2", {})
    disk(store).cache(store.fetch, "template", SIZE)
    assert run(1, lambda: disk(store).create_snap("one")) == -signal.SIGKILL

    with pytest.raises(exceptions.InvalidArgument, match="is encrypted"):
        disk(store, None).libvirt_info("virtio", "vda", "disk", "none", {})
    disk(store).libvirt_info("virtio", "vda", "disk", "none", {})
    disk(store, None).libvirt_info("virtio", "vda", "disk", "none", {})


def test_a_guest_boots_from_an_encrypted_disk_and_sees_it_grow(
    start_guest: Any, store: Store, guest: GuestImage, libvirt_qemu: libvirt.virConnect
) -> None:
    with secret(libvirt_qemu, PASSPHRASE.encode(), "volume") as identifier:
        image = disk(store, Encryption(PASSPHRASE, identifier, iter_time=1))
        image.cache(imagebackend.open_source(str(guest.disk), store.conf).fetch, "guest", 96 * MIB)

        running = start_guest(image.libvirt_info("virtio", "vda", "disk", None, {}).to_xml())
        assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
        assert running.wait_for(SIZE_SAYS) == str(96 * MIB)
        with pytest.raises(exceptions.DiskInUse):
            image.remove()
        image.resize_image(128 * MIB, domain=running.domain)
        running.wait_for(f"imagebackend-guest: size=({128 * MIB})")
        running.domain.destroy()
        assert image.get_disk_size(image.path) == 128 * MIB
        image.remove()
