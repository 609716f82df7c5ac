# SPDX-License-Identifier: Apache-2.0
"""Disks made from images of an image service in the same cluster, and images made from disks."""

from __future__ import annotations

import contextlib
import logging

from imagebackend import exceptions, faults
from imagebackend.images import rbd_disk, rbd_image, rbd_location
from imagebackend.storage import ceph

__all__ = ["clone", "copy", "remove"]

LOG = logging.getLogger(__name__)

# Glance's name for the snapshot that it refers to.
_SNAPSHOT = "snap"


def clone(disk: rbd_disk.RbdDisk, location: rbd_location.Location, layout: ceph.Layout) -> None:
    """Make a disk from a snapshot of an image; one with too many parents is flattened.

    :raises ImageUnacceptable: it is in another cluster.
    :raises DiskNotFound: there is no such image or snapshot.
    :raises StorageError: also for format 1 where the snapshot is not protected.
    """
    if location.fsid != disk.pool.fsid():
        raise exceptions.ImageUnacceptable(str(location), "in another cluster")
    parent = ceph.Pool(disk.pool.settings, location.pool)
    limit = disk.conf.libvirt.images_rbd_max_clone_depth
    disk.clone(parent, location.image, location.snapshot, layout)
    if _depth(disk.pool, disk.name) > limit:
        LOG.info("disk %s has more than %d parents and is flattened", disk.spec, limit)
        with disk.pool.open(disk.name) as image:
            image.flatten()


def copy(disk: rbd_disk.RbdDisk, snapshot: str, image_id: str, layout: ceph.Layout) -> rbd_location.Location:
    """Copy a disk, which the caller has locked, to an image in the pool that its parent is in.

    :param snapshot: the name of a snapshot of the disk, as long as this takes.
    :param image_id: the name of the image, which appears when it is whole.
    :raises DiskExists: there is an image of that name.
    """
    parent = rbd_image.parent_of(disk.pool, disk.name)
    target = disk.pool if parent is None else ceph.Pool(disk.pool.settings, *parent[:2])
    partial = f"partial:{image_id}"
    if target.image_id(image_id) is not None:
        raise exceptions.DiskExists(target.spec(image_id))
    # No snapshot that a user made is called that.
    snapshot = f"direct:{snapshot}"
    with contextlib.ExitStack() as undo:
        # First, what a killed one left.
        _discard(target, partial, disk, snapshot)
        undo.callback(_discard, target, partial, disk, snapshot)
        disk.create_snapshot(snapshot, protect=True)
        faults.point("disk.direct_snapshot.snapshot")
        target.clone(disk.pool, disk.name, snapshot, partial, layout)
        with target.open(partial) as image:
            image.flatten()
            image.create_snap(_SNAPSHOT)
            image.protect_snap(_SNAPSHOT)
        faults.point("disk.direct_snapshot.copied")
        target.rename(partial, image_id)
    return rbd_location.Location(target.fsid(), target.name, image_id, _SNAPSHOT)


def remove(pool: ceph.Pool, location: rbd_location.Location, whole: bool) -> None:
    """Remove the snapshot that an image service refers to, or the whole image.

    :param pool: any pool of the cluster.
    :raises SnapshotNotFound, DiskNotFound: it is not there.
    :raises DiskInUse: the snapshot has clones.
    """
    where = ceph.Pool(pool.settings, location.pool)
    if whole:
        rbd_image.bury(where, location.image)
    else:
        rbd_image.remove_snapshot(where, location.image, location.snapshot)


def _depth(pool: ceph.Pool, name: str) -> int:
    depth = 0
    while (parent := rbd_image.parent_of(pool, name)) is not None:
        pool, name = ceph.Pool(pool.settings, *parent[:2]), parent[2]
        depth += 1
    return depth


def _discard(target: ceph.Pool, partial: str, disk: rbd_disk.RbdDisk, snapshot: str) -> None:
    try:
        rbd_image.bury(target, partial)
        with contextlib.suppress(exceptions.SnapshotNotFound):
            rbd_image.remove_snapshot(disk.pool, disk.name, snapshot)
    except exceptions.ImageBackendError as error:
        # Whatever led here matters more; the next copy, or removing the disk, removes it.
        LOG.warning("snapshot %s of %s is still there: %s", snapshot, disk.spec, error)
