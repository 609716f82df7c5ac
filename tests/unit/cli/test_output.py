# SPDX-License-Identifier: Apache-2.0
"""What people and programs get to see."""

from __future__ import annotations

import json

import pytest

from imagebackend import exceptions
from imagebackend.cli import output


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (20 << 30, "20 GiB"),
        ((20 << 30) + 1, "20 GiB"),
        (64 << 40, "64 TiB"),
        (1 << 62, "4 EiB"),
        (1 << 72, "4096 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert output.human_size(size) == text


def test_a_table_has_columns_of_equal_width_below_their_names() -> None:
    assert output.table(("A", "LONG"), [("1", "x"), ("333", "")]) == "A    LONG\n1    x\n333"


def test_a_table_without_rows_shows_what_it_would_hold() -> None:
    assert output.table(("NAME", "SIZE"), []) == "NAME  SIZE"


def test_a_cell_cannot_break_the_table_or_the_terminal() -> None:
    assert output.table(("A",), [("x\n\x1b[31mred\udcff",)]) == "A\nx \\x1b[31mred\\udcff"


def test_json_is_ascii_whatever_a_name_holds() -> None:
    document = output.to_json({"path": "/tmp/\udcff\u2028é"})

    assert document.isascii()
    assert json.loads(document) == {"path": "/tmp/\udcff\u2028é"}


def test_an_error_as_json_carries_its_attributes() -> None:
    error = exceptions.InsufficientSpace("/srv", required=10, available=5)

    document = output.error_document(error, 6)

    assert document == {
        "type": "InsufficientSpace",
        "message": str(error),
        "exit_status": 6,
        "path": "/srv",
        "reason": error.reason,
        "errno": 28,
        "required": 10,
        "available": 5,
    }


def test_what_was_noted_on_an_error_is_told() -> None:
    error = exceptions.StorageError("/srv", "read-only")
    error.add_note("and afterwards: it is damaged")

    assert output.message(error) == "/srv: read-only; and afterwards: it is damaged"
    assert "__notes__" not in output.error_document(error, 1)
