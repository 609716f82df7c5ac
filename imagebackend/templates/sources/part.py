# SPDX-License-Identifier: Apache-2.0
"""What there is of an image whose transfer was cut short, on record beside it, so that another process can go on.

The record is written every few seconds. It names the source, what identifies the very bytes there, and the digest of
what has come until then, so that nothing is believed that did not reach the storage, and nothing has to be synced.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import publish

__all__ = ["LONGEST_KEPT", "Part", "path_for", "read", "write"]

LOG = logging.getLogger(__name__)

#: For how many seconds a part may be taken up again.
LONGEST_KEPT = 86400

_VERSION = 1
_LARGEST = 16 << 10


@dataclasses.dataclass(frozen=True)
class Part:
    """The beginning of an image.

    :ivar source: where it comes from, without credentials.
    :ivar checksum: what the image must hash to, as ``algorithm:hex``; empty: not known.
    :ivar validator: identifies the image's bytes at its source: a strong ETag, or a date of HTTP.
    :ivar etag: as in :class:`~imagebackend.templates.sources.Fetched`; empty: none.
    :ivar last_modified: as there.
    :ivar size: how many bytes there are.
    :ivar sha256: their digest, in hexadecimal digits.
    :ivar total: how many there will be.
    :ivar written: when this was recorded, in seconds since 1970.
    """

    source: str
    checksum: str
    validator: str
    etag: str
    last_modified: str
    size: int
    sha256: str
    total: int
    written: int


_KINDS = {field.name: {"str": str, "int": int}[str(field.type)] for field in dataclasses.fields(Part)}


def path_for(target: str) -> str:
    """Return where the part that is in ``target`` is on record."""
    return f"{target}.part"


def read(target: str) -> Part | None:
    """Return what there is in ``target``, if that is on record, makes sense and is not too old."""
    try:
        content = publish.read_file(path_for(target), _LARGEST)
        fields = json.loads(content) if content else {}
    except (exceptions.ImageBackendError, ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.get("version") != _VERSION:
        return None
    if any(type(fields.get(name)) is not kind for name, kind in _KINDS.items()):
        return None
    part = Part(**{name: fields[name] for name in _KINDS})
    # A clock that was set back does not make it any older.
    fresh = time.time() - part.written <= LONGEST_KEPT
    return part if fresh and part.size > 0 and part.size <= (part.total or part.size) else None


def write(target: str, **facts: Any) -> None:
    """Record what there is in ``target`` now: the fields of :class:`Part` but the time.

    A failure is only logged: without a record the next transfer starts over.
    """
    part = Part(**facts, written=int(time.time()))
    content = json.dumps({"version": _VERSION, **dataclasses.asdict(part)}).encode()
    try:
        publish.write_file(path_for(target), content, durable=False)
    except exceptions.StorageError as error:
        LOG.warning("the transfer could not be taken up again: %s", error)
