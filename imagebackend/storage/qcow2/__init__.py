# SPDX-License-Identifier: Apache-2.0
"""The qcow2 format, read and written in this process: bounded, no tool (docs/interop/qcow2.txt of QEMU)."""

from __future__ import annotations

from imagebackend.storage.qcow2.header import Header, read_header
from imagebackend.storage.qcow2.overlay import write_overlay

__all__ = ["Header", "read_header", "write_overlay"]
