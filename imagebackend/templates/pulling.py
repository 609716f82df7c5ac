# SPDX-License-Identifier: Apache-2.0
"""When a source is asked for an image: if it is absent, or as a policy says."""

from __future__ import annotations

import logging

from imagebackend import exceptions, names
from imagebackend.templates import placement, trust
from imagebackend.templates.fetching import Request
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Template
from imagebackend.templates.sources import Source

__all__ = ["POLICIES", "fetch", "fetch_locked", "pull"]

LOG = logging.getLogger(__name__)

#: When a source is asked for what is in the cache already; see :meth:`.cache.TemplateCache.pull`.
POLICIES = ("always", "missing", "newer", "never")


def fetch(folder: TemplateFolder, request: Request) -> Template:
    """Return a template, fetched if it is absent; see :meth:`.cache.TemplateCache.fetch`."""
    template = trust.usable(folder, request.name, request.size, request.progress)
    if template is None and (meant := trust.resolve(folder, request.name)) != request.name:
        template = trust.usable(folder, meant, request.size, request.progress)
    if template is not None:
        folder.events.tell("hit", template.name)
        return template
    with folder.lock(names.check_name("template", request.name)):
        return fetch_locked(folder, request)


def fetch_locked(folder: TemplateFolder, request: Request) -> Template:
    """Return a template, fetched if it is absent; under its exclusive lock."""
    template = folder.read(request.name)
    if template is not None:
        folder.events.tell("hit", template.name)
        return template
    folder.events.tell("miss", request.name, "is not in the cache")
    return placement.fetch_new(folder, request)


def pull(folder: TemplateFolder, request: Request, source: Source, policy: str) -> Template:
    """Return a template, after asking its source as the policy says; see :meth:`.cache.TemplateCache.pull`."""
    name = request.name
    tagged = trust.resolve(folder, name)
    if tagged != name:
        raise exceptions.TemplateExists(name, f"it is a tag of {tagged}; pull that, or remove the tag")
    current = folder.read(name, check_file=False)
    if policy == "missing" or current is None:
        return fetch(folder, request)
    sound = _sound(folder, request)
    try:
        if policy == "newer" and sound is not None and _is_unchanged(source, sound):
            LOG.debug("template %s is what %s has", name, sound.source)
            folder.events.tell("hit", name)
            return sound
        return placement.replace(folder, request, current)
    except (exceptions.ChecksumMismatch, exceptions.SignatureInvalid):
        raise
    except exceptions.FetchFailed as error:
        if policy != "newer" or sound is None:
            raise
        LOG.warning("template %s stays as it is: %s", name, error)
        return sound


def _sound(folder: TemplateFolder, request: Request) -> Template | None:
    """Return what is there, if it may be used; None if it is damaged."""
    try:
        return trust.usable(folder, request.name, request.size, request.progress)
    except exceptions.CorruptRecord as error:
        LOG.warning("template %s is damaged: %s", request.name, error)
        return None


def _is_unchanged(source: Source, template: Template) -> bool:
    return source.unchanged_since(
        sha256=template.sha256, etag=template.etag or None, last_modified=template.last_modified or None
    )
