# SPDX-License-Identifier: Apache-2.0
"""What people and programs get to see: tables, sizes, one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["error_document", "facts", "human_age", "human_size", "printable", "table", "to_json"]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def human_size(size: int) -> str:
    """Return a size in the largest unit of which it has at least one, with at most one digit after the point."""
    if size < 1024:
        return f"{size} B"
    exponent = min((size.bit_length() - 1) // 10, len(_UNITS))
    value = f"{size / 1024**exponent:.1f}".removesuffix(".0")
    return f"{value} {_UNITS[exponent - 1]}"


def human_age(seconds: float) -> str:
    """Return a time in the largest unit of which it has at least two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"


def printable(text: str) -> str:
    """Return a text without what would control a terminal, or what no encoding has: a name can hold any byte."""
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows as columns of equal width, below their names; only the names if there are no rows."""
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values, one pair a line, the values below each other."""
    known = [(name, printable(value)) for name, value in pairs]
    width = max(len(name) for name, _ in known) + 1
    return "\n".join(f"{name + ':':{width}} {value}".rstrip() for name, value in known)


def to_json(document: Any) -> str:
    """Return a document as JSON, in ASCII: a name that is not UTF-8 cannot break it."""
    return json.dumps(document, indent=1, default=str)


def error_document(error: BaseException, exit_status: int) -> dict[str, Any]:
    """Return an error as JSON has it: type, message, exit status, and the attributes that it carries."""
    attributes = {name: value for name, value in vars(error).items() if not name.startswith("_")}
    return {**attributes, "type": type(error).__name__, "message": message(error), "exit_status": exit_status}


def message(error: BaseException) -> str:
    """Return what an error says, and what was noted on it later."""
    return "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
