# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every folder of tests may use."""

from __future__ import annotations

pytest_plugins = ["tests.functional.filesystems"]
