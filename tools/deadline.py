# SPDX-License-Identifier: Apache-2.0
"""Waiting for something that reports nothing, with an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_for"]

_POLL = 0.05
_Found = TypeVar("_Found")


def wait_for(look: Callable[[], _Found | None], *, seconds: float, what: str) -> _Found:
    """Call ``look`` until it returns something that is true, and return that.

    :param seconds: how long to wait at most.
    :param what: what is waited for, for the error.
    :raises TimeoutError: it did not come.
    """
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(_POLL)
    return found
