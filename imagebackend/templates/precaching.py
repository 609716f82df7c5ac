# SPDX-License-Identifier: Apache-2.0
"""Pulling several images at a time, and making what stores need of them, before a guest asks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagebackend import exceptions, faults
from imagebackend.templates.fetching import Progress
from imagebackend.templates.native import NativeTemplates
from imagebackend.templates.record import Template
from imagebackend.templates.sources import Source

if TYPE_CHECKING:
    from imagebackend.templates.cache import TemplateCache

__all__ = ["Precached", "Wanted", "precache"]


@dataclass(frozen=True)
class Wanted:
    """A template that is to be ready.

    :ivar name: what it is called.
    :ivar source: where it comes from.
    :ivar policy: when the source is asked, as for :meth:`.cache.TemplateCache.pull`.
    :ivar progress: called with the bytes done and in all of each part of the work, in a thread of its own; an
        exception that it raises ends all the work.
    """

    name: str
    source: Source
    policy: str = "missing"
    progress: Progress | None = None


@dataclass(frozen=True)
class Precached:
    """What came of it.

    :ivar name: the template's.
    :ivar template: the template, if it is in the cache.
    :ivar stores: the image types whose stores have made what they need of it.
    :ivar error: what went wrong; None: nothing.
    """

    name: str
    template: Template | None = None
    stores: tuple[str, ...] = ()
    error: exceptions.ImageBackendError | None = None


def precache(
    cache: TemplateCache, wanted: Sequence[Wanted], stores: Sequence[NativeTemplates], at_once: int
) -> list[Precached]:
    """Have templates ready; see :meth:`.cache.TemplateCache.precache`."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(wanted)):
        left.put(number)
    done: dict[int, Precached] = {}
    ended: list[BaseException] = []

    def work() -> None:
        while not ended:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            try:
                done[number] = _precache_one(cache, wanted[number], stores)
            except BaseException as error:
                ended.append(error)

    # They do not keep a process from ending that is told to: what they leave is swept up, as after a kill.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(wanted)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if ended:
        raise ended[0]
    return [done[number] for number in range(len(wanted))]


def _precache_one(cache: TemplateCache, wanted: Wanted, stores: Sequence[NativeTemplates]) -> Precached:
    template, made = None, []
    try:
        template = cache.pull(wanted.name, wanted.source, wanted.policy, progress=wanted.progress)
        for store in stores:
            # Nobody removes the template meanwhile.
            with cache.use(wanted.name) as used:
                store.prepare(used, wanted.progress)
            made.append(store.image_type)
            faults.point("template.precache.made")
    except exceptions.Cancelled:
        raise
    except exceptions.ImageBackendError as error:
        return Precached(wanted.name, template, tuple(made), error)
    return Precached(wanted.name, template, tuple(made))
