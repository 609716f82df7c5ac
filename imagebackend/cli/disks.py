# SPDX-License-Identifier: Apache-2.0
"""Finding a disk, and telling what it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from imagebackend import exceptions, names

if TYPE_CHECKING:
    from imagebackend.backend import Backend
    from imagebackend.images.base import Image

__all__ = ["describe", "find"]


def find(backend: Backend, instance: str, disk: str) -> Image:
    """Return a disk that is there, whatever type it was made with.

    :raises InvalidName: one of the names is not safe.
    :raises DiskNotFound: it is not there.
    """
    names.check_name("disk", disk)
    for recorded in backend.disks(instance):
        if recorded.disk_name == disk:
            return recorded
    # In a store that has no disk.info, or made by something else that keeps none.
    image = backend.image(instance, disk)
    if not image.exists():
        raise exceptions.DiskNotFound(image.path)
    return image


def describe(image: Image) -> dict[str, Any]:
    """Return what a disk is, as JSON has it; sizes in bytes.

    :raises ImageBackendError: it is gone, or damaged.
    """
    backing_files = image.parents()
    return {
        "instance": image.instance,
        "disk": image.disk_name,
        "type": type(image).__name__.lower(),
        "path": image.path,
        "format": image.resolve_driver_format(),
        "size": image.get_disk_size(image.path),
        "allocated": image.allocated_size(),
        "template": image.template_name(),
        "backing_files": backing_files,
        "chain_depth": len(backing_files),
        "in_use": image.is_in_use(),
        "snapshots": [dataclasses.asdict(each) for each in image.list_snaps()],
    }
