# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every folder of tests may use."""

from __future__ import annotations

import hypothesis
import pytest

# On a busy machine anything may take long, once.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

pytest_plugins = ["tests.functional.ceph", "tests.functional.filesystems", "tests.lvm.volume_groups"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write the XML in tests/golden anew")
    parser.addoption(
        "--stores", help="run the contract suite on these stores, separated by commas; without, on all but lvm's"
    )
