# SPDX-License-Identifier: Apache-2.0
"""Disks in a Ceph cluster, cloned from templates that live there."""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from oslo_config import cfg

from imagebackend import exceptions, faults, names
from imagebackend.images import (
    disk_file,
    rbd_disk,
    rbd_encryption,
    rbd_exchange,
    rbd_image,
    rbd_location,
    rbd_options,
    rbd_template,
    transfer,
)
from imagebackend.images.base import Capabilities, Image, Progress, Snapshot, Usage
from imagebackend.images.encryption import Encryption
from imagebackend.images.model import RBDImage
from imagebackend.images.rbd_template import RbdTemplate, RbdTemplates
from imagebackend.storage import ceph, ceph_options, publish, qemu_img, rbd_data, rbd_url
from imagebackend.templates import inspection
from imagebackend.templates.cache import FetchFunction

if TYPE_CHECKING:
    from imagebackend.guest import LibvirtConfigGuestDisk

__all__ = ["Encryption", "Rbd", "Usage"]

LOG = logging.getLogger(__name__)


class Rbd(Image):
    """A disk in a Ceph pool: a clone of its template, which is in the pool too."""

    source_type: ClassVar[str] = "network"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Set this before an encrypted disk is made, filled or read. A disk that is encrypted shows its content, and
        #: has its size, without the header of LUKS; libvirt is told of the secret.
        self.encryption: Encryption | None = None
        pool, namespace, name = rbd_location.parse_path(self.path)
        self.pool = ceph.Pool(ceph_options.settings(self.conf), pool, namespace)
        self._layout = rbd_options.layout(self.conf)
        self._disk = rbd_disk.RbdDisk(self.conf, self.pool, self.instance, self.disk_name, name)
        self._store = RbdTemplates(self.conf, self.pool, self._layout)

    def _default_path(self) -> str:
        name = rbd_location.image_name(self.instance, self.disk_name)
        return rbd_location.format_path(rbd_options.pool(self.conf), name)

    @classmethod
    def names_of_path(cls, path: str) -> tuple[str, str]:
        found = rbd_location.disk_names(rbd_location.parse_path(path)[2])
        assert found is not None
        return found

    @classmethod
    def stored(cls, conf: cfg.ConfigOpts) -> Iterator[tuple[str, str]]:
        pool = rbd_options.pool(conf)
        # A disk that is just being replaced is there, though no image has its name.
        for image in {*pool.images(), *pool.intents()}:
            found = rbd_location.disk_names(image)
            if found is not None:
                yield found

    @classmethod
    def native_templates(cls, conf: cfg.ConfigOpts) -> RbdTemplates:
        return RbdTemplates(conf, rbd_options.pool(conf), rbd_options.layout(conf))

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(snapshots=True, clone=True, flatten=True, direct_snapshot=True, resize_running=True)

    def exists(self) -> bool:
        return self._disk.exists()

    def create_image(
        self, prepare_template: FetchFunction, base: str, size: int | None, *args: Any, **kwargs: Any
    ) -> None:
        name = self.templates.name_of(base)
        if size is not None:
            names.check_size(size)
        with self._disk.lock():
            self._disk.settle()
            if self._disk.exists():
                return
            if self.encryption is not None and not rbd_encryption.can_clone(self.conf):
                self._copy_cached(prepare_template, name, size, *args, **kwargs)
                return
            template = self._find_stored(name)
            if template is not None:
                self._clone_stored(template, size)
            else:
                self._clone_cached(prepare_template, name, size, *args, **kwargs)
        LOG.info("disk %s made from template %s", self.path, name)

    def create_from_func(self, func: Callable[[str], object], size: int) -> None:
        names.check_size(size)
        with self._disk.lock():
            self._disk.settle()
            if self._disk.exists():
                return
            path = self._disk.scratch
            with publish.new_scratch(path) as descriptor:
                transfer.set_length(descriptor, size, path)
                func(path)
                transfer.check_filled(path, size)
                self._fill(self._disk, descriptor)
        LOG.info("disk %s made: %d bytes", self.path, size)

    def resize_image(self, size: int, domain: Any = None) -> None:
        names.check_size(size)
        with self._disk.lock():
            self._settle()
            current = self.get_disk_size(self.path)
            if transfer.is_grown(self.path, current, size):
                return
            header = self._disk.header_size()
            if domain is not None and transfer.is_running(domain):
                if header:
                    raise exceptions.Unsupported("growing a running encrypted disk", "librbd would cut off its end")
                transfer.resize_running(domain, self._target_device(domain), size)
            else:
                self._disk.refuse_in_use()
                with self.pool.open(self._disk.name) as image:
                    image.resize(size + header)
                faults.point("disk.resize.changed")
        LOG.info("disk %s grown from %d to %d bytes", self.path, current, size)

    def get_disk_size(self, name: str) -> int:
        return self._disk.size()

    def create_snap(self, name: str) -> None:
        names.check_name("snapshot", name)
        with self._disk.lock():
            self._settle()
            self._disk.refuse_in_use()
            self._disk.create_snapshot(name)

    def remove_snap(self, name: str, ignore_errors: bool = False) -> None:
        names.check_name("snapshot", name)
        try:
            with self._disk.lock():
                self._settle()
                rbd_image.remove_snapshot(self.pool, self._disk.name, name)
        except exceptions.ImageBackendError as error:
            if not ignore_errors:
                raise
            LOG.warning("snapshot %s of %s may still be there: %s", name, self.path, error)

    def rollback_to_snap(self, name: str) -> None:
        names.check_name("snapshot", name)
        with self._disk.lock():
            self._settle()
            if name not in [snapshot.name for snapshot in self.list_snaps()]:
                raise exceptions.SnapshotNotFound(name, f"disk {self.path} has no such snapshot")
            self._disk.refuse_in_use()
            self._disk.roll_back(name)
        LOG.info("disk %s rolled back to snapshot %s", self.path, name)

    def list_snaps(self) -> list[Snapshot]:
        with self.pool.open(self._disk.name, read_only=True) as image:
            found, header = [], self._disk.header_size()
            for each in sorted(image.list_snaps(), key=lambda snapshot: snapshot["id"]):
                # Not those that librbd keeps for clones, nor one that lives for as long as a direct snapshot takes.
                if each["namespace"] or ":" in each["name"]:
                    continue
                created = image.get_snap_timestamp(each["id"]).replace(tzinfo=datetime.UTC)
                found.append(Snapshot(each["name"], created.isoformat(timespec="seconds"), each["size"] - header))
            return found

    def flatten(self, *, progress: Progress | None = None) -> None:
        with self._disk.lock():
            self._settle()
            parent = rbd_image.parent_of(self.pool, self._disk.name)
            if parent is not None:
                with self.pool.open(self._disk.name) as image:
                    self._load_encryption(image)
                    rbd_data.flatten(image, progress)
                faults.point("disk.flatten.changed")
                rbd_image.bury_zombie(*parent)
            self.templates.release_all(self._disk.owner)
        LOG.info("disk %s holds all its data itself", self.path)

    def snapshot_extract(
        self, target: str, out_format: str | None = None, *, progress: Progress | None = None
    ) -> None:
        target, out_format = transfer.extract_target(self.conf, target, out_format, "raw")
        with self._disk.lock():
            self._settle()
            self._disk.refuse_in_use()
            with publish.new_file(target, durable=self.conf.durable_writes, replace=True) as (descriptor, partial):
                if out_format == "raw":
                    self._read(descriptor, progress)
                    return
                path = self._disk.scratch
                with publish.new_scratch(path) as scratch:
                    self._read(scratch, progress)
                    compress = out_format == "qcow2" and self.conf.libvirt.snapshot_compression
                    limits = disk_file.tool_options(self.conf)
                    qemu_img.convert(path, "raw", partial, out_format, compress=compress, progress=progress, **limits)
                    qemu_img.compare(path, "raw", partial, out_format, **limits)

    def import_file(self, instance: Any, local_file: str, remote_name: str) -> None:
        local_file = os.path.abspath(local_file)
        owner = names.instance_id(instance)
        disk = rbd_disk.RbdDisk(self.conf, self.pool, owner, names.check_name("disk", remote_name))
        with disk.lock(), transfer.open_file(local_file) as source:
            disk.settle()
            if disk.exists():
                disk.refuse_in_use()
            verdict = inspection.inspect(source, local_file)
            if verdict.format == "raw":
                self._fill(disk, source)
            else:
                path = disk.scratch
                with publish.new_scratch(path) as scratch:
                    limits = disk_file.tool_options(self.conf)
                    qemu_img.convert(local_file, verdict.format, path, "raw", **limits)
                    qemu_img.compare(local_file, verdict.format, path, "raw", **limits)
                    self._fill(disk, scratch)
            self.templates.release_all(disk.owner)

    def clone(self, context: Any, image_id_or_uri: str | Sequence[str]) -> None:
        """Make the disk from a snapshot of an image in the same cluster; do nothing if the disk exists.

        :param context: the image's :class:`~imagebackend.templates.sources.Source`, which tells its locations; None or
            anything else: Glance is asked.
        :param image_id_or_uri: the image's id or URL, as :func:`~imagebackend.templates.sources.open_source` takes it;
            or its location ``rbd://fsid/pool/image/snapshot``, or several, of which the first that can be cloned is.
        :raises ImageUnacceptable: none of them can; says why for each.
        :raises FetchFailed: what knows the locations cannot be reached, or has no such image.
        """
        if self.encryption is not None:
            raise exceptions.ImageUnacceptable(str(image_id_or_uri), "an encrypted disk is made with cache()")
        if not self._is_ready():
            locations = rbd_exchange.locations(self.conf, context, image_id_or_uri)
            with self._disk.lock():
                self._disk.settle()
                if not self._disk.exists():
                    location = rbd_exchange.clone_first(self._disk, locations, self._layout)
                    LOG.info("disk %s cloned from %s", self.path, location)

    def direct_snapshot(
        self, context: Any, snapshot_name: str, image_format: str, image_id: str, base_image_id: str
    ) -> str:
        """Make a copy of the disk in the pool that its template or base image is in, and return its URL.

        The disk may be in use: what is copied is what a power cut would have left.

        :param context: ignored.
        :param snapshot_name: of the disk, as long as this takes.
        :param image_format: raw.
        :param image_id: the name that the copy gets.
        :param base_image_id: ignored: the disk knows its parent.
        :raises Unsupported: another format.
        :raises DiskExists: there is an image of that name.
        """
        names.check_name("snapshot", snapshot_name)
        names.check_name("image", image_id)
        if image_format != "raw":
            raise exceptions.Unsupported(f"a direct snapshot in {image_format}", "images in a Ceph pool are raw")
        with self._disk.lock():
            self._settle()
            if self._disk.header_size():
                raise exceptions.Unsupported("a direct snapshot of an encrypted disk", "nobody could read the image")
            location = rbd_exchange.copy(self._disk, snapshot_name, image_id, self._layout)
        LOG.info("disk %s copied to %s", self.path, location)
        return str(location)

    def cleanup_direct_snapshot(
        self, location: str | None, also_destroy_volume: bool = False, ignore_errors: bool = False
    ) -> None:
        """Remove the snapshot that an image service refers to, and the image with it if asked.

        :param location: what :meth:`direct_snapshot` returned; None: nothing is done.
        :param also_destroy_volume: remove the image too.
        :param ignore_errors: only log what goes wrong.
        """
        if location is None:
            return
        try:
            rbd_exchange.remove(self.pool, rbd_url.parse_url(location), also_destroy_volume)
        except exceptions.ImageBackendError as error:
            if not ignore_errors:
                raise
            LOG.warning("%s may still be there: %s", location, error)

    def get_model(self, connection: Any) -> RBDImage:
        user, secret = self._auth()
        password = None
        if secret is not None and connection is not None:
            password = base64.b64encode(connection.secretLookupByUUIDString(secret).value()).decode()
        servers = tuple(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.pool.monitors())
        name = f"{self.pool.namespace}/{self._disk.name}" if self.pool.namespace else self._disk.name
        return RBDImage(name, self.pool.name, user, password, servers)

    def resolve_driver_format(self) -> str:
        return "raw"

    def remove(self) -> None:
        with self._disk.lock():
            self._disk.remove()
            self.templates.release_all(self._disk.owner)

    def usage(self) -> Usage:
        """Return what the disk takes by itself; quick with the image features object-map and fast-diff.

        :raises DiskNotFound: there is no such disk.
        """
        with self.pool.open(self._disk.name, read_only=True) as image:
            return Usage(image.size() - self._disk.header_size(), rbd_data.allocated(image))

    def allocated_size(self) -> int:
        return self.usage().used

    def is_in_use(self) -> bool:
        return bool(self.pool.watchers(self._disk.name))

    def parents(self) -> list[str]:
        return [pool.spec(image) for pool, image in rbd_image.ancestors(self.pool, self._disk.name)]

    def template_name(self) -> str | None:
        parent = rbd_image.parent_of(self.pool, self._disk.name)
        return None if parent is None else rbd_template.name_of(parent[1])

    @staticmethod
    def is_shared_block_storage() -> bool:
        return True

    def _describe_source(self, disk: LibvirtConfigGuestDisk) -> None:
        user, secret = self._auth()
        record = self._disk.settled_record()
        if record is None:
            self._disk.require()
            with self._disk.lock():
                self._settle()
                record = self._disk.record()
        disk.source_protocol = "rbd"
        disk.source_name = self._disk.spec
        disk.driver_format = "raw"
        for host, port in self.pool.monitors():
            disk.source_hosts.append(host)
            disk.source_ports.append(port)
        rbd_encryption.describe(disk, record.get("encryption"))
        disk.source_config_file = self.pool.settings.conf_file or None
        if user is not None:
            disk.auth_username = user
            disk.auth_secret_type = "ceph"  # noqa: S105 - not a password but a kind of secret
            disk.auth_secret_uuid = secret

    def _is_ready(self) -> bool:
        return self._disk.is_ready()

    def _settle(self) -> None:
        """Finish, or undo, a change that was cut short; the caller holds the lock."""
        self._disk.settle()
        self._disk.require()

    def _auth(self) -> tuple[str | None, str | None]:
        user, secret = self.conf.libvirt.rbd_user, self.conf.libvirt.rbd_secret_uuid
        if user and not secret:
            raise exceptions.InvalidConfiguration(
                "[libvirt] rbd_secret_uuid",
                f"guests need it for rbd_user {user!r}: define a secret of libvirt with its key",
            )
        return user or None, secret or None

    def _clone_cached(
        self, prepare_template: FetchFunction, name: str, size: int | None, *args: Any, **kwargs: Any
    ) -> None:
        """Make the disk from a template of the cache, which is fetched if it is absent, and imported if need be."""
        rbd_options.require_raw(self.conf)
        with (
            self.templates.use(name, prepare_template, *args, size=size, **kwargs) as template,
            contextlib.ExitStack() as undo,
        ):
            self.verify_base_size(template.path, size, template.virtual_size)
            self.templates.lease(template.file, self._disk.owner)
            undo.callback(self._release_quietly, template.file)
            faults.point("disk.create.leased")
            stored = RbdTemplate(template.name, template.virtual_size, template.sha256)
            prepare = functools.partial(self._store.ensure, template, progress=kwargs.get("progress"))
            self._clone_template(stored, size or template.virtual_size, prepare)
            undo.pop_all()

    def _copy_cached(
        self, prepare_template: FetchFunction, name: str, size: int | None, *args: Any, **kwargs: Any
    ) -> None:
        """Make the disk, encrypted, from a template of the cache; it depends on nothing."""
        with (
            self.templates.use(name, prepare_template, *args, size=size, **kwargs) as template,
            transfer.open_file(template.path) as source,
        ):
            self.verify_base_size(template.path, size, template.virtual_size)
            rbd_options.require_raw(self.conf, template)
            self._fill(self._disk, source, size or template.virtual_size, kwargs.get("progress"))

    def _find_stored(self, name: str) -> RbdTemplate | None:
        """Return a template that another host has imported, if this one has not fetched it itself."""
        with contextlib.suppress(exceptions.TemplateNotFound):
            self.templates.get(name)
            return None
        return self._store.find(name)

    def _clone_stored(self, template: RbdTemplate, size: int | None) -> None:
        """Make the disk from a template of the pool."""
        wanted = size or template.virtual_size
        if wanted < template.virtual_size:
            raise exceptions.DiskTooSmall(template.name, wanted, template.virtual_size, "the template's virtual size")
        self._clone_template(template, wanted, functools.partial(self._store.add_size, template))

    def _clone_template(self, template: RbdTemplate, size: int, prepare: Callable[[int], object]) -> None:
        """Clone the disk; only if that fails, ``prepare`` the template in the pool, and try again.

        :param prepare: called with the size that the template's snapshot has to have.
        """
        wanted = size if self.encryption is None else size + rbd_encryption.ROOM
        parent = (self.pool, template.image, template.snapshot(wanted))
        try:
            self._clone(*parent, size)
            return
        except exceptions.DiskNotFound:
            pass
        except exceptions.StorageError as error:
            if error.errno != errno.EINVAL:  # format 1, and its maker was killed before it protected the snapshot
                raise
        prepare(wanted)
        self._clone(*parent, size)

    def _clone(self, parent: ceph.Pool, image: str, snapshot: str, size: int) -> None:
        if self.encryption is None:
            self._disk.clone(parent, image, snapshot, self._layout)
        else:
            self._disk.clone_encrypted(parent, image, snapshot, size, self._layout, self.encryption)

    def _fill(self, disk: rbd_disk.RbdDisk, source: int, size: int = 0, progress: Progress | None = None) -> None:
        if self.encryption is None and disk.exists() and disk.header_size():
            raise exceptions.InvalidArgument(f"disk {disk.spec} is encrypted: set 'encryption' to replace it")
        size = -(-max(size, os.fstat(source).st_size) // names.SECTOR) * names.SECTOR
        with disk.fill(size, self._layout, {"format": "raw"}, self.encryption) as image:
            rbd_data.write_from(source, image, progress=progress)

    def _read(self, descriptor: int, progress: Progress | None) -> None:
        with self.pool.open(self._disk.name, read_only=True) as image:
            self._load_encryption(image)
            rbd_data.read_into(image, descriptor, progress=progress)

    def _load_encryption(self, image: Any) -> None:
        """Have the open disk decrypt what is read, if it is encrypted."""
        if self._disk.header_size():
            if self.encryption is None:
                raise exceptions.InvalidArgument(f"disk {self.path} is encrypted: set its 'encryption' to read it")
            rbd_encryption.load(self.encryption, image)

    def _release_quietly(self, template: str) -> None:
        # The error that led here matters more; the next attempt, or removing the disk, drops the lease.
        with contextlib.suppress(exceptions.ImageBackendError):
            self.templates.release(template, self._disk.owner)

    def _target_device(self, domain: Any) -> str:
        """Return the device that a running domain's guest sees the disk as: libvirt resizes network disks by that."""
        from lxml import etree

        for disk in etree.fromstring(domain.XMLDesc()).iterfind("devices/disk"):
            source, target = disk.find("source"), disk.find("target")
            if source is not None and target is not None and source.get("name") == self._disk.spec:
                return str(target.get("dev"))
        raise exceptions.DiskNotFound(self._disk.spec, "the domain has no such disk")
