# SPDX-License-Identifier: Apache-2.0
"""Fault points do nothing unless a test arms them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import faults


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    faults.arm(None)


def test_a_point_passes_its_name_on_while_something_is_armed():
    faults.point("before")
    steps: list[str] = []
    faults.arm(steps.append)
    faults.point("one")
    faults.point("two")
    faults.arm(None)
    faults.point("after")
    assert steps == ["one", "two"]


def test_what_is_armed_may_stop_the_operation():
    def stop(step: str) -> None:
        raise InterruptedError(step)

    faults.arm(stop)
    with pytest.raises(InterruptedError, match="here"):
        faults.point("here")


def test_nothing_in_the_library_arms_a_point():
    folder = Path(faults.__file__).parent
    assert [path.name for path in folder.rglob("*.py") if re.search(r"\barm\(", path.read_text())] == ["faults.py"]


def test_a_new_process_starts_disarmed():
    script = "from imagebackend import faults; assert faults._armed is None; faults.point('x')"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
