# SPDX-License-Identifier: Apache-2.0
"""Which templates are to be removed: the decision alone, without I/O, with its reason for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Candidate", "Decision", "Policy", "must_stay", "plan"]


@dataclass(frozen=True)
class Candidate:
    """A template that may be removed.

    :ivar name: its name.
    :ivar store: the image type of the store that it is in; empty for a file in the cache.
    :ivar own: the bytes of storage that removing it gives back.
    :ivar last_used: when it was used last, in seconds since the epoch.
    :ivar users: how many disks depend on it.
    :ivar pinned: whether the operator wants to keep it.
    :ivar busy: whether it is being fetched, or a disk is being made from it.
    :ivar unknown: why nothing is known of it; empty if that is not so.
    """

    name: str
    store: str = ""
    own: int = 0
    last_used: float = 0.0
    users: int = 0
    pinned: bool = False
    busy: bool = False
    unknown: str = ""

    def age(self, now: float) -> float:
        """Return for how many seconds it has not been used; 0 if a clock was set back since."""
        return max(0.0, now - self.last_used)


@dataclass(frozen=True)
class Policy:
    """What is to be kept.

    :ivar enabled: whether anything is removed at all.
    :ivar minimum_age: for how many seconds a template in the cache is kept after its last use.
    :ivar native_minimum_age: the same for what was made from a template in another store.
    :ivar total_size_limit: the bytes that the templates in the cache may take; 0: no limit.
    :ivar free_space_target: the bytes that are to be free on the file system of the cache; 0: no target.
    """

    enabled: bool = True
    minimum_age: float = 86400
    native_minimum_age: float = 3600
    total_size_limit: int = 0
    free_space_target: int = 0

    def age_limit(self, candidate: Candidate) -> float:
        """Return for how many seconds after its last use a template is kept."""
        return self.native_minimum_age if candidate.store else self.minimum_age


@dataclass(frozen=True)
class Decision:
    """What is to become of a template, and why."""

    candidate: Candidate
    remove: bool
    reason: str


def must_stay(candidate: Candidate, policy: Policy) -> str:
    """Return why a template must not be removed, whatever its age and size; empty if it may be."""
    if candidate.unknown:
        return candidate.unknown
    if candidate.users:
        return f"in use by {candidate.users} disk{'s' if candidate.users > 1 else ''}"
    if candidate.pinned:
        return "pinned"
    if candidate.busy:
        return "being fetched, or made a disk from"
    if not policy.enabled:
        return "[image_cache] remove_unused_base_images is off"
    return ""


def plan(candidates: Iterable[Candidate], policy: Policy, now: float, free: int = 0) -> list[Decision]:
    """Return what is to become of each template: first those to be removed, those not used for longest first.

    A template goes if it was not used for as long as the policy says. Those that are left go, from the one not used
    for longest on, until the rest fits into the size limit and the file system has as much free space as is wanted.

    :param now: seconds since the epoch.
    :param free: the bytes that are free on the file system of the cache.
    """
    known = sorted(candidates, key=_by_use)
    removed: list[Decision] = []
    kept: list[Decision] = []
    left: list[tuple[Candidate, str]] = []
    for each in known:
        age, limit = each.age(now), policy.age_limit(each)
        if reason := must_stay(each, policy):
            kept.append(Decision(each, False, reason))
        elif age >= limit:
            removed.append(Decision(each, True, f"not used for {_time(age)}, which is {_time(limit)} or more"))
        else:
            left.append((each, f"used {_time(age)} ago, which is less than {_time(limit)}"))
    total = sum(each.own for each in known if not each.store)
    reclaimed = sum(decision.candidate.own for decision in removed if not decision.candidate.store)
    for each, reason in left:
        pressure = _pressure(policy, total - reclaimed, free + reclaimed)
        if pressure and each.own and not each.store:
            removed.append(Decision(each, True, pressure))
            reclaimed += each.own
        else:
            kept.append(Decision(each, False, reason))
    kept.sort(key=lambda decision: (decision.candidate.store, decision.candidate.name))
    return [*sorted(removed, key=lambda decision: _by_use(decision.candidate)), *kept]


def _by_use(candidate: Candidate) -> tuple[float, str, str]:
    return candidate.last_used, candidate.store, candidate.name


def _pressure(policy: Policy, total: int, free: int) -> str:
    """Return why more has to go; empty if it need not."""
    if policy.total_size_limit and total > policy.total_size_limit:
        return f"the templates take {_size(total)}, {_size(policy.total_size_limit)} are allowed"
    if free < policy.free_space_target:
        return f"{_size(free)} are free, {_size(policy.free_space_target)} are wanted"
    return ""


def _size(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB" if size < 10 << 30 else f"{size / (1 << 30):.0f} GiB"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"
