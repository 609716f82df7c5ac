# SPDX-License-Identifier: Apache-2.0
"""The folder beside a file to be fetched that an archive is unpacked into."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator

from imagebackend import exceptions
from imagebackend.storage import tree
from imagebackend.templates.sources import Progress

__all__ = ["remove", "scratch_folder", "unpack"]


@contextlib.contextmanager
def scratch_folder(target: str) -> Iterator[str]:
    """Give an empty folder beside a file to be fetched, which only its owner enters, and which is gone at the end."""
    remove(target)
    path = _path(target)
    try:
        os.mkdir(path, 0o700)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    with contextlib.ExitStack() as discard:
        discard.callback(shutil.rmtree, path, ignore_errors=True)
        yield path
        remove(target)
        discard.pop_all()


def unpack(archive: int, scratch: str, name: str, progress: Progress | None) -> str:
    """Unpack a tar archive, and return the folder that what is in it is in.

    :param archive: open for reading.
    :param scratch: from :func:`scratch_folder`.
    :param name: what to call the archive in errors.
    :raises: as :func:`imagebackend.storage.tree.extract`.
    """
    root = f"{scratch}/root"
    try:
        os.mkdir(root, 0o755)
    except OSError as error:
        raise exceptions.storage_error(error, root) from error
    tree.extract(archive, root, name, progress=progress)
    return root


def remove(target: str) -> None:
    """Remove what a killed process unpacked beside a file to be fetched.

    :raises PermissionDenied, StorageError: it is still there.
    """
    path = _path(target)
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno != errno.ENOENT or os.path.lexists(path):
            raise exceptions.storage_error(error, path) from error


def _path(target: str) -> str:
    return f"{target}.tree"
