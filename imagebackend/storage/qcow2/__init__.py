# SPDX-License-Identifier: Apache-2.0
"""The qcow2 format, read and written in this process: bounded, no tool (docs/interop/qcow2.txt of QEMU)."""

from __future__ import annotations

from imagebackend.storage.qcow2.chain import BackingFile, backing_chain
from imagebackend.storage.qcow2.compression import decompressor
from imagebackend.storage.qcow2.content import Content
from imagebackend.storage.qcow2.header import CORRUPT, CRYPTO_HEADER, DATA_FILE_NAME, Header, read_header
from imagebackend.storage.qcow2.overlay import write_overlay
from imagebackend.storage.qcow2.tables import (
    Snapshot,
    all_counted,
    allocated_size,
    data_runs,
    read_snapshots,
)
from imagebackend.storage.run import Run

__all__ = [
    "CORRUPT",
    "CRYPTO_HEADER",
    "DATA_FILE_NAME",
    "BackingFile",
    "Content",
    "Header",
    "Run",
    "Snapshot",
    "all_counted",
    "allocated_size",
    "backing_chain",
    "data_runs",
    "decompressor",
    "read_header",
    "read_snapshots",
    "write_overlay",
]
