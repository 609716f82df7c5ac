# SPDX-License-Identifier: Apache-2.0
"""Where a disk is, for code that has to open it itself."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LocalBlockImage", "LocalFileImage", "Model", "RBDImage"]


@dataclass(frozen=True)
class LocalFileImage:
    """A disk in a file.

    :ivar path: the file, absolute.
    :ivar format: its format, as QEMU names it.
    """

    path: str
    format: str


@dataclass(frozen=True)
class LocalBlockImage:
    """A disk on a block device.

    :ivar path: the device node.
    :ivar format: ``raw``.
    """

    path: str
    format: str = "raw"


@dataclass(frozen=True)
class RBDImage:
    """A disk in a Ceph cluster.

    :ivar name: the image, in ``pool``.
    :ivar user: the Ceph user, without ``client.``; None: no authentication.
    :ivar password: the user's key, never shown.
    :ivar servers: the monitors, as ``address:port``.
    :ivar format: ``raw``.
    """

    name: str
    pool: str
    user: str | None
    password: str | None = field(repr=False)
    servers: tuple[str, ...]
    format: str = "raw"


Model = LocalFileImage | LocalBlockImage | RBDImage
