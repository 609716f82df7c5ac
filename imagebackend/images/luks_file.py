# SPDX-License-Identifier: Apache-2.0
"""A disk in a raw file that QEMU encrypts: what that makes of growing."""

from __future__ import annotations

from imagebackend.images import transfer
from imagebackend.images.raw_file import RawFile
from imagebackend.storage import luks

__all__ = ["LuksFile"]


class LuksFile(RawFile):
    """A disk in a raw file behind a header of LUKS1. Its snapshots are opened by the same passphrase."""

    disk_format = "luks"

    def grow(self, size: int) -> None:
        """Make the disk ``size`` bytes long. What it gains reads as noise, as when QEMU itself makes it longer."""
        with transfer.open_file(self._disk.path) as descriptor:
            header = luks.header_size(descriptor, self._disk.path)
        super().grow(size + header)
