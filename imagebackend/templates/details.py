# SPDX-License-Identifier: Apache-2.0
"""Everything that is known of one template, as JSON can hold it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import publish, qcow2
from imagebackend.templates.entries import Entry
from imagebackend.templates.leases import Lease
from imagebackend.templates.record import Template

__all__ = ["details", "owner", "summary"]


def summary(entry: Entry, now: float) -> dict[str, Any]:
    """Return what is recorded of a template, and what else is known of it; None of what is not.

    :param entry: one that has a record.
    :param now: seconds since the epoch.
    """
    assert entry.template is not None
    last_used = datetime.datetime.fromtimestamp(entry.last_used, datetime.UTC)
    return {
        **entry.template.as_dict(),
        "tags": list(entry.tags),
        "dangling": entry.is_dangling,
        "user_count": entry.users,
        "last_used": last_used.isoformat(timespec="seconds"),
        "age": int(entry.age(now)),
        "allocated": entry.allocated,
        "shared": entry.shared,
        "own": entry.own,
        "damage": None if entry.damage is None else entry.damage.reason,
    }


def details(entry: Entry, leases: Sequence[Lease], now: float) -> dict[str, Any]:
    """Return the same, the disks that depend on it, and what its file says of its format."""
    assert entry.template is not None
    facts = {} if entry.damage is not None else _format_details(entry.template)
    return {**summary(entry, now), "users": [owner(lease) for lease in leases], "format_details": facts}


def owner(lease: Lease) -> dict[str, str]:
    """Return who depends on a template."""
    return dict(vars(lease.owner))


def _format_details(template: Template) -> dict[str, Any]:
    if template.format != "qcow2":
        return {}
    try:
        with publish.opened(template.path) as image:
            header = qcow2.read_header(image, template.path)
    except exceptions.ImageBackendError as error:
        return {"error": str(error)}
    return {
        "version": header.version,
        "cluster_size": header.cluster_size,
        "compression_type": ("zlib", "zstd")[header.compression_type],
        "extended_l2": header.extended_l2,
        "snapshots": header.snapshot_count,
    }
