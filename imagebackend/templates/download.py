# SPDX-License-Identifier: Apache-2.0
"""The file that a template is fetched into, which outlives a fetch only as a part that can be taken up again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imagebackend import exceptions
from imagebackend.storage import publish
from imagebackend.templates.sources import Source, part, scratch

__all__ = ["is_resumable", "opened", "remove"]


def is_resumable(fetch_func: object) -> bool:
    """Tell whether a function is the method ``fetch`` of a source that takes ``resume=True``."""
    source = getattr(fetch_func, "__self__", None)
    return isinstance(source, Source) and source.resumable and fetch_func == source.fetch


@contextlib.contextmanager
def opened(path: str, *, resume: bool) -> Iterator[None]:
    """Have a file that can be filled in the block; it is removed at the end unless it is a part that is on record.

    :param path: its name; the caller holds the template's lock.
    :param resume: it may hold the part that an earlier block left; otherwise it is empty.
    :raises InsufficientSpace, PermissionDenied, StorageError: it cannot be made.
    """
    descriptor = _open(path) if resume else None
    try:
        if descriptor is None:
            publish.remove_file(part.path_for(path))
            descriptor = publish.create(path)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    try:
        yield
    finally:
        # Open until it is synced: an error while writing back is reported to whoever had the file open.
        publish.close_quietly(descriptor)
        if not os.path.lexists(part.path_for(path)):
            publish.remove_quietly(path)


def remove(path: str) -> bool:
    """Remove the file and what is on record of it, and return whether there was any.

    :raises PermissionDenied, StorageError: it is still there.
    """
    scratch.remove(path)
    there = publish.remove_file(part.path_for(path))
    return publish.remove_file(path) or there


def _open(path: str) -> int | None:
    if part.read(path) is None:
        return None
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
