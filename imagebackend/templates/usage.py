# SPDX-License-Identifier: Apache-2.0
"""What the cache takes of the storage, by what it is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from imagebackend import exceptions
from imagebackend.templates.entries import Entry
from imagebackend.templates.folder import TemplateFolder

__all__ = ["Part", "Usage", "usage"]

_BLOCK = 512


@dataclass(frozen=True)
class Part:
    """What takes storage for one reason.

    :ivar count: how many files.
    :ivar allocated: the bytes of storage that they take.
    :ivar own: those of them that no other file shares.
    :ivar reclaimable: those of these that removing what nobody needs gives back.
    """

    count: int = 0
    allocated: int = 0
    own: int = 0
    reclaimable: int = 0


@dataclass(frozen=True)
class Usage:
    """What the cache takes.

    :ivar parts: ``templates``; ``dangling``, whose names other images have; ``other``: what is being fetched, or was
        left by a killed process, or is not the cache's.
    :ivar free: the bytes that are free on its file system.
    :ivar total: the size of its file system, in bytes.
    """

    parts: dict[str, Part]
    free: int
    total: int


def usage(folder: TemplateFolder, entries: Sequence[Entry]) -> Usage:
    """Return what the cache takes.

    :param entries: all that is in it.
    :raises PermissionDenied, StorageError: the folder cannot be read.
    """
    known = {each.template.file for each in entries if each.template is not None}
    parts = {
        "templates": _sum([each for each in entries if not each.is_dangling]),
        "dangling": _sum([each for each in entries if each.is_dangling]),
        "other": _others(folder, known),
    }
    try:
        found = os.statvfs(folder.path)
    except FileNotFoundError:
        return Usage(parts, 0, 0)
    except OSError as error:
        raise exceptions.storage_error(error, folder.path) from error
    return Usage(parts, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def _sum(entries: Sequence[Entry]) -> Part:
    free = [each for each in entries if not each.users and each.template is not None and not each.template.pinned]
    return Part(
        len(entries),
        sum(each.allocated for each in entries),
        sum(each.own for each in entries),
        sum(each.own for each in free),
    )


def _others(folder: TemplateFolder, known: set[str]) -> Part:
    count = allocated = 0
    try:
        with os.scandir(folder.path) as found:
            for each in found:
                if each.name not in known and each.is_file(follow_symlinks=False):
                    count += 1
                    allocated += each.stat(follow_symlinks=False).st_blocks * _BLOCK
    except FileNotFoundError:
        pass
    except OSError as error:
        raise exceptions.storage_error(error, folder.path) from error
    return Part(count, allocated, allocated)
