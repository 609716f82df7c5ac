# SPDX-License-Identifier: Apache-2.0
"""The ploop format, read and written in this process: bounded, no tool.

A disk is a folder with a descriptor and images. QEMU calls the images parallels, and reads and writes single ones.
"""

from __future__ import annotations

from imagebackend.storage.ploop.descriptor import (
    NAME,
    ROOT_IMAGE,
    TOP,
    Delta,
    Descriptor,
    format_descriptor,
    parse_descriptor,
)
from imagebackend.storage.ploop.device import find_device
from imagebackend.storage.ploop.header import (
    CLUSTER_SIZE,
    MAX_SIZE,
    MAX_SIZE_V1,
    SIGNATURES,
    Header,
    read_header,
    round_size,
)
from imagebackend.storage.ploop.image import allocate, cut, grow, version_for, write_image
from imagebackend.storage.ploop.table import allocated_clusters, data_runs, read_table

__all__ = [
    "CLUSTER_SIZE",
    "MAX_SIZE",
    "MAX_SIZE_V1",
    "NAME",
    "ROOT_IMAGE",
    "SIGNATURES",
    "TOP",
    "Delta",
    "Descriptor",
    "Header",
    "allocate",
    "allocated_clusters",
    "cut",
    "data_runs",
    "find_device",
    "format_descriptor",
    "grow",
    "parse_descriptor",
    "read_header",
    "read_table",
    "round_size",
    "version_for",
    "write_image",
]
