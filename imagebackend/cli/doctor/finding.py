# SPDX-License-Identifier: Apache-2.0
"""What an examination finds."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable

__all__ = ["Finding", "Severity", "error", "fine", "warning", "worst"]


class Severity(enum.StrEnum):
    """How bad it is; the later, the worse."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    :ivar check: what was looked at: ``tool qemu-img``.
    :ivar status: how bad it is.
    :ivar message: what was found.
    :ivar advice: what to do; empty if there is nothing to do.
    """

    check: str
    status: Severity
    message: str
    advice: str = ""


def fine(check: str, message: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(check, Severity.OK, message)


def warning(check: str, message: str, advice: str) -> Finding:
    """Return a finding that the library can live with."""
    return Finding(check, Severity.WARNING, message, advice)


def error(check: str, message: str, advice: str) -> Finding:
    """Return a finding with which something configured or essential does not work."""
    return Finding(check, Severity.ERROR, message, advice)


def worst(findings: Iterable[Finding]) -> Severity:
    """Return the worst of all."""
    return max((finding.status for finding in findings), key=list(Severity).index, default=Severity.OK)
