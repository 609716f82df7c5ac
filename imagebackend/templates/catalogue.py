# SPDX-License-Identifier: Apache-2.0
"""What is in the cache, and what it is called there: for those who look after it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imagebackend import exceptions, names
from imagebackend.templates import details, entries, record, removal, tags, trust, usage
from imagebackend.templates.entries import Entry, Filter
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Template
from imagebackend.templates.usage import Usage

__all__ = ["HINT", "Catalogue"]

#: What to do about a template that is not there.
HINT = "add it with 'imagebackend template add'"


class Catalogue:
    """The templates of a cache, with their tags, labels and pins: :attr:`.TemplateCache.catalogue`."""

    def __init__(self, folder: TemplateFolder) -> None:
        self._folder = folder

    def entries(self, wanted: Filter | None = None) -> Sequence[Entry]:
        """Return what is in the cache with what it takes, how many disks depend on it, and when it was used last.

        Damaged templates are there, too, and those that another image has taken the name of. No lock is taken.

        :param wanted: which ones; None: all.
        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        return entries.entries(self._folder, wanted)

    def entry(self, name: str) -> Entry:
        """Return the same of one template.

        :raises TemplateNotFound: it is not in the cache.
        """
        name = trust.require(self._folder, record.check_reference(name), HINT)
        found = entries.entry_of(self._folder, name, tags.by_template(self._folder.tags).get(name, ()))
        if found is None:
            raise exceptions.TemplateNotFound(name)
        return found

    def inspect(self, name: str) -> dict[str, Any]:
        """Return everything that is known of a template, as JSON can hold it: its record, its history, its users, …

        :raises TemplateNotFound: it is not in the cache.
        :raises CorruptRecord: its record cannot be understood.
        """
        entry = self.entry(name)
        if entry.template is None and entry.damage is not None:
            raise entry.damage
        return details.details(entry, removal.users(self._folder, entry.name), time.time())

    def usage(self) -> Usage:
        """Return what the cache takes of the storage.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        return usage.usage(self._folder, self.entries())

    def tag(self, name: str, tag: str) -> None:
        """Give a template another name, or move that name to it; the cache knows it by that, too.

        :param tag: the other name.
        :raises InvalidName: no template can be called that.
        :raises TemplateNotFound: there is no template ``name``.
        :raises TemplateExists: there is a template ``tag``.
        """
        names.check_name("template", tag)
        name = trust.require(self._folder, names.check_name("template", name))
        # Nobody fetches a template of that name meanwhile.
        with self._folder.lock(tag):
            if self._folder.is_recorded(tag):
                raise exceptions.TemplateExists(tag, "a template has that name, so that it cannot be a tag")
            tags.move(self._folder.tags, tag, name)

    def label(self, name: str, labels: Mapping[str, str | None]) -> Template:
        """Give a template labels, and take those away that are given as None; return it so.

        :raises InvalidArgument: it cannot have such labels, or so many.
        :raises TemplateNotFound: there is no such template.
        :raises CorruptRecord: its record cannot be understood.
        """
        record.check_labels(labels)

        def change(template: Template) -> Template:
            merged = {key: value for key, value in {**template.labels, **labels}.items() if value is not None}
            return dataclasses.replace(template, labels=merged)

        return self._change(name, change)

    def pin(self, name: str, *, pinned: bool = True) -> Template:
        """Keep pruning away from a template, or let it come; return the template so.

        What takes its name by a pull is pinned in its place.

        :raises TemplateNotFound: there is no such template.
        :raises CorruptRecord: its record cannot be understood.
        """
        event = "pinned" if pinned else "unpinned"
        return self._change(name, lambda template: template.after(event, pinned=pinned))

    def untag(self, tag: str) -> None:
        """Take a tag away; the template stays.

        :raises TemplateNotFound: there is no such tag.
        """
        if not tags.remove(self._folder.tags, names.check_name("template", tag)):
            raise exceptions.TemplateNotFound(tag, "there is no such tag")

    def tags(self) -> Mapping[str, str]:
        """Return all tags, sorted, and the name of the template that each means.

        :raises PermissionDenied, StorageError: they cannot be read.
        """
        return tags.read_all(self._folder.tags)

    def _change(self, name: str, change: Callable[[Template], Template]) -> Template:
        name = trust.require(self._folder, record.check_reference(name))
        with self._folder.lock(name):
            template = self._folder.read(name, check_file=False)
            if template is None:
                raise exceptions.TemplateNotFound(name)
            changed = change(template)
            if changed != template:
                self._folder.write(changed)
        return changed
