# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on a real device-mapper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.conftest import LvmStore, open_store


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Callable[..., LvmStore]:
    """Return what opens a store by the name that it has in the contract suite."""

    def open_by_name(name: str, **options: Any) -> LvmStore:
        store = open_store(name, request)
        assert isinstance(store, LvmStore)
        store.conf.set_override("lock_timeout", 5.0)
        for option, value in options.items():
            store.conf.set_override(option, value, group="libvirt")
        return store

    return open_by_name
