# SPDX-License-Identifier: Apache-2.0
"""Digests of what goes by, each computed in a thread of its own: hashlib releases the interpreter lock.

At most a few blocks wait for a digest, so memory stays flat however much there is.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable
from concurrent import futures

from imagebackend.templates.sources.checksum import BROKEN

__all__ = ["Digests"]

_BLOCKS_WAITING = 4


class Digests:
    """The digests of some content, by several algorithms at a time; :meth:`close` ends the threads.

    :param names: the algorithms.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(set(names))
        # One thread for each digest keeps its blocks in order.
        self._threads = [futures.ThreadPoolExecutor(1, f"imagebackend-{name}") for name in self._names]
        self._waiting: collections.deque[list[futures.Future[None]]] = collections.deque()
        self.restart()

    def add(self, block: bytes | bytearray | memoryview) -> None:
        """Add a block, which must not change any more."""
        pairs = zip(self._threads, self._digests, strict=True)
        self._waiting.append([thread.submit(digest.update, block) for thread, digest in pairs])
        while len(self._waiting) > _BLOCKS_WAITING:
            self._wait_for_oldest()

    def values(self) -> dict[str, str]:
        """Return the digests of what has been added until now, in hexadecimal digits, by algorithm."""
        self._drain()
        return {name: digest.hexdigest() for name, digest in zip(self._names, self._digests, strict=True)}

    def restart(self) -> None:
        """Forget what has been added."""
        self._drain()
        # Not for security as far as FIPS mode is concerned: md5 and sha1 are only taken when they are asked for.
        self._digests = [hashlib.new(name, usedforsecurity=name not in BROKEN) for name in self._names]

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def _drain(self) -> None:
        while self._waiting:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for update in self._waiting.popleft():
            update.result()
