# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: an orderly end, with everything as it was."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from imagebackend import exceptions

__all__ = ["Interruption"]

# Work that reports progress does so twice a second; what waits for a lock or a tool does not.
_GRACE = 2.0


class Interruption:
    """Whether the user wants the command to end.

    A first signal while work is watched ends it at its next report of progress, where the library undoes everything.
    A second signal, or one that nothing has reacted to after two seconds, ends it wherever it is, as does any signal
    while nothing is watched.

    :ivar signal: the signal that came first; None: none has.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._watched: set[object] = set()

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the two signals in the block, and as before after it; for the main thread only."""
        handlers = {signal.SIGINT: self._interrupt, signal.SIGTERM: self._interrupt, signal.SIGALRM: self._insist}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Leave it to :meth:`check` to end the work in the block; several threads may have one each."""
        work = object()
        self._watched.add(work)
        try:
            yield
        finally:
            self._watched.discard(work)
            if self.signal is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self) -> None:
        """End the work if the user wants it.

        :raises Cancelled: so it is.
        """
        if self.signal is not None:
            # Undoing takes the time that it takes.
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise exceptions.Cancelled(self.message)

    @property
    def message(self) -> str:
        """What to tell the user."""
        return "ended by SIGTERM" if self.signal == signal.SIGTERM else "interrupted"

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        first = self.signal is None
        self.signal = self.signal or number
        if not first or not self._watched:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, _GRACE)

    def _insist(self, _: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt
