# SPDX-License-Identifier: Apache-2.0
"""The template cache: fetched once, inspected before anything opens it, recorded, leased."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.templates import (
    entries,
    eviction,
    leases,
    precaching,
    pulling,
    record,
    removal,
    sweep,
    trust,
    verification,
)
from imagebackend.templates.catalogue import HINT, Catalogue
from imagebackend.templates.events import Observer
from imagebackend.templates.eviction import Report
from imagebackend.templates.fetching import FetchFunction, Progress, Request
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.lease_book import LeaseBook
from imagebackend.templates.leases import Lease, Owner
from imagebackend.templates.native import NativeTemplates
from imagebackend.templates.precaching import Precached, Wanted
from imagebackend.templates.pruning import Policy
from imagebackend.templates.pulling import POLICIES
from imagebackend.templates.record import Template
from imagebackend.templates.sources import Source

__all__ = ["POLICIES", "FetchFunction", "Template", "TemplateCache"]

LOG = logging.getLogger(__name__)

# How often the use of a template is noted, in seconds: pruning counts in hours.
_NOTE_EVERY = 300.0

# What [image_cache] manager_interval = 0 means, in seconds.
_SHORTEST_INTERVAL = 60.0


class TemplateCache:
    """The templates in one folder, which other hosts may share.

    A template is there when its record is. Making the object does no I/O.

    :param conf: options of this library.
    :param stores: returns the stores of templates that were made from those in the cache.
    :param is_gone: whether a disk of this host, which nobody makes or changes meanwhile, is provably not there; None:
        only files are known to be.
    :param sweep_disks: removes what killed processes left of disks in a store, and returns what that was.
    :ivar catalogue: what is in the cache, for those who look after it.
    :ivar lease_book: all leases.
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        stores: Callable[[], Sequence[NativeTemplates]] = tuple,
        is_gone: Callable[[Owner], bool] | None = None,
        sweep_disks: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._conf = conf
        self._folder = TemplateFolder(conf)
        self._stores = stores
        self._is_gone = is_gone or self.is_file_gone
        self._sweep_disks = sweep_disks
        self.catalogue = Catalogue(self._folder)
        self.lease_book = LeaseBook(self._folder, self._is_gone)
        self._noted: dict[str, float] = {}
        self._next_run = -math.inf

    @property
    def folder(self) -> str:
        """The folder that holds the templates."""
        return self._folder.path

    @property
    def observers(self) -> builtins.list[Observer]:
        """Who is told what happens, by whatever thread of this process; see :mod:`imagebackend.templates.events`."""
        return self._folder.events.observers

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
        template = self._folder.read(name) or self._folder.read(trust.resolve(self._folder, name))
        if template is None:
            raise exceptions.TemplateNotFound(name, HINT)
        return template

    def by_file(self, file: str) -> Template:
        """Return the template whose file has a name in the folder, which is what disks depend on, by its record alone.

        :raises TemplateNotFound: none has.
        :raises CorruptRecord: its record is damaged.
        """
        found = self._folder.find(record.check_reference(file))
        if found is None:
            raise exceptions.TemplateNotFound(file, HINT)
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

    def names(self, *, former: bool = False) -> Sequence[str]:
        """Return the names of all templates, sorted, whether their records are sound or not.

        :param former: also of those that another image has taken the name of.
        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        return [name for name in self._folder.names() if former or "@" not in name]

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
        return pulling.fetch(self._folder, Request(name, fetch_func, args, kwargs, size, progress))

    def pull(
        self,
        name: str,
        source: Source,
        policy: str = "missing",
        *,
        size: int | None = None,
        progress: Progress | None = None,
    ) -> Template:
        """Return a template, after asking its source as the policy says.

        What is there stays, and disks go on being made from it, until what comes from the source is complete. It then
        has the name, and what had it before stays for the disks that depend on it, as ``NAME@DIGITS``, until it is
        pruned. If the source has the same image, nothing is kept twice; if the one here is damaged, that mends it.

        :param policy: ``missing``: ask only if the template is absent. ``newer``: fetch it if the source has another
            image; if it cannot be reached, that is a warning, and what is there does. ``always``: fetch it. ``never``:
            do not ask.
        :param size, progress: as for :meth:`fetch`.
        :raises InvalidArgument: there is no such policy.
        :raises TemplateExists: the name is a tag of another template.
        :raises TemplateNotFound: it is absent, and the policy is ``never``.
        :raises FetchFailed, ChecksumMismatch, FetchTimeout: the source did not deliver.

        All else that :meth:`fetch` raises is raised here.
        """
        if policy not in POLICIES:
            raise exceptions.InvalidArgument(f"pull policy {policy!r}: {', '.join(POLICIES)} are known")
        if policy == "never":
            return self.get(name)
        request = Request(names.check_name("template", name), source.fetch, size=size, progress=progress)
        return pulling.pull(self._folder, request, source, policy)

    def precache(
        self, wanted: Sequence[Wanted], stores: Sequence[NativeTemplates] = (), *, at_once: int | None = None
    ) -> Sequence[Precached]:
        """Have templates ready before a guest needs them: pulled, and made into what stores make disks from.

        One that fails does not keep the others, and is in the answer with its error.

        :param stores: such as :meth:`.Backend.native_templates` returns.
        :param at_once: how many are worked on at a time; None: ``[image_cache] precache_concurrency``.
        :returns: what came of each, in the same order.
        """
        return precaching.precache(self, wanted, stores, at_once or self._conf.image_cache.precache_concurrency)

    def is_file_gone(self, owner: Owner) -> bool:
        """Return whether a disk, if it is a file of this host, is provably not there."""
        return sweep.is_file_gone(self._folder, owner)

    def prune(
        self,
        policy: Policy | None = None,
        *,
        stores: Sequence[NativeTemplates] | None = None,
        dry_run: bool = False,
    ) -> Report:
        """Remove templates that no disk depends on, as a policy says, and what killed processes left.

        Nobody is waited for: what is in use, pinned or being fetched stays. What fails does not keep the rest, and is
        in the report with what was removed. Templates in other stores are pruned by the same rules.

        :param policy: None: what is configured.
        :param stores: the other stores; None: those of the configured image type.
        :param dry_run: only decide.
        :raises PermissionDenied, StorageError: the cache cannot be read.
        """
        policy = policy or eviction.policy_of(self._folder)
        stores = self._stores() if stores is None else stores
        report = eviction.decide(self._folder, stores, policy)
        if not dry_run:
            eviction.evict(self._folder, stores, policy, report)
            eviction.sweep_all(self._folder, stores, self._is_gone, self._sweep_disks, report)
        return report

    def periodic(self) -> Report | None:
        """Prune, if that is due; for an agent's timer, which may call this as often as it likes.

        :returns: None if it is not due, or ``[image_cache] manager_interval`` is -1.
        :raises PermissionDenied, StorageError: the cache cannot be read; it is tried again when it is due again.
        """
        interval = self._conf.image_cache.manager_interval
        if interval < 0 or time.monotonic() < self._next_run:
            return None
        self._next_run = time.monotonic() + (interval or _SHORTEST_INTERVAL)
        return self.prune()

    def policy(self, **changes: Any) -> Policy:
        """Return the policy that is configured, with some of its fields changed."""
        return dataclasses.replace(eviction.policy_of(self._folder), **changes)

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
            name = trust.require(self._folder, name, HINT)
        is_told = False
        while True:
            with self._folder.lock(name, shared=True):
                template = trust.trusted(self._folder, name, size)
                if template is not None:
                    self._note_use(template.file)
                    if not is_told:
                        self._folder.events.tell("hit", template.name)
                    yield template
                    return
            # Examined, resolved or fetched; then it is looked at again under the lock.
            if fetch_func is not None:
                name = pulling.fetch(self._folder, Request(name, fetch_func, args, kwargs, size, progress)).name
                is_told = True
            elif trust.usable(self._folder, name, size, progress) is None:
                trust.require(self._folder, name, HINT)

    def last_used(self, template: Template) -> float:
        """Return when a template was used last, in seconds since the epoch: fetched, or a disk made or dropped."""
        return entries.last_used(self._folder, template)

    def lease(self, file: str, owner: Owner) -> None:
        """Note that the disk ``owner`` depends on a template, within :meth:`use`.

        :param file: the template's :attr:`~Template.file`.
        :raises InsufficientSpace, PermissionDenied, StorageError: it is not noted.
        """
        self._folder.take_lease(file, owner)

    def is_leased(self, file: str, owner: Owner) -> bool:
        """Return whether ``owner`` has a lease on a template, by its :attr:`~Template.file`."""
        return leases.holds(self._folder.leases(file), owner)

    def release(self, file: str, owner: Owner) -> None:
        """Drop the lease that ``owner`` has on a template, if it has one.

        :param file: the template's :attr:`~Template.file`.
        :raises PermissionDenied, StorageError: it still has it.
        """
        self._folder.drop_lease(file, owner)

    def release_all(self, owner: Owner) -> None:
        """Drop every lease that ``owner`` has, when it is not known on which templates.

        :raises PermissionDenied, StorageError: it may still have some.
        """
        for file in self._folder.leased():
            self._folder.drop_lease(file, owner)

    def leases(self, name: str) -> Sequence[Lease]:
        """Return the leases on a template, sorted by disk.

        :raises PermissionDenied, StorageError: they cannot be read.
        """
        record.check_reference(name)
        return removal.users(self._folder, name)

    def verify(self, name: str, progress: Progress | None = None, *, rate: int = 0) -> Template:
        """Read a template again, from the storage, and compare it with its digest.

        One that is damaged is put into quarantine: it stays for the disks that depend on it, and no disk is made from
        it until it is pulled again, or restored and verified. A verification that was cut short is taken up by the
        next one within a day, except for the first one of an image that is kept as it was fetched.

        :param progress: called with the bytes done and in all.
        :param rate: read at most this many bytes a second; 0: no limit.
        :returns: the template.
        :raises TemplateNotFound: it is not in the cache.
        :raises CorruptTemplate: it is damaged; names the disks that depend on it.
        :raises CorruptRecord: its record is.
        """
        return verification.verify(
            self._folder, trust.require(self._folder, record.check_reference(name)), progress, rate
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
            there = removal.remove(self._folder, name, removal.list_names(self._folder))
        if not there:
            raise exceptions.TemplateNotFound(name)
        LOG.info("template %s removed", name)

    def _note_use(self, file: str) -> None:
        """Note that a template is used, since disks that do not depend on it leave no trace, by its leases' folder."""
        now = time.monotonic()
        if now - self._noted.get(file, -math.inf) < _NOTE_EVERY:
            return
        self._noted[file] = now
        # A folder that is read-only keeps nobody from using what is there.
        with contextlib.suppress(OSError):
            leases.touch(self._folder.leases(file))
