# SPDX-License-Identifier: Apache-2.0
"""The benchmark: every figure is a ratio against a peer that did the same work in the same round.

``tools/bench`` runs it. Nothing here is a test; the counts that must hold are asserted in the tests.
"""
