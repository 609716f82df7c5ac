# SPDX-License-Identifier: Apache-2.0
"""What the exit status says: one table, for the command, its help, its manual page and its tests."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from imagebackend import exceptions

__all__ = ["FAILED", "TABLE", "USAGE", "Status", "status_of"]


@dataclass(frozen=True)
class Status:
    """An exit status.

    :ivar code: the number.
    :ivar meaning: what it says, for people.
    :ivar errors: the errors that lead to it.
    """

    code: int
    meaning: str
    errors: tuple[type[BaseException], ...] = ()


FAILED = 1
USAGE = 2

#: The first that fits an error counts, from the bottom up to 1: a lock that was held for too long is "in use".
TABLE = (
    Status(0, "done; for doctor: nothing is wrong, though there may be warnings"),
    Status(FAILED, "refused or failed, and the message says why", (exceptions.ImageBackendError,)),
    Status(
        USAGE,
        "wrong usage: an argument that cannot be used, or a file that cannot be read",
        (exceptions.InvalidArgument,),
    ),
    Status(3, "not found: the disk, the template or the snapshot", (exceptions.NotFound,)),
    Status(4, "exists already: the disk, the template or the snapshot", (exceptions.AlreadyExists,)),
    Status(5, "in use, or locked by someone else; it may work later", (exceptions.Busy,)),
    Status(6, "no space left on the file system", (exceptions.InsufficientSpace,)),
    Status(7, "the configuration cannot be used", (exceptions.InvalidConfiguration,)),
    Status(8, "timed out", (exceptions.TimedOut,)),
    Status(128 + signal.SIGINT, "interrupted by Ctrl-C (SIGINT); everything is as it was", (exceptions.Cancelled,)),
    Status(128 + signal.SIGTERM, "ended by SIGTERM; everything is as it was"),
)


def status_of(error: BaseException) -> int:
    """Return the exit status for an error."""
    for status in (*TABLE[2:], TABLE[1]):
        if isinstance(error, status.errors):
            return status.code
    return FAILED
