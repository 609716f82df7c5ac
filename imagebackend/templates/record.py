# SPDX-License-Identifier: Apache-2.0
"""What a template is: written when it is published, and trusted from then on."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import digest, publish

__all__ = ["Template", "TouchedTemplate", "read", "write"]

_VERSION = 1
_LARGEST = 64 << 10


@dataclasses.dataclass(frozen=True)
class Template:
    """A template in the cache.

    :ivar name: its name.
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON can hold them."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}


_KINDS = {field.name: field.type for field in dataclasses.fields(Template) if field.name != "path"}


def write(record_path: str, template: Template, *, durable: bool) -> None:
    """Publish a record; from now on the template is there.

    :raises InsufficientSpace, PermissionDenied, StorageError: it is not.
    """
    content = {"version": _VERSION, **template.as_dict()}
    del content["path"]
    publish.write_file(record_path, json.dumps(content, indent=1).encode() + b"\n", durable=durable)
    if durable:
        publish.sync_folder(os.path.dirname(record_path))


def read(record_path: str, path: str, *, check_file: bool = True) -> Template | None:
    """Return the template that is recorded, or None if none is.

    :param record_path: the record.
    :param path: the template's file.
    :param check_file: make sure that it has the length and time of change that were recorded.
    :raises CorruptRecord: the record cannot be understood, or the file is not the one that was recorded.
    """
    content = publish.read_file(record_path, _LARGEST)
    if content is None:
        return None
    template = _parse(record_path, path, content)
    if check_file:
        _check_file(template)
    return template


def _parse(record_path: str, path: str, content: bytes) -> Template:
    way_out = "remove the template and add it again"
    try:
        fields = json.loads(content)
        version = fields.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise exceptions.CorruptRecord(record_path, f"not a template's record ({error}); {way_out}") from error
    if version != _VERSION:
        reason = f"version {version!r} is not known here; it was written by another release"
        raise exceptions.CorruptRecord(record_path, reason)
    for name, kind in _KINDS.items():
        expected = {"str": str, "int": int}.get(str(kind), list)
        if type(fields.get(name)) is not expected:
            raise exceptions.CorruptRecord(record_path, f"{name} is missing or not a {expected.__name__}; {way_out}")
    # A later release may add fields; those it has to have are checked above.
    known = {name: fields[name] for name in _KINDS}
    template = Template(**{**known, "notes": tuple(known["notes"]), "path": path})
    if not _is_possible(template):
        raise exceptions.CorruptRecord(record_path, f"no template can be what it says; {way_out}")
    return template


def _is_possible(template: Template) -> bool:
    return (
        template.name == os.path.basename(template.path)
        and template.format in ("raw", "qcow2")
        and min(template.virtual_size, template.size) >= 0
        and template.digest.partition(":")[0] in (digest.SHA256, digest.BLOCKS)
        and all(isinstance(note, str) for note in template.notes)
    )


class TouchedTemplate(exceptions.CorruptRecord):
    """The file has the length that was recorded, but was changed, copied or touched since."""


def _check_file(template: Template) -> None:
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
