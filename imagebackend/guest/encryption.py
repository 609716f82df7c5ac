# SPDX-License-Identifier: Apache-2.0
"""``<encryption>``: how an image is encrypted, and which secret of libvirt opens it.

Source: https://libvirt.org/formatstorageencryption.html.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagebackend import exceptions
from imagebackend.guest.element import Element, Property, choice, text

if TYPE_CHECKING:
    from lxml import etree

__all__ = ["UUID", "LibvirtConfigGuestDiskEncryption", "LibvirtConfigGuestDiskEncryptionSecret"]

#: A UUID, as libvirt's schema has it.
UUID = text(r"[a-fA-F0-9]{32}|[a-fA-F0-9]{8}-([a-fA-F0-9]{4}-){3}[a-fA-F0-9]{12}", "a UUID")

_FORMATS = choice("luks", newer={"luks2": 7009000, "luks-any": 9003000})

# An encrypted image that is attached as a plain one shows the guest its ciphertext, and takes plain text.
_ENCRYPTION = Element(
    Property("format", "format", _FORMATS, since=2001000, needed=True),
    Property("engine", "engine", choice("qemu", "librbd"), since=7009000, needed=True),
)
_SECRET = Element(
    Property("type", "type", choice("passphrase")),
    Property("uuid", "uuid", UUID),
)


@dataclass(slots=True, kw_only=True)
class LibvirtConfigGuestDiskEncryptionSecret:
    """The secret, as libvirt keeps it.

    :ivar type: ``passphrase``.
    :ivar uuid: of the secret.
    """

    type: str = "passphrase"
    uuid: str | None = None


@dataclass(slots=True, kw_only=True)
class LibvirtConfigGuestDiskEncryption:
    """How an image is encrypted.

    :ivar format: ``luks``; with ``engine`` librbd also ``luks2`` and ``luks-any``.
    :ivar secret: what opens it.
    :ivar engine: who decrypts: ``qemu``, the default, or ``librbd``.
    """

    format: str = "luks"
    secret: LibvirtConfigGuestDiskEncryptionSecret = field(default_factory=LibvirtConfigGuestDiskEncryptionSecret)
    engine: str | None = None

    def element(self, version: int, indent: str) -> str:
        """Return the element, each line with ``indent`` before it.

        :raises InvalidArgument: no UUID, or a value that libvirt does not take.
        :raises Unsupported: ``version`` of libvirt does not know the format or the engine.
        """
        if self.secret.uuid is None:
            raise exceptions.InvalidArgument("encryption: the uuid of its secret is missing")
        head = _ENCRYPTION.attributes(self, version)
        secret = _SECRET.attributes(self.secret, version)
        return f"{indent}<encryption{head}>\n{indent}  <secret{secret}/>\n{indent}</encryption>\n"

    @classmethod
    def read(cls, node: etree._Element | None) -> LibvirtConfigGuestDiskEncryption | None:
        """Return what ``node``, an ``<encryption>``, says; None for none."""
        if node is None:
            return None
        secret = LibvirtConfigGuestDiskEncryptionSecret(**_SECRET.read_attributes(node.find("secret")))
        return cls(secret=secret, **_ENCRYPTION.read_attributes(node))
