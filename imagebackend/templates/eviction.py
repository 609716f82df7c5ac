# SPDX-License-Identifier: Apache-2.0
"""Removing what pruning has decided on, and telling what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from imagebackend import exceptions, faults, locks
from imagebackend.storage import publish
from imagebackend.templates import entries, pruning, record, removal, sweep
from imagebackend.templates.entries import Entry
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.leases import Owner
from imagebackend.templates.native import NativeTemplate, NativeTemplates
from imagebackend.templates.pruning import Candidate, Decision, Policy

__all__ = ["Report", "decide", "evict", "policy_of", "sweep_all"]

LOG = logging.getLogger(__name__)


@dataclass
class Report:
    """What pruning did, or would do.

    :ivar decisions: what was to become of each template, and why; those to be removed first, in order.
    :ivar removed: what was removed.
    :ivar failed: what could not be, or could not be looked at, and why.
    :ivar swept: what killed processes had left, and is gone.
    """

    decisions: list[Decision] = field(default_factory=list)
    removed: list[Candidate] = field(default_factory=list)
    failed: list[tuple[str, exceptions.ImageBackendError]] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)

    @property
    def reclaimed(self) -> int:
        """The bytes of storage that were given back, in all stores."""
        return sum(each.own for each in self.removed)


def policy_of(folder: TemplateFolder) -> Policy:
    """Return the policy that is configured."""
    options = folder.conf.image_cache
    return Policy(
        enabled=options.remove_unused_base_images,
        minimum_age=options.remove_unused_original_minimum_age_seconds,
        native_minimum_age=options.remove_unused_resized_minimum_age_seconds,
        total_size_limit=options.total_size_limit,
        free_space_target=options.free_space_target,
    )


def decide(folder: TemplateFolder, stores: Sequence[NativeTemplates], policy: Policy) -> Report:
    """Return what is to become of each template, without changing anything or waiting for anybody.

    A store that does not tell what it has is a failure in the report.

    :raises PermissionDenied, StorageError: the cache cannot be read.
    """
    report = Report()
    found = entries.entries(folder)
    busy = _busy(folder)
    candidates = [_candidate(entry, busy) for entry in found]
    parents = _by_content(found) if stores else {}
    for store in stores:
        try:
            candidates += [_native_candidate(store.image_type, each, parents) for each in store.list()]
        except exceptions.ImageBackendError as error:
            report.failed.append((store.image_type, error))
    report.decisions = pruning.plan(candidates, policy, time.time(), _free(folder))
    return report


def evict(folder: TemplateFolder, stores: Sequence[NativeTemplates], policy: Policy, report: Report) -> None:
    """Remove what was decided on, and note in the report what came of it.

    Each template is looked at again under its lock: what somebody uses by then stays. One that cannot be removed does
    not keep the others.
    """
    by_type = {store.image_type: store for store in stores}
    known = removal.list_names(folder)
    for decision in report.decisions:
        candidate = decision.candidate
        if not decision.remove:
            continue
        what = f"{candidate.store}:{candidate.name}" if candidate.store else candidate.name
        try:
            if candidate.store:
                by_type[candidate.store].remove(candidate.name)
            elif not _remove(folder, candidate, policy, known):
                continue
        except (exceptions.Busy, exceptions.TemplateNotFound) as error:
            LOG.info("template %s stays, since it is used again: %s", what, error)
        except exceptions.ImageBackendError as error:
            report.failed.append((what, error))
            LOG.warning("template %s cannot be removed: %s", what, error)
        else:
            report.removed.append(candidate)
            told = "removed%s: %s; %d bytes are free again"
            where = f" from {candidate.store}" if candidate.store else ""
            facts = {"store": candidate.store, "size": candidate.own, "reason": decision.reason}
            folder.events.tell("evicted", candidate.name, told, where, decision.reason, candidate.own, **facts)
        faults.point("template.prune.done")


def sweep_all(
    folder: TemplateFolder,
    stores: Sequence[NativeTemplates],
    is_gone: Callable[[Owner], bool],
    sweep_disks: Callable[[], Sequence[str]],
    report: Report,
) -> None:
    """Remove what killed processes left in the cache and in the stores, and note it in the report.

    :param is_gone: as for :func:`.sweep.sweep`.
    :param sweep_disks: removes what they left of disks in a store, and returns what that was.
    """
    swept, failed = sweep.sweep(folder, is_gone)
    report.swept += swept
    report.failed += failed
    for store in stores:
        with _noted(report, store.image_type):
            report.swept += [f"{store.image_type}:{name}" for name in store.sweep()]
    with _noted(report, folder.conf.libvirt.images_type):
        report.swept += sweep_disks()


@contextlib.contextmanager
def _noted(report: Report, image_type: str) -> Iterator[None]:
    try:
        yield
    except exceptions.ImageBackendError as error:
        report.failed.append((image_type, error))
        LOG.warning("what killed processes left in the %s store stays: %s", image_type, error)


def _remove(folder: TemplateFolder, candidate: Candidate, policy: Policy, known: removal.Names) -> bool:
    """Remove a template, unless it was used since it was decided on; return whether it was removed."""
    with folder.lock(candidate.name, timeout=0):
        entry = entries.entry_of(folder, candidate.name, ())
        if entry is None:
            return False
        found = _candidate(entry, frozenset())
        reason = pruning.must_stay(found, policy)
        if not reason and found.last_used > candidate.last_used:
            reason = "it was used meanwhile"
        if reason:
            LOG.info("template %s stays: %s", candidate.name, reason)
            return False
        return removal.remove(folder, candidate.name, known)


def _candidate(entry: Entry, busy: frozenset[str]) -> Candidate:
    template = entry.template
    return Candidate(
        name=entry.name,
        own=entry.own,
        last_used=entry.last_used,
        users=entry.users,
        pinned=template is not None and template.pinned,
        busy=record.base_name(entry.name) in busy,
        unknown=f"its record cannot be understood: {entry.damage}" if template is None else "",
    )


def _by_content(found: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """Return the templates by the name that they have or had, and by the digest of what was fetched."""
    parents: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        if entry.template is not None:
            parents.setdefault((record.base_name(entry.name), entry.template.sha256), []).append(entry)
    return parents


def _native_candidate(
    image_type: str, native: NativeTemplate, parents: Mapping[tuple[str, str], Sequence[Entry]]
) -> Candidate:
    """Return a template in another store, which is pinned, and used, as the one that it was made from."""
    candidate = Candidate(native.name, image_type, own=native.used, users=len(native.users))
    try:
        last_used = record.seconds(native.made)
    except ValueError:
        return dataclasses.replace(candidate, unknown=f"it does not say when it was made: {native.made!r}")
    found = parents.get((native.name, native.sha256), ())
    return dataclasses.replace(
        candidate,
        last_used=max([last_used, *(entry.last_used for entry in found)]),
        pinned=any(entry.template is not None and entry.template.pinned for entry in found),
    )


def _busy(folder: TemplateFolder) -> frozenset[str]:
    """Return the names of the templates that somebody fetches, makes a disk from, or reads again."""
    return frozenset(name for name, path in _lock_files(folder) if locks.is_held(path))


def _lock_files(folder: TemplateFolder) -> Iterator[tuple[str, str]]:
    for entry in publish.list_folder(folder.locks):
        kind, _, name = entry.partition("-")
        if kind in ("template", "pull"):
            yield name, f"{folder.locks}/{entry}"


def _free(folder: TemplateFolder) -> int:
    try:
        found = os.statvfs(folder.path)
    except OSError:
        return 0  # there is nothing to remove either
    return found.f_bavail * found.f_frsize
