# SPDX-License-Identifier: Apache-2.0
"""What is in the cache: every template with what it takes, who depends on it, and when it was used last."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from imagebackend import exceptions
from imagebackend.storage import extents
from imagebackend.templates import leases, record, tags
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Template

__all__ = ["Entry", "Filter", "entries", "entry_of", "last_used"]

# The unit of st_blocks (stat(2)).
_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    """A template, and what is known of it beyond its record.

    :ivar name: its name.
    :ivar template: its record; None if that cannot be understood.
    :ivar damage: what is wrong with its record or its file; None: nothing that is known.
    :ivar tags: its other names.
    :ivar users: how many disks depend on it.
    :ivar last_used: when it was fetched, or a disk was made from it or dropped, in seconds since the epoch.
    :ivar allocated: the bytes of storage that its file takes.
    :ivar shared: those of them that other files share, such as reflinks of it; 0 where the file system does not tell.
    """

    name: str
    template: Template | None
    damage: exceptions.CorruptRecord | None = None
    tags: tuple[str, ...] = ()
    users: int = 0
    last_used: float = 0.0
    allocated: int = 0
    shared: int = 0

    @property
    def own(self) -> int:
        """The bytes of storage that removing it gives back."""
        return max(0, self.allocated - self.shared)

    @property
    def is_dangling(self) -> bool:
        """Whether another image has its name."""
        return "@" in self.name

    def age(self, now: float) -> float:
        """Return for how many seconds it has not been used; 0 if a clock was set back since."""
        return max(0.0, now - self.last_used)


@dataclass(frozen=True)
class Filter:
    """Which entries are wanted; None and empty: it does not matter.

    :ivar in_use: whether disks depend on it.
    :ivar dangling: whether another image has its name.
    :ivar labels: labels that it has, and their values; None: any value.
    :ivar before, since: when it was fetched, in seconds since the epoch: before then, or then and later.
    :ivar disk_format: the format of its file.
    :ivar names: the names that it may have, or have had.
    """

    in_use: bool | None = None
    dangling: bool | None = None
    labels: Mapping[str, str | None] = field(default_factory=dict)
    before: float | None = None
    since: float | None = None
    disk_format: str | None = None
    names: Collection[str] | None = None

    def takes(self, entry: Entry) -> bool:
        """Return whether an entry is wanted; a damaged one is if nothing of its record is asked for."""
        if self.in_use not in (None, entry.users > 0) or self.dangling not in (None, entry.is_dangling):
            return False
        if self.names is not None and record.base_name(entry.name) not in self.names:
            return False
        template = entry.template
        if template is None:
            return not self.labels and (self.before, self.since, self.disk_format) == (None, None, None)
        fetched = record.seconds(template.fetched)
        return (
            self._takes_labels(template.labels)
            and (self.before is None or fetched < self.before)
            and (self.since is None or fetched >= self.since)
            and self.disk_format in (None, template.format)
        )

    def _takes_labels(self, labels: Mapping[str, str]) -> bool:
        return all(key in labels and value in (None, labels[key]) for key, value in self.labels.items())


def entries(folder: TemplateFolder, wanted: Filter | None = None) -> list[Entry]:
    """Return what is in the cache, sorted by name, damaged templates included; no lock is taken.

    :raises PermissionDenied, StorageError: the folder cannot be read.
    """
    wanted = wanted or Filter()
    other_names = tags.by_template(folder.tags)
    files: dict[str, str] = {}
    found = []
    for name in folder.names():
        entry = entry_of(folder, name, other_names.get(name, ()))
        if entry is None:
            continue  # removed since it was listed
        file = entry.template.file if entry.template is not None else ""
        # What had the name comes after what has it. One with the same file was left by a process that was killed.
        if "@" not in name:
            files[name] = file
        elif file and files.get(record.base_name(name)) == file:
            continue
        if wanted.takes(entry):
            found.append(entry)
    return found


def entry_of(folder: TemplateFolder, name: str, other_names: Sequence[str]) -> Entry | None:
    """Return what is known of a template; None: it is not there.

    :param other_names: its tags.
    """
    try:
        template = folder.read(name, check_file=False)
    except exceptions.CorruptRecord as error:
        # Its file has its name, as a rule; where it matters, all that may be its are looked at.
        return Entry(name, None, error, tuple(other_names), leases.count(folder.leases(name)))
    if template is None:
        return None
    damage, allocated, shared = None, 0, 0
    try:
        allocated = record.file_status(template).st_blocks * _BLOCK
        shared = extents.shared_size(template.path)
    except exceptions.CorruptRecord as error:
        damage = error
    return Entry(
        name=name,
        template=template,
        damage=damage,
        tags=tuple(other_names),
        users=leases.count(folder.leases(template.file)),
        last_used=last_used(folder, template),
        allocated=allocated,
        shared=shared,
    )


def last_used(folder: TemplateFolder, template: Template) -> float:
    """Return when a template was fetched, or a disk was made from it or dropped, in seconds since the epoch."""
    known = record.seconds(template.superseded or template.fetched)
    return max(known, leases.changed(folder.leases(template.file)))
