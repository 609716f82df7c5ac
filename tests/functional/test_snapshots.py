# SPDX-License-Identifier: Apache-2.0
"""Snapshots are listed in the order in which they were made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.contract.conftest import STORES, Store


@pytest.fixture(params=["raw-xfs", "raw-btrfs", "qcow2", "qcow2-options", "qcow2-preallocated"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    image_type, fixture, options = STORES[request.param]
    folder = request.getfixturevalue(fixture)
    yield Store(folder, image_type, options)
    shutil.rmtree(folder)


@pytest.mark.parametrize("durable", [True, False])
def test_snapshots_made_within_a_moment_are_listed_oldest_first(store: Store, durable: bool) -> None:
    store.conf.set_override("durable_writes", durable)
    image = store.make()
    names = ["z", "m", "a", "x", "b", "0a", "Y", "c"]

    for name in names:
        image.create_snap(name)

    assert [snapshot.name for snapshot in image.list_snaps()] == names
    image.rollback_to_snap("z")
    image.remove_snap("a")
    names.remove("a")
    assert [snapshot.name for snapshot in image.list_snaps()] == names
