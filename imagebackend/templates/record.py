# SPDX-License-Identifier: Apache-2.0
"""What a template is: written when it is published, and trusted from then on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import stat
from collections.abc import Mapping
from typing import Any

from imagebackend import exceptions, names
from imagebackend.storage import digest, publish

__all__ = [
    "Happening",
    "NewerRecord",
    "Template",
    "TouchedTemplate",
    "base_name",
    "check_labels",
    "check_reference",
    "file_status",
    "generation",
    "is_generation",
    "now",
    "prepare",
    "publish_prepared",
    "read",
    "read_prepared",
    "seconds",
    "write",
]

_VERSION = 2
_LARGEST = 64 << 10
#: How many happenings a record keeps: the first, and the latest of the others.
_MOST_HAPPENINGS = 20

_GENERATION_DIGITS = 16
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}\Z", re.ASCII)
_GENERATION = re.compile(rf"[0-9a-f]{{{_GENERATION_DIGITS}}}\Z", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Happening:
    """Something that happened to a template.

    :ivar event: ``fetched``, ``refetched``, ``verified``, ``damaged``, ``superseded``, ``pinned``, ``unpinned``.
    :ivar time: when, as ISO 8601 in UTC.
    :ivar detail: more about it, for people.
    """

    event: str
    time: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """A template in the cache.

    :ivar name: its name; ``NAME@DIGITS``, the digits being the first of its digest, once another has taken the name.
    :ivar path: its file, absolute.
    :ivar format: ``raw`` or ``qcow2``, of the file in the cache.
    :ivar virtual_size: the size of the disk that it holds, in bytes.
    :ivar size: the length of its file, in bytes.
    :ivar modified: the time of the file's last change when it was published, in nanoseconds: whether it was touched.
    :ivar sha256: the digest of the image as it was fetched: what its publisher's checksum file says; empty for one
        that was generated here.
    :ivar digest: the digest of the file in the cache, as ``algorithm:hex``; see :mod:`imagebackend.storage.digest`.
    :ivar source: where it came from, without credentials.
    :ivar source_format: the format that it came in.
    :ivar inspector: the version of the inspector that accepted it.
    :ivar notes: what else the inspector saw, such as ``gpt``.
    :ivar fetched: when it was published, as ISO 8601 in UTC.
    :ivar file: the name of its file in the folder of the cache, which its leases go by.
    :ivar etag: what identified the state of the image at its source; empty if nothing did.
    :ivar last_modified: when the source said that it was changed last, as a date of HTTP; empty if it did not.
    :ivar compression: how the image was compressed at its source, such as ``xz``; empty if it was not.
    :ivar content_sha256: the digest of the image once decompressed; empty if it was not compressed.
    :ivar min_disk: the size of the smallest disk that the image is meant for, in bytes; 0: its virtual size.
    :ivar labels: the operator's own facts about it.
    :ivar pinned: whether pruning leaves it alone.
    :ivar superseded: when another image took its name, as ISO 8601 in UTC; empty as long as none has.
    :ivar quarantined: since when, and why, no disk must be made from it any more; empty for a sound one.
    :ivar block_digest: the digest of the file by blocks, once one that has another was verified; empty until then.
    :ivar history: what happened to it: how it began, and what came last.
    """

    name: str
    path: str
    format: str
    virtual_size: int
    size: int
    modified: int
    sha256: str
    digest: str
    source: str
    source_format: str
    inspector: int
    notes: tuple[str, ...]
    fetched: str
    file: str
    etag: str = ""
    last_modified: str = ""
    compression: str = ""
    content_sha256: str = ""
    min_disk: int = 0
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    pinned: bool = False
    superseded: str = ""
    quarantined: str = ""
    block_digest: str = dataclasses.field(default="", compare=False)
    history: tuple[Happening, ...] = dataclasses.field(default=(), compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON can hold them."""
        return {**dataclasses.asdict(self), "notes": list(self.notes), "history": list(map(vars, self.history))}

    def after(self, event: str, detail: str = "", **changes: Any) -> Template:
        """Return the template with some fields changed, and with what happened added to its history."""
        history = (*self.history, Happening(event, now(), detail))
        if len(history) > _MOST_HAPPENINGS:
            history = (history[0], *history[1 - _MOST_HAPPENINGS :])
        return dataclasses.replace(self, **changes, history=history)


_TEXTS = (
    *("name", "format", "sha256", "digest", "source", "source_format", "fetched", "file", "etag", "last_modified"),
    *("compression", "content_sha256", "superseded", "quarantined", "block_digest"),
)
_NUMBERS = ("virtual_size", "size", "modified", "inspector", "min_disk")
_KINDS: dict[str, type] = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(_NUMBERS, int),
    "pinned": bool,
    "notes": list,
    "labels": dict,
    "history": list,
}
# What version 1 had.
_FIRST_VERSION = (
    *("name", "format", "virtual_size", "size", "modified", "sha256", "digest", "source", "source_format"),
    *("inspector", "notes", "fetched"),
)


def now() -> str:
    """Return the time, as records have it: ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def seconds(time: str) -> float:
    """Return a time of :func:`now` in seconds since the epoch."""
    return datetime.datetime.fromisoformat(time).timestamp()


def check_labels(labels: Mapping[str, str | None]) -> None:
    """Make sure that a template can have these labels.

    :raises InvalidArgument: a name is not ``[A-Za-z0-9][A-Za-z0-9._/-]{0,127}``, or a value is not printable text of
        at most 1024 characters.
    """
    for key, value in labels.items():
        if _LABEL.match(key) is None:
            reason = "1 to 128 of the ASCII letters, digits, '.', '_', '/' and '-' are allowed"
            raise exceptions.InvalidArgument(f"label {key!r}: {reason}, the first a letter or digit")
        if value is not None and (len(value) > 1024 or not value.isprintable()):
            raise exceptions.InvalidArgument(f"label {key}: printable text of up to 1024 characters is needed")


def generation(name: str, value: str) -> str:
    """Return what a template is called, or its file, when the name alone means another.

    :param name: the name that it had.
    :param value: its digest, as ``algorithm:hex``.
    """
    return f"{base_name(name)}@{value.rpartition(':')[2][:_GENERATION_DIGITS]}"


def base_name(name: str) -> str:
    """Return the name that a template, or its file, has or had."""
    return name.partition("@")[0]


def is_generation(name: str) -> bool:
    """Return whether a name, or that of a file, is one that :func:`generation` gives."""
    return _GENERATION.match(name.partition("@")[2]) is not None


def check_reference(name: object) -> str:
    """Return what may mean a template: a name, or ``NAME@DIGITS``.

    :raises InvalidName: it can mean none.
    """
    if isinstance(name, str) and is_generation(name):
        names.check_name("template", base_name(name))
        return name
    return names.check_name("template", name)


def write(record_path: str, template: Template, *, durable: bool) -> None:
    """Publish a record; from now on the template is there.

    :raises InvalidArgument: it would be larger than what is read again.
    :raises InsufficientSpace, PermissionDenied, StorageError: it is not.
    """
    prepare(record_path, template, durable=durable)
    publish_prepared(record_path, durable=durable)


def prepare(record_path: str, template: Template, *, durable: bool) -> None:
    """Write a record under a temporary name: it says whose a file is that has no record yet, or no longer.

    :raises InvalidArgument, InsufficientSpace, PermissionDenied, StorageError: as for :func:`write`.
    """
    fields = {"version": _VERSION, **template.as_dict()}
    del fields["path"]
    content = json.dumps(fields, indent=1).encode() + b"\n"
    if len(content) >= _LARGEST:
        reason = f"its labels and notes take too much: {len(content)} bytes, {_LARGEST - 1} at most"
        raise exceptions.InvalidArgument(f"the record of template {template.name}: {reason}")
    publish.prepare_file(record_path, content, durable=durable)


def publish_prepared(record_path: str, *, durable: bool) -> None:
    """Give a record of :func:`prepare` its name; from now on the template is there.

    :raises PermissionDenied, StorageError: it is not.
    """
    publish.publish_prepared(record_path)
    if durable:
        publish.sync_folder(os.path.dirname(record_path))


def read(record_path: str, folder: str, *, check_file: bool = True) -> Template | None:
    """Return the template that is recorded, or None if none is.

    :param record_path: the record, ``…/NAME.json``.
    :param folder: where the templates' files are.
    :param check_file: make sure that it has the length and time of change that were recorded.
    :raises NewerRecord: a newer release wrote it.
    :raises CorruptRecord: the record cannot be understood, or the file is not the one that was recorded.
    """
    content = publish.read_file(record_path, _LARGEST)
    if content is None:
        return None
    template = _parse(record_path, folder, content)
    if check_file:
        file_status(template)
    return template


def read_prepared(record_path: str, folder: str) -> Template | None:
    """Return what a record says that has only its temporary name; None: there is none, or it says nothing."""
    try:
        content = publish.read_file(publish.partial_path(record_path), _LARGEST)
        return None if content is None else _parse(record_path, folder, content)
    except exceptions.ImageBackendError:
        return None


def _parse(record_path: str, folder: str, content: bytes) -> Template:
    way_out = "remove the template and add it again"
    try:
        fields = json.loads(content)
        version = fields.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise exceptions.CorruptRecord(record_path, f"not a template's record ({error}); {way_out}") from error
    if type(version) is int and version > _VERSION:
        reason = f"written by a newer release (version {version}, known here are 1 to {_VERSION}); update this host"
        raise NewerRecord(record_path, reason)
    if type(version) is not int or version < 1:
        raise exceptions.CorruptRecord(record_path, f"no record has version {version!r}; {way_out}")
    if version == 1:
        fields |= _since_version_2(fields)
    for name, expected in _KINDS.items():
        if type(fields.get(name)) is not expected:
            raise exceptions.CorruptRecord(record_path, f"{name} is missing or not a {expected.__name__}; {way_out}")
    try:
        history = tuple(Happening(each["event"], each["time"], each["detail"]) for each in fields["history"])
    except (KeyError, TypeError) as error:
        raise exceptions.CorruptRecord(record_path, f"history is damaged ({error!r}); {way_out}") from error
    # Fields that a later release of the same version adds are passed over.
    known = {name: fields[name] for name in _KINDS}
    known |= {"notes": tuple(fields["notes"]), "history": history, "path": f"{folder}/{fields['file']}"}
    template = Template(**known)
    if template.name != os.path.basename(record_path).removesuffix(".json") or not _is_possible(template):
        raise exceptions.CorruptRecord(record_path, f"no template can be what it says; {way_out}")
    return template


def _since_version_2(fields: dict[str, Any]) -> dict[str, Any]:
    """Return what version 2 has besides, for the fields of a record of version 1."""
    fetched = Happening("fetched", fields.get("fetched", ""), fields.get("source", ""))
    made_up: dict[str, Any] = {name: expected() for name, expected in _KINDS.items() if name not in _FIRST_VERSION}
    return {**made_up, "file": fields.get("name"), "history": [vars(fetched)]}


def _is_possible(template: Template) -> bool:
    told = (text for each in template.history for text in vars(each).values())
    texts = (*template.notes, *template.labels.values(), *told)
    return (
        _is_file_of(template)
        and template.format in ("raw", "qcow2")
        and min(template.virtual_size, template.size, template.min_disk) >= 0
        and template.digest.partition(":")[0] in (digest.SHA256, digest.BLOCKS)
        and all(isinstance(text, str) for text in texts)
        and all(map(_is_time, filter(None, (template.fetched or "?", template.superseded))))
    )


def _is_time(text: str) -> bool:
    try:
        return datetime.datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _is_file_of(template: Template) -> bool:
    name, at, digits = template.file.partition("@")
    return name == base_name(template.name) and (not at or _GENERATION.match(digits) is not None)


class TouchedTemplate(exceptions.CorruptRecord):
    """The file has the length that was recorded, but was changed, copied or touched since."""


class NewerRecord(exceptions.CorruptRecord):
    """A newer release wrote the record: what it says is not known here, so nothing is done with the template."""


def file_status(template: Template) -> os.stat_result:
    """Return the status of a template's file, if that is as it was recorded, and no damage of it is known.

    :raises TouchedTemplate: it has the length that was recorded, but was changed, copied or touched since.
    :raises CorruptTemplate: it is in quarantine.
    :raises CorruptRecord: it is gone, or has another length.
    """
    if template.quarantined:
        raise exceptions.CorruptTemplate(template.path, f"quarantined {template.quarantined}", ())
    try:
        found = os.stat(template.path, follow_symlinks=False)
    except FileNotFoundError as error:
        raise exceptions.CorruptRecord(
            template.path, "the template's file is gone, its record is there; restore the file, or remove the template"
        ) from error
    changed = "the file has changed since it was recorded"
    if not stat.S_ISREG(found.st_mode) or found.st_size != template.size:
        reason = f"{changed}: {found.st_size} bytes, recorded are {template.size}; restore it, or remove the template"
        raise exceptions.CorruptRecord(template.path, reason)
    if found.st_mtime_ns != template.modified:
        raise TouchedTemplate(template.path, f"{changed}; 'template verify' tells whether its data have")
    return found
