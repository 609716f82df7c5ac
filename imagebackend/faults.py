# SPDX-License-Identifier: Apache-2.0
"""Named steps of multi-step operations, so that a test can stop a process right there.

Disarmed, a point costs one comparison. Nothing in the library arms one.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["arm", "point"]

_armed: Callable[[str], None] | None = None


def point(step: str) -> None:
    """Pass the step ``operation.step``; a test may have armed something that happens here."""
    if _armed is not None:
        _armed(step)


def arm(callback: Callable[[str], None] | None) -> None:
    """Call ``callback(step)`` at every point that this process passes; None disarms."""
    global _armed
    _armed = callback
