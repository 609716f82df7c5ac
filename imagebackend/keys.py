# SPDX-License-Identifier: Apache-2.0
"""Where the keys of encrypted disks come from: a function of the agent's, or its key manager through castellan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from imagebackend import exceptions

__all__ = ["Keys", "castellan_keys"]

#: Called with the instance and the name of a disk; returns the disk's key, the same whenever it is asked.
Keys = Callable[[str, str], bytes]


def castellan_keys(manager: Any, context: Any, key_id: Callable[[str, str], str]) -> Keys:
    """Return what takes keys from a key manager; needs the extra ``castellan``.

    A key's bytes are used as they are, all of them: they are not made into text.

    :param manager: a ``castellan.key_manager.KeyManager``.
    :param context: what the manager is asked with: an oslo.context, usually.
    :param key_id: called with the instance and the name of a disk; returns the manager's ID of the key.
    """
    from castellan.common import exception

    def key(instance: str, disk_name: str) -> bytes:
        wanted = key_id(instance, disk_name)
        try:
            found = manager.get(context, wanted).get_encoded()
        except exception.CastellanException as error:
            raise exceptions.StorageError("key manager", f"it has not given key {wanted!a:.80}: {error}") from error
        if not isinstance(found, bytes):
            raise exceptions.InvalidArgument(f"encryption key: key {wanted!a:.80} is not bytes")
        return found

    return key
