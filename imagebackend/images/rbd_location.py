# SPDX-License-Identifier: Apache-2.0
"""How RBD disks are named: in the pool, for QEMU, for libvirt. Decisions only."""

from __future__ import annotations

import re

from imagebackend import exceptions, names
from imagebackend.storage import ceph

__all__ = ["disk_names", "format_path", "image_name", "parse_path", "pool_name"]

_ESCAPED = re.compile(r"(?<!\\):")


def image_name(instance: str, disk_name: str) -> str:
    """Return the name of a disk's image, which is Nova's.

    Whatever else this library keeps in a pool has a ``:`` in its name, which is in no instance's and no disk's.

    :raises InvalidName: the instance's name would make two disks' names one.
    """
    if "_" in instance:
        raise exceptions.InvalidName("instance", instance, "a '_' separates it from the disk's name in a Ceph pool")
    return f"{instance}_{disk_name}"


def disk_names(image: str) -> tuple[str, str] | None:
    """Return instance and disk name of a disk's image; None for an image that is no disk's."""
    instance, separator, disk_name = image.partition("_")
    try:
        return (names.check_name("instance", instance), names.check_name("disk", disk_name)) if separator else None
    except exceptions.InvalidName:
        return None


def pool_name(option: str, name: str) -> str:
    """Return the name of a pool or namespace if it cannot be mistaken for something else.

    :raises InvalidConfiguration: it can.
    """
    try:
        return names.check_name("pool", name)
    except exceptions.InvalidName as error:
        raise exceptions.InvalidConfiguration(option, str(error)) from error


def format_path(pool: ceph.Pool, image: str) -> str:
    """Return an image's path as QEMU takes it: ``rbd:pool/image:id=user:conf=file``."""
    path = f"rbd:{pool.spec(image)}"
    if pool.settings.user:
        path += f":id={_escape(pool.settings.user)}"
    if pool.settings.conf_file:
        path += f":conf={_escape(pool.settings.conf_file)}"
    return path


def parse_path(path: str) -> tuple[str, str, str]:
    """Return pool, namespace and image of a path as QEMU takes it, or of ``pool/image`` as libvirt has it.

    :raises InvalidName: it is neither.
    """
    parts = _ESCAPED.split(path.removeprefix("rbd:"))[0].split("/")
    if len(parts) not in (2, 3) or disk_names(parts[-1]) is None:
        raise exceptions.InvalidName("disk", path, "rbd:pool/instance_disk is needed")
    for part in parts[:-1]:
        names.check_name("pool", part)
    return parts[0], parts[1] if len(parts) == 3 else "", parts[-1]


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace(":", "\\:").replace("@", "\\@")
