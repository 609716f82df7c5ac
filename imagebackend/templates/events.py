# SPDX-License-Identifier: Apache-2.0
"""What happens in the cache, told to the log and to whoever observes it.

Each log record carries ``event``, ``template`` and ``facts``, for handlers that write structured logs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Event", "Events", "Observer"]

LOG = logging.getLogger(__name__)

#: The kinds of events, and the levels at which they are logged; ``hit`` and ``fetch.progress`` are not.
KINDS: Mapping[str, int] = {
    "hit": logging.NOTSET,
    "miss": logging.DEBUG,
    "fetch.started": logging.INFO,
    "fetch.progress": logging.NOTSET,
    "fetch.finished": logging.INFO,
    "fetch.failed": logging.INFO,
    "evicted": logging.INFO,
    "quarantined": logging.ERROR,
    "lease.made": logging.DEBUG,
    "lease.dropped": logging.DEBUG,
}


@dataclass(frozen=True)
class Event:
    """Something that happened.

    :ivar kind: one of :data:`KINDS`.
    :ivar template: the name of the template; of its file, for leases.
    :ivar facts: more about it, by kind. ``fetch.progress``: ``done`` and ``total``, in bytes. ``fetch.finished``:
        ``source``, ``format``, ``size`` of the file in bytes, ``seconds``. ``fetch.failed``: ``error``, ``seconds``.
        ``evicted``: ``store``, ``size`` in bytes, ``reason``. ``quarantined``: ``reason``, ``users``. Leases:
        ``instance``, ``disk``, ``host``, ``path``.
    """

    kind: str
    template: str
    facts: Mapping[str, Any]


#: Called with each event, in the thread and often under the lock of the work that it is about, so it has to be quick.
#: What it raises is logged, and changes nothing.
Observer = Callable[[Event], object]


class Events:
    """Tells what happens."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []

    def tell(self, kind: str, template: str, text: str = "", *arguments: object, **facts: Any) -> None:
        """Log an event, and tell it to the observers.

        :param text: what to say of the template, as for :func:`logging.log`; empty: the event is not logged.
        """
        if text:
            extra = {"event": kind, "template": template, "facts": facts}
            LOG.log(KINDS[kind], f"template %s {text}", template, *arguments, extra=extra)
        if self.observers:
            event = Event(kind, template, facts)
            for observer in self.observers:
                try:
                    observer(event)
                except Exception:
                    LOG.exception("an observer of the template cache failed")
