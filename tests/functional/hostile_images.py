# SPDX-License-Identifier: Apache-2.0
"""A corpus of images that must not become templates, each with the reason that the refusal has to give.

``HOSTILE_IMAGES`` is the table; ``image.build(path)`` makes one, with real tools where they make such images and by
changing what they made where they do not. Files that an image refers to lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.functional.hostile_disks import (
    HOSTILE_OTHERS,
    HOSTILE_PLOOP,
    HOSTILE_RAW,
    HOSTILE_VDI,
    HOSTILE_VHD,
    HOSTILE_VHDX,
)
from tests.functional.hostile_qcow2 import HOSTILE_QCOW2
from tests.functional.hostile_vmdk import HOSTILE_VMDK
from tests.functional.image_building import Build

__all__ = ["HOSTILE_IMAGES", "HostileImage"]


@dataclass(frozen=True)
class HostileImage:
    """An image to refuse.

    :ivar claimed_format: what its uploader says that it is.
    :ivar reason: a regular expression that the refusal matches.
    :ivar build: makes it at a path.
    """

    name: str
    claimed_format: str
    reason: str
    build: Build


def _images(claimed_format: str, table: Mapping[str, tuple[str, Build]]) -> list[HostileImage]:
    return [
        HostileImage(f"{claimed_format}-{name}", claimed_format, reason, build)
        for name, (reason, build) in table.items()
    ]


HOSTILE_IMAGES: tuple[HostileImage, ...] = (
    *_images("qcow2", HOSTILE_QCOW2),
    *_images("vmdk", HOSTILE_VMDK),
    *_images("vhd", HOSTILE_VHD),
    *_images("vhdx", HOSTILE_VHDX),
    *_images("vdi", HOSTILE_VDI),
    *_images("ploop", HOSTILE_PLOOP),
    *_images("raw", HOSTILE_RAW | HOSTILE_OTHERS),
)
