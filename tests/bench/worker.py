# SPDX-License-Identifier: Apache-2.0
"""One side of the comparison as a process that stays: commands come in on stdin, answers go out on stdout.

A command is a line of JSON, ``[operation, {argument: value}]``; the answer is one too, the result or the error's text.
The time that it took is measured in here, so that neither the start of an interpreter nor the pipe counts.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Clock", "Timing", "repeat", "serve", "spread"]

#: ``wall``: seconds for all of it; ``cpu``: seconds of processor time, of child processes too; ``count``: how many
#: things were done; ``each``: seconds for each, if timed.
Timing = dict[str, Any]


class Clock:
    """Seconds since it was made, of the wall clock and of processor time."""

    def __init__(self) -> None:
        self._cpu = _cpu_time()
        self._wall = time.perf_counter_ns()

    def timing(self, count: int, each: Sequence[float] = ()) -> Timing:
        """Return what has passed."""
        wall = (time.perf_counter_ns() - self._wall) / 1e9
        return {"wall": wall, "cpu": _cpu_time() - self._cpu, "count": count, "each": list(each)}


def repeat(work: Callable[[], object], times: int) -> Timing:
    """Do the same again and again, which is too short to be timed alone; once more beforehand, to have it loaded."""
    work()
    clock = Clock()
    for _ in range(times):
        work()
    return clock.timing(times)


def spread(work: Callable[[str], object], items: list[str], threads: int) -> Timing:
    """Do ``work`` for each item, in so many threads, which are started beforehand."""

    def timed(item: str) -> float:
        started = time.perf_counter_ns()
        work(item)
        return (time.perf_counter_ns() - started) / 1e9

    if threads == 1:
        clock = Clock()
        return clock.timing(len(items), [timed(item) for item in items])
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        ready = threading.Barrier(threads)
        list(pool.map(lambda _: ready.wait(), range(threads)))
        clock = Clock()
        return clock.timing(len(items), list(pool.map(timed, items)))


def _cpu_time() -> float:
    found = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in found)


def serve(peer: object) -> None:
    """Answer commands until stdin ends; each names a method of ``peer``."""
    answers = os.fdopen(os.dup(1), "w")
    # What a library prints must not be taken for an answer.
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer: dict[str, object] = {"result": getattr(peer, name)(**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
