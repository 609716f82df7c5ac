# SPDX-License-Identifier: Apache-2.0
"""A disk's file and everything beside it: its lock, its record, its publication, its repair."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults, locks, names, process
from imagebackend.images import disk_info
from imagebackend.images.encryption import Encryption
from imagebackend.storage import image_lock, loop_device, ploop, publish, qcow2, qemu_img
from imagebackend.templates.leases import Owner

__all__ = ["DiskFile", "for_disk", "tool_options"]

LOG = logging.getLogger(__name__)

#: Names in ``instances_path`` that are no instance's, and names in an instance's folder that are no disk's.
_NO_INSTANCES = ("locks", "snapshots")
_NO_DISKS = ("disk.info",)

# Of a file: what changes if it does. The time of change is there since nobody can set it back.
_identity: Callable[[os.stat_result], tuple[int, ...]]
_identity = attrgetter("st_ino", "st_mtime_ns", "st_ctime_ns", "st_size")


def for_disk(conf: cfg.ConfigOpts, instance: object, disk_name: str) -> DiskFile:
    """Return the file of an instance's disk.

    :param instance: anything with a ``uuid``, or a string.
    :raises InvalidName: one of the names is not safe, or stands for something else.
    """
    name = names.instance_id(instance)
    names.check_name("disk", disk_name)
    if name in (*_NO_INSTANCES, conf.image_cache.subdirectory_name):
        raise exceptions.InvalidName("instance", name, "instances_path has something else of that name")
    if disk_name in _NO_DISKS:
        raise exceptions.InvalidName("disk", disk_name, "the record of the instance's disks is called that")
    return DiskFile(conf, name, disk_name)


def tool_options(conf: cfg.ConfigOpts, *, facts_only: bool = False) -> dict[str, Any]:
    """Return the deadline and limits for a tool that works on a disk, as keyword arguments.

    :param facts_only: it reads what images are, and none of their data: its work does not grow with them.
    """
    timeout = conf.libvirt.images_tool_timeout
    cpu_time = conf.libvirt.images_cpu_time_limit if facts_only else timeout
    limits = process.Limits(cpu_time=cpu_time, address_space=conf.libvirt.images_address_space_limit << 30)
    return {"timeout": timeout, "limits": limits}


class DiskFile:
    """A disk's file, or its folder if it is a ploop disk. Making the object does no I/O.

    :param conf: options of this library.
    :param instance, disk_name: the disk; the names are safe.
    """

    def __init__(self, conf: cfg.ConfigOpts, instance: str, disk_name: str) -> None:
        instances = os.path.abspath(conf.instances_path)
        self.conf = conf
        self.folder = f"{instances}/{instance}"
        self.path = f"{self.folder}/{disk_name}"
        self.owner = Owner(instance, disk_name, conf.host, self.path)
        self.locks = locks.folder(instances)
        #: How the disk is, or is to be, encrypted.
        self.encryption: Encryption | None = None
        #: Where content is put together that then becomes the disk in another format.
        self.scratch = f"{self.folder}/.{disk_name}.scratch"
        self._intent = f"{self.folder}/.{disk_name}.intent"
        self._broken = f"{self.folder}/.{disk_name}.broken"

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
        if not (stat.S_ISREG(found.st_mode) or (stat.S_ISDIR(found.st_mode) and os.path.lexists(self.descriptor))):
            raise exceptions.StorageError(self.path, "neither a regular file nor a ploop disk; move it away")
        return True

    @property
    def descriptor(self) -> str:
        """The path of a ploop disk's descriptor."""
        return f"{self.path}/{ploop.NAME}"

    def identity(self) -> tuple[tuple[int, ...], ...] | None:
        """Return what changes if the disk's file or its record does; None if one of them is not there."""
        try:
            disk, record = os.lstat(self.path), os.lstat(f"{self.folder}/disk.info")
            if not stat.S_ISDIR(disk.st_mode):
                return _identity(disk), _identity(record)
            parts = os.lstat(self.descriptor), os.lstat(f"{self.path}/{ploop.ROOT_IMAGE}")
        except OSError:
            return None
        return tuple(map(_identity, (disk, record, *parts)))

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
        """Return whether no change of the disk was cut short or is under way, and none has damaged it."""
        return not os.access(self._intent, os.F_OK)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which the disk is made and changed."""
        path = locks.disk_lock(self.locks, self.owner.instance, self.owner.disk)
        return locks.hold(path, timeout=self.conf.lock_timeout, transient=True)

    @contextlib.contextmanager
    def lock_to_remove(self) -> Iterator[None]:
        """Hold the lock; go without it where the file system is too full for a lock file: nobody could make room."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.lock())
            except exceptions.InsufficientSpace as error:
                LOG.warning("removing %s without its lock: %s", self.path, error)
            yield

    @contextlib.contextmanager
    def create(self, disk_format: str, *, replace: bool = False) -> Iterator[tuple[int, str]]:
        """Give an empty file to make the disk in; at the end of the block it is recorded and gets its name.

        :param replace: a disk may be there, recorded in the same format; otherwise none is.
        """
        with contextlib.ExitStack() as undo:
            if not replace:
                undo.callback(self._forget_quietly)
            durable = self.conf.durable_writes
            with publish.new_file(self.path, durable=durable, replace=replace) as (descriptor, partial):
                yield descriptor, partial
                faults.point("disk.create.filled")
                if durable:
                    # Starts writing back at once, so that syncing it, after its record, finds little to do.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                self._record_new(disk_format)
            undo.pop_all()

    @contextlib.contextmanager
    def create_folder(self, disk_format: str) -> Iterator[str]:
        """Give an empty folder to make the disk in; at the end of the block it is recorded and gets its name.

        The block makes the files durable. No disk is there.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self._forget_quietly)
            with publish.new_folder(self.path, durable=self.conf.durable_writes) as partial:
                yield partial
                faults.point("disk.create.filled")
                self._record_new(disk_format)
            undo.pop_all()

    def _record_new(self, disk_format: str) -> None:
        self.record(disk_format)
        # Of a disk that had the name before.
        if publish.remove_file(self._intent):
            publish.remove_file(self._broken)
        faults.point("disk.create.recorded")

    def record(self, disk_format: str) -> None:
        """Record the disk's format, for good."""
        secret = self.encryption.secret_uuid if self.encryption else None
        disk_info.record(self.path, disk_format, secret_uuid=secret, **self._record_options())

    def resolve_format(self, default: str) -> str:
        """Return the disk's recorded format; a disk that has none recorded is ``default`` from now on.

        It is read each time: another process may have made the disk anew, in another format.

        :raises CorruptRecord: none is recorded, and the disk cannot be in ``default``.
        """
        recorded = disk_info.read(self.path)
        if recorded is None and self.exists():
            # What is a folder and what is a file, no guest can change.
            if os.path.isdir(self.path):
                default = "ploop"
            elif default == "ploop":
                reason = f"does not tell the format of {self.path}, which is no ploop disk; write it in: raw or qcow2"
                raise exceptions.CorruptRecord(f"{self.folder}/disk.info", reason)
            self.record(default)
        return recorded or default

    def secret_uuid(self) -> str | None:
        """Return the UUID of the secret that opens the disk, as recorded; None: it is not encrypted."""
        return disk_info.read_secret(self.path)

    def passphrase(self) -> str | None:
        """Return what opens the disk; None: it is not encrypted.

        :raises InvalidArgument: it is not known, or how the disk is encrypted is not how it is to be.
        """
        recorded = self.secret_uuid()
        if recorded == (self.encryption.secret_uuid if self.encryption else None):
            return self.encryption.passphrase if self.encryption else None
        reason = "is not encrypted" if recorded is None else f"is encrypted, with secret {recorded}"
        raise exceptions.InvalidArgument(f"disk {self.path} {reason}: set its 'encryption' accordingly")

    def is_in_use(self) -> bool:
        """Return whether a guest or a tool has the disk open for writing."""
        return any(image_lock.is_in_use(path) for path in self._files())

    def refuse_in_use(self) -> None:
        """Make sure that no guest, no tool and no device of the kernel has the disk open for writing.

        :raises DiskInUse: one has.
        """
        for path in self._files():
            if image_lock.is_in_use(path):
                raise exceptions.DiskInUse(self.path, "a running guest or a tool has it open; stop the guest first")
            device = loop_device.find(path) or ploop.find_device(path)
            if device is not None:
                reason = f"{device} is attached to it; stop the container or detach it first"
                raise exceptions.DiskInUse(self.path, reason)

    def allocated_size(self) -> int:
        """Return how many bytes of storage the disk takes; those that it shares with others count."""
        try:
            return sum(os.stat(path, follow_symlinks=False).st_blocks for path in self._files()) * names.SECTOR
        except FileNotFoundError as error:
            raise exceptions.DiskNotFound(self.path) from error
        except OSError as error:
            raise exceptions.storage_error(error, self.path) from error

    def _files(self) -> list[str]:
        """Return the paths of what the disk is stored in."""
        try:
            entries = os.listdir(self.path)
        except NotADirectoryError:
            return [self.path]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise exceptions.storage_error(error, self.path) from error
        paths = (f"{self.path}/{entry}" for entry in sorted(entries) if not entry.startswith((".", ploop.NAME)))
        return [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]

    def intend(self, operation: str, **facts: Any) -> None:
        """Put on record what is about to be done to the disk in place.

        :param facts: what whoever finds the intent has to know to finish the change, or to undo it.
        """
        durable = self.conf.durable_writes
        publish.write_file(self._intent, json.dumps({"operation": operation, **facts}).encode(), durable=durable)
        if durable:
            publish.sync_folder(self.folder)
        faults.point(f"disk.{operation}.intended")

    def intent(self) -> dict[str, Any] | None:
        """Return what :meth:`intend` put on record and nobody has settled, or None.

        :raises CorruptRecord: it cannot be read.
        """
        try:
            intent: dict[str, Any] = json.loads(pathlib.Path(self._intent).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise exceptions.storage_error(error, self._intent) from error
        except ValueError as error:
            reason = f"cannot be read ({error}); check the disk with 'qemu-img check', then remove this file"
            raise exceptions.CorruptRecord(self._intent, reason) from error
        return intent

    def mark_broken(self, facts: dict[str, Any]) -> None:
        """Mark the disk as damaged: it is not offered for use any more."""
        publish.write_file(self._broken, json.dumps(facts).encode(), durable=self.conf.durable_writes)

    def forget_damage(self) -> None:
        """Drop the mark of a disk that was damaged: it holds something else now."""
        publish.remove_file(self._broken)

    @contextlib.contextmanager
    def change(self, operation: str, **facts: Any) -> Iterator[None]:
        """Change a qcow2 disk in place in the block, with the intent on record.

        qemu-img's changes are not atomic. If the block fails, or the process dies in it, the disk is checked: leaked
        clusters are given back, and damage marks it as not to be used.

        :param operation: what is being done.
        :param facts: what whoever finds the intent has to know to finish the change.
        """
        self.intend(operation, **facts)
        try:
            yield
        except Exception as error:
            try:
                self.repair()
                if not _may_be_half_done(operation, error):
                    self.settle()
            except exceptions.ImageBackendError as damage:
                error.add_note(f"and afterwards: {damage}")
            raise
        faults.point(f"disk.{operation}.changed")
        self.settle()
        faults.point(f"disk.{operation}.settled")

    def repair(self) -> dict[str, Any] | None:
        """Check a disk whose change was cut short, and mend its reference counts; the caller holds the lock.

        :returns: the intent that was found, as recorded by :meth:`change`; None if there was none. The caller does
            what remains to be done, then calls :meth:`settle`.
        :raises CorruptDisk: the disk is damaged, and marked so.
        :raises StorageError: it could not be mended; the next attempt may.
        """
        intent = self.intent()
        if intent is None:
            return None
        result = self._mend_leaks()
        if result.corruptions:
            # What a change that was cut short leaves is wrong counts; the tables that they are made from are right.
            qemu_img.check(self.path, "qcow2", repair="all", **self.image_options())
            result = self._mend_leaks()
        if result.corruptions:
            self.mark_broken(intent)
            reason = f"{result.corruptions} errors after '{intent['operation']}' was cut short; restore or remove it"
            raise exceptions.CorruptDisk(self.path, reason)
        if result.leaks:
            raise exceptions.StorageError(self.path, f"{result.leaks} leaked clusters could not be given back")
        return intent

    def settle(self) -> None:
        """Drop the intent: the change was made, or undone."""
        publish.remove_file(self._intent)
        if self.conf.durable_writes:
            # One that came back after a power cut would be carried out again, over what the guest wrote since.
            publish.sync_folder(self.folder)

    def tool_options(self, *, facts_only: bool = False) -> dict[str, Any]:
        """Return what :func:`tool_options` does for this disk."""
        return tool_options(self.conf, facts_only=facts_only)

    def image_options(self, *, facts_only: bool = False) -> dict[str, Any]:
        """Return what :func:`tool_options` does for a tool that opens this disk itself, with what opens it."""
        return {**self.tool_options(facts_only=facts_only), "passphrase": self.passphrase()}

    def remove_file(self) -> None:
        """Remove the disk itself and what killed makers left of it; :meth:`forget` follows."""
        if os.path.isdir(self.path):
            publish.remove_folder(self.path)
        else:
            publish.remove_file(self.path)
        faults.point("disk.remove.file")
        publish.remove_partial(self.path)
        for leftover in (self.scratch, self._intent, self._broken):
            publish.remove_file(leftover)

    def forget(self) -> None:
        """Drop the record of a disk that is gone, and the instance's folder with the last one.

        The record goes last: a disk without a format is the one thing that must never be seen. It stays where the file
        system is too full to write one without this disk: without the disk it means nothing.
        """
        try:
            disk_info.forget(self.path, **self._record_options())
        except exceptions.InsufficientSpace as error:
            LOG.warning("the record of %s, which is gone, stays: %s", self.path, error)
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

    def _mend_leaks(self) -> qemu_img.CheckResult:
        with qcow2.all_counted(self.path):
            return qemu_img.check(self.path, "qcow2", repair="leaks", **self.image_options())

    def _forget_quietly(self) -> None:
        # An undo step: the error that led here matters more, and a record without a disk means nothing.
        with contextlib.suppress(exceptions.ImageBackendError):
            if not os.path.lexists(self.path):
                self.forget()

    def _record_options(self) -> dict[str, Any]:
        return {
            "lock": f"{self.locks}/record-{self.owner.instance}",
            "timeout": self.conf.lock_timeout,
            "durable": self.conf.durable_writes,
        }


def _may_be_half_done(operation: str, error: Exception) -> bool:
    """Return whether a disk is neither what it was nor what it was to be, so that the intent has to stay.

    A flatten or rebase that failed can leave that, and a roll back whose tool was killed. All else changes what no
    guest reads.
    """
    if operation in ("flatten", "rebase"):
        return True
    if operation != "rollback":
        return False
    return not isinstance(error, exceptions.ToolFailed) or error.exit_code is None or error.exit_code < 0
