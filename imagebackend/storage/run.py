# SPDX-License-Identifier: Apache-2.0
"""Where a disk's data lie in the file of an image."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """Guest data that lie in one piece in the image file; sizes and offsets in bytes.

    :ivar guest_offset, length: where they are on the disk.
    :ivar host_offset: where they are in the file.
    :ivar compressed_length: 0 for data that lie there as they are. Otherwise they are one cluster, or what the disk
        has of it, which takes this many bytes of the file at most.
    """

    guest_offset: int
    host_offset: int
    length: int
    compressed_length: int = 0
