# SPDX-License-Identifier: Apache-2.0
"""Root file systems of containers that are folders, cloned from one that is kept as a template.

They are no disks: they have no size, no format and no record, and libvirt mounts them as they are
(``<filesystem type='mount'>``).
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults
from imagebackend.guest import LibvirtConfigGuestFilesys
from imagebackend.images import disk_file
from imagebackend.images.base import Progress
from imagebackend.images.disk_file import DiskFile
from imagebackend.storage import publish, tree, tree_clone

__all__ = ["clone_root", "remove_root"]

LOG = logging.getLogger(__name__)


def clone_root(
    conf: cfg.ConfigOpts,
    source: str,
    instance: Any,
    name: str = "root",
    *,
    target: str = "/",
    progress: Progress | None = None,
) -> LibvirtConfigGuestFilesys:
    """Clone a folder for a container, and return its libvirt description; nothing is cloned if it is there.

    A subvolume of btrfs becomes a snapshot, in one step. Elsewhere files share their blocks where the file system can
    and ``[DEFAULT] reflink`` lets them, and are copied otherwise. It takes root.

    :param conf: options of this library.
    :param source: the folder, absolute, which nobody changes meanwhile.
    :param instance: the instance that it is for.
    :param name: what it is called in the instance's folder.
    :param target: where the container has it mounted.
    :param progress: called with the bytes done and in all.
    :raises InvalidName: one of the names is not safe.
    :raises DiskExists: a disk has the name.
    :raises ImageUnacceptable: a device, a FIFO, a socket or another file system is in it.
    :raises Unsupported: blocks must be shared, and cannot be.
    :raises InsufficientSpace, PermissionDenied, StorageError, LockTimeout: there is none.
    """
    place = disk_file.for_disk(conf, instance, name)
    with place.lock():
        if not _is_there(place):
            _clone(conf, os.path.abspath(source), place.path, progress)
    return LibvirtConfigGuestFilesys(source_type="mount", source_dir=place.path, target_dir=target)


def remove_root(conf: cfg.ConfigOpts, instance: Any, name: str = "root") -> None:
    """Remove a clone; do nothing if it is not there. Nobody may have it mounted.

    :raises InvalidName: one of the names is not safe.
    :raises DiskExists: a disk has the name.
    :raises PermissionDenied, StorageError, LockTimeout: it, or a part of it, is still there.
    """
    place = disk_file.for_disk(conf, instance, name)
    with place.lock():
        if _is_there(place):
            publish.remove_folder(place.path)
        publish.remove_partial(place.path)
        with contextlib.suppress(OSError):
            os.rmdir(place.folder)


def _clone(conf: cfg.ConfigOpts, source: str, path: str, progress: Progress | None) -> None:
    publish.remove_partial(path)
    subvolume = conf.reflink != "never" and tree_clone.is_subvolume(source)
    measured = None if subvolume else tree.measure(source, source)
    with publish.new_folder(path, durable=conf.durable_writes) as folder:
        try:
            os.rmdir(folder)  # a snapshot makes its own
            if not (subvolume and tree_clone.snapshot(source, folder)):
                os.mkdir(folder, 0o700)
                measured = measured or tree.measure(source, source)
                tree_clone.clone(source, folder, measured.size, share=conf.reflink, progress=progress)
        except OSError as error:
            raise exceptions.storage_error(error, path) from error
        faults.point("root.clone.filled")
        if conf.durable_writes:
            tree_clone.sync(folder)
    LOG.info("root file system %s cloned from %s", path, source)


def _is_there(place: DiskFile) -> bool:
    if os.path.isdir(place.path) and not os.path.islink(place.path) and not os.path.lexists(place.descriptor):
        return True
    if os.path.lexists(place.path):
        raise exceptions.DiskExists(place.path)
    return False
