# SPDX-License-Identifier: Apache-2.0
"""Encrypted volumes: how they are encrypted, by their tags, and the mapping through which they are read and written.

The mapping has the name that Nova gives it: the volume's, and ``-dmcrypt``. It is there while somebody needs the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images import lvm_naming, lvm_options
from imagebackend.keys import Keys
from imagebackend.storage import cryptsetup, device_mapper
from imagebackend.storage.cryptsetup import Cipher, Cryptsetup
from imagebackend.storage.lvm2 import Volume, VolumeGroup

__all__ = ["CryptMapping", "content_size", "facts", "key_of", "new_cipher", "of"]

_OPTION = "[ephemeral_storage_encryption] enabled"


def new_cipher(conf: cfg.ConfigOpts) -> Cipher | None:
    """Return how new disks are encrypted; None: they are not."""
    options = conf.ephemeral_storage_encryption
    return Cipher(options.default_format, options.cipher, options.key_size) if options.enabled else None


def facts(cipher: Cipher | None) -> dict[str, str | int]:
    """Return what is recorded of a volume's encryption."""
    if cipher is None:
        return {}
    return {"encryption": cipher.format, "cipher": cipher.name, "key_size": cipher.key_size}


def of(recorded: Mapping[str, str]) -> Cipher | None:
    """Return how a volume is encrypted, by what is recorded; None: it is not."""
    if "encryption" not in recorded:
        return None
    return Cipher(recorded["encryption"], recorded["cipher"], int(recorded["key_size"]))


def content_size(volume: Volume) -> int:
    """Return how many bytes of a volume are its user's."""
    cipher = of(lvm_naming.facts(volume.tags))
    return volume.size - (cipher.header if cipher else 0)


def key_of(keys: Keys | None, instance: str, disk_name: str) -> bytes:
    """Return the key of a disk.

    :raises InvalidConfiguration: nobody gives any.
    :raises InvalidArgument: what gives them gave something else.
    """
    if keys is None:
        raise exceptions.InvalidConfiguration(_OPTION, "the agent must give keys: Backend(conf, keys=…)")
    key = keys(instance, disk_name)
    if not isinstance(key, bytes):
        raise exceptions.InvalidArgument(f"encryption key of {instance}/{disk_name}: bytes are needed")
    return key


class CryptMapping:
    """The mapping of one volume, which is active. Making the object does no I/O.

    :param volume: its name.
    :param key: returns the key; called only when it is needed.
    """

    def __init__(
        self, conf: cfg.ConfigOpts, group: VolumeGroup, volume: str, cipher: Cipher, key: Callable[[], bytes]
    ) -> None:
        self._name = f"{volume}-dmcrypt"
        self._volume = group.device(volume)
        self._cipher = cipher
        self._key = key
        self._helper = lvm_options.root_helper(conf)
        self._tool = Cryptsetup(timeout=conf.libvirt.images_tool_timeout, root_helper=self._helper)
        # Whether the guest's discards are to show on the volume is decided with whether they are passed down at all.
        self._discards = conf.libvirt.hw_disk_discard == "unmap"
        self.device = cryptsetup.device(self._name)

    def format(self) -> None:
        """Make the volume an encrypted one; what it held is lost."""
        self._tool.format(self._volume, self._cipher, self._key())

    def open(self) -> str:
        """Make the mapping if it is not there, and return the path of its device."""
        if not os.path.exists(self.device):
            self._tool.open(self._volume, self._name, self._cipher, self._key(), discards=self._discards)
        return self.device

    def close(self) -> None:
        """Remove the mapping; nothing happens if it is not there.

        :raises DiskInUse: something has it open.
        """
        if os.path.lexists(self.device):
            self._tool.close(self._name)

    def grow(self) -> None:
        """Give the mapping, which may be in use, the size that the volume has now."""
        if os.path.exists(self.device):
            self._tool.resize(self._name, self._key())

    def is_in_use(self) -> bool:
        """Return whether something has the mapping open."""
        return bool(device_mapper.open_count(self._name, self._helper))
