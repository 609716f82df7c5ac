# SPDX-License-Identifier: Apache-2.0
"""A file system in a network may tell only when a file is closed that what was written to it is lost.

As with test_io_errors.py: it is told, and everything is as it was; or all had been synced before, and all is done.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from imagebackend import exceptions
from tests.contract.conftest import MIB, Store
from tests.functional import failing_calls
from tests.functional.failing_calls import Fault
from tests.functional.test_io_errors import prepared


@pytest.mark.parametrize("durable", [True, False], ids=["durable", "hasty"])
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("qcow2", "create, warm"),
        ("qcow2", "create, cold, from qcow2"),
        ("qcow2", "import"),
        ("qcow2", "extract"),
        ("raw-ext4", "import"),
        ("raw-xfs", "snapshot"),
    ],
)
def test_a_file_that_cannot_be_closed_never_gets_its_name(
    name: str, operation: str, durable: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    told = 0
    with prepared(name, operation, request) as swept:
        swept.store.conf.set_override("durable_writes", durable)
        counted = failing_calls.run(swept.act, ("close",), None, trace)
        assert counted.error is None, counted.told
        swept.restore()

        # Of what was opened to be written: its descriptor, and the one that is closed while it has no name yet.
        numbers = [number for number, call in enumerate(counted.calls, 1) if ".partial>" in call.text]
        for number in numbers:
            outcome = failing_calls.run(swept.act, ("close",), Fault("close", "EDQUOT", number), trace)
            if outcome.error is None:
                swept.check_done(outcome.told)
                swept.restore()
            else:
                told += 1
                assert type(outcome.error) is exceptions.InsufficientSpace, outcome.told
                swept.check_failed(str(outcome.error))

    assert bool(told) is not durable


def test_a_ploop_disk_that_cannot_be_closed_is_not_made(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "ploop", {"durable_writes": False})
    store.make(disk_name="other")
    trace = tmp_path / "trace"
    counted = failing_calls.run(lambda: store.make(disk_name="counted"), ("close",), None, trace)
    numbers = [number for number, call in enumerate(counted.calls, 1) if "/root.hds>" in call.text]

    for number in numbers:
        outcome = failing_calls.run(store.make, ("close",), Fault("close", "EIO", number), trace)
        if outcome.error is not None:
            break
        store.image().remove()

    assert type(outcome.error) is exceptions.StorageError, outcome.told
    assert not store.image().exists()
    assert store.make().get_disk_size(store.image().path) == 8 * MIB
