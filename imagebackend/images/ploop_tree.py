# SPDX-License-Identifier: Apache-2.0
"""How the deltas of a ploop disk hang together: decisions, without I/O.

A snapshot that the library makes is not what is below the disk's image, but a copy of it beside it: QEMU, which opens
one image and nothing below it, sees all of the disk in the one that is on top, and may give blocks back there without
uncovering old ones. What has to be the one root of the tree is an image that holds nothing. ``ploop`` itself puts an
empty image on top of the old one instead; of such a chain, a copy that is whole takes the place of its part here as
soon as it is worked on.
"""

from __future__ import annotations

import dataclasses
import re
import uuid
from collections.abc import Collection, Mapping, Sequence

from imagebackend.storage.ploop import ROOT_IMAGE, TOP, Delta, Descriptor

__all__ = [
    "EMPTY_IMAGE",
    "children",
    "find_snapshot",
    "layers",
    "new_guid",
    "new_image",
    "rearranged",
    "renamed",
    "resized",
    "snapshot_image",
    "snapshot_name",
    "snapshots",
]

#: The root below copies that are whole.
EMPTY_IMAGE = f"{ROOT_IMAGE}.empty"
# No name that a user can give contains '@'.
_SNAPSHOT = re.compile(rf"{re.escape(ROOT_IMAGE)}@(.+)\Z")


def new_guid() -> str:
    """Return a GUID that no delta has."""
    return f"{{{uuid.uuid4()}}}"


def new_image() -> str:
    """Return a name for a new image, as ``ploop`` would."""
    return f"{ROOT_IMAGE}.{new_guid()}"


def snapshot_image(name: str) -> str:
    """Return what the image of a snapshot is called."""
    return f"{ROOT_IMAGE}@{name}"


def snapshot_name(delta: Delta) -> str:
    """Return the name of a snapshot: of one that ``ploop`` made, its GUID without braces."""
    match = _SNAPSHOT.match(delta.file)
    return match[1] if match else delta.guid.strip("{}")


def snapshots(descriptor: Descriptor) -> list[Delta]:
    """Return the deltas that are snapshots."""
    return [delta for delta in descriptor.deltas if delta.guid != TOP and delta.file != EMPTY_IMAGE]


def find_snapshot(descriptor: Descriptor, name: str) -> Delta | None:
    """Return the snapshot of that name, or None."""
    return next((delta for delta in snapshots(descriptor) if snapshot_name(delta) == name), None)


def layers(descriptor: Descriptor, guid: str) -> Sequence[Delta]:
    """Return the deltas that hold what can be read of one: itself, and what is below it but the empty root."""
    return [delta for delta in descriptor.chain(guid) if delta.file != EMPTY_IMAGE]


def children(descriptor: Descriptor, guid: str) -> list[Delta]:
    """Return the deltas right above one."""
    return [delta for delta in descriptor.deltas if delta.parent == guid]


def rearranged(
    descriptor: Descriptor, *, whole: Mapping[str, str], drop: Collection[str] = (), size: int | None = None
) -> Descriptor:
    """Return what describes the disk when some deltas are whole.

    :param whole: GUID and image of each delta that is new, or gets another image, and holds all that can be read of
        it.
    :param drop: the GUIDs of those that are no more; nothing but ``whole`` ones is above them.
    :param size: of the disk, in bytes, if it changes.
    """
    root = next((delta for delta in descriptor.deltas if delta.file == EMPTY_IMAGE), None)
    root = root or Delta(new_guid(), None, EMPTY_IMAGE)
    gone = {root.guid, *drop, *whole}
    kept = [
        dataclasses.replace(delta, parent=delta.parent or root.guid)
        for delta in descriptor.deltas
        if delta.guid not in gone
    ]
    deltas = [root, *kept, *(Delta(guid, root.guid, file) for guid, file in whole.items())]
    if len(deltas) == 2:
        deltas = [Delta(TOP, None, deltas[1].file)]
    return dataclasses.replace(descriptor, deltas=tuple(deltas), virtual_size=size or descriptor.virtual_size)


def renamed(descriptor: Descriptor, image: str) -> Descriptor:
    """Return what describes the disk when the image on top has another name."""
    deltas = (dataclasses.replace(each, file=image) if each.guid == TOP else each for each in descriptor.deltas)
    return dataclasses.replace(descriptor, deltas=tuple(deltas))


def resized(descriptor: Descriptor, size: int) -> Descriptor:
    """Return what describes the disk when it has another size, in bytes."""
    return dataclasses.replace(descriptor, virtual_size=size)
