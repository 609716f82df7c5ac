# SPDX-License-Identifier: Apache-2.0
"""One side of the comparison as a process that stays: commands come in on stdin, answers go out on stdout.

A command is a line of JSON, ``[operation, {argument: value}]``; the answer is one too, the result or the error's text.
The time that it took is measured in here, so that neither the start of an interpreter nor the pipe counts.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["Timing", "repeat", "serve", "spread"]

#: ``wall``: seconds for all of it; ``count``: how many things were done; ``each``: seconds for each, if timed.
Timing = dict[str, Any]


def repeat(work: Callable[[], object], times: int) -> Timing:
    """Do the same again and again, which is too short to be timed alone; once more beforehand, to have it loaded."""
    work()
    started = time.perf_counter_ns()
    for _ in range(times):
        work()
    wall = (time.perf_counter_ns() - started) / 1e9
    return {"wall": wall, "count": times, "each": []}


def spread(work: Callable[[str], object], items: list[str], threads: int) -> Timing:
    """Do ``work`` for each item, in so many threads, which are started beforehand."""

    def timed(item: str) -> float:
        started = time.perf_counter_ns()
        work(item)
        return (time.perf_counter_ns() - started) / 1e9

    if threads == 1:
        started = time.perf_counter_ns()
        each = [timed(item) for item in items]
        return {"wall": (time.perf_counter_ns() - started) / 1e9, "count": len(each), "each": each}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        ready = threading.Barrier(threads)
        list(pool.map(lambda _: ready.wait(), range(threads)))
        started = time.perf_counter_ns()
        each = list(pool.map(timed, items))
        return {"wall": (time.perf_counter_ns() - started) / 1e9, "count": len(each), "each": each}


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
