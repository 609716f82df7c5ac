# SPDX-License-Identifier: Apache-2.0
"""The folder of the cache: what is called what there, and under which locks it is changed.

::

    NAME                    a template's file; NAME@DIGITS, if another has or had that name
    .NAME.download          while it is fetched
    .NAME.partial           while it is converted
    .FILE.verify            how far its verification is
    .records/NAME.json      its record
    .leases/FILE/           who depends on its file
    .tags/TAG               another name of a template: a symbolic link to NAME
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults, locks
from imagebackend.storage import publish
from imagebackend.templates import leases, record
from imagebackend.templates.events import Events
from imagebackend.templates.leases import Owner
from imagebackend.templates.record import Template

__all__ = ["TemplateFolder"]


class TemplateFolder:
    """The folder that holds the templates, which other hosts may share. Making the object does no I/O.

    :param conf: options of this library.
    :ivar path: the folder, absolute.
    :ivar locks: the folder of the lock files.
    :ivar events: who is told what happens.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        instances = os.path.abspath(conf.instances_path)
        self.conf = conf
        self.path: str = os.path.join(instances, conf.image_cache.subdirectory_name)
        self.locks = locks.folder(instances)
        self.events = Events()

    def file(self, name: str) -> str:
        """Return the path of a file by its name in the folder."""
        return f"{self.path}/{name}"

    def download(self, name: str) -> str:
        """Return where a template is fetched to."""
        return f"{self.path}/.{name}.download"

    def record(self, name: str) -> str:
        """Return the path of a template's record."""
        return f"{self.path}/.records/{name}.json"

    def checkpoint(self, file: str) -> str:
        """Return where it stands how far a verification of a file is."""
        return f"{self.path}/.{file}.verify"

    @property
    def tags(self) -> str:
        """The folder of the tags."""
        return f"{self.path}/.tags"

    def leases(self, file: str) -> str:
        """Return the folder of the leases on a template's file."""
        return f"{self.path}/.leases/{file}"

    def leased(self) -> list[str]:
        """Return the files that have, or had, leases, sorted.

        :raises PermissionDenied, StorageError: it cannot be known.
        """
        return publish.list_folder(f"{self.path}/.leases")

    def take_lease(self, file: str, owner: Owner) -> None:
        """Make a disk's lease on a file, unless it has it.

        :raises InsufficientSpace, PermissionDenied, StorageError: there is none.
        """
        if leases.take(self.leases(file), owner):
            self.events.tell("lease.made", file, "is leased to %s", owner.path, **vars(owner))

    def drop_lease(self, file: str, owner: Owner) -> None:
        """Drop a disk's lease on a file, if it has one.

        :raises PermissionDenied, StorageError: it still has it.
        """
        if leases.drop(self.leases(file), owner):
            self.events.tell("lease.dropped", file, "is not leased to %s any more", owner.path, **vars(owner))

    def lock_file(self, kind: str, name: str) -> str:
        """Return the lock file of a kind, ``template``, ``pull`` or ``verify``, for a template or a file of one."""
        return f"{self.locks}/{kind}-{record.base_name(name)}"

    def lock(
        self, name: str, *, shared: bool = False, timeout: float | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which a template, and all that had its name before, is changed, or kept as it is.

        :param timeout: seconds to wait at most; None: ``[DEFAULT] lock_timeout``.
        :raises LockTimeout: someone else held it all that time.
        """
        # Exclusive holders remove the lock file, so that none is left for a template that could not be fetched.
        path = self.lock_file("template", name)
        timeout = self.conf.lock_timeout if timeout is None else timeout
        return locks.hold(path, timeout=timeout, shared=shared, transient=not shared)

    def pull_lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which a template that is there is fetched anew, while disks are made from it."""
        return locks.hold(self.lock_file("pull", name), timeout=self.conf.lock_timeout, transient=True)

    def verify_lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold the lock under which a template is read again, so that one does it at a time."""
        return locks.hold(self.lock_file("verify", name), timeout=self.conf.lock_timeout, transient=True)

    def is_recorded(self, name: str) -> bool:
        """Return whether a template is there."""
        return os.path.lexists(self.record(name))

    def read(self, name: str, *, check_file: bool = True) -> Template | None:
        """Return what is recorded of a template, or None.

        :param check_file: make sure that its file has the length and time of change that were recorded.
        :raises CorruptRecord: the record cannot be understood, or the file is not the one that was recorded.
        """
        return record.read(self.record(name), self.path, check_file=check_file)

    def write(self, template: Template) -> None:
        """Record a template; from now on it is there.

        :raises InsufficientSpace, PermissionDenied, StorageError: it is not, or still as it was recorded before.
        """
        record.write(self.record(template.name), template, durable=self.conf.durable_writes)

    def prepare(self, template: Template) -> None:
        """Write a template's record under a temporary name, for :meth:`publish_prepared`; until then it says whose
        the file is.

        :raises InsufficientSpace, PermissionDenied, StorageError: nothing has changed.
        """
        record.prepare(self.record(template.name), template, durable=self.conf.durable_writes)

    def publish_prepared(self, name: str) -> None:
        """Do what remains for a template to be recorded.

        :raises PermissionDenied, StorageError: it is not, or still as it was recorded before.
        """
        record.publish_prepared(self.record(name), durable=self.conf.durable_writes)

    def restore(self, template: Template) -> None:
        """Record a template as it was before, as an undo step: a sync of the records that failed is not tried again.

        :raises InsufficientSpace, PermissionDenied, StorageError: it is recorded as it was changed.
        """
        self.prepare(template)
        record.publish_prepared(self.record(template.name), durable=False)

    def rewrite(
        self, template: Template, event: str, detail: str = "", *, timeout: float | None = None, **changes: Any
    ) -> Template:
        """Record changes of a template, unless it was removed or changed otherwise since it was read; return it so.

        :param event, detail: what happened to it, for its history.
        :param timeout: as for :meth:`lock`.
        """
        faults.point("template.rewrite")
        with self.lock(template.name, timeout=timeout):
            if (current := self.read(template.name, check_file=False)) == template and current is not None:
                template = current.after(event, detail, **changes)
                self.write(template)
                return template
        return template.after(event, detail, **changes)

    def forget(self, name: str) -> bool:
        """Remove a template's record; return whether there was one.

        :raises PermissionDenied, StorageError: it is still there.
        """
        return publish.remove_file(self.record(name))

    def set_aside(self, name: str) -> bool:
        """Give a template's record a temporary name, so that the template is not there; return whether it was.

        What has that name says whose the file is, until :meth:`forget_prepared`.

        :raises PermissionDenied, StorageError: it is still there.
        """
        path = self.record(name)
        try:
            os.rename(path, publish.partial_path(path))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise exceptions.storage_error(error, path) from error
        return True

    def forget_prepared(self, name: str) -> bool:
        """Remove a record that has only its temporary name; return whether there was one.

        :raises PermissionDenied, StorageError: it is still there.
        """
        return publish.remove_file(publish.partial_path(self.record(name)))

    def names(self) -> Sequence[str]:
        """Return the names of all records, sorted, whether they are sound or not.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        entries = publish.list_folder(f"{self.path}/.records")
        return sorted(name.removesuffix(".json") for name in entries if not name.startswith("."))

    def former(self) -> Mapping[str, Sequence[str]]:
        """Return, by the name that they had before, the names of all templates that another has taken it of, sorted.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        found: dict[str, list[str]] = {}
        for name in self.names():
            if "@" in name:
                found.setdefault(record.base_name(name), []).append(name)
        return found

    def generations(self, name: str) -> Sequence[str]:
        """Return the names of the templates that had a name before, sorted.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        return self.former().get(record.base_name(name), ())

    def leftovers(self, name: str, known: Sequence[str] | None = None) -> Sequence[str]:
        """Return the names whose records say what had a name before, though its file is that of the template of today.

        A process that was killed while it replaced one by the other leaves such a record.

        :param known: the names of the templates that had the name before; None: they are listed.
        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        base, found = record.base_name(name), []
        known = self.generations(base) if known is None else known
        with contextlib.suppress(exceptions.CorruptRecord):
            current = self.read(base, check_file=False)
            for each in known if current is not None else ():
                with contextlib.suppress(exceptions.CorruptRecord):
                    former = self.read(each, check_file=False)
                    if former is not None and current is not None and former.file == current.file:
                        found.append(each)
        return found

    def find(self, file: str) -> Template | None:
        """Return the template whose file has a name, by the records alone, or None.

        :raises CorruptRecord: a record that may be its cannot be understood.
        """
        # The record that most probably is its own comes first: then nothing has to be listed.
        for each in dict.fromkeys((file, record.base_name(file))):
            template = self.read(each, check_file=False)
            if template is not None and template.file == file:
                return template
        for each in self.generations(file):
            template = self.read(each, check_file=False)
            if template is not None and template.file == file:
                return template
        return None

    def unclaimed(self, name: str) -> Sequence[str]:
        """Return the files that have or had a name, sorted, but for those that other sound records say are theirs.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        base = record.base_name(name)
        claimed = set()
        for each in {base, *self.generations(base)} - {name}:
            with contextlib.suppress(exceptions.CorruptRecord):
                template = self.read(each, check_file=False)
                claimed.add(template.file if template is not None else "")
        entries = publish.list_folder(self.path)
        return [each for each in entries if record.base_name(each) == base and each not in claimed]
