# SPDX-License-Identifier: Apache-2.0
"""A disk in a raw file: what its format makes of growing and snapshots."""

from __future__ import annotations

import datetime
import os

from imagebackend import exceptions, faults
from imagebackend.images import transfer
from imagebackend.images.base import Progress, Snapshot
from imagebackend.images.disk_file import DiskFile
from imagebackend.storage import image_lock, publish, reflink

__all__ = ["RawFile"]


class RawFile:
    """A disk in a raw file; its snapshots are reflinks of it, beside it: ``disk@name``."""

    disk_format = "raw"
    grows_running = True

    def __init__(self, disk: DiskFile) -> None:
        self._disk = disk
        self._conf = disk.conf

    def check(self) -> None:
        """Do nothing: what is in a raw file is its guest's."""

    def is_settled(self) -> bool:
        """Return True: a raw file needs no mending when its writer was killed."""
        return True

    def is_closed(self) -> bool:
        """Return True: nothing in a raw file says who writes to it."""
        return True

    def settle(self) -> None:
        """Do nothing: no change of a raw file can be half done."""

    def source_path(self) -> str:
        """Return the path for QEMU."""
        return self._disk.path

    def virtual_size(self) -> int:
        """Return the disk's size in bytes."""
        return transfer.virtual_size(self._disk.path, self.disk_format)

    def new_size(self, size: int) -> int:
        """Return the size that the disk gets when it is asked to have this one."""
        return size

    def grow(self, size: int) -> None:
        """Make the disk ``size`` bytes long; allocated, if that is wanted."""
        path = self._disk.path
        with image_lock.hold(path), transfer.open_file(path, writable=True) as descriptor:
            transfer.set_size(self._conf, descriptor, size, path)
            faults.point("disk.resize.changed")
            if self._conf.durable_writes:
                transfer.sync(descriptor, path)

    def depends(self) -> bool:
        """Return False: the disk's data are its own."""
        return False

    def template_file(self) -> str | None:
        """Return None: the disk's data are its own."""
        return None

    def can_snapshot(self) -> bool:
        """Return whether the file system shares blocks, and may."""
        return self._conf.reflink != "never" and transfer.shares_blocks(self._disk.folder)

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots, oldest first."""
        found = []
        for path in self._snapshot_paths():
            modified = os.stat(path).st_mtime_ns
            created = datetime.datetime.fromtimestamp(modified / 1e9, datetime.UTC).isoformat(timespec="seconds")
            size = transfer.virtual_size(path, self.disk_format)
            found.append((modified, Snapshot(path.rpartition("@")[2], created, size)))
        return [snapshot for _, snapshot in sorted(found, key=lambda each: each[0])]

    def create_snapshot(self, name: str) -> None:
        """Clone the disk's file.

        :raises Unsupported: the file system does not share blocks, or must not.
        """
        if self._conf.reflink == "never":
            raise exceptions.Unsupported("a snapshot", "[DEFAULT] reflink is never")
        with image_lock.hold(self._disk.path, shared=True):
            self._share(self._disk.path, f"{self._disk.path}@{name}", replace=False)

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot that is there."""
        publish.remove_file(f"{self._disk.path}@{name}")
        publish.sync_folder(self._disk.folder)

    def roll_back(self, name: str) -> None:
        """Put a clone of the snapshot in the disk's place."""
        with image_lock.hold(self._disk.path):
            self._share(f"{self._disk.path}@{name}", self._disk.path, replace=True)

    def remove_snapshots(self) -> None:
        """Remove all snapshots of a disk that is gone, or replaced."""
        for path in self._snapshot_paths():
            publish.remove_file(path)
            faults.point("disk.remove.snapshot")

    def flatten(self, progress: Progress | None) -> None:
        """Do nothing: the disk's data are its own."""

    def _share(self, source: str, target: str, *, replace: bool) -> None:
        durable = self._conf.durable_writes
        with (
            transfer.open_file(source) as descriptor,
            publish.new_file(target, durable=durable, replace=replace) as (clone, _),
        ):
            if not reflink.clone_file(descriptor, clone):
                raise exceptions.Unsupported("a snapshot", f"the file system of {source} does not share blocks")
            transfer.set_time(clone, target)

    def _snapshot_paths(self) -> list[str]:
        # No name that a user can give contains '@'.
        prefix = f"{os.path.basename(self._disk.path)}@"
        entries = publish.list_folder(self._disk.folder)
        return [f"{self._disk.folder}/{entry}" for entry in entries if entry.startswith(prefix)]
