# SPDX-License-Identifier: Apache-2.0
"""Encrypted disks: LUKS, as librbd writes and reads it (https://docs.ceph.com/en/latest/rbd/rbd-encryption/).

From release 18 on, librbd can encrypt a clone of an image that is not; elsewhere, an encrypted disk is a copy of its
template. Before release 17, librbd takes the size that an image is to have for that with the header if its encryption
is loaded: images are only resized when it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images.encryption import Encryption
from imagebackend.storage import ceph, ceph_connection

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["ROOM", "can_clone", "create", "describe", "encrypt", "load"]

#: libvirt's names for the formats of librbd.
_LIBVIRT = {"luks1": "luks", "luks2": "luks2"}
#: The size of the larger of the two headers, in bytes.
ROOM = 16 << 20


def load(encryption: Encryption, image: Any) -> None:
    """Have an open image encrypt what is written to it, and decrypt what is read."""
    image.encryption_load(_format_number(_format_of(encryption)), encryption.passphrase)


def can_clone(conf: cfg.ConfigOpts) -> bool:
    """Return whether encrypted disks are clones of their templates.

    :raises Unsupported: they have to be, but librbd cannot encrypt clones.
    """
    wanted = conf.libvirt.images_rbd_encrypted_clones
    # It came with the encryption of clones.
    is_supported = hasattr(ceph_connection.import_rbd().Image, "encryption_load2")
    if wanted == "always" and not is_supported:
        version = ceph_connection.librbd_version()
        reason = f"librbd {version} cannot; install that of Ceph 18, or set images_rbd_encrypted_clones to auto"
        raise exceptions.Unsupported("encrypting a clone", reason)
    return is_supported and wanted != "never"


def create(pool: ceph.Pool, name: str, size: int, layout: ceph.Layout, encryption: Encryption) -> dict[str, Any]:
    """Make an empty encrypted image.

    :param size: what its user sees, in bytes.
    :returns: what has to be recorded: format, secret and the size of the header.
    """
    pool.create(name, size + ROOM, layout)
    return encrypt(pool, name, size, encryption)


def encrypt(pool: ceph.Pool, name: str, size: int, encryption: Encryption) -> dict[str, Any]:
    """Encrypt an image that holds nothing itself; what its parent holds then comes behind the header.

    :param size: what its user is to see, in bytes; it has :data:`ROOM` more.
    :returns: what has to be recorded: format, secret and the size of the header.
    """
    with pool.open(name) as image:
        image.encryption_format(_format_number(_format_of(encryption)), encryption.passphrase)
        if image.size() == size + ROOM:  # a clone's encryption is not loaded by that
            load(encryption, image)
        header = size + ROOM - image.size()
    with pool.open(name) as image:
        image.resize(size + header)
    return {"format": _format_of(encryption), "secret_uuid": encryption.secret_uuid, "header": header}


def describe(disk: LibvirtConfigGuestDisk, facts: dict[str, Any] | None) -> None:
    """Fill in what libvirt has to know of a disk's encryption.

    :param facts: what :func:`create` returned; None: the disk is not encrypted.
    """
    if facts is None:
        return
    from imagebackend import guest

    secret = guest.LibvirtConfigGuestDiskEncryptionSecret(uuid=facts["secret_uuid"])
    disk.ephemeral_encryption = guest.LibvirtConfigGuestDiskEncryption(
        format=_LIBVIRT[facts["format"]], secret=secret, engine="librbd"
    )


def _format_of(encryption: Encryption) -> str:
    return encryption.format or "luks2"


def _format_number(name: str) -> int:
    import rbd

    number: int = {"luks1": rbd.RBD_ENCRYPTION_FORMAT_LUKS1, "luks2": rbd.RBD_ENCRYPTION_FORMAT_LUKS2}[name]
    return number
