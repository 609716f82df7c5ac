# SPDX-License-Identifier: Apache-2.0
"""Which records of a part are believed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from imagebackend.templates.sources import part

FACTS: dict[str, Any] = {
    "source": "http://host/image", "checksum": "", "validator": '"v1"', "etag": '"v1"', "last_modified": "",
    "size": 5, "sha256": "0" * 64, "total": 10,
}  # fmt: skip


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tmp_path / "target")


def test_what_is_written_is_read(target: str) -> None:
    assert part.read(target) is None
    part.write(target, **FACTS)
    found = part.read(target)
    assert found is not None
    assert abs(found.written - time.time()) < 60
    assert found == part.Part(**FACTS, written=found.written)
    assert os.listdir(os.path.dirname(target)) == ["target.part"]


@pytest.mark.parametrize(
    ("changes", "believed"),
    [
        ({}, True),
        ({"total": 0}, True),
        ({"added": "by a later release"}, True),
        ({"size": 10}, True),
        ({"size": 11}, False),
        ({"size": 0}, False),
        ({"size": -1}, False),
        ({"size": "5"}, False),
        ({"size": 5.0}, False),
        ({"size": True}, False),
        ({"validator": None}, False),
        ({"version": 2}, False),
        ({"written": 0}, False),
    ],
)
def test_facts(target: str, changes: dict[str, Any], believed: bool) -> None:
    Path(part.path_for(target)).write_text(json.dumps({**FACTS, "version": 1, "written": int(time.time()), **changes}))
    assert (part.read(target) is not None) is believed


@pytest.mark.parametrize(
    ("age", "believed"),
    [(0, True), (part.LONGEST_KEPT - 60, True), (part.LONGEST_KEPT + 60, False), (-10 * 365 * 86400, True)],
)
def test_age(target: str, age: int, believed: bool) -> None:
    """A clock that was set back does not make it any older."""
    Path(part.path_for(target)).write_text(json.dumps({**FACTS, "version": 1, "written": int(time.time()) - age}))
    assert (part.read(target) is not None) is believed


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000, b"{}" + b" " * 20_000])
def test_nonsense(target: str, content: bytes) -> None:
    Path(part.path_for(target)).write_bytes(content)
    assert part.read(target) is None


def test_a_link_is_not_followed(target: str, tmp_path: Path) -> None:
    part.write(str(tmp_path / "other"), **FACTS)
    os.symlink(tmp_path / "other.part", part.path_for(target))
    assert part.read(target) is None


def test_a_record_that_cannot_be_written_is_only_missed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "target.part").mkdir()
    part.write(str(tmp_path / "target"), **FACTS)
    assert "could not be taken up again" in caplog.text
