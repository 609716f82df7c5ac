# SPDX-License-Identifier: Apache-2.0
"""How logical volumes of disks and templates are named and tagged. Decisions only.

A disk's volume has the name that Nova gives it: ``instance_disk``, with each ``_`` of the two doubled. Every other
name that this library gives has a ``+`` in it, which is in no instance's and no disk's::

    instance_disk+new               is being made; with the tag "complete", about to take the disk's name
    instance_disk+removed+1a2b3c4d  was the disk, and is being cleared
    instance_disk+snap+1a2b3c4d     a snapshot
    instance_disk+pool+1a2b3c4d     the pool that the disk has for itself
    template+debian-12+1a2b….SIZE   a template for disks of one size

What a volume is stands in its tags, of the form ``imagebackend.key=value``.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterable, Mapping

from imagebackend import exceptions, names
from imagebackend.storage import lvm2

__all__ = [
    "COMPLETE",
    "disk_names",
    "disk_tag",
    "facts",
    "maker_tag",
    "now",
    "parse_path",
    "tags",
    "template_key",
    "template_volume",
    "volume_name",
]

#: The tag without which nothing that this library made is used.
COMPLETE = "imagebackend.complete"

_PREFIX = "imagebackend."
_DISK = re.compile(r"((?:[^_]|__)+)_((?:[^_]|__)+)")
_PATH = re.compile(r"/dev/(?!mapper/)([^/]+)/([^/]+)")
_MAPPING_PATH = re.compile(r"/dev/mapper/([^/]+)-dmcrypt")
_LONGEST_SUFFIX = "+removed+00000000"
_KEY_LENGTH = 16
_TEMPLATE_NAME_SHOWN = 40


def volume_name(group: str, instance: str, disk_name: str) -> str:
    """Return the name of a disk's volume.

    :raises InvalidName: LVM has no volume of that name, or could give none to what belongs to the disk.
    """
    name = f"{instance.replace('_', '__')}_{disk_name.replace('_', '__')}"
    try:
        lvm2.device_name(group, lvm2.check_name(name) + _LONGEST_SUFFIX)
    except exceptions.InvalidName as error:
        raise exceptions.InvalidName("disk", f"{instance}_{disk_name}", error.reason) from error
    return name


def disk_names(volume: str) -> tuple[str, str] | None:
    """Return instance and disk name of a disk's volume; None for one that is no disk's."""
    found = _DISK.fullmatch(volume)
    if found is None:
        return None
    instance, disk_name = (part.replace("__", "_") for part in found.groups())
    try:
        return names.check_name("instance", instance), names.check_name("disk", disk_name)
    except exceptions.InvalidName:
        return None


def parse_path(path: str) -> tuple[str | None, str]:
    """Return volume group and volume of a path ``/dev/group/volume``, or of that of a mapping, which has no group.

    :raises InvalidName: it is not of that form, or no disk's.
    """
    mapping = _MAPPING_PATH.fullmatch(path)
    found = (None, mapping[1]) if mapping is not None else _volume_of(path)
    if found is None or disk_names(found[1]) is None:
        raise exceptions.InvalidName("disk", path, "/dev/GROUP/INSTANCE_DISK is needed")
    return found[0] and lvm2.check_name(found[0]), lvm2.check_name(found[1])


def template_key(name: str, digest: str) -> str:
    """Return what tells a template's content from that of another one of its name, or of a similar name."""
    return hashlib.sha256(f"{name}\0{digest}".encode()).hexdigest()[:_KEY_LENGTH]


def template_volume(name: str, key: str, size: int) -> str:
    """Return the name of the volume that disks of ``size`` bytes are made from."""
    return f"template+{name[:_TEMPLATE_NAME_SHOWN]}+{key}.{size}"


def disk_tag(instance: str, disk_name: str) -> str:
    """Return the tag of everything that belongs to a disk."""
    return f"{_PREFIX}disk={instance}/{disk_name}"


def maker_tag(host: str, folder: str) -> str:
    """Return the tag of what a host makes under the locks that are in a folder.

    Others may use the volume group, too, whose locks are elsewhere: they cannot tell whether somebody is still at it.
    """
    maker = hashlib.sha256(f"{host}\0{folder}".encode()).hexdigest()[:_KEY_LENGTH]
    return f"{_PREFIX}maker={maker}"


def tags(values: Mapping[str, str | int]) -> set[str]:
    """Return tags that say this."""
    return {f"{_PREFIX}{key}={value}" for key, value in values.items()}


def facts(found: Iterable[str]) -> dict[str, str]:
    """Return what tags of this library's say; nothing for a volume that it did not make."""
    pairs = (tag.removeprefix(_PREFIX).partition("=") for tag in found if tag.startswith(_PREFIX))
    return {key: value for key, _, value in pairs}


def now() -> str:
    """Return the time, as tags have it: snapshots made within a second are told apart."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _volume_of(path: str) -> tuple[str, str] | None:
    found = _PATH.fullmatch(path)
    return None if found is None else (found[1], found[2])
