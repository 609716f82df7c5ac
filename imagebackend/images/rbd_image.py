# SPDX-License-Identifier: Apache-2.0
"""Images in a pool, whatever they are of: their record, their parents and clones, and how they are removed."""

from __future__ import annotations

import errno
import json
import logging
from typing import Any

from imagebackend import exceptions, faults
from imagebackend.storage import ceph

__all__ = [
    "RECORD",
    "ancestors",
    "bury",
    "bury_zombie",
    "is_zombie",
    "parent_of",
    "parse_record",
    "remove",
    "remove_snapshot",
    "remove_snapshots",
]

LOG = logging.getLogger(__name__)

#: Where in an image's metadata its record is: JSON. Clones get a copy of their template's.
RECORD = "imagebackend"

_ZOMBIE = "zombie:"


def parse_record(name: str, text: str | None) -> dict[str, Any]:
    """Return a record that is a JSON object; an empty one for None.

    :raises CorruptRecord: it is not.
    """
    if text is None:
        return {}
    try:
        record = json.loads(text)
    except ValueError as error:
        raise exceptions.CorruptRecord(name, f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise exceptions.CorruptRecord(name, "not a JSON object")
    return record


def remove_snapshot(pool: ceph.Pool, image_name: str, name: str) -> None:
    """Remove a snapshot of an image, protected or not.

    :raises SnapshotNotFound: the image has none of that name.
    :raises DiskInUse: the snapshot has clones.
    """
    import rbd

    with pool.open(image_name) as image:
        try:
            image.set_snap(name)
            clones = [f"{each['pool']}/{each['image']}" for each in image.list_children2()]
            if clones:
                reason = f"snapshot {name} has clones; flatten or remove them first: {', '.join(clones[:5])}"
                raise exceptions.DiskInUse(pool.spec(image_name), reason)
            image.set_snap(None)
            if image.is_protected_snap(name):
                image.unprotect_snap(name)
            image.remove_snap(name)
        except rbd.ImageNotFound as error:
            raise exceptions.SnapshotNotFound(name, f"image {pool.spec(image_name)} has no such snapshot") from error
        faults.point("disk.snapshot_remove.changed")


def remove(pool: ceph.Pool, name: str, trash_delay: int | None = None) -> bool:
    """Remove an image with its snapshots; one that has clones stays.

    :param trash_delay: as for :meth:`imagebackend.storage.ceph.Pool.remove`.
    :returns: whether it is gone.
    :raises DiskNotFound: there is none of that name.
    :raises DiskInUse: a client has it open.
    """
    with pool.open(name) as image:
        parent = _parent(pool, image)
        if list(image.list_children2()):
            return False
        if trash_delay is None:
            remove_snapshots(image)
    try:
        pool.remove(name, trash_delay=trash_delay)
    except exceptions.StorageError as error:
        if error.errno != errno.ENOTEMPTY:  # somebody has just cloned a snapshot, and librbd keeps it for the clone
            raise
        return False
    faults.point("disk.remove.image")
    if parent is not None:
        bury_zombie(*parent)
    return True


def remove_snapshots(image: Any) -> None:
    """Remove the snapshots of an open image, protected or not, none of which has clones."""
    for snapshot in [each["name"] for each in image.list_snaps()]:
        if image.is_protected_snap(snapshot):
            image.unprotect_snap(snapshot)
        image.remove_snap(snapshot)
        faults.point("disk.remove.snapshot")


def bury(pool: ceph.Pool, name: str, trash_delay: int | None = None) -> None:
    """Remove an image with its snapshots; do nothing if it is not there.

    One that has clones only loses its name, and is removed with the last of them.

    :param trash_delay: as for :meth:`imagebackend.storage.ceph.Pool.remove`.
    :raises DiskInUse: a client has it open.
    """
    try:
        if remove(pool, name, trash_delay) or is_zombie(name):
            return
        with pool.open(name, read_only=True) as image:
            image_id = image.id()
        pool.rename(name, f"{_ZOMBIE}{image_id}")
    except exceptions.DiskNotFound:
        return
    LOG.info("image %s has clones and will be removed with the last of them", pool.spec(name))


def is_zombie(name: str) -> bool:
    """Return whether an image lost its name because it had clones."""
    return name.startswith(_ZOMBIE)


def bury_zombie(pool: ceph.Pool, name: str) -> None:
    """Remove an image that lost its name because it had clones, if it has none any more.

    Nothing that goes wrong is raised: the clone that led here is gone, and the sweep finds what is left.
    """
    if is_zombie(name):
        try:
            bury(pool, name)
        except exceptions.ImageBackendError as error:
            LOG.warning("image %s without a name is still there: %s", name, error)


def parent_of(pool: ceph.Pool, name: str) -> tuple[ceph.Pool, str] | None:
    """Return where an image's parent is, and its name; None if the image holds all its data itself.

    :raises DiskNotFound: there is no such image.
    """
    with pool.open(name, read_only=True) as image:
        return _parent(pool, image)


def ancestors(pool: ceph.Pool, name: str) -> list[tuple[ceph.Pool, str]]:
    """Return the parent of an image, that one's parent, and so on.

    :raises DiskNotFound: there is no such image.
    """
    found = []
    parent = parent_of(pool, name)
    while parent is not None:
        found.append(parent)
        parent = parent_of(*parent)
    return found


def _parent(pool: ceph.Pool, image: Any) -> tuple[ceph.Pool, str] | None:
    import rbd

    try:
        spec = image.get_parent_image_spec()
    except rbd.ImageNotFound:
        return None
    return ceph.Pool(pool.settings, spec["pool_name"], spec["pool_namespace"]), spec["image_name"]
