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

__all__ = ["Tree", "may_be_empty", "new_guid", "new_image", "snapshot_image", "snapshot_name"]

# No name that a user can give contains '@', and 'ploop' ends the names of its images with a GUID in braces.
_EMPTY_IMAGE = f"{ROOT_IMAGE}.empty"
_EMPTY = re.compile(rf"{re.escape(_EMPTY_IMAGE)}(?:@[0-9a-f-]{{36}})?\Z")
_SNAPSHOT = re.compile(rf"{re.escape(ROOT_IMAGE)}@([^@]+)(?:@[0-9a-f-]{{36}})?\Z")


def new_guid() -> str:
    """Return a GUID that no delta has."""
    return f"{{{uuid.uuid4()}}}"


def new_image(delta: Delta | None = None) -> str:
    """Return a name for a new image, as ``ploop`` would.

    :param delta: whose image it takes the place of; a snapshot keeps its name.
    """
    match = None if delta is None else _SNAPSHOT.match(delta.file)
    return f"{ROOT_IMAGE}.{new_guid()}" if match is None else f"{ROOT_IMAGE}@{match[1]}@{uuid.uuid4()}"


def snapshot_image(name: str) -> str:
    """Return what the image of a snapshot is called."""
    return f"{ROOT_IMAGE}@{name}"


def snapshot_name(delta: Delta) -> str:
    """Return the name of a snapshot: of one that ``ploop`` made, its GUID without braces."""
    match = _SNAPSHOT.match(delta.file)
    return match[1] if match else delta.guid.strip("{}")


def may_be_empty(delta: Delta) -> bool:
    """Return whether a delta was made as the root that holds nothing; ``ploop`` may have merged something into it."""
    return delta.parent is None and delta.guid != TOP and _EMPTY.match(delta.file) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Tree:
    """The deltas of a disk.

    :ivar descriptor: what describes them.
    :ivar empty: the GUID of the root that holds nothing, or None.
    """

    descriptor: Descriptor
    empty: str | None = None

    @property
    def snapshots(self) -> list[Delta]:
        """The deltas that are snapshots."""
        return [delta for delta in self.descriptor.deltas if delta.guid not in (TOP, self.empty)]

    def find_snapshot(self, name: str) -> Delta | None:
        """Return the snapshot of that name, or None."""
        return next((delta for delta in self.snapshots if snapshot_name(delta) == name), None)

    def layers(self, guid: str) -> Sequence[Delta]:
        """Return the deltas that hold what can be read of one: itself, and what is below it, the lowest first."""
        return [delta for delta in self.descriptor.chain(guid) if delta.guid != self.empty]

    def children(self, guid: str) -> list[Delta]:
        """Return the deltas right above one."""
        return [delta for delta in self.descriptor.deltas if delta.parent == guid]

    def rearranged(
        self, *, whole: Mapping[str, str], drop: Collection[str] = (), size: int | None = None
    ) -> Descriptor:
        """Return what describes the disk when some deltas are whole.

        :param whole: GUID and image of each delta that is new, or gets another image, and holds all that can be read
            of it.
        :param drop: the GUIDs of those that are no more; nothing but ``whole`` ones is above them.
        :param size: of the disk, in bytes, if it changes.
        """
        old = self.descriptor
        root = self._root()
        gone = {root.guid, *drop, *whole}
        kept = [
            dataclasses.replace(delta, parent=delta.parent or root.guid)
            for delta in old.deltas
            if delta.guid not in gone
        ]
        deltas = [root, *kept, *(Delta(guid, root.guid, file) for guid, file in whole.items())]
        if len(deltas) == 2:
            deltas = [Delta(TOP, None, deltas[1].file)]
        return dataclasses.replace(old, deltas=tuple(deltas), virtual_size=size or old.virtual_size)

    def tidied(self) -> Descriptor:
        """Return what describes the disk without a root that nothing but the disk is on, and with its usual name.

        That is :data:`ROOT_IMAGE`, under which domains know it; if a snapshot has it, any name that no snapshot of
        the library can have.
        """
        deltas = list(self.descriptor.deltas)
        if len(deltas) == 2 and self.empty is not None:
            deltas = [Delta(TOP, None, self.descriptor.top.file)]
        image = self.descriptor.top.file
        if all(delta.file != ROOT_IMAGE for delta in deltas):
            image = ROOT_IMAGE
        elif _SNAPSHOT.match(image) or _EMPTY.match(image):
            image = new_image()
        tidy = (dataclasses.replace(each, file=image) if each.guid == TOP else each for each in deltas)
        return dataclasses.replace(self.descriptor, deltas=tuple(tidy))

    def resized(self, size: int) -> Descriptor:
        """Return what describes the disk when it has another size, in bytes."""
        return dataclasses.replace(self.descriptor, virtual_size=size)

    def _root(self) -> Delta:
        """Return the root that holds nothing, a new one if there is none."""
        if self.empty is not None:
            return self.descriptor.delta(self.empty)
        taken = any(delta.file == _EMPTY_IMAGE for delta in self.descriptor.deltas)
        return Delta(new_guid(), None, f"{_EMPTY_IMAGE}@{uuid.uuid4()}" if taken else _EMPTY_IMAGE)
