# SPDX-License-Identifier: Apache-2.0
"""The template cache: fetch, inspect, record, lease."""
