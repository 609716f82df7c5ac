# SPDX-License-Identifier: Apache-2.0
"""Where an image that was fetched goes: beside what had its name before, whose file disks may depend on.

A file in the cache never changes while a record names it. An image that takes a name gets a file of its own, and what
had the name keeps its file, and is recorded as ``NAME@DIGITS`` until it is pruned. An image that is there already,
under the name or as one that had it, is not kept twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os

from imagebackend import exceptions, faults
from imagebackend.templates import fetching, leases, record
from imagebackend.templates.fetching import Arrival, Request
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Template

__all__ = ["fetch_new", "replace"]

LOG = logging.getLogger(__name__)

# What of a template does not come with its file.
_OF_THE_NAME = ("labels", "pinned")
_OF_THE_FILE = (
    *("file", "path", "size", "modified", "digest", "block_digest"),
    *("format", "virtual_size", "inspector", "notes"),
)


def fetch_new(folder: TemplateFolder, request: Request) -> Template:
    """Fetch a template that has no record, and record it; under its exclusive lock.

    :raises CorruptRecord: its record is gone, while disks depend on its file.
    """
    name = request.name
    _refuse_unrecorded(folder, name)
    with fetching.arriving(folder, request, name) as arrival, contextlib.ExitStack() as undo:
        template = _place(folder, arrival, None)
        folder.prepare(template)
        undo.callback(_forget_quietly, folder, name)
        arrival.publish()
        folder.publish_prepared(name)
        faults.point("template.fetch.recorded")
        undo.pop_all()
    _forget_leftovers(folder, name)
    return template


def replace(folder: TemplateFolder, request: Request, seen: Template) -> Template:
    """Fetch a template that is there, and let what comes have its name, if it is something else.

    Disks go on being made from what is there meanwhile.

    :param seen: what was there when it was decided to fetch: if another caller has fetched it since, that will do.
    :raises CorruptRecord: the record of what is there cannot be understood.
    """
    name = request.name
    with folder.pull_lock(name):
        current = folder.read(name, check_file=False)
        if current is not None and _fetches(current) != _fetches(seen):
            return current
        with fetching.arriving(folder, request, f"{name}@") as arrival, folder.lock(name):
            # It may have been removed meanwhile, or been given labels.
            template = _take_name(folder, arrival, folder.read(name, check_file=False))
            _forget_leftovers(folder, name)
    return template


def _take_name(folder: TemplateFolder, arrival: Arrival, current: Template | None) -> Template:
    template = _place(folder, arrival, current)
    with contextlib.ExitStack() as undo:
        folder.prepare(template)
        undo.callback(_forget_prepared_quietly, folder, template.name)
        arrival.publish()
        undo.callback(_restore_quietly, folder, template.name, current)
        if current is not None and current.file != template.file:
            old = record.generation(current.name, current.digest)
            detail = f"by an image from {template.source}"
            undo.callback(_forget_quietly, folder, old)
            folder.write(current.after("superseded", detail, name=old, superseded=record.now(), pinned=False))
            faults.point("template.pull.superseded")
        folder.publish_prepared(template.name)
        faults.point("template.pull.recorded")
        undo.pop_all()
    return template


def _place(folder: TemplateFolder, arrival: Arrival, current: Template | None) -> Template:
    """Choose where an image's file goes, unless one with the same content is there; return it for the record."""
    arrived = arrival.template
    if current is not None:
        arrived = dataclasses.replace(arrived, **{name: getattr(current, name) for name in _OF_THE_NAME})
        if _is_same(current, arrived):
            return _kept(folder, arrival, current, arrived)
    for name in folder.generations(arrived.name):
        with contextlib.suppress(exceptions.CorruptRecord):
            former = folder.read(name, check_file=False)
            if former is not None and _is_same(former, arrived):
                return _kept(folder, arrival, former, arrived)
    file = arrived.name
    if current is not None or folder.find(file) is not None:
        file = record.generation(arrived.name, arrived.digest)
    _refuse_unrecorded(folder, file)
    placed = arrival.named(file)
    return dataclasses.replace(placed, **{name: getattr(arrived, name) for name in _OF_THE_NAME})


def _kept(folder: TemplateFolder, arrival: Arrival, there: Template, arrived: Template) -> Template:
    """Return the record of an image that came again, whose file is the one that is there, mended if it was damaged."""
    history = there.history
    try:
        folder.read(there.name)
        arrival.discard()
        detail = "the same image"
    except exceptions.CorruptRecord as error:
        LOG.warning("template %s was damaged, and is replaced by the same image: %s", there.name, error)
        there = arrival.named(there.file, mends=True)
        detail = "the same image, in place of a damaged file"
    of_the_file = {name: getattr(there, name) for name in _OF_THE_FILE}
    return dataclasses.replace(arrived, **of_the_file, history=history).after("refetched", detail)


def _is_same(one: Template, other: Template) -> bool:
    if (one.format, one.virtual_size) != (other.format, other.virtual_size):
        return False
    content = one.content_sha256 or one.sha256
    return one.digest == other.digest or (content != "" and content == (other.content_sha256 or other.sha256))


def _fetches(template: Template) -> tuple[object, ...]:
    return (template.file, *(each for each in template.history if each.event in ("fetched", "refetched")))


def _forget_leftovers(folder: TemplateFolder, name: str) -> None:
    # The image is there, and has its name. What cannot be forgotten now is forgotten by the next pull.
    with contextlib.suppress(exceptions.ImageBackendError):
        for leftover in folder.leftovers(name):
            folder.forget(leftover)
            faults.point("template.pull.revived")


def _refuse_unrecorded(folder: TemplateFolder, file: str) -> None:
    """Make sure that no disk depends on a file that is to be made, and that no record names."""
    if not os.path.lexists(folder.file(file)) or folder.find(file) is not None:
        return
    if leases.read_all(folder.leases(file), file):
        reason = "the template's record is gone while disks depend on its file; restore the record"
        raise exceptions.CorruptRecord(folder.record(file), reason)


def _restore_quietly(folder: TemplateFolder, name: str, template: Template | None) -> None:
    # An undo step, as below.
    with contextlib.suppress(exceptions.ImageBackendError):
        if template is None:
            folder.forget(name)
        else:
            folder.restore(template)


def _forget_quietly(folder: TemplateFolder, name: str) -> None:
    # An undo step: the error that led here matters more. The record goes before the file, as when it is removed.
    with contextlib.suppress(exceptions.ImageBackendError):
        folder.forget(name)
        folder.forget_prepared(name)


def _forget_prepared_quietly(folder: TemplateFolder, name: str) -> None:
    # An undo step, as above.
    with contextlib.suppress(exceptions.ImageBackendError):
        folder.forget_prepared(name)
