# SPDX-License-Identifier: Apache-2.0
"""Removing a template, and nothing that anybody depends on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence

from imagebackend import exceptions, faults
from imagebackend.storage import publish
from imagebackend.templates import download, leases, record, tags
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.leases import Lease

__all__ = ["remove", "users"]

LOG = logging.getLogger(__name__)


def users(folder: TemplateFolder, name: str) -> list[Lease]:
    """Return the leases on a template, sorted by disk; all that may be its, if its record cannot be understood.

    :raises PermissionDenied, StorageError: they cannot be read.
    """
    found = [lease for file in _files(folder, name) for lease in leases.read_all(folder.leases(file), name)]
    return sorted(found, key=lambda lease: lease.owner.link)


def remove(folder: TemplateFolder, name: str) -> bool:
    """Remove a template, and what killed processes left of it, under its exclusive lock; return whether it was there.

    :raises TemplateInUse: disks hold leases on it.
    :raises NewerRecord: a newer release wrote its record.
    :raises PermissionDenied, StorageError: it is still there, or without its record.
    """
    _refuse_newer(folder, name)
    leftovers = folder.leftovers(name)
    if name in leftovers:
        return folder.forget(name)
    found = [f"{lease.owner.host}:{lease.owner.path}" for lease in users(folder, name)]
    if found:
        raise exceptions.TemplateInUse(name, found)
    files = _files(folder, name)
    # The record goes first: from then on nothing but a file is left, and what says whose it is.
    if record.base_name(name) == name:
        for leftover in leftovers:
            folder.forget(leftover)
    there = folder.set_aside(name)
    faults.point("template.remove.record")
    for file in files:
        there |= publish.remove_file(folder.file(file))
    faults.point("template.remove.file")
    there |= download.remove(folder.download(name))
    there |= publish.remove_file(publish.partial_path(folder.file(name)))
    there |= folder.forget_prepared(name)
    for file in files:
        with contextlib.suppress(OSError):
            os.rmdir(folder.leases(file))
    for tag, tagged in tags.read_all(folder.tags).items():
        if tagged == name:
            tags.remove(folder.tags, tag)
    return there


def _files(folder: TemplateFolder, name: str) -> Sequence[str]:
    """Return the files that belong to a template: one, unless its record cannot be understood."""
    try:
        template = folder.read(name, check_file=False)
    except exceptions.CorruptRecord:
        return folder.unclaimed(name)
    if template is not None:
        return [template.file]
    # One that had the name may have the file.
    return [name] if folder.find(name) is None else []


def _refuse_newer(folder: TemplateFolder, name: str) -> None:
    try:
        folder.read(name, check_file=False)
    except record.NewerRecord:
        raise
    except exceptions.CorruptRecord as error:
        LOG.warning("removing template %s: %s", name, error)
