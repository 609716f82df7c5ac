# SPDX-License-Identifier: Apache-2.0
"""The decision which templates go: a table, and what must hold for every cache."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagebackend.templates.pruning import Candidate, Decision, Policy, must_stay, plan

DAY, HOUR, MIB = 86400.0, 3600.0, 1 << 20
NOW = 1_800_000_000.0
TEN_YEARS = 10 * 365 * DAY


def used(name: str, ago: float, own: int = MIB, **facts: Any) -> Candidate:
    """A template that was used so many seconds ago."""
    return Candidate(name, own=own, last_used=NOW - ago, **facts)


def outcome(decisions: list[Decision]) -> str:
    """Return what is removed, in order."""
    return " ".join(each.candidate.name for each in decisions if each.remove)


OLD, NEW = used("old", 2 * DAY), used("new", HOUR)


@pytest.mark.parametrize(
    ("candidates", "options", "free", "removed", "reasons"),
    [
        ([], {}, 0, "", []),
        (
            [NEW, OLD],
            {},
            0,
            "old",
            ["not used for 2 days, which is 24 h or more", "used 60 min ago, which is less than 24 h"],
        ),
        ([used("a", DAY)], {}, 0, "a", ["not used for 24 h, which is 24 h or more"]),
        ([used("a", DAY - 1)], {}, 0, "", ["used 23 h ago, which is less than 24 h"]),
        ([used("a", 0)], {"minimum_age": 0}, 0, "a", ["not used for 0 s, which is 0 s or more"]),
        ([OLD], {"enabled": False}, 0, "", ["[image_cache] remove_unused_base_images is off"]),
        ([OLD], {"enabled": False, "total_size_limit": 1, "free_space_target": MIB}, 0, "", None),
        ([used("a", 2 * DAY, users=1)], {"total_size_limit": 1}, 0, "", ["in use by 1 disk"]),
        ([used("a", 2 * DAY, users=3)], {}, 0, "", ["in use by 3 disks"]),
        ([used("a", 2 * DAY, pinned=True)], {"free_space_target": MIB}, 0, "", ["pinned"]),
        ([used("a", 2 * DAY, busy=True)], {}, 0, "", ["being fetched, or made a disk from"]),
        ([used("a", 2 * DAY, unknown="why")], {}, 0, "", ["why"]),
        # In other stores.
        ([used("a", 2 * HOUR, store="rbd")], {}, 0, "a", ["not used for 2 h, which is 60 min or more"]),
        ([used("a", HOUR / 2, store="rbd")], {}, 0, "", ["used 30 min ago, which is less than 60 min"]),
        ([used("a", HOUR / 2, store="rbd")], {"total_size_limit": 1, "free_space_target": MIB}, 0, "", None),
        # For want of space: from the one not used for longest on.
        ([used("a", 1), used("b", 3), used("c", 2)], {"total_size_limit": 3 * MIB}, 0, "", None),
        (
            [used("a", 1), used("b", 3), used("c", 2)],
            {"total_size_limit": 2 * MIB},
            0,
            "b",
            [
                "the templates take 3 MiB, 2 MiB are allowed",
                "used 1 s ago, which is less than 24 h",
                "used 2 s ago, which is less than 24 h",
            ],
        ),
        ([used("a", 1), used("b", 3), used("c", 2)], {"total_size_limit": 2 * MIB - 1}, 0, "b c", None),
        ([used("a", 1), used("b", 3), used("c", 2)], {"total_size_limit": 1}, 0, "b c a", None),
        ([used("a", 1), used("b", 3, users=1), used("c", 2)], {"total_size_limit": 1}, 0, "c a", None),
        ([used("a", 1), used("b", 3, own=0), used("c", 2)], {"total_size_limit": MIB}, 0, "c", None),
        ([OLD, NEW], {"total_size_limit": MIB}, 0, "old", None),
        ([used("a", 1), used("b", 2)], {"free_space_target": 100}, 100, "", None),
        ([used("a", 1), used("b", 2)], {"free_space_target": 100}, 99, "b", None),
        ([used("a", 1)], {"free_space_target": 5 * MIB}, 3 * MIB, "a", ["3 MiB are free, 5 MiB are wanted"]),
        ([used("a", 1), used("b", 2)], {"free_space_target": 2 * MIB}, 0, "b a", None),
        ([OLD, NEW], {"free_space_target": MIB}, 0, "old", None),
        ([OLD, NEW], {"free_space_target": MIB + 1}, 0, "old new", None),
        # Whatever the clock says.
        ([used("a", -TEN_YEARS)], {}, 0, "", ["used 0 s ago, which is less than 24 h"]),
        ([used("a", TEN_YEARS, users=1)], {}, 0, "", ["in use by 1 disk"]),
        ([used("b", -TEN_YEARS), used("a", 5)], {"total_size_limit": MIB}, 0, "a", None),
    ],
)
def test_the_plan(candidates, options, free, removed, reasons):
    decisions = plan(candidates, Policy(**options), NOW, free)
    assert outcome(decisions) == removed
    assert {each.candidate for each in decisions} == set(candidates)
    if reasons is not None:
        assert [each.reason for each in decisions] == reasons


names = st.integers(0, 1000).map("template{}".format)
candidates = st.lists(
    st.builds(
        Candidate,
        name=names,
        store=st.sampled_from(["", "", "rbd", "lvm"]),
        own=st.integers(0, 1 << 40),
        last_used=st.floats(NOW - 3 * DAY, NOW + DAY),
        users=st.sampled_from([0, 0, 0, 1, 7]),
        pinned=st.booleans(),
        busy=st.sampled_from([False, False, True]),
        unknown=st.sampled_from(["", "", "", "damaged"]),
    ),
    max_size=30,
    unique_by=lambda each: (each.store, each.name),
)
policies = st.builds(
    Policy,
    enabled=st.sampled_from([True, True, True, False]),
    minimum_age=st.floats(0, 2 * DAY),
    native_minimum_age=st.floats(0, 2 * DAY),
    total_size_limit=st.sampled_from([0]) | st.integers(0, 1 << 42),
    free_space_target=st.sampled_from([0]) | st.integers(0, 1 << 42),
)
jumps = st.floats(-TEN_YEARS, TEN_YEARS)
free_space = st.integers(0, 1 << 42)


@given(candidates, policies, jumps, free_space)
def test_nothing_goes_that_must_stay_whatever_the_clock_says(found, policy, jump, free):
    decisions = plan(found, policy, NOW + jump, free)
    assert sorted(map(repr, found)) == sorted(repr(each.candidate) for each in decisions)
    for each in decisions:
        assert each.reason
        candidate = each.candidate
        if candidate.users or candidate.pinned or candidate.busy or candidate.unknown or not policy.enabled:
            assert not each.remove
            assert must_stay(candidate, policy) == each.reason


def _order(candidate: Candidate) -> tuple[float, str]:
    return candidate.last_used, candidate.name


@given(candidates, policies, free_space)
def test_the_limits_are_kept_if_they_can_be_and_no_more_goes_than_has_to(found, policy, free):
    decisions = plan(found, policy, NOW, free)
    removed = [each.candidate for each in decisions if each.remove]
    gone = sum(each.own for each in removed if not each.store)
    total = sum(each.own for each in found if not each.store) - gone
    left = [each.candidate for each in decisions if not each.remove]
    removable = [each for each in left if not each.store and each.own and not must_stay(each, policy)]
    is_kept = (not policy.total_size_limit or total <= policy.total_size_limit) and (
        free + gone >= policy.free_space_target
    )
    assert is_kept or not removable
    for each in removed:
        if each.age(NOW) < policy.age_limit(each):
            # Without this one, which is not old enough, a limit would not be kept.
            later = [other for other in removed if not other.store and _order(other) >= _order(each)]
            without = gone - sum(other.own for other in later)
            assert (policy.total_size_limit and total + gone - without > policy.total_size_limit) or (
                free + without < policy.free_space_target
            )


@given(candidates, policies, free_space)
def test_those_not_used_for_longest_go_first(found, policy, free):
    decisions = plan(found, policy, NOW, free)
    removed = [each.candidate for each in decisions if each.remove]
    assert removed == sorted(removed, key=lambda each: (each.last_used, each.store, each.name))
    assert [each.remove for each in decisions] == sorted([each.remove for each in decisions], reverse=True)


@given(candidates, policies, free_space)
def test_pruning_twice_is_pruning_once(found, policy, free):
    first = plan(found, policy, NOW, free)
    gone = sum(each.candidate.own for each in first if each.remove and not each.candidate.store)
    left = [each.candidate for each in first if not each.remove]
    assert outcome(plan(left, policy, NOW, free + gone)) == ""


@given(candidates, policies, free_space)
def test_more_space_never_makes_more_go(found, policy, free):
    def removed(space: int) -> set[Candidate]:
        return {each.candidate for each in plan(found, policy, NOW, space) if each.remove}

    assert removed(free + (1 << 41)) <= removed(free)
