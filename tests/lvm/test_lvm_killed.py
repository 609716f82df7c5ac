# SPDX-License-Identifier: Apache-2.0
"""Kill the process after each step that changes volumes; tests/functional/test_faults.py has the operations.

What precedes those steps is what other backends do, too, and is swept there. A step that several operations pass is
swept in one of them, and what is one command of LVM's in none: growing a thin disk, making or removing its snapshot.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.conftest import MIB, LvmStore, Store
from tests.functional.test_faults import OPERATIONS, Operation, again, check_left, make, run, state_of, steps_of


def make_larger(store: Store) -> None:
    """Make a disk of another size than those for which the pool has the template."""
    store.make(size=16 * MIB, disk_name="larger")


LARGER = Operation(make, make_larger)

# Store, operation, and what the names of the steps begin with.
SWEPT: list[tuple[str, str, str | tuple[str, ...]]] = [
    ("lvm-thin", "create, cold", ("template.copy.", "disk.")),
    ("lvm-thin", "create, larger", "template.size."),
    ("lvm-thin", "roll back", "disk."),
    ("lvm-thin", "remove", "disk."),
    ("lvm-thick", "import over a disk", "disk."),
    ("lvm-thick", "resize", "disk."),
    ("lvm-thick", "remove", "disk.remove.volume"),
    ("lvm-sparse", "create, filled", "disk.create.made"),
    ("lvm-sparse", "remove", "disk.remove."),
    ("lvm-encrypted", "create, filled", "disk.create.formatted"),
    ("lvm-encrypted", "resize", "disk.resize.changed"),
]


@pytest.mark.parametrize(("name", "operation", "beginning"), SWEPT, ids=[" ".join(row[:2]) for row in SWEPT])
def test_killed_after_any_step_nothing_is_half_made_or_lost(
    opened: Callable[..., LvmStore], group_folder: Path, name: str, operation: str, beginning: str | tuple[str, ...]
) -> None:
    chosen = {**OPERATIONS, "create, larger": LARGER}[operation]

    def fresh() -> LvmStore:
        shutil.rmtree(group_folder)
        group_folder.mkdir()
        store = opened(name)
        store.empty()
        chosen.before(store)
        return store

    store = fresh()
    before = state_of(store)
    steps = steps_of(lambda: chosen.act(store))
    after, files = state_of(store), store.files()
    swept = [number for number, step in enumerate(steps) if step.startswith(beginning)]
    assert swept, steps

    for number in swept:
        store, step = fresh(), steps[number]
        assert run(number, lambda store=store: chosen.act(store)) == -signal.SIGKILL, step
        check_left(before, after, state_of(store), step)
        again(chosen, store)
        assert state_of(store) == after, f"repeated after {step}"
        assert store.files() == files, f"left over after {step}"
