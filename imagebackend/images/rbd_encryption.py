# SPDX-License-Identifier: Apache-2.0
"""Encrypted disks: LUKS, as librbd writes and reads it (https://docs.ceph.com/en/latest/rbd/rbd-encryption/).

From release 18 on, librbd can encrypt a clone of an image that is not; elsewhere, an encrypted disk is a copy of its
template. Before release 17, librbd takes the size that an image is to have for that with the header if its encryption
is loaded: images are only resized when it is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.storage import ceph, ceph_connection

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["ROOM", "Encryption", "can_clone", "create", "describe", "encrypt"]

#: libvirt's names for the formats of librbd.
_LIBVIRT = {"luks1": "luks", "luks2": "luks2"}
#: The size of the larger of the two headers, in bytes.
ROOM = 16 << 20


@dataclass(frozen=True)
class Encryption:
    """How a disk is encrypted.

    :ivar passphrase: what opens it; never recorded.
    :ivar secret_uuid: of libvirt's secret that holds the passphrase.
    :ivar format: ``luks1`` or ``luks2``.
    """

    passphrase: str = field(repr=False)
    secret_uuid: str
    format: str = "luks2"

    def __post_init__(self) -> None:
        if self.format not in _LIBVIRT:
            raise exceptions.InvalidArgument(f"encryption format {self.format!a:.80}: luks1 or luks2 is needed")

    def load(self, image: Any) -> None:
        """Have an open image encrypt what is written to it, and decrypt what is read."""
        image.encryption_load(_format_number(self.format), self.passphrase)


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
        image.encryption_format(_format_number(encryption.format), encryption.passphrase)
        if image.size() == size + ROOM:  # a clone's encryption is not loaded by that
            encryption.load(image)
        header = size + ROOM - image.size()
    with pool.open(name) as image:
        image.resize(size + header)
    return {"format": encryption.format, "secret_uuid": encryption.secret_uuid, "header": header}


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


def _format_number(name: str) -> int:
    import rbd

    number: int = {"luks1": rbd.RBD_ENCRYPTION_FORMAT_LUKS1, "luks2": rbd.RBD_ENCRYPTION_FORMAT_LUKS2}[name]
    return number
