# SPDX-License-Identifier: Apache-2.0
"""What the backends that keep a disk in a file share: its lock, its record, its publication, its repair."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults, locks, names, process
from imagebackend.images import disk_info
from imagebackend.storage import image_lock, publish, qemu_img
from imagebackend.templates.leases import Owner

__all__ = ["DiskFile", "default_path", "for_disk", "tool_options"]


def default_path(conf: cfg.ConfigOpts, instance: str, disk_name: str) -> str:
    """Return where the disk of an instance is kept."""
    return f"{os.path.abspath(conf.instances_path)}/{instance}/{disk_name}"


def for_disk(conf: cfg.ConfigOpts, instance: object, disk_name: str) -> DiskFile:
    """Return the file of an instance's disk.

    :param instance: anything with a ``uuid``, or a string.
    :raises InvalidName: one of the names is not safe.
    """
    name = names.instance_id(instance)
    return DiskFile(conf, name, names.check_name("disk", disk_name), default_path(conf, name, disk_name))


def tool_options(conf: cfg.ConfigOpts) -> dict[str, Any]:
    """Return the deadline and limits for a tool that works on a whole disk, as keyword arguments."""
    timeout = conf.libvirt.images_tool_timeout
    limits = process.Limits(cpu_time=timeout, address_space=conf.libvirt.images_address_space_limit << 30)
    return {"timeout": timeout, "limits": limits}


class DiskFile:
    """A disk's file and everything beside it. Making the object does no I/O.

    :param conf: options of this library.
    :param instance, disk_name: the disk.
    :param path: its file, absolute.
    """

    def __init__(self, conf: cfg.ConfigOpts, instance: str, disk_name: str, path: str) -> None:
        self.conf = conf
        self.path = path
        self.owner = Owner(instance, disk_name, conf.host, path)
        self.folder, name = os.path.split(path)
        self._locks = f"{os.path.abspath(conf.instances_path)}/locks"
        self._intent = f"{self.folder}/.{name}.intent"
        self._broken = f"{self.folder}/.{name}.broken"
        #: Where content is put together that then becomes the disk in another format.
        self.scratch = f"{self.folder}/.{name}.scratch"

    def exists(self) -> bool:
        """Return whether the disk is there; what has its name is whole.

        :raises StorageError: something else has its name.
        """
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise exceptions.storage_error(error, self.path) from error
        if not stat.S_ISREG(found.st_mode):
            raise exceptions.StorageError(self.path, "not a regular file; move it away")
        return True

    def require(self) -> None:
        """Make sure that the disk is there and sound.

        :raises DiskNotFound: it is not there.
        :raises CorruptDisk: a check found it damaged.
        """
        if not self.exists():
            raise exceptions.DiskNotFound(self.path)
        if os.path.exists(self._broken):
            raise exceptions.CorruptDisk(self.path, f"found damaged ({self._broken}); restore it, or remove the disk")

    def is_settled(self) -> bool:
        """Return whether no change of the disk was cut short, or is under way."""
        return not os.path.exists(self._intent)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which the disk is made and changed."""
        path = f"{self._locks}/disk-{self.owner.instance}_{self.owner.disk}"
        return locks.hold(path, timeout=self.conf.lock_timeout, transient=True)

    @contextlib.contextmanager
    def create(self, disk_format: str) -> Iterator[tuple[int, str]]:
        """Give an empty file to make the disk in; at the end of the block it is recorded and gets its name."""
        with publish.new_file(self.path, durable=self.conf.durable_writes) as (descriptor, partial):
            yield descriptor, partial
            faults.point("disk.create.filled")
            self.record(disk_format)
            faults.point("disk.create.recorded")

    def record(self, disk_format: str) -> None:
        """Record the disk's format, for good."""
        disk_info.record(
            self.path,
            disk_format,
            lock=self._record_lock(),
            timeout=self.conf.lock_timeout,
            durable=self.conf.durable_writes,
        )

    def resolve_format(self, default: str) -> str:
        """Return the disk's recorded format; a disk that has none recorded is ``default`` from now on."""
        recorded = disk_info.read(self.path)
        if recorded is None and self.exists():
            self.record(default)
        return recorded or default

    def refuse_in_use(self) -> None:
        """Make sure that no guest, and no tool, has the disk open for writing.

        :raises DiskInUse: one has.
        """
        if image_lock.is_in_use(self.path):
            raise exceptions.DiskInUse(self.path, "a running guest or a tool has it open; stop the guest first")

    @contextlib.contextmanager
    def change(self, disk_format: str, operation: str, **facts: Any) -> Iterator[None]:
        """Change the disk in place in the block, with the intent on record.

        qemu-img's changes are not atomic. If the block fails, or the process dies in it, the disk is checked: leaked
        clusters are given back, and damage marks it as not to be used.

        :param disk_format: qcow2.
        :param operation: what is being done.
        :param facts: what whoever finds the intent has to know to finish the change.
        """
        durable = self.conf.durable_writes
        publish.write_file(self._intent, json.dumps({"operation": operation, **facts}).encode(), durable=durable)
        if durable:
            publish.sync_folder(self.folder)
        faults.point(f"disk.{operation}.intended")
        try:
            yield
        except Exception as error:
            try:
                self.repair(disk_format)
                self.settle()
            except exceptions.ImageBackendError as damage:
                error.add_note(f"and afterwards: {damage}")
            raise
        faults.point(f"disk.{operation}.changed")
        self.settle()

    def repair(self, disk_format: str) -> dict[str, Any] | None:
        """Check a disk whose change was cut short, and give leaked clusters back; the caller holds the lock.

        :returns: the intent that was found, as recorded by :meth:`change`; None if there was none. The caller does
            what remains to be done, then calls :meth:`settle`.
        :raises CorruptDisk: the disk is damaged, and marked so.
        """
        try:
            intent: dict[str, Any] = json.loads(pathlib.Path(self._intent).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error}); check the disk with 'qemu-img check', then remove this file"
            raise exceptions.CorruptRecord(self._intent, reason) from error
        result = qemu_img.check(self.path, disk_format, repair_leaks=True, **self.tool_options())
        if result.corruptions:
            publish.write_file(self._broken, json.dumps(intent).encode(), durable=self.conf.durable_writes)
            reason = f"{result.corruptions} errors after '{intent['operation']}' was cut short; restore or remove it"
            raise exceptions.CorruptDisk(self.path, reason)
        return intent

    def settle(self) -> None:
        """Drop the intent: the change was made, or undone."""
        publish.remove_file(self._intent)

    def tool_options(self) -> dict[str, Any]:
        """Return what :func:`tool_options` does for this disk."""
        return tool_options(self.conf)

    def remove_file(self) -> None:
        """Remove the disk itself and what killed makers left of it; :meth:`forget` follows."""
        publish.remove_file(self.path)
        faults.point("disk.remove.file")
        for leftover in (publish.partial_path(self.path), self.scratch, self._intent, self._broken):
            publish.remove_file(leftover)

    def forget(self) -> None:
        """Drop the record of a disk that is gone, and the instance's folder with the last one.

        The record goes last: a disk without a format is the one thing that must never be seen.
        """
        disk_info.forget(
            self.path,
            lock=self._record_lock(),
            timeout=self.conf.lock_timeout,
            durable=self.conf.durable_writes,
        )
        faults.point("disk.remove.recorded")
        try:
            os.rmdir(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise exceptions.storage_error(error, self.folder) from error
            if self.conf.durable_writes:
                publish.sync_folder(self.folder)

    def _record_lock(self) -> str:
        return f"{self._locks}/record-{self.owner.instance}"
