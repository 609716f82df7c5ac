# SPDX-License-Identifier: Apache-2.0
"""Clearing volumes of what their guests left, as ``volume_clear`` says."""

from __future__ import annotations

from oslo_config import cfg

from imagebackend.storage import block_device
from imagebackend.storage.lvm2 import Volume

__all__ = ["clear", "is_needed"]


def is_needed(conf: cfg.ConfigOpts, volume: Volume) -> bool:
    """Return whether a volume is to be cleared before its space is given back.

    A pool gives no volume what was another one's without zeroing it.
    """
    return volume.kind != "thin" and conf.libvirt.volume_clear != "none"


def clear(conf: cfg.ConfigOpts, device: str) -> None:
    """Clear a volume; what it held is gone when this returns.

    :raises DiskInUse: something is on it.
    :raises StorageError: it could not be written to, and may hold everything still.
    """
    size = block_device.size(device)
    limit = conf.libvirt.volume_clear_size << 20
    length = min(limit, size) if limit else size
    match conf.libvirt.volume_clear:
        case "shred":
            block_device.shred(device, length, timeout=conf.libvirt.images_tool_timeout)
        case "discard":
            block_device.discard(device, 0, length)
        case _:
            block_device.zero(device, 0, length)
