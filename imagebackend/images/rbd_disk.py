# SPDX-License-Identifier: Apache-2.0
"""A disk's image in a pool: its lock, its record, its publication, its repair.

What takes more than one step is put on record in the pool first (an intent), so that whoever finds it half done, on
whatever host, finishes or undoes it. A disk is there when its image is and no intent says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults, locks
from imagebackend.images import rbd_encryption, rbd_image, rbd_location
from imagebackend.images.encryption import Encryption
from imagebackend.storage import ceph, publish
from imagebackend.templates.leases import Owner

__all__ = ["RbdDisk"]

LOG = logging.getLogger(__name__)


class RbdDisk:
    """A disk's image and everything beside it. Making the object does no I/O.

    :param conf: options of this library.
    :param pool: where the image is.
    :param instance: the instance that the disk is of.
    :param disk: the disk's name in it.
    :param name: the image's name, if not what this library would call it.
    """

    def __init__(self, conf: cfg.ConfigOpts, pool: ceph.Pool, instance: str, disk: str, name: str = "") -> None:
        self.conf = conf
        self.pool = pool
        self.name = name = name or rbd_location.image_name(instance, disk)
        self.owner = Owner(instance, disk, conf.host, rbd_location.format_path(pool, name))
        self.spec = pool.spec(name)
        # The intent of this process that is on record.
        self._begun = ""
        self._partial = f"partial:{name}"
        self._outgoing = f"outgoing:{name}"
        #: Where content is put together, on this host, that then becomes the disk.
        self.scratch = f"{os.path.abspath(conf.instances_path)}/{conf.image_cache.subdirectory_name}/.{name}.scratch"

    def lock(self, timeout: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which the disk is made and changed, on the hosts that share ``instances_path``.

        :param timeout: seconds; None: ``[DEFAULT] lock_timeout``.
        """
        folder = locks.folder(os.path.abspath(self.conf.instances_path))
        path = locks.disk_lock(folder, self.owner.instance, self.owner.disk)
        return locks.hold(path, timeout=self.conf.lock_timeout if timeout is None else timeout, transient=True)

    def exists(self) -> bool:
        """Return whether the disk is there, or will be when :meth:`settle` has finished what was begun."""
        # In this order: whoever makes the image drops the intent when it is whole.
        found = self.pool.image_id(self.name) is not None
        operation: str | None = self._intent().get("operation")
        return operation == "replace" or (found and operation not in ("clone", "remove"))

    def is_ready(self) -> bool:
        """Return whether the disk is there and no change of it was cut short, or is under way: two requests."""
        return self.pool.image_id(self.name) is not None and not self._intent()

    def require(self) -> None:
        """Make sure that the disk is there.

        :raises DiskNotFound: it is not.
        """
        if not self.exists():
            raise exceptions.DiskNotFound(self.spec)

    def is_left(self) -> bool:
        """Return whether this host has begun something with the disk; under the lock: and was killed at it."""
        return bool(self._intent().get("host") == self.conf.host)

    def settle(self) -> None:
        """Finish, or undo, what was cut short; the caller holds the lock.

        :raises DiskInUse: another host does so at the same moment.
        """
        self._begun = self.pool.intent(self.name) or ""
        if self._begun:
            # On other hosts, nobody else has the lock: whoever is still at it there finds that it was taken from him.
            self._intend(**self._parse(self._begun))
            self._carry_out()

    def record(self) -> dict[str, Any]:
        """Return what is on record about the disk; nothing for one that another program made.

        :raises DiskNotFound: it is not there.
        :raises CorruptRecord: it cannot be read.
        """
        return self._recorded(self._image_id())

    def settled_record(self) -> dict[str, Any] | None:
        """Return :meth:`record` of a disk with which nothing is to be done first, None of any other.

        It takes the time of two requests for a disk that has a record.

        :raises CorruptRecord: it cannot be read.
        """
        image_id, intent = self.pool.image_id_and_intent(self.name)
        if image_id is None or intent:
            return None
        text = self.pool.metadata(image_id, rbd_image.RECORD)
        # An image that has a record is whole. One that has none may just have been begun, or replaced; in this order:
        # whoever makes the image drops the intent when it is whole.
        if text is None and (self.pool.image_id(self.name) != image_id or self._intent()):
            return None
        return rbd_image.parse_record(self.spec, text)

    def header_size(self) -> int:
        """Return how many bytes of the image are the header of its encryption; 0: it is not encrypted.

        :raises DiskNotFound: it is not there.
        """
        size: int = self.record().get("encryption", {}).get("header", 0)
        return size

    def size(self) -> int:
        """Return how many bytes its user sees: three requests.

        :raises DiskNotFound: it is not there.
        """
        image_id = self._image_id()
        header: int = self._recorded(image_id).get("encryption", {}).get("header", 0)
        return self.pool.size(image_id) - header

    def clone(self, parent: ceph.Pool, image: str, snapshot: str, layout: ceph.Layout) -> None:
        """Make the disk from a snapshot.

        It gets its own name at once, since renaming an image takes as long as cloning it: the intent says that it is
        not whole yet.

        :raises DiskNotFound: there is no such snapshot; nothing was made.
        :raises DiskExists: another host made the disk.
        """
        with self._intended("clone"):
            try:
                self.pool.clone(parent, image, snapshot, self.name, layout)
            except exceptions.DiskExists:
                self._end()
                raise
            faults.point("disk.create.cloned")

    def clone_encrypted(
        self, parent: ceph.Pool, image: str, snapshot: str, size: int, layout: ceph.Layout, encryption: Encryption
    ) -> None:
        """Make the disk, encrypted, from a snapshot that is not, and that is larger than the disk by the header.

        :param size: bytes.
        :raises DiskNotFound: there is no such snapshot; nothing was made.
        """
        with self._intended("fill"):
            self.pool.clone(parent, image, snapshot, self._partial, layout)
            facts = rbd_encryption.encrypt(self.pool, self._partial, size, encryption)
            with self.pool.open(self._partial) as opened:
                record = {"version": 1, "format": "raw", "encryption": facts}
                opened.metadata_set(rbd_image.RECORD, json.dumps(record))
            self._publish()

    @contextlib.contextmanager
    def fill(
        self, size: int, layout: ceph.Layout, record: dict[str, Any], encryption: Encryption | None = None
    ) -> Iterator[Any]:
        """Give a new, open image to fill in the block; at the end of the block it takes the disk's place.

        :param size: bytes, without what encryption adds.
        """
        with self._intended("fill"):
            if encryption is None:
                self.pool.create(self._partial, size, layout)
            else:
                facts = rbd_encryption.create(self.pool, self._partial, size, layout, encryption)
                record = {**record, "encryption": facts}
            with self.pool.open(self._partial) as image:
                if encryption is not None:
                    rbd_encryption.load(encryption, image)
                faults.point("disk.create.opened")
                yield image
                image.metadata_set(rbd_image.RECORD, json.dumps({"version": 1, **record}))
            self._publish()

    def create_snapshot(self, name: str, *, protect: bool = False) -> None:
        """Make a snapshot, which may then be cloned if it is protected.

        :raises SnapshotExists: the disk has one of that name.
        """
        import rbd

        with self.pool.open(self.name) as image:
            try:
                image.create_snap(name)
            except rbd.ImageExists as error:
                raise exceptions.SnapshotExists(name, f"of disk {self.spec}") from error
            faults.point("disk.snapshot.changed")
            if protect:
                image.protect_snap(name)

    def roll_back(self, snapshot: str) -> None:
        """Make the disk what it was when the snapshot was made. librbd's way of doing it can be cut short."""
        self._intend(operation="rollback", snapshot=snapshot)
        faults.point("disk.rollback.intended")
        self._carry_out()

    def refuse_in_use(self) -> None:
        """Make sure that no guest, and no tool, has the disk open for writing.

        :raises DiskInUse: one has.
        """
        watchers = self.pool.watchers(self.name)
        if watchers:
            clients = ", ".join(watcher.address for watcher in watchers)
            raise exceptions.DiskInUse(self.spec, f"open at {clients}; stop the guest first")

    def remove(self) -> None:
        """Remove the disk with its snapshots; do nothing if it is not there.

        The cluster notices late that a guest died, so that a disk that seems to be in use is asked for again.

        :raises DiskInUse: it is, every time.
        """
        self.settle()
        publish.remove_file(self.scratch)
        if not self.exists():
            return
        for left in range(self.conf.libvirt.rbd_destroy_volume_retries, -1, -1):
            try:
                self.refuse_in_use()
                break
            except exceptions.DiskInUse:
                if not left:
                    raise
            time.sleep(self.conf.libvirt.rbd_destroy_volume_retry_interval)
        self._intend(operation="remove")
        faults.point("disk.remove.intended")
        self._carry_out()

    @contextlib.contextmanager
    def _intended(self, operation: str) -> Iterator[None]:
        """Do something to a disk that is not there yet in the block; undo it if it fails."""
        self._intend(operation=operation)
        faults.point(f"disk.create.{operation}_intended")
        with contextlib.ExitStack() as undo:
            undo.callback(self._undo_quietly)
            try:
                yield
            except exceptions.TimedOut:
                raise
            except (exceptions.NotFound, exceptions.StorageError) as error:
                # Whoever takes the disk over removes what is being made here.
                if self.pool.intent(self.name) != self._begun:
                    raise exceptions.DiskInUse(self.spec, "another host has taken it over") from error
                raise
            if self._begun:
                self._end()
            undo.pop_all()

    def _carry_out(self) -> None:
        """Do what the intent on record, which is this process's, says."""
        intent = self._parse(self._begun)
        match intent.get("operation"):
            case "clone":
                self.pool.remove(self.name)
            case "fill":
                self.pool.remove(self._partial)
                publish.remove_file(self.scratch)
            case "replace":
                self._replace(intent["image_id"])
                publish.remove_file(self.scratch)
            case "rollback":
                with self.pool.open(self.name) as image:
                    image.rollback_to_snap(intent["snapshot"])
                faults.point("disk.rollback.changed")
            case "remove":
                rbd_image.bury(self.pool, self.name, self.conf.libvirt.images_rbd_trash_delay)
            case other:
                raise exceptions.CorruptRecord(self.spec, f"intent {other!r} is not known to this release")
        self._end()

    def _publish(self) -> None:
        """Give what was filled the disk's name."""
        faults.point("disk.create.filled")
        self._intend(operation="replace", image_id=self.pool.image_id(self._partial))
        faults.point("disk.create.publishing")
        self._carry_out()

    def _replace(self, image_id: str) -> None:
        """Give an image the disk's name, and remove the one that had it before.

        Images are told apart by their ids, since another host may have taken over and be at the same.
        """
        while self.pool.image_id(self.name) != image_id:
            places = {self.pool.image_id(place): place for place in (self._outgoing, self._partial)}
            if places.get(image_id) == self._partial:
                with contextlib.suppress(exceptions.DiskNotFound):  # a new disk
                    self.pool.rename(self.name, self._outgoing)
                    faults.point("disk.import.moved")
            # If it is gone, what had the name before gets it back.
            with contextlib.suppress(exceptions.DiskNotFound, exceptions.DiskExists):
                self.pool.rename(places.get(image_id, self._outgoing), self.name)
            faults.point("disk.create.renamed")
            if image_id not in places:
                break
        if self.pool.image_id(self._outgoing) not in (None, image_id):
            rbd_image.bury(self.pool, self._outgoing, self.conf.libvirt.images_rbd_trash_delay)

    def _image_id(self) -> str:
        image_id = self.pool.image_id(self.name)
        if image_id is None:
            raise exceptions.DiskNotFound(self.spec)
        return image_id

    def _recorded(self, image_id: str) -> dict[str, Any]:
        return rbd_image.parse_record(self.spec, self.pool.metadata(image_id, rbd_image.RECORD))

    def _intend(self, operation: str, **facts: Any) -> None:
        # No two are alike, so that nobody takes another's for his own.
        token = secrets.token_hex(8)
        text = json.dumps({**facts, "operation": operation, "host": self.conf.host, "token": token})
        self.pool.swap_intent(self.name, self._begun, text)
        self._begun = text

    def _end(self) -> None:
        self.pool.swap_intent(self.name, self._begun, "")
        self._begun = ""

    def _intent(self) -> dict[str, Any]:
        return self._parse(self.pool.intent(self.name))

    def _parse(self, intent: str | None) -> dict[str, Any]:
        return rbd_image.parse_record(f"{self.spec}: intent", intent)

    def _undo_quietly(self) -> None:
        # The error that led here matters more; the next call on the disk tries again.
        try:
            if self.pool.intent(self.name) == self._begun:
                self._carry_out()
        except exceptions.ImageBackendError as error:
            LOG.warning("what is left of %s is still there: %s", self.spec, error)
