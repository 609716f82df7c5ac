# SPDX-License-Identifier: Apache-2.0
"""The template cache: fetched once, inspected before anything opens it, recorded, leased."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults, names
from imagebackend.storage import digest, publish
from imagebackend.templates import download, fetching, inspection, leases, record
from imagebackend.templates.fetching import FetchFunction, Progress, Request
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.leases import Lease, Owner
from imagebackend.templates.record import Template

__all__ = ["FetchFunction", "Template", "TemplateCache"]

LOG = logging.getLogger(__name__)

# How often the use of a template is noted, in seconds: pruning counts in hours.
_NOTE_EVERY = 300.0
_HINT = "add it with 'imagebackend template add'"


class TemplateCache:
    """The templates in one folder, which other hosts may share.

    A template is there when its record is. Making the object does no I/O.

    :param conf: options of this library.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._conf = conf
        self._folder = TemplateFolder(conf)
        self._noted: dict[str, float] = {}

    @property
    def folder(self) -> str:
        """The folder that holds the templates."""
        return self._folder.path

    def path(self, name: str) -> str:
        """Return what agents may call a template by in place of its name: the path of its file, as a rule.

        :raises InvalidName: no template can be called that.
        """
        return self._folder.file(record.check_reference(name))

    def name_of(self, base: str) -> str:
        """Return the name of the template that ``base`` means: a name, or a path in this cache.

        :raises InvalidName: it is neither.
        """
        folder, slash, name = base.rpartition("/")
        if slash and folder != self._folder.path:
            raise exceptions.InvalidName("template", base, f"neither a name nor a path in {self._folder.path}")
        return record.check_reference(name)

    def get(self, name: str) -> Template:
        """Return a template that is in the cache.

        :raises TemplateNotFound: it is not.
        :raises CorruptRecord: its record or its file is damaged.
        """
        record.check_reference(name)
        template = self._folder.read(name) or self._folder.read(self._resolve(name))
        if template is None:
            raise exceptions.TemplateNotFound(name, _HINT)
        return template

    def by_file(self, file: str) -> Template:
        """Return the template whose file has a name in the folder, which is what disks depend on, by its record alone.

        :raises TemplateNotFound: none has.
        :raises CorruptRecord: its record is damaged.
        """
        found = self._folder.find(record.check_reference(file))
        if found is None:
            raise exceptions.TemplateNotFound(file, _HINT)
        return found

    def list(self) -> Sequence[Template]:
        """Return every template, sorted by name; one whose record is damaged is logged and left out.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        found = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except exceptions.TemplateNotFound:
                continue  # removed since it was listed
            except exceptions.CorruptRecord as error:
                LOG.warning("template %s is left out: %s", name, error)
        return found

    def names(self) -> Sequence[str]:
        """Return the names of all templates, sorted, whether their records are sound or not.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        return [name for name in self._folder.names() if "@" not in name]

    def fetch(
        self,
        name: str,
        fetch_func: FetchFunction,
        *args: Any,
        size: int | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> Template:
        """Return a template, fetching it if it is absent: once, however many threads, processes and hosts ask.

        :param name: the template.
        :param fetch_func: called as ``fetch_func(*args, target=path, **kwargs)`` if the template is absent, and with
            ``progress=`` too if one is given.
        :param size: refuse a template whose virtual size exceeds this many bytes, before it is converted.
        :param progress: called with the bytes done and in all, while fetching and while converting; an exception that
            it raises cancels the fetch and propagates.
        :raises InvalidName: no template can be called that.
        :raises ImageUnacceptable: what was fetched must not be used.
        :raises DiskTooSmall: its virtual size exceeds ``size``.
        :raises InsufficientSpace: it does not fit into the file system.
        :raises LockTimeout: someone else was at it for longer than ``[DEFAULT] lock_timeout``.

        An exception of ``fetch_func`` propagates. A failed fetch is not remembered, and leaves nothing but, for a day
        and under a temporary name, the part of an image that its source can go on with.
        """
        names.check_name("template", name)
        template = self._trusted(name, size)
        if template is None and self._folder.is_recorded(name):
            self._examine(name, progress)
        if template is not None:
            return template
        with self._folder.lock(name):
            return self._fetch_locked(Request(name, fetch_func, args, kwargs, size, progress))

    @contextlib.contextmanager
    def use(
        self,
        name: str,
        fetch_func: FetchFunction | None = None,
        *args: Any,
        size: int | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> Iterator[Template]:
        """Give a template, fetched as :meth:`fetch` does, that nobody removes while the block runs.

        Any number of threads, processes and hosts may use a template at a time. A disk that needs it for longer takes
        a :meth:`lease` in the block.

        :param fetch_func: None: the template must be in the cache.
        :raises TemplateNotFound: it is not, and there is nothing to fetch it with.
        """
        record.check_reference(name)
        if fetch_func is None:
            name = self._require(name)
        while True:
            with self._folder.lock(name, shared=True):
                template = self._trusted(name, size)
                if template is not None:
                    self._note_use(template.file)
                    yield template
                    return
            if self._folder.is_recorded(name):
                self._examine(name, progress)
            elif fetch_func is None:
                self._require(name)
            else:
                with self._folder.lock(name):
                    self._fetch_locked(Request(name, fetch_func, args, kwargs, size, progress))

    def last_used(self, template: Template) -> float:
        """Return when a template was used last, in seconds since the epoch: fetched, or a disk made or dropped."""
        known = datetime.datetime.fromisoformat(template.superseded or template.fetched).timestamp()
        return max(known, leases.changed(self._folder.leases(template.file)))

    def lease(self, file: str, owner: Owner) -> None:
        """Note that the disk ``owner`` depends on a template, within :meth:`use`.

        :param file: the template's :attr:`~Template.file`.
        :raises InsufficientSpace, PermissionDenied, StorageError: it is not noted.
        """
        leases.take(self._folder.leases(file), owner)

    def is_leased(self, file: str, owner: Owner) -> bool:
        """Return whether ``owner`` has a lease on a template, by its :attr:`~Template.file`."""
        return leases.holds(self._folder.leases(file), owner)

    def release(self, file: str, owner: Owner) -> None:
        """Drop the lease that ``owner`` has on a template, if it has one.

        :param file: the template's :attr:`~Template.file`.
        :raises PermissionDenied, StorageError: it still has it.
        """
        leases.drop(self._folder.leases(file), owner)

    def release_all(self, owner: Owner) -> None:
        """Drop every lease that ``owner`` has, when it is not known on which templates.

        :raises PermissionDenied, StorageError: it may still have some.
        """
        folder = f"{self.folder}/.leases"
        try:
            templates = os.listdir(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise exceptions.storage_error(error, folder) from error
        for name in templates:
            leases.drop(f"{folder}/{name}", owner)

    def leases(self, name: str) -> Sequence[Lease]:
        """Return the leases on a template, sorted by disk.

        :raises PermissionDenied, StorageError: they cannot be read.
        """
        record.check_reference(name)
        found = [lease for file in self._files(name) for lease in leases.read_all(self._folder.leases(file), name)]
        return sorted(found, key=lambda lease: lease.owner.link)

    def verify(self, name: str, progress: Progress | None = None) -> Template:
        """Read a template again and compare it with its digest.

        :param progress: called with the bytes done and in all.
        :returns: the template.
        :raises TemplateNotFound: it is not in the cache.
        :raises CorruptRecord: the record or the file is damaged.
        """
        name = self._require(record.check_reference(name), hint="")
        with self._folder.lock(name, shared=True):
            template = self._folder.read(name, check_file=False)
            if template is None:
                raise exceptions.TemplateNotFound(name)
            path, expected = template.path, template.digest
            with fetching.open_image(path) as descriptor:
                # Before it is read: what is changed while it is read, behind the reader, must show as changed later.
                found = os.fstat(descriptor)
                actual = digest.compute(descriptor, expected.partition(":")[0], path, progress)
        if actual != expected:
            raise exceptions.CorruptRecord(
                path, f"the template is damaged: its digest is {actual}, recorded as {expected}; restore or remove it"
            )
        # Same bytes, another time of change: a copy or a restore touched the file, not its content.
        return (
            template if found.st_mtime_ns == template.modified else self._rewrite(template, modified=found.st_mtime_ns)
        )

    def remove(self, name: str) -> None:
        """Remove a template that no disk depends on.

        :raises TemplateNotFound: it is not in the cache.
        :raises TemplateInUse: disks hold leases on it.
        :raises CorruptRecord: a newer release wrote its record.
        :raises LockTimeout: someone else was at it for longer than ``[DEFAULT] lock_timeout``.
        """
        record.check_reference(name)
        with self._folder.lock(name):
            try:
                self._folder.read(name, check_file=False)
            except record.NewerRecord:
                raise
            except exceptions.CorruptRecord as error:
                LOG.warning("removing template %s: %s", name, error)
            users = [f"{lease.owner.host}:{lease.owner.path}" for lease in self.leases(name)]
            if users:
                raise exceptions.TemplateInUse(name, users)
            files = self._files(name)
            # The record goes first: from then on nothing but a file without a meaning is left.
            there = self._folder.forget(name)
            faults.point("template.remove.record")
            for file in files:
                there |= publish.remove_file(self._folder.file(file))
            faults.point("template.remove.file")
            there |= download.remove(self._folder.download(name))
            there |= publish.remove_file(publish.partial_path(self._folder.file(name)))
            for file in files:
                with contextlib.suppress(OSError):
                    os.rmdir(self._folder.leases(file))
        if not there:
            raise exceptions.TemplateNotFound(name)
        LOG.info("template %s removed", name)

    def _files(self, name: str) -> Sequence[str]:
        """Return the files of a template: one, unless its record cannot be understood."""
        try:
            template = self._folder.read(name, check_file=False)
        except exceptions.CorruptRecord:
            return self._folder.unclaimed(name)
        return [name if template is None else template.file]

    def _fetch_locked(self, request: Request) -> Template:
        name = request.name
        template = self._folder.read(name)
        if template is not None:
            return template
        if os.path.lexists(self._folder.file(name)) and self.leases(name):
            raise exceptions.CorruptRecord(
                self._folder.record(name),
                "the template's record is gone while disks depend on its file; restore the record",
            )
        with fetching.arriving(self._folder, request, name) as arrival, contextlib.ExitStack() as undo:
            template = arrival.publish(name)
            undo.callback(self._forget_quietly, name)
            self._folder.write(template)
            faults.point("template.fetch.recorded")
            undo.pop_all()
        LOG.info("template %s fetched from %s: %s, %d bytes", name, template.source, template.format, template.size)
        return template

    def _forget_quietly(self, name: str) -> None:
        # An undo step: the error that led here matters more. The record goes before the file, as in remove().
        with contextlib.suppress(exceptions.ImageBackendError):
            self._folder.forget(name)

    def _note_use(self, file: str) -> None:
        """Note that a template is used, since disks that do not depend on it leave no trace, by its leases' folder."""
        now = time.monotonic()
        if now - self._noted.get(file, -math.inf) < _NOTE_EVERY:
            return
        self._noted[file] = now
        # A folder that is read-only keeps nobody from using what is there.
        with contextlib.suppress(OSError):
            leases.touch(self._folder.leases(file))

    def _resolve(self, name: str) -> str:
        """Return the name of the template that is meant: its own, or that of its file."""
        if self._folder.is_recorded(name) or "@" not in name:
            return name
        found = self._folder.find(name)
        return name if found is None else found.name

    def _require(self, name: str, hint: str = _HINT) -> str:
        """Return the name of the template that is meant.

        :raises TemplateNotFound: there is none.
        """
        name = self._resolve(name)
        if not self._folder.is_recorded(name):
            raise exceptions.TemplateNotFound(name, hint)
        return name

    def _trusted(self, name: str, size: int | None) -> Template | None:
        """Return the template if it may be used as it stands; None if it is absent, or to be examined first."""
        try:
            template = self._folder.read(name)
        except record.TouchedTemplate:
            return None
        if template is None or template.inspector != inspection.INSPECTOR_VERSION:
            return None
        fetching.check_size(self._conf, name, template.virtual_size, template.min_disk, size)
        return template

    def _examine(self, name: str, progress: Progress | None) -> None:
        """Read a template that was touched again, and inspect anew one that an older inspector accepted.

        :raises CorruptRecord: its data have changed.
        :raises ImageUnacceptable: the inspector of today refuses it.
        """
        try:
            template = self.verify(name, progress)
        except exceptions.TemplateNotFound:
            return  # removed meanwhile
        if template.inspector == inspection.INSPECTOR_VERSION:
            return
        with fetching.open_image(template.path) as image:
            verdict = inspection.inspect(image, name, template.format)
        self._rewrite(template, inspector=inspection.INSPECTOR_VERSION, notes=verdict.notes)

    def _rewrite(self, template: Template, **changes: Any) -> Template:
        refreshed = dataclasses.replace(template, **changes)
        faults.point("template.verify.touched")
        with self._folder.lock(template.name):
            # It may have been removed, or fetched anew, since it was read.
            if self._folder.read(template.name, check_file=False) == template:
                self._folder.write(refreshed)
        return refreshed
