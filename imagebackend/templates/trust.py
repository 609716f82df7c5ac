# SPDX-License-Identifier: Apache-2.0
"""Whether a template may be used as it stands, and another look at one that may not.

A template whose file is as it was recorded is trusted, since it was inspected and hashed when it came. One that was
touched since is read again, and one that an older inspector accepted is inspected again, once.
"""

from __future__ import annotations

from imagebackend import exceptions
from imagebackend.storage import publish
from imagebackend.templates import fetching, inspection, record, tags, verification
from imagebackend.templates.fetching import Progress
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Template

__all__ = ["require", "resolve", "trusted", "usable"]


def resolve(folder: TemplateFolder, name: str) -> str:
    """Return the name of the template that is meant by its own, by that of its file, or by a tag; or ``name``."""
    if folder.is_recorded(name):
        return name
    if "@" in name:
        found = folder.find(name)
        return name if found is None else found.name
    tagged = tags.read(folder.tags, name)
    return name if tagged is None or not folder.is_recorded(tagged) else tagged


def require(folder: TemplateFolder, name: str, hint: str = "") -> str:
    """Return the name of the template that is meant.

    :param hint: what to do if there is none.
    :raises TemplateNotFound: there is none.
    """
    name = resolve(folder, name)
    if not folder.is_recorded(name):
        raise exceptions.TemplateNotFound(name, hint)
    return name


def trusted(folder: TemplateFolder, name: str, size: int | None) -> Template | None:
    """Return a template if it may be used as it stands; None if it is absent, or to be examined first.

    :param size: refuse one that does not fit into a disk of this many bytes; None: no check.
    :raises CorruptRecord: it is damaged.
    :raises DiskTooSmall: it does not fit.
    """
    try:
        template = folder.read(name)
    except record.TouchedTemplate:
        return None
    if template is None or template.inspector != inspection.INSPECTOR_VERSION:
        return None
    fetching.check_size(folder.conf, name, template.virtual_size, template.min_disk, size)
    return template


def usable(folder: TemplateFolder, name: str, size: int | None, progress: Progress | None = None) -> Template | None:
    """Return a template if it may be used, after another look at it if need be; None if it is absent.

    :param size: as for :func:`trusted`.
    :param progress: called with the bytes done and in all while it is read again.
    :raises CorruptRecord: it is damaged.
    :raises ImageUnacceptable: the inspector of today refuses it.
    :raises DiskTooSmall: it does not fit.
    """
    template = trusted(folder, name, size)
    while template is None and folder.is_recorded(name):
        _examine(folder, name, progress)
        template = trusted(folder, name, size)
    return template


def _examine(folder: TemplateFolder, name: str, progress: Progress | None) -> None:
    """Read a template that was touched again, and inspect anew one that an older inspector accepted."""
    with folder.verify_lock(name):
        try:
            if trusted(folder, name, None) is not None:
                return  # another has just done it
            template = verification.verify_alone(folder, name, progress)
        except exceptions.TemplateNotFound:
            return  # removed meanwhile
    if template.inspector == inspection.INSPECTOR_VERSION:
        return
    with publish.opened(template.path) as image:
        verdict = inspection.inspect(image, name, template.format)
    folder.rewrite(template, "inspected", inspector=inspection.INSPECTOR_VERSION, notes=verdict.notes)
