# SPDX-License-Identifier: Apache-2.0
"""A disk's volume and everything beside it: its lock, its tags, its publication, its repair, its removal.

A new volume is filled under another name. The tag that says that it is complete, set in one change of the volume
group's metadata, decides: before it, the volume is a leftover; from then on it is the disk, whatever happens, and
whoever finds it gives it the disk's name. A thin snapshot is complete from the start, so that a disk that is one gets
its name at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
from collections.abc import Iterable, Iterator

from oslo_config import cfg

from imagebackend import exceptions, faults, locks
from imagebackend.images import lvm_clearing, lvm_encryption, lvm_naming, lvm_options
from imagebackend.images.lvm_encryption import CryptMapping
from imagebackend.images.lvm_naming import COMPLETE
from imagebackend.images.lvm_pool import Space
from imagebackend.keys import Keys
from imagebackend.storage import block_device, publish
from imagebackend.storage.cryptsetup import Cipher
from imagebackend.storage.lvm2 import Volume, VolumeGroup
from imagebackend.templates.leases import Owner

__all__ = ["Found", "LvmDisk", "unfinished"]

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a volume group has of a disk.

    :ivar current: the volume that has the disk's name.
    :ivar replacement: a complete one that is about to take it.
    :ivar snapshots: oldest first.
    :ivar removed: volumes that were the disk, and are being cleared.
    :ivar leftovers: what killed makers left.
    """

    current: Volume | None
    replacement: Volume | None
    snapshots: tuple[Volume, ...]
    removed: tuple[Volume, ...]
    leftovers: tuple[Volume, ...]

    @property
    def disk(self) -> Volume | None:
        """The volume that is the disk."""
        return self.replacement or self.current

    @property
    def current_was_growing(self) -> bool:
        """Whether the current volume may have grown without having been zeroed."""
        return self.current is not None and "grown_from" in lvm_naming.facts(self.current.tags)

    @property
    def is_settled(self) -> bool:
        """Whether no change of the disk was cut short, or is under way."""
        return self.replacement is None and not self.leftovers and not self.current_was_growing


class LvmDisk:
    """A disk's volume. Making the object does no I/O.

    :param conf: options of this library.
    :param group: the volume group that it is in.
    :param name: the volume's name.
    :param owner: the disk that it is.
    :param keys: give the disk's key if it is encrypted.
    """

    def __init__(
        self, conf: cfg.ConfigOpts, group: VolumeGroup, name: str, owner: Owner, keys: Keys | None = None
    ) -> None:
        self.conf = conf
        self.group = group
        self.name = name
        self.owner = owner
        self.keys = keys
        self.path = group.device(name)
        self._tag = lvm_naming.disk_tag(owner.instance, owner.disk)
        self._maker = lvm_options.maker_tag(conf)
        self._who = f"{owner.instance}/{owner.disk}"
        self._new = f"{name}+new"
        self._locks = locks.folder(os.path.abspath(conf.instances_path))
        # Beside the locks: that a volume may have taken the disk's place, but not its name. The tags say what is so;
        # this says that they have to be looked at before a disk is made.
        self._replacing = f"{self._locks}/replacing-{owner.instance}_{owner.disk}"

    def lock(self, timeout: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which the disk is made and changed.

        :param timeout: seconds to wait at most; None: ``[DEFAULT] lock_timeout``.
        :raises LockTimeout: someone else held it all that time.
        """
        path = locks.disk_lock(self._locks, self.owner.instance, self.owner.disk)
        return locks.hold(path, timeout=self.conf.lock_timeout if timeout is None else timeout, transient=True)

    def may_exist(self) -> bool:
        """Return whether there is a sign of the disk that costs nothing to see; if not, making it tells."""
        return any(os.path.lexists(path) for path in (self.path, self.group.device(self._new), self._replacing))

    def find(self) -> Found:
        """Return what there is of the disk: one command.

        :raises StorageError: the volume that has the disk's name is another disk's.
        """
        current = replacement = None
        snapshots, removed, leftovers, pools = [], [], [], []
        found = self.group.report(self.name, tags=[self._tag])
        for volume in found:
            facts = lvm_naming.facts(volume.tags)
            whole = "complete" in facts
            if facts.get("disk", self._who) != self._who:
                reason = f"its tags say that it is the disk {facts['disk']}; rename it (lvrename)"
                raise exceptions.StorageError(self.path, reason)
            if volume.kind == "thin-pool":
                pools.append(volume)
            elif volume.name == self.name and (whole or "disk" not in facts):
                current = volume
            elif volume.name == self._new and whole:
                replacement = volume
            elif volume.name.startswith(f"{self.name}+removed+"):
                removed.append(volume)
            elif facts.get("kind") == "snapshot" and whole:
                snapshots.append(volume)
            elif volume.name in (self.name, self._new):
                leftovers.append(volume)
        used = {volume.pool for volume in found}
        leftovers += [pool for pool in pools if pool.name not in used]
        snapshots.sort(key=lambda volume: lvm_naming.facts(volume.tags)["made"])
        return Found(current, replacement, tuple(snapshots), tuple(removed), tuple(leftovers))

    def settle(self, found: Found) -> Found:
        """Finish, or undo, what was cut short; the caller holds the lock.

        :returns: what there is then.
        """
        if found.is_settled:
            return found
        for leftover in found.leftovers:
            self._give_back(leftover)
        if found.replacement is not None:
            self._take_place(found.current)
            self.clear(found.removed)
        elif found.current is not None and found.current_was_growing:
            self._finish_growing(found.current)
        return self.find()

    def tags(self, **more: str | int) -> set[str]:
        """Return the tags of a new volume of the disk's."""
        values = {"kind": "disk", "format": "raw", "made": lvm_naming.now(), **more}
        return {self._tag, self._maker, *lvm_naming.tags(values), *self.conf.libvirt.images_volume_tags}

    def snapshot_template(self, volume: str, template: str) -> None:
        """Make the disk a thin snapshot of a template's volume: one command.

        :raises DiskNotFound: there is no such volume.
        :raises DiskExists: something has the disk's name.
        """
        self.group.snapshot(volume, self.name, {*self.tags(template=template), COMPLETE})
        faults.point("disk.create.snapshot")

    @contextlib.contextmanager
    def fill(
        self,
        space: Space,
        size: int,
        *,
        data: int,
        current: Volume | None,
        template: str | None = None,
        cipher: Cipher | None = None,
    ) -> Iterator[str]:
        """Give the device of a new volume to fill in the block; at the end of the block it takes the disk's place.

        :param space: where the volume comes from.
        :param size: bytes.
        :param data: how many bytes will be written to it.
        :param current: the volume that has the disk's name.
        :param template: the name of the template that it is filled from, if it is.
        :param cipher: how the disk is to be encrypted; None: it is not.
        """
        more = {**lvm_encryption.facts(cipher), **({} if template is None else {"template": template})}
        with contextlib.ExitStack() as undo:
            # What is made may have succeeded although its command failed.
            undo.callback(self._discard_new)
            if cipher is None:
                space.create(self._new, size, data, self.tags(**more))
                faults.point("disk.create.made")
                yield self.group.device(self._new)
            else:
                self._key()  # nothing is made if there is none
                # It is written from end to end, for what was never written does not read as zeros.
                space.create(self._new, size + cipher.header, size + cipher.header, self.tags(**more))
                faults.point("disk.create.made")
                mapping = self._crypt_mapping(self._new, cipher)
                mapping.format()
                faults.point("disk.create.formatted")
                yield mapping.open()
                mapping.close()
            faults.point("disk.create.filled")
            self._announce(current)
            self.group.publish(self._new, add_tags=[COMPLETE])
            undo.pop_all()
        faults.point("disk.create.complete")
        self._take_place(current)

    def create_snapshot(self, volume: Volume, name: str) -> None:
        """Make a snapshot of the disk.

        :param volume: the disk's.
        """
        kept = {key: value for key, value in lvm_naming.facts(volume.tags).items() if key not in ("complete", "made")}
        facts = {**kept, "kind": "snapshot", "format": "raw", "snapshot": name, "made": lvm_naming.now()}
        tags = {self._tag, *lvm_naming.tags(facts), *self.conf.libvirt.images_volume_tags, COMPLETE}
        target = f"{self.name}+snap+{secrets.token_hex(4)}"
        self.group.snapshot(volume.name, target, tags, read_only=True, activate=False)
        faults.point("disk.snapshot.changed")

    def remove_snapshot(self, snapshot: Volume) -> None:
        """Remove a snapshot."""
        self.group.remove(snapshot.name)
        faults.point("disk.snapshot_remove.changed")

    def roll_back(self, current: Volume, snapshot: Volume) -> None:
        """Have a snapshot of the snapshot take the disk's place."""
        kept = {
            key: value for key, value in lvm_naming.facts(snapshot.tags).items() if key not in ("snapshot", "kind")
        }
        self._announce(current)
        tags = {self._tag, *lvm_naming.tags({**kept, "kind": "disk"}), *self.conf.libvirt.images_volume_tags, COMPLETE}
        self.group.snapshot(snapshot.name, self._new, tags)
        faults.point("disk.rollback.complete")
        self._take_place(current)

    def grow(self, volume: Volume, size: int) -> None:
        """Make the disk's volume larger; what it gains reads as zeros."""
        mapping = self.mapping(volume)
        if mapping is None and (volume.kind == "thin" or self.conf.libvirt.images_volume_group_zeroed):
            self.group.resize(self.name, size)
            faults.point("disk.resize.changed")
            return
        if mapping is not None:
            self._key()  # nothing is done if there is none
        self.group.publish(self.name, add_tags=lvm_naming.tags({"grown_from": volume.size}))
        faults.point("disk.resize.intended")
        self.group.resize(self.name, size)
        faults.point("disk.resize.changed")
        (grown,) = self.group.report(self.name)
        self._finish_growing(grown)

    def refuse_in_use(self, volume: Volume) -> None:
        """Make sure that nothing has the disk open; the mapping of an encrypted one is closed.

        :raises DiskInUse: something has.
        """
        mapping = self.mapping(volume)
        if (volume.open and mapping is None) or (mapping is not None and mapping.is_in_use()):
            raise exceptions.DiskInUse(self.path, "a running guest, a mount or a tool has it open; stop that first")
        if mapping is not None:
            mapping.close()

    def open(self, volume: Volume) -> str:
        """Return the device by which the disk is read and written, which is made if it is not there.

        :raises InvalidConfiguration: it is encrypted, and nobody gives its key.
        """
        if not volume.active:
            self.group.activate(volume.name)
        mapping = self.mapping(volume)
        return self.group.device(volume.name) if mapping is None else mapping.open()

    def mapping(self, volume: Volume) -> CryptMapping | None:
        """Return the mapping through which a volume of the disk is read and written; None: it is not encrypted."""
        cipher = lvm_encryption.of(lvm_naming.facts(volume.tags))
        return None if cipher is None else self._crypt_mapping(volume.name, cipher)

    def refuse_foreign(self, volume: Volume) -> None:
        """Make sure that the volume's own tags say that it is this disk.

        :raises StorageError: they do not: another program made it.
        """
        if self._tag not in volume.tags:
            how = " ".join(f"--addtag {tag}" for tag in sorted({*self.tags(), COMPLETE}))
            reason = f"another program made it; hand it over with 'lvchange {how} {self.group.name}/{volume.name}'"
            raise exceptions.StorageError(self.path, reason)

    def remove(self, found: Found) -> tuple[Volume, ...]:
        """Remove the disk with its snapshots; the caller holds the lock.

        :returns: what is to be given to :meth:`clear` when the lock is released.
        :raises DiskInUse: something has it open.
        :raises StorageError: this library did not make it.
        """
        for leftover in found.leftovers:
            self._give_back(leftover)
        volumes = [volume for volume in (found.current, found.replacement) if volume is not None]
        for volume in volumes:
            self.refuse_foreign(volume)
            self.refuse_in_use(volume)
        removed = list(found.removed)
        for volume in volumes:
            if volume.active and (found.snapshots or lvm_clearing.is_needed(self.conf, volume)):
                # From here on nobody can open it: it is not cleared under a guest, nor left without its snapshots.
                self.group.deactivate(volume.name)
        if found.snapshots:
            self.group.remove(*(snapshot.name for snapshot in found.snapshots))
            faults.point("disk.remove.snapshots")
        for volume in volumes:
            if lvm_clearing.is_needed(self.conf, volume):
                removed.append(self._set_aside(volume))
            else:
                self._give_back(volume)
            faults.point("disk.remove.volume")
        publish.remove_file(self._replacing)
        return tuple(removed)

    def sweep(self) -> list[str]:
        """Remove what a killed process left unfinished, or did not live to remove, unless somebody is at it.

        What has the tag of another maker stays: whether that is still at it cannot be known. So does what is about to
        be the disk, or is the disk, and is finished by the next call for it.

        :returns: the names of the volumes.
        """
        with self.lock(timeout=0):
            found = self.find()
            left = [volume for volume in found.leftovers if self._maker in volume.tags]
            for leftover in left:
                self._give_back(leftover)
        removed = [volume for volume in found.removed if self._maker in volume.tags]
        return [volume.name for volume in (*left, *self.clear(removed))]

    def clear(self, removed: Iterable[Volume]) -> list[Volume]:
        """Clear volumes that were the disk, and give their space back; nobody waits for that.

        One that another process is at is left to it.

        :returns: those whose space was given back.
        """
        cleared = []
        for volume in removed:
            lock = f"{self._locks}/clearing-{volume.uuid}"
            with contextlib.suppress(exceptions.LockTimeout), locks.hold(lock, timeout=0, transient=True):
                if not self.group.report(volume.name):
                    continue
                if lvm_clearing.is_needed(self.conf, volume):
                    self.group.activate(volume.name)
                    lvm_clearing.clear(self.conf, self.group.device(volume.name))
                    faults.point("disk.remove.cleared")
                self._give_back(volume)
                cleared.append(volume)
                faults.point("disk.remove.given_back")
        return cleared

    def _announce(self, current: Volume | None) -> None:
        """Prepare for another volume to take the place of the one that has the disk's name."""
        if current is not None:
            publish.write_file(self._replacing, b"", durable=True)
            publish.sync_folder(self._locks)
            faults.point("disk.replace.announced")
            # From here on nobody can open it.
            self.group.deactivate(current.name)

    def _take_place(self, current: Volume | None) -> None:
        """Give the complete new volume the name of the disk, and clear the volumes that had it."""
        if current is not None:
            self._set_aside(current)
            faults.point("disk.replace.set_aside")
        self.group.rename(self._new, self.name)
        faults.point("disk.replace.renamed")
        if current is not None:
            # And what earlier calls left that were killed here.
            self.clear(self.find().removed)
        publish.remove_file(self._replacing)

    def _set_aside(self, volume: Volume) -> Volume:
        self.refuse_foreign(volume)
        if self._maker not in volume.tags:
            # From here on it is this host that is at it.
            maker = lvm_naming.facts(volume.tags).get("maker")
            others = set() if maker is None else lvm_naming.tags({"maker": maker})
            self.group.publish(volume.name, add_tags=[self._maker], drop_tags=others)
            volume = dataclasses.replace(volume, tags=volume.tags - others | {self._maker})
        name = f"{self.name}+removed+{secrets.token_hex(4)}"
        self.group.rename(volume.name, name)
        return dataclasses.replace(volume, name=name)

    def _give_back(self, volume: Volume) -> None:
        mapping = self.mapping(volume)
        if mapping is not None:
            mapping.close()
        self.group.remove_reported(volume)
        if not volume.pool.startswith(f"{self.name}+pool+"):
            return
        # The pool that the disk has for itself goes with the last of its volumes.
        if volume.pool not in {each.pool for each in self.group.report(tags=[self._tag])}:
            self.group.remove(volume.pool)

    def _discard_new(self) -> None:
        # An undo step: the error that led here matters more; the next call for this disk tries again.
        try:
            found = self.find()
            for leftover in found.leftovers:
                self._give_back(leftover)
            if found.replacement is None:
                publish.remove_file(self._replacing)
        except exceptions.ImageBackendError as error:
            LOG.warning("what was made of %s is still there: %s", self.path, error)

    def _finish_growing(self, volume: Volume) -> None:
        before = int(lvm_naming.facts(volume.tags)["grown_from"])
        if before < volume.size:
            mapping = self.mapping(volume)
            if mapping is not None:
                mapping.grow()
            header = volume.size - lvm_encryption.content_size(volume)
            block_device.zero(self.open(volume), before - header, volume.size - header)
            faults.point("disk.resize.zeroed")
        self.group.publish(self.name, drop_tags=lvm_naming.tags({"grown_from": before}))

    def _crypt_mapping(self, volume: str, cipher: Cipher) -> CryptMapping:
        return CryptMapping(self.conf, self.group, volume, cipher, self._key)

    def _key(self) -> bytes:
        return lvm_encryption.key_of(self.keys, self.owner.instance, self.owner.disk)


def unfinished(volumes: Iterable[Volume], maker: str) -> list[tuple[str, str]]:
    """Return instance and name of the disks of which something may be left that :meth:`LvmDisk.sweep` removes, sorted.

    :param volumes: all of the volume group.
    :param maker: the tag of the maker.
    """
    volumes = list(volumes)
    pools = {volume.pool for volume in volumes}
    found = set()
    for volume in volumes:
        facts = lvm_naming.facts(volume.tags)
        is_needed = volume.name in pools if volume.kind == "thin-pool" else "complete" in facts
        if maker in volume.tags and "disk" in facts and (not is_needed or "+removed+" in volume.name):
            instance, _, disk_name = facts["disk"].partition("/")
            found.add((instance, disk_name))
    return sorted(found)
