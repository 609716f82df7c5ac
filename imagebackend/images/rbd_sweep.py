# SPDX-License-Identifier: Apache-2.0
"""What killed processes left of disks in a pool."""

from __future__ import annotations

import contextlib
import logging

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images import rbd_disk, rbd_location
from imagebackend.storage import ceph

__all__ = ["settle_disks"]

LOG = logging.getLogger(__name__)


def settle_disks(conf: cfg.ConfigOpts, pool: ceph.Pool) -> list[str]:
    """Finish or undo what processes of this host began with disks and did not live to end.

    :returns: the names of the images.
    """
    settled = []
    for name in pool.intents():
        found = rbd_location.disk_names(name)
        if found is None:
            continue
        disk = rbd_disk.RbdDisk(conf, pool, *found, name)
        # Whoever is still at it has the lock.
        with contextlib.suppress(exceptions.LockTimeout), disk.lock(timeout=0):
            if disk.is_left():
                try:
                    disk.settle()
                except exceptions.ImageBackendError as error:
                    LOG.warning("what is left of %s is still there: %s", disk.spec, error)
                else:
                    settled.append(name)
    return settled
