# SPDX-License-Identifier: Apache-2.0
"""All leases in a cache: made anew from what the disks say, and, for a host that is gone, dropped on purpose."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field

from imagebackend import exceptions, faults, locks
from imagebackend.templates import leases, record, sweep
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.leases import Lease, Owner
from imagebackend.templates.native import NativeTemplate

__all__ = ["Evidence", "LeaseBook", "Rebuilt"]


@dataclass
class Evidence:
    """What disks say of themselves, whatever leases there are.

    :ivar needed: the leases that they need, by the templates' files.
    :ivar natives: templates in other stores, with the disks that depend on them.
    :ivar failed: what could not be looked at, and why.
    """

    needed: set[Lease] = field(default_factory=set)
    natives: list[NativeTemplate] = field(default_factory=list)
    failed: list[tuple[str, exceptions.ImageBackendError]] = field(default_factory=list)


@dataclass(frozen=True)
class Rebuilt:
    """What came of it.

    :ivar made: leases that were missing.
    :ivar dropped: leases of this host whose disks are gone, or depend on something else.
    :ivar failed: what could not be looked at, or made, and why.
    """

    made: list[Lease]
    dropped: list[Lease]
    failed: list[tuple[str, exceptions.ImageBackendError]]


class LeaseBook:
    """The leases in a cache: :attr:`.TemplateCache.lease_book`.

    :param is_gone: whether a disk of this host, which nobody makes or changes meanwhile, is provably not there.
    """

    def __init__(self, folder: TemplateFolder, is_gone: Callable[[Owner], bool]) -> None:
        self._folder = folder
        self._is_gone = is_gone

    def leases(self, host: str | None = None) -> list[Lease]:
        """Return all leases, sorted by the templates' files and by disk; no lock is taken.

        :param host: only those of the disks of this host.
        :raises PermissionDenied, StorageError: they cannot be read.
        """
        found = []
        for file in self._folder.leased():
            each_of = leases.read_all(self._folder.leases(file), file)
            found += [each for each in each_of if host in (None, each.owner.host)]
        return found

    def is_seen(self, owner: Owner) -> bool:
        """Return whether a disk can be seen from this host, where its lease says that it is."""
        if owner.path.startswith("rbd:"):
            return not self._is_gone(owner)
        return os.path.lexists(owner.path)

    def rebuild(self, evidence: Evidence, needs: Callable[[Owner], Set[str] | None]) -> Rebuilt:
        """Make the leases that disks need and do not have, and drop those of this host that nothing needs.

        :param needs: returns the files of templates that a disk, which nobody makes or changes meanwhile, depends on;
            None: it cannot be known.
        :raises PermissionDenied, StorageError: the leases cannot be read.
        """
        rebuilt = Rebuilt([], [], list(evidence.failed))
        needed = {*evidence.needed, *self._of_natives(evidence)}
        for lease in sorted(needed, key=lambda each: (each.template, each.owner.link)):
            with _noted(rebuilt, lease.owner.path):
                if self._make(lease):
                    rebuilt.made.append(lease)
            faults.point("template.leases.made")
        links = {(each.template, each.owner.link) for each in needed}
        for lease in self.leases(self._folder.conf.host):
            if (lease.template, lease.owner.link) not in links:
                with _noted(rebuilt, lease.owner.path), contextlib.suppress(exceptions.LockTimeout):
                    if self._drop_needless(lease, needs):
                        rebuilt.dropped.append(lease)
        return rebuilt

    def drop_host(self, host: str) -> tuple[list[Lease], list[Lease]]:
        """Drop the leases of a host that will not come back; return those, and those that stay.

        A lease stays if its disk can be seen from here: it is in use, or can be again on another host.

        :raises InvalidArgument: it is this host.
        :raises PermissionDenied, StorageError: some are still there.
        """
        if host == self._folder.conf.host:
            raise exceptions.InvalidArgument(f"host {host} is this one: its leases are rebuilt, not dropped")
        dropped, kept = [], []
        for lease in self.leases(host):
            if self.is_seen(lease.owner):
                kept.append(lease)
            else:
                self._folder.drop_lease(lease.template, lease.owner)
                dropped.append(lease)
        return dropped, kept

    def _of_natives(self, evidence: Evidence) -> Set[Lease]:
        """Return the leases of disks that depend on templates in other stores, which were made from those here."""
        found = set()
        former = self._folder.former() if evidence.natives else {}
        for native in evidence.natives:
            names = (native.name, *former.get(native.name, ()))
            file = self._file_of(names, native.sha256) if native.users else None
            for owner in native.users if file is not None else ():
                if owner.instance:  # otherwise it is no disk of ours
                    host = owner.host or self._folder.conf.host
                    found.add(Lease(file or "", dataclasses.replace(owner, host=host)))
        return found

    def _file_of(self, names: Iterable[str], sha256: str) -> str | None:
        for each in names:
            with contextlib.suppress(exceptions.CorruptRecord):
                template = self._folder.read(each, check_file=False)
                if template is not None and template.sha256 == sha256:
                    return template.file
        return None

    def _make(self, lease: Lease) -> bool:
        """Make a lease unless it is there; return whether it was not.

        :raises InvalidName: no template can have the file.
        :raises TemplateNotFound: the file is gone.
        """
        file = record.check_reference(lease.template)
        if leases.holds(self._folder.leases(file), lease.owner):
            return False
        # Nobody removes the template meanwhile.
        with self._folder.lock(file, shared=True):
            if not os.path.lexists(self._folder.file(file)):
                raise exceptions.TemplateNotFound(file, f"{lease.owner.path} depends on it; restore the file")
            self._folder.take_lease(file, lease.owner)
        return True

    def _drop_needless(self, lease: Lease, needs: Callable[[Owner], Set[str] | None]) -> bool:
        with locks.hold(sweep.disk_lock(self._folder, lease.owner), timeout=0, transient=True):
            if not self._is_gone(lease.owner):
                needed = needs(lease.owner)
                if needed is None or lease.template in needed:
                    return False
            self._folder.drop_lease(lease.template, lease.owner)
        return True


@contextlib.contextmanager
def _noted(rebuilt: Rebuilt, what: str) -> Iterator[None]:
    """Note an error of the block, but for a lock that somebody holds."""
    try:
        yield
    except exceptions.LockTimeout:
        raise
    except exceptions.ImageBackendError as error:
        rebuilt.failed.append((what, error))
