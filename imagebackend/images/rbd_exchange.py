# SPDX-License-Identifier: Apache-2.0
"""Disks made from images of an image service in the same cluster, and images made from disks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from oslo_config import cfg

from imagebackend import exceptions, faults
from imagebackend.images import rbd_disk, rbd_image
from imagebackend.storage import ceph, rbd_url
from imagebackend.templates.sources import Source, open_source

__all__ = ["clone_first", "copy", "locations", "remove"]

LOG = logging.getLogger(__name__)

# Glance's name for the snapshot that it refers to.
_SNAPSHOT = "snap"


def locations(conf: cfg.ConfigOpts, context: object, image: str | Sequence[str]) -> Sequence[str]:
    """Return where an image may be cloned from, as :meth:`imagebackend.images.rbd.Rbd.clone` takes it.

    :raises ImageUnacceptable: it is not raw, or nothing knows of it.
    :raises FetchFailed: what knows the locations cannot be reached, or has no such image.
    """
    if not isinstance(image, str):
        return image
    if image.startswith("rbd://"):
        return [image]
    try:
        source = context if isinstance(context, Source) else open_source(_url(image), conf)
    except exceptions.InvalidArgument as error:
        raise exceptions.ImageUnacceptable(image, str(error)) from error
    disk_format = source.metadata().disk_format
    if disk_format not in (None, "raw"):
        raise exceptions.ImageUnacceptable(image, f"its format is {disk_format}; disks in Ceph are raw")
    return source.locations()


def clone_first(disk: rbd_disk.RbdDisk, urls: Sequence[str], layout: ceph.Layout) -> rbd_url.Location:
    """Make a disk from the first location of an image that can be cloned, and return that.

    :raises ImageUnacceptable: none can; says why for each.
    :raises InsufficientSpace, StorageTimeout: another location would not help.
    """
    reasons = []
    for url in urls:
        try:
            location = rbd_url.parse_url(url)
            _clone(disk, location, layout)
        except (exceptions.InsufficientSpace, exceptions.TimedOut):
            raise
        except exceptions.InvalidConfiguration as error:  # the disk's own pool was there a moment ago
            reasons.append(f"{url}: {error.reason}")
        except (exceptions.ImageUnacceptable, exceptions.NotFound, exceptions.StorageError) as error:
            reasons.append(str(error))
        else:
            return location
    reason = "; ".join(reasons) or "it has no location in a store"
    raise exceptions.ImageUnacceptable(", ".join(urls) or "image", reason)


def copy(disk: rbd_disk.RbdDisk, snapshot: str, image_id: str, layout: ceph.Layout) -> rbd_url.Location:
    """Copy a disk, which the caller has locked, to an image in the pool that its parent is in.

    :param snapshot: the name of a snapshot of the disk, as long as this takes.
    :param image_id: the name of the image, which appears when it is whole.
    :raises DiskExists: there is an image of that name.
    """
    parent = rbd_image.parent_of(disk.pool, disk.name)
    target = disk.pool if parent is None else parent[0]
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
    return rbd_url.Location(target.fsid(), target.name, image_id, _SNAPSHOT)


def remove(pool: ceph.Pool, location: rbd_url.Location, whole: bool) -> None:
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


def _url(image: str) -> str:
    return image if ":" in image else f"glance:{image}"


def _clone(disk: rbd_disk.RbdDisk, location: rbd_url.Location, layout: ceph.Layout) -> None:
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
    if len(rbd_image.ancestors(disk.pool, disk.name)) > limit:
        LOG.info("disk %s has more than %d parents and is flattened", disk.spec, limit)
        with disk.pool.open(disk.name) as image:
            image.flatten()


def _discard(target: ceph.Pool, partial: str, disk: rbd_disk.RbdDisk, snapshot: str) -> None:
    try:
        rbd_image.bury(target, partial)
        with contextlib.suppress(exceptions.SnapshotNotFound):
            rbd_image.remove_snapshot(disk.pool, disk.name, snapshot)
    except exceptions.ImageBackendError as error:
        # Whatever led here matters more; the next copy, or removing the disk, removes it.
        LOG.warning("snapshot %s of %s is still there: %s", snapshot, disk.spec, error)
