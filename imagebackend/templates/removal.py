# SPDX-License-Identifier: Apache-2.0
"""Removing a template, and nothing that anybody depends on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imagebackend import exceptions, faults
from imagebackend.storage import publish
from imagebackend.templates import download, leases, record, tags
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.leases import Lease

__all__ = ["Names", "list_names", "remove", "users"]

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Names:
    """The names that go with a template: listed once, however many are removed.

    :ivar former: the names of the templates that another has taken the name of, by that name.
    :ivar tags: the tags of each template.
    """

    former: Mapping[str, Sequence[str]]
    tags: Mapping[str, Sequence[str]]


def list_names(folder: TemplateFolder) -> Names:
    """Return the names that go with templates.

    :raises PermissionDenied, StorageError: they cannot be read.
    """
    return Names(folder.former(), tags.by_template(folder.tags))


def users(folder: TemplateFolder, name: str) -> list[Lease]:
    """Return the leases on a template, sorted by disk; all that may be its, if its record cannot be understood.

    :raises PermissionDenied, StorageError: they cannot be read.
    """
    found = [lease for file in _files(folder, name) for lease in leases.read_all(folder.leases(file), name)]
    return sorted(found, key=lambda lease: lease.owner.link)


def remove(folder: TemplateFolder, name: str, known: Names) -> bool:
    """Remove a template, and what killed processes left of it, under its exclusive lock; return whether it was there.

    :param known: a tag that was made since it was listed is swept up once the template is gone.
    :raises TemplateInUse: disks hold leases on it.
    :raises NewerRecord: a newer release wrote its record.
    :raises PermissionDenied, StorageError: it is still there, or without its record.
    """
    _refuse_newer(folder, name)
    leftovers = folder.leftovers(name, known.former.get(record.base_name(name), ()))
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
    for tag in known.tags.get(name, ()):
        # It may have been moved to another since.
        if tags.read(folder.tags, tag) == name:
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
