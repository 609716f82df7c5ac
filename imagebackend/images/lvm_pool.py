# SPDX-License-Identifier: Apache-2.0
"""Where disks' volumes come from: a thin pool that all share, thin pools of their own, or the volume group itself."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images import lvm_options
from imagebackend.storage import device_mapper, lvm2
from imagebackend.storage.device_mapper import PoolStatus
from imagebackend.storage.lvm2 import VolumeGroup

__all__ = ["GroupSpace", "OwnPools", "Space", "ThinPool", "space"]

_GIB = 1 << 30
# What Nova gives a sparse volume to begin with.
_ROOM = 64 << 20


class ThinPool:
    """A thin pool. Making the object does no I/O.

    :param conf: options of this library.
    :param group: where it is.
    :param name: its name.
    """

    #: New volumes read as zeros.
    zeroed = True

    def __init__(self, conf: cfg.ConfigOpts, group: VolumeGroup, name: str) -> None:
        self._conf = conf
        self._group = group
        self.name = name

    def create(self, name: str, size: int, data: int, tags: Iterable[str]) -> None:
        """Make an empty volume.

        :param data: how many bytes are about to be written to it.
        :raises InsufficientSpace: the pool is too full for that.
        """
        self.refuse_full(data)
        self._group.create_thin(self.name, name, size, tags)

    def refuse_full(self, more: int = 0) -> None:
        """Make sure that the pool is not as full as the options allow, nor will be with so many bytes more.

        :raises InsufficientSpace: it is.
        :raises InvalidConfiguration: there is no such pool, and none is to be made.
        :raises StorageError: it has failed, and must be repaired.
        """
        status = self.status()
        libvirt = self._conf.libvirt
        data = 100 * (status.data_used + more) / status.data_size
        metadata = 100 * status.metadata_used / status.metadata_size
        where = f"{self._group.name}/{self.name}"
        if data > libvirt.images_thin_pool_data_limit or status.state.startswith("out_of_data_space"):
            with_more = f" with {more} bytes more" if more else ""
            reason = (
                f"{data:.1f} % of its data space are used{with_more}, [libvirt] images_thin_pool_data_limit is "
                f"{libvirt.images_thin_pool_data_limit}; extend it (lvextend), or remove disks or templates"
            )
            raise exceptions.InsufficientSpace(where, reason=reason)
        if metadata > libvirt.images_thin_pool_metadata_limit:
            reason = (
                f"{metadata:.1f} % of its metadata space are used, [libvirt] images_thin_pool_metadata_limit is "
                f"{libvirt.images_thin_pool_metadata_limit}; extend it (lvextend --poolmetadatasize)"
            )
            raise exceptions.InsufficientSpace(where, reason=reason)
        if not status.state.startswith("rw"):
            raise exceptions.StorageError(where, f"its state is {status.state!r}; see 'lvs -o+lv_health_status'")

    def status(self) -> PoolStatus:
        """Return how full the pool is; it is made, or activated, if need be.

        :raises InvalidConfiguration: there is no such pool, and none is to be made.
        """
        status = self._ask()
        if status is None:
            self._prepare()
            status = self._ask()
        if status is None:
            raise exceptions.StorageError(f"{self._group.name}/{self.name}", "it has no device; see 'lvs -a'")
        return status

    def _ask(self) -> PoolStatus | None:
        device = lvm2.device_name(self._group.name, self.name)
        helper = lvm_options.root_helper(self._conf)
        # Before it has its first volume, there is only the second of these.
        return device_mapper.pool_status(f"{device}-tpool", helper) or device_mapper.pool_status(device, helper)

    def _prepare(self) -> None:
        found = self._group.report(self.name)
        if not found:
            size = self._conf.libvirt.images_thin_pool_size
            if not size:
                reason = f"there is no pool {self.name} in {self._group.name}; make it, or set images_thin_pool_size"
                raise exceptions.InvalidConfiguration("[libvirt] images_thin_pool", reason)
            try:
                self._group.create_thin_pool(self.name, size * _GIB, self._conf.libvirt.images_volume_tags)
            except exceptions.DiskExists:
                return  # another process was faster
        elif found[0].kind != "thin-pool":
            reason = f"{self._group.name}/{self.name} is a {found[0].kind} volume, not a thin pool"
            raise exceptions.InvalidConfiguration("[libvirt] images_thin_pool", reason)
        else:
            self._group.activate(self.name)


class OwnPools:
    """Thin pools with one volume each. Making the object does no I/O."""

    zeroed = True

    def __init__(self, group: VolumeGroup) -> None:
        self._group = group

    def create(self, name: str, size: int, data: int, tags: Iterable[str]) -> None:
        """Make an empty volume in a pool of its own, which has room for the data and little more.

        :raises InsufficientSpace: the volume group has no room.
        """
        pool = f"{name.removesuffix('+new')}+pool+{secrets.token_hex(4)}"
        # With the tags that lead to the disk, so that one without a volume is found.
        self._group.create_thin_pool(pool, data + _ROOM, tags)
        try:
            self._group.create_thin(pool, name, size, tags)
        except exceptions.ImageBackendError:
            self._group.remove(pool)
            raise


class GroupSpace:
    """Volumes with extents of their own. Making the object does no I/O."""

    def __init__(self, conf: cfg.ConfigOpts, group: VolumeGroup) -> None:
        self._group = group
        self._layout = lvm_options.layout(conf)
        self.zeroed: bool = conf.libvirt.images_volume_group_zeroed

    def create(self, name: str, size: int, data: int, tags: Iterable[str]) -> None:
        """Make a volume.

        :raises InsufficientSpace: the volume group has no room.
        """
        self._group.create(name, size, tags, self._layout)


Space = ThinPool | OwnPools | GroupSpace


def space(conf: cfg.ConfigOpts, group: VolumeGroup) -> Space:
    """Return where new disks' volumes come from."""
    pool = lvm_options.thin_pool(conf)
    if pool is not None:
        return ThinPool(conf, group, pool)
    if conf.libvirt.sparse_logical_volumes:
        return OwnPools(group)
    return GroupSpace(conf, group)
