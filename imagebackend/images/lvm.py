# SPDX-License-Identifier: Apache-2.0
"""Disks in logical volumes: snapshots of their templates in a thin pool, or volumes that their templates fill."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.images import (
    lvm_content,
    lvm_disk,
    lvm_encryption,
    lvm_naming,
    lvm_options,
    lvm_pool,
    lvm_template,
    transfer,
)
from imagebackend.images.base import Capabilities, Image, Progress, Snapshot, Usage
from imagebackend.images.lvm_disk import Found
from imagebackend.images.lvm_pool import ThinPool
from imagebackend.images.lvm_template import LvmTemplate, LvmTemplates
from imagebackend.images.model import LocalBlockImage
from imagebackend.storage.cryptsetup import Cipher
from imagebackend.storage.lvm2 import Volume
from imagebackend.templates import inspection
from imagebackend.templates.cache import FetchFunction, Template
from imagebackend.templates.leases import Owner
from imagebackend.templates.native import NativeTemplates

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["Lvm"]

LOG = logging.getLogger(__name__)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


class Lvm(Image):
    """A disk in a logical volume.

    With ``[libvirt] images_thin_pool``, a new disk is a snapshot of its template. Otherwise its template is copied
    into a volume of its own. What can be done with a disk depends on the volume that it is in, not on the options.
    """

    source_type: ClassVar[str] = "block"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group, name = lvm_naming.parse_path(self.path)
        self.group = lvm_options.group(self.conf, group)
        self.path = self.group.device(name)
        self._volume = name
        self._space = lvm_pool.space(self.conf, self.group)

    def _default_path(self) -> str:
        group = lvm_options.group(self.conf)
        return group.device(lvm_naming.volume_name(group.name, self.instance, self.disk_name))

    @classmethod
    def names_of_path(cls, path: str) -> tuple[str, str]:
        found = lvm_naming.disk_names(lvm_naming.parse_path(path)[1])
        assert found is not None
        return found

    @classmethod
    def stored(cls, conf: cfg.ConfigOpts) -> Iterator[tuple[str, str]]:
        yield from sorted(set(filter(None, map(_owner_of, lvm_options.group(conf).report()))))

    @classmethod
    def native_templates(cls, conf: cfg.ConfigOpts) -> NativeTemplates | None:
        return lvm_template.templates(conf)

    @classmethod
    def sweep_disks(cls, conf: cfg.ConfigOpts) -> list[str]:
        group = lvm_options.group(conf)
        swept = []
        for instance, disk_name in lvm_disk.unfinished(group.report(), lvm_options.maker_tag(conf)):
            name = lvm_naming.volume_name(group.name, instance, disk_name)
            disk = lvm_disk.LvmDisk(conf, group, name, Owner(instance, disk_name, conf.host, group.device(name)))
            try:
                swept += disk.sweep()
            except exceptions.LockTimeout:
                continue  # somebody is at it
            except exceptions.ImageBackendError as error:
                LOG.warning("what is left of %s is still there: %s", disk.path, error)
        return swept

    @property
    def capabilities(self) -> Capabilities:
        disk = self._disk.find().disk
        thin = self._space.zeroed if disk is None else disk.kind == "thin"
        return Capabilities(snapshots=thin, clone=False, flatten=False, direct_snapshot=False, resize_running=True)

    def exists(self) -> bool:
        return self._disk.find().disk is not None

    def create_image(
        self, prepare_template: FetchFunction, base: str, size: int | None, *args: Any, **kwargs: Any
    ) -> None:
        name = self.templates.name_of(base)
        if size is not None:
            names.check_size(size)
        with self._disk.lock():
            fetched = self._is_cached(name)
            # Making a snapshot tells whether there is a disk, and so no command has to ask before.
            snapshots = isinstance(self._space, ThinPool) and self._cipher() is None
            tells = fetched and snapshots and not self._disk.may_exist()
            if not tells and self._settled().disk is not None:
                return
            stored = self._templates().find(name) if snapshots and not fetched else None
            if stored is not None:
                self._snapshot_stored(stored, size)
            else:
                with self.templates.use(name, prepare_template, *args, size=size, **kwargs) as template:
                    self.verify_base_size(template.path, size, template.virtual_size)
                    self._create_from(template, size or template.virtual_size, kwargs.get("progress"))
        LOG.info("disk %s made from template %s", self.path, name)

    def create_from_func(self, func: Callable[[str], object], size: int) -> None:
        names.check_size(size)
        with self._disk.lock():
            if self._settled().disk is not None:
                return
            cipher = self._cipher()
            with self._disk.fill(self._space, size, data=0, current=None, cipher=cipher) as device:
                if cipher or not self._space.zeroed:
                    lvm_content.clear(device)
                func(device)
                lvm_content.sync(device)
        LOG.info("disk %s made: %d bytes", self.path, size)

    def resize_image(self, size: int, domain: Any = None) -> None:
        names.check_size(size)
        with self._disk.lock():
            volume = self._require()
            current = lvm_encryption.content_size(volume)
            header = volume.size - current
            # What is asked for may lie within the last extent.
            rounded = -(-(size + header) // volume.extent_size) * volume.extent_size
            if rounded < volume.size:
                transfer.is_grown(self.path, current, size)
            if rounded == volume.size:
                return
            running = domain is not None and transfer.is_running(domain)
            if not running:
                self._disk.refuse_in_use(volume)
            self._disk.grow(volume, rounded)
            if running:
                transfer.resize_running(domain, self._disk.open(volume), rounded - header)
        LOG.info("disk %s grown from %d to %d bytes", self.path, current, rounded - header)

    def get_disk_size(self, name: str) -> int:
        return lvm_encryption.content_size(self._look())

    def create_snap(self, name: str) -> None:
        names.check_name("snapshot", name)
        with self._disk.lock():
            volume, found = self._require_found()
            if volume.kind != "thin":
                self._warn_no_snapshots("create", name)
                return
            if self._snapshot_called(found, name) is not None:
                raise exceptions.SnapshotExists(name, f"of disk {self.path}")
            self._disk.refuse_in_use(volume)
            self._disk.create_snapshot(volume, name)

    def remove_snap(self, name: str, ignore_errors: bool = False) -> None:
        names.check_name("snapshot", name)
        try:
            with self._disk.lock():
                volume, found = self._require_found()
                if volume.kind == "thin":
                    self._disk.remove_snapshot(self._require_snapshot(found, name))
                else:
                    self._warn_no_snapshots("remove", name)
        except exceptions.ImageBackendError as error:
            if not ignore_errors:
                raise
            LOG.warning("snapshot %s of %s may still be there: %s", name, self.path, error)

    def rollback_to_snap(self, name: str) -> None:
        names.check_name("snapshot", name)
        with self._disk.lock():
            volume, found = self._require_found()
            if volume.kind != "thin":
                self._warn_no_snapshots("roll back to", name)
                return
            snapshot = self._require_snapshot(found, name)
            self._disk.refuse_in_use(volume)
            self._disk.roll_back(volume, snapshot)
        LOG.info("disk %s rolled back to snapshot %s", self.path, name)

    def list_snaps(self) -> list[Snapshot]:
        found = []
        for volume in self._disk.find().snapshots:
            facts = lvm_naming.facts(volume.tags)
            found.append(Snapshot(facts["snapshot"], facts["made"], lvm_encryption.content_size(volume)))
        return found

    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        with self._disk.lock():
            volume = self._require()
            self._disk.refuse_in_use(volume)
            lvm_content.extract(self.conf, self._disk.open(volume), target, out_format, progress)

    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        local_file = os.path.abspath(local_file)
        disk = self._disk_called(names.instance_id(instance), names.check_name("disk", remote_name))
        with disk.lock(), transfer.open_file(local_file) as source:
            current = disk.settle(disk.find()).current
            if current is not None:
                disk.refuse_foreign(current)
                disk.refuse_in_use(current)
            verdict = inspection.inspect(source, local_file)
            data = lvm_content.data_size(local_file)
            size = -(-verdict.virtual_size // names.SECTOR) * names.SECTOR
            cipher = self._cipher()
            zeroed = self._space.zeroed and cipher is None
            with disk.fill(self._space, size, data=data, current=current, cipher=cipher) as device:
                lvm_content.write(self.conf, local_file, verdict.format, device, zeroed=zeroed)

    def get_model(self, connection: Any) -> LocalBlockImage:
        return LocalBlockImage(self._disk.open(self._look()))

    def resolve_driver_format(self) -> str:
        return "raw"

    def remove(self) -> None:
        with self._disk.lock():
            removed = self._disk.remove(self._disk.find())
        self._disk.clear(removed)

    def usage(self) -> Usage:
        """Return what the disk takes in its pool, what it shares with its template and its snapshots included.

        :raises DiskNotFound: there is no such disk.
        """
        volume = self._look()
        percent = 100.0 if volume.kind != "thin" else volume.data_percent
        if percent is None:
            self.group.activate(volume.name)
            percent = self._look().data_percent or 0.0
        return Usage(lvm_encryption.content_size(volume), round(volume.size * percent / 100))

    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        found = self._disk.find()
        if not found.is_settled:
            with self._disk.lock():
                found = self._disk.settle(self._disk.find())
        if found.disk is None:
            raise exceptions.DiskNotFound(self.path)
        disk.source_path = self._disk.open(found.disk)
        disk.driver_format = "raw"

    def _is_preallocated(self) -> bool:
        return isinstance(self._space, lvm_pool.GroupSpace)

    @property
    def _disk(self) -> lvm_disk.LvmDisk:
        return self._disk_called(self.instance, self.disk_name, self._volume)

    def _is_ready(self) -> bool:
        # Asking LVM costs nearly as much as making the disk, which finds out.
        return False

    def _look(self) -> Volume:
        found = self._disk.find().disk
        if found is None:
            raise exceptions.DiskNotFound(self.path)
        return found

    def _settled(self) -> Found:
        """Return what there is of the disk, once what was cut short is finished; the caller holds the lock."""
        return self._disk.settle(self._disk.find())

    def _require_found(self) -> tuple[Volume, Found]:
        """Return the disk's volume and all else, settled; the caller holds the lock."""
        found = self._settled()
        if found.current is None:
            raise exceptions.DiskNotFound(self.path)
        return found.current, found

    def _require(self) -> Volume:
        return self._require_found()[0]

    def _require_snapshot(self, found: Found, name: str) -> Volume:
        snapshot = self._snapshot_called(found, name)
        if snapshot is None:
            raise exceptions.SnapshotNotFound(name, f"disk {self.path} has no such snapshot")
        return snapshot

    @staticmethod
    def _snapshot_called(found: Found, name: str) -> Volume | None:
        return next((each for each in found.snapshots if lvm_naming.facts(each.tags)["snapshot"] == name), None)

    def _disk_called(self, instance: str, disk_name: str, name: str | None = None) -> lvm_disk.LvmDisk:
        name = name or lvm_naming.volume_name(self.group.name, instance, disk_name)
        owner = Owner(instance, disk_name, self.conf.host, self.group.device(name))
        return lvm_disk.LvmDisk(self.conf, self.group, name, owner, self.keys)

    def _cipher(self) -> Cipher | None:
        """Return how a new disk is encrypted; None: it is not."""
        return lvm_encryption.new_cipher(self.conf)

    def _is_cached(self, name: str) -> bool:
        with contextlib.suppress(exceptions.TemplateNotFound, exceptions.CorruptRecord):
            self.templates.get(name)
            return True
        return False

    def _create_from(self, template: Template, size: int, progress: Progress | None) -> None:
        """Make the disk from a template of the cache, which nobody removes meanwhile."""
        cipher = self._cipher()
        if isinstance(self._space, ThinPool) and cipher is None:
            stored = LvmTemplate.of(template)
            self._snapshot(self._space, stored, size, lambda: self._templates().ensure(template, size, progress))
            return
        data = lvm_content.data_size(template.path)
        zeroed = self._space.zeroed and cipher is None
        with self._disk.fill(
            self._space, size, data=data, current=None, template=template.name, cipher=cipher
        ) as device:
            lvm_content.write(self.conf, template.path, template.format, device, zeroed=zeroed, progress=progress)

    def _snapshot_stored(self, template: LvmTemplate, size: int | None) -> None:
        """Make the disk from a template that is only in the pool."""
        assert isinstance(self._space, ThinPool)
        wanted = size or template.virtual_size
        if wanted < template.virtual_size:
            raise exceptions.DiskTooSmall(template.name, wanted, template.virtual_size, "the template's virtual size")
        self._snapshot(self._space, template, wanted, lambda: self._templates().add_size(template, wanted))

    def _snapshot(self, pool: ThinPool, template: LvmTemplate, size: int, prepare: Callable[[], object]) -> None:
        """Make the disk a snapshot; only if there is nothing to snapshot, ``prepare`` that, and try again."""
        pool.refuse_full()
        for attempt in (1, 2):
            try:
                self._disk.snapshot_template(template.volume(size), template.name)
                return
            except exceptions.DiskNotFound:
                if attempt == 2:
                    raise
                prepare()
            except exceptions.DiskExists:
                # One that is not active shows no sign of itself.
                if attempt == 2 or self._settled().disk is not None:
                    return

    def _templates(self) -> LvmTemplates:
        assert isinstance(self._space, ThinPool)
        return LvmTemplates(self.conf, self.group, self._space)


def _owner_of(volume: Volume) -> tuple[str, str] | None:
    """Return the instance and the name of the disk that a volume belongs to; None: to none."""
    facts = lvm_naming.facts(volume.tags)
    if "disk" in facts:
        instance, _, disk_name = facts["disk"].partition("/")
        return instance, disk_name
    found = lvm_naming.disk_names(volume.name)
    # Nova's: its instances are UUIDs. Others' names may only look like a disk's.
    return found if not facts and found is not None and _UUID.fullmatch(found[0]) else None
