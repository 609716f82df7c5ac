# SPDX-License-Identifier: Apache-2.0
"""Names and sizes, checked once, where they enter."""

from __future__ import annotations

import re

from imagebackend import exceptions

__all__ = ["SECTOR", "check_name", "check_size", "instance_id"]

#: Virtual sizes are multiples of this many bytes: the smallest sector that libvirt and QEMU know.
SECTOR = 512

# QEMU's own ceiling for a block device: 2**63 - 1 rounded down to a sector, and qcow2's is lower still.
_MAX_SIZE = 1 << 62
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z", re.ASCII)


def check_name(kind: str, name: object) -> str:
    """Return ``name`` if it is safe as a file name, an argument and a part of a URL.

    :param kind: what is named, for the error: ``template``, ``instance``, ``disk``, ``snapshot``.
    :raises InvalidName: it is not ``[A-Za-z0-9][A-Za-z0-9._-]{0,127}``.
    """
    if not isinstance(name, str):
        raise exceptions.InvalidName(kind, name, f"a string is needed, not {type(name).__name__}")
    if _SAFE.match(name) is None:
        raise exceptions.InvalidName(
            kind,
            name,
            "1 to 128 of the ASCII letters, digits, '.', '_' and '-' are allowed, the first a letter or digit",
        )
    return name


def check_size(size: object) -> int:
    """Return ``size`` if a disk can have it.

    :param size: bytes.
    :raises InvalidSize: not an integer, not above 0, not a multiple of 512, or beyond what QEMU can address.
    """
    if not isinstance(size, int) or isinstance(size, bool):
        raise exceptions.InvalidSize(size, f"a number of bytes is needed, not {type(size).__name__}")
    if size <= 0:
        raise exceptions.InvalidSize(size, "a disk has at least one sector of 512 bytes")
    if size > _MAX_SIZE:
        raise exceptions.InvalidSize(size, f"QEMU addresses at most {_MAX_SIZE} bytes")
    if size % SECTOR:
        raise exceptions.InvalidSize(size, f"not a multiple of 512 bytes; {-(-size // SECTOR) * SECTOR} is the next")
    return size


def instance_id(instance: object) -> str:
    """Return the checked name of an instance: the string itself, or its ``uuid``.

    :raises InvalidName: it has neither, or the name is not safe.
    """
    return check_name("instance", instance if isinstance(instance, str) else getattr(instance, "uuid", instance))
