# SPDX-License-Identifier: Apache-2.0
"""Several images at a time, with a limit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions
from imagebackend.templates.precaching import Wanted
from imagebackend.templates.sources import Fetched, Metadata, Source
from tests.unit.templates.conftest import MIB, Cache


class Meeting(Source):
    """Delivers once as many fetches as the barrier is for are under way, and counts them."""

    def __init__(self, barrier: threading.Barrier | None = None, error: Exception | None = None) -> None:
        self.barrier = barrier
        self.error = error

    def metadata(self) -> Metadata:
        return Metadata("test:")

    def fetch(self, target: str, progress: Any = None, **_: Any) -> Fetched:
        if self.barrier is not None:
            self.barrier.wait(timeout=30)
        if progress is not None:
            progress(1, 1)
        if self.error is not None:
            raise self.error
        Path(target).write_bytes(b"x" * MIB)
        return Fetched("test:", MIB, "")


def wanted(source: Source, count: int) -> list[Wanted]:
    return [Wanted(f"template{number}", source) for number in range(count)]


def test_as_many_as_allowed_are_fetched_at_a_time(cache: Cache) -> None:
    results = cache.cache.precache(wanted(Meeting(threading.Barrier(3)), 6), at_once=3)
    assert [each.name for each in results] == [f"template{number}" for number in range(6)]
    assert all(each.template is not None and each.error is None for each in results)
    assert len(cache.cache.names()) == 6


@pytest.mark.parametrize(("option", "at_once", "most"), [(1, None, 1), (2, None, 2), (4, 1, 1)])
def test_no_more_than_allowed_are_fetched_at_a_time(cache: Cache, option: int, at_once: int | None, most: int) -> None:
    cache.conf.set_override("precache_concurrency", option, group="image_cache")
    under_way: list[object] = []
    seen: list[int] = []

    class Noting(Meeting):
        def fetch(self, target: str, progress: Any = None, **options: Any) -> Fetched:
            under_way.append(target)
            seen.append(len(under_way))
            try:
                return super().fetch(target, progress, **options)
            finally:
                under_way.remove(target)

    cache.cache.precache(wanted(Noting(), 5), at_once=at_once)
    assert max(seen) <= most
    assert len(seen) == 5


def test_one_that_fails_does_not_keep_the_others(cache: Cache) -> None:
    failing = Wanted("failing", Meeting(error=exceptions.FetchFailed("test:", "gone")))
    results: Sequence[Any] = cache.cache.precache([failing, *wanted(Meeting(), 2)])
    assert [type(each.error) for each in results] == [exceptions.FetchFailed, type(None), type(None)]
    assert list(cache.cache.names()) == ["template0", "template1"]


@pytest.mark.parametrize("error", [exceptions.Cancelled("interrupted"), ZeroDivisionError()])
def test_what_is_cancelled_or_broken_ends_all_of_it(cache: Cache, error: Exception) -> None:
    def fail(done: int, total: int) -> None:
        raise error

    first = Wanted("first", Meeting(), progress=fail)
    with pytest.raises(type(error)):
        cache.cache.precache([first, *wanted(Meeting(), 3)], at_once=1)
    assert list(cache.cache.names()) == []


def test_nothing_wanted_is_nothing_done(cache: Cache) -> None:
    assert cache.cache.precache([]) == []
