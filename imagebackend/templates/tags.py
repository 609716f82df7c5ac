# SPDX-License-Identifier: Apache-2.0
"""Other names of templates, such as ``stable``, that can be moved from one to another.

A tag is a symbolic link to the template's name: one atomic system call to make, to move and to remove, visible with
``ls -l``, and one more to follow, which only names that no template has need.
"""

from __future__ import annotations

import contextlib
import os

from imagebackend import exceptions
from imagebackend.storage import publish

__all__ = ["by_template", "move", "read", "read_all", "remove"]


def read(folder: str, tag: str) -> str | None:
    """Return what a tag means, or None if there is no such tag.

    :param folder: the folder of the tags.
    :raises PermissionDenied, StorageError: it cannot be read.
    """
    try:
        return os.readlink(f"{folder}/{tag}")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise exceptions.storage_error(error, f"{folder}/{tag}") from error


def read_all(folder: str) -> dict[str, str]:
    """Return all tags, sorted, and what they mean.

    :raises PermissionDenied, StorageError: they cannot be read.
    """
    found = {tag: read(folder, tag) for tag in publish.list_folder(folder) if not tag.startswith(".")}
    return {tag: name for tag, name in found.items() if name is not None}


def by_template(folder: str) -> dict[str, list[str]]:
    """Return the tags, sorted, of each template that has any."""
    found: dict[str, list[str]] = {}
    for tag, name in read_all(folder).items():
        found.setdefault(name, []).append(tag)
    return found


def move(folder: str, tag: str, name: str) -> None:
    """Make a tag mean ``name``, whatever it meant before; nobody else moves it meanwhile.

    :raises InsufficientSpace, PermissionDenied, StorageError: it means what it did.
    """
    path = f"{folder}/{tag}"
    partial = publish.partial_path(path)
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        os.symlink(name, partial)
        os.rename(partial, path)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def remove(folder: str, tag: str) -> bool:
    """Remove a tag; return whether there was one.

    :raises PermissionDenied, StorageError: it is still there.
    """
    return publish.remove_file(f"{folder}/{tag}")
