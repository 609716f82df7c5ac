# SPDX-License-Identifier: Apache-2.0
"""What observers of the cache, and structured logs, are told."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from imagebackend import exceptions
from imagebackend.templates.events import KINDS, Event
from tests.unit.templates.conftest import MIB, OWNER, Cache
from tests.unit.templates.test_pull import ONE, TWO


@pytest.fixture
def told(cache: Cache) -> list[Event]:
    events: list[Event] = []
    cache.cache.observers.append(events.append)
    return events


def kinds(events: list[Event]) -> list[str]:
    """Return what was told, and forget it; progress aside, of which there is more or less."""
    found = [event.kind for event in events if event.kind != "fetch.progress"]
    assert set(found) <= set(KINDS)
    events.clear()
    return found


def test_a_fetch_is_told_from_its_beginning_to_its_end(cache: Cache, told: list[Event]) -> None:
    cache.cache.pull("template", cache.source("image", ONE))
    miss, started, *progress, finished = told
    assert [event.kind for event in (miss, started, finished)] == ["miss", "fetch.started", "fetch.finished"]
    assert {event.template for event in told} == {"template"}
    assert progress
    assert {event.kind for event in progress} == {"fetch.progress"}
    assert progress[-1].facts["done"] == progress[-1].facts["total"] == len(ONE)
    facts = dict(finished.facts)
    assert facts.pop("seconds") > 0
    assert facts == {"source": f"file://{cache.sources}/image", "format": "raw", "size": len(ONE)}


def test_whether_a_template_was_there(cache: Cache, told: list[Event]) -> None:
    cache.fetch()
    assert kinds(told) == ["miss", "fetch.started", "fetch.finished"]
    cache.fetch()
    assert kinds(told) == ["hit"]
    with cache.cache.use("template"):
        assert kinds(told) == ["hit"]
    with cache.cache.use("other", cache.fetcher()):
        assert kinds(told) == ["miss", "fetch.started", "fetch.finished"]
    cache.cache.pull("newer", cache.source("image", ONE))
    told.clear()
    cache.cache.pull("newer", cache.source("image"), "newer")
    assert kinds(told) == ["hit"]
    cache.cache.pull("newer", cache.source("image", TWO), "newer")
    assert kinds(told) == ["fetch.started", "fetch.finished"]


def test_a_fetch_that_fails(cache: Cache, told: list[Event]) -> None:
    def fail(target: str) -> None:
        raise exceptions.FetchFailed("test:", "gone")

    with pytest.raises(exceptions.FetchFailed):
        cache.cache.fetch("template", fail)
    failed = told[-1]
    assert (failed.kind, failed.facts["error"]) == ("fetch.failed", "FetchFailed")
    assert kinds(told) == ["miss", "fetch.started", "fetch.failed"]


def test_what_an_agents_function_raises_is_not_logged(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    def fail(target: str) -> None:
        raise ValueError("https://name:password@host/")

    caplog.set_level(logging.DEBUG, "imagebackend")
    with pytest.raises(ValueError, match="password"):
        cache.cache.fetch("template", fail)
    assert "template template is not fetched: ValueError" in caplog.text
    assert "password" not in caplog.text


def test_an_agents_function_that_takes_no_progress_is_not_given_any(cache: Cache, told: list[Event]) -> None:
    def fetch(target: str) -> None:
        cache.fetcher()(target)

    cache.cache.fetch("template", fetch)
    assert kinds(told) == ["miss", "fetch.started", "fetch.finished"]


def test_a_progress_function_is_still_called(cache: Cache, told: list[Event]) -> None:
    calls: list[tuple[int, int]] = []
    cache.cache.pull("template", cache.source("image", ONE), progress=lambda *call: calls.append(call))
    assert calls == [(each.facts["done"], each.facts["total"]) for each in told if each.kind == "fetch.progress"]
    assert calls


def test_leases(cache: Cache, told: list[Event]) -> None:
    cache.fetch()
    kinds(told)
    for _ in range(2):
        cache.cache.lease("template", OWNER)
    assert dict(told[0].facts) == vars(OWNER)
    assert kinds(told) == ["lease.made"]
    for _ in range(2):
        cache.cache.release("template", OWNER)
    assert kinds(told) == ["lease.dropped"]
    cache.cache.lease("template", OWNER)
    cache.cache.release_all(OWNER)
    assert kinds(told) == ["lease.made", "lease.dropped"]


def test_what_is_pruned_and_what_is_damaged(cache: Cache, told: list[Event]) -> None:
    template = cache.cache.pull("template", cache.source("image", ONE))
    cache.cache.pull("old", cache.source("image"))
    cache.cache.lease("template", OWNER)
    kinds(told)
    cache.cache.prune(cache.cache.policy(minimum_age=0))
    assert (told[0].template, told[0].facts["store"], told[0].facts["size"] >= MIB) == ("old", "", True)
    assert kinds(told) == ["evicted"]
    with open(template.path, "r+b") as file:
        file.write(b"x")
    with pytest.raises(exceptions.CorruptTemplate):
        cache.cache.verify("template")
    assert told[0].facts["users"] == ["host:/srv/instance/disk"]
    assert kinds(told) == ["quarantined"]


def test_an_observer_that_fails_changes_nothing(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise ZeroDivisionError

    told: list[Event] = []
    cache.cache.observers.extend([fail, told.append])
    cache.fetch()
    assert kinds(told) == ["miss", "fetch.started", "fetch.finished"]
    assert "an observer of the template cache failed" in caplog.text


def test_logs_carry_what_observers_are_told(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "imagebackend")
    cache.cache.pull("template", cache.source("image", ONE))
    found: dict[str, Any] = {each.event: each for each in caplog.records if hasattr(each, "event")}
    assert list(found) == ["miss", "fetch.started", "fetch.finished"]
    finished = found["fetch.finished"]
    assert (finished.levelname, finished.template, finished.facts["size"]) == ("INFO", "template", len(ONE))
    assert f"template template fetched from file://{cache.sources}/image: raw, " in finished.getMessage()
    assert {each.levelname for each in found.values()} == {"DEBUG", "INFO"}
