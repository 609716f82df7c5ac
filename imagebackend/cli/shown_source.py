# SPDX-License-Identifier: Apache-2.0
"""A source whose progress is shown, apart from that of what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imagebackend.cli.session import Session
from imagebackend.templates.sources import Fetched, Metadata, Source

__all__ = ["ShownSource"]


class ShownSource(Source):
    """The source of a template, which shows the progress of a fetch itself instead of reporting it to its caller.

    :param name: the template's.
    :param source: what it stands for.
    :param lines: show no bar: others are shown at a time.
    :ivar fetched: whether it was asked for the image.
    """

    def __init__(self, session: Session, name: str, source: Source, *, lines: bool = False) -> None:
        self._session = session
        self._name = name
        self._lines = lines
        self._source = source
        self.resumable = self._source.resumable
        self.fetched = False

    def metadata(self) -> Metadata:
        return self._source.metadata()

    def fetch(self, target: str, progress: object = None, **options: Any) -> Fetched:
        self.fetched = True
        with self._session.progress(f"Fetching {self._name}", lines=self._lines) as fetching:
            return self._source.fetch(target, fetching, **options)

    def unchanged_since(self, **known: Any) -> bool:
        return self._source.unchanged_since(**known)

    def locations(self) -> Sequence[str]:
        return self._source.locations()
