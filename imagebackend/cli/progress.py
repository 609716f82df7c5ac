# SPDX-License-Identifier: Apache-2.0
"""How far a long operation is: a bar on a terminal, a line for each tenth elsewhere; on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import click

from imagebackend.cli.interruption import Interruption
from imagebackend.cli.output import human_size

__all__ = ["Progress"]

# How much to wait for before the next line, if nobody knows how much there is.
_STEP = 64 << 20


class Progress:
    """What the library calls with the bytes done and the bytes in all.

    :param label: what is being done: ``Fetching debian-12``.
    :param interruption: asked at each call whether to go on.
    :param silent: show nothing.
    :param lines: show no bar: others are shown at a time.
    """

    def __init__(self, label: str, interruption: Interruption, *, silent: bool, lines: bool = False) -> None:
        self._label = label
        self._interruption = interruption
        self._silent = silent
        self._terminal = sys.stderr.isatty() and not lines
        self._bar: Any = None
        self._shown = -1
        self._done = self._total = 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[Progress]:
        """Watch for interruptions in the block, and leave the terminal as it was found."""
        try:
            with self._interruption.watch():
                yield self
            # The last report may have come before the end.
            if not self._silent and self._done < self._total:
                self._show(self._total, self._total)
        finally:
            self._finish_bar()

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is.

        :raises Cancelled: the user wants no more of it.
        """
        self._interruption.check()
        self._done, self._total = done, total
        if not self._silent:
            self._show(done, total)

    def _show(self, done: int, total: int) -> None:
        if not total:
            self._tell(done // _STEP, human_size(done))
        elif self._terminal:
            self._draw(done, total)
        else:
            self._tell(done * 10 // total, f"{done * 100 // total} % of {human_size(total)}")

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None or self._bar.length != total or done < self._bar.pos:
            self._finish_bar()
            self._bar = click.progressbar(length=total, label=self._label, file=sys.stderr)
            self._bar.render_progress()
        self._bar.update(done - self._bar.pos)

    def _tell(self, step: int, state: str) -> None:
        # A step back is a new beginning: a download that starts over.
        if step != self._shown:
            self._shown = step
            click.echo(f"{self._label}: {state}", err=True)

    def _finish_bar(self) -> None:
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None
