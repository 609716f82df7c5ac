# SPDX-License-Identifier: Apache-2.0
"""Removing what killed processes left in the cache, and nothing that anybody is at.

Each thing is removed under the lock under which it was made, and only if that lock is free. What may not be ours, such
as a file that has no record, is left alone: another program may share the folder.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imagebackend import exceptions, faults, locks
from imagebackend.storage import publish
from imagebackend.templates import download, leases, record, tags
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.leases import Lease, Owner
from imagebackend.templates.sources import part

__all__ = ["disk_lock", "is_file_gone", "orphans", "sweep"]

LOG = logging.getLogger(__name__)

# For how many seconds a lock's file is left although nobody holds it: making it again costs little, but not nothing.
_LOCK_AGE = 3600
_TEMPORARY = re.compile(r"\.(.+?)\.(download\.part|download|partial|verify)", re.DOTALL)
# The kinds of locks that templates and disks have. What else is there stays: "replacing-" begins the names of notes.
_LOCKS = (
    *("template-", "pull-", "verify-", "rbd-template-", "lvm-template-", "ploop-template-"),
    *("disk-", "record-", "clearing-", "extract-"),
)


@dataclass(frozen=True)
class _Leftover:
    """Something that may have been left.

    :ivar what: for the log.
    :ivar lock: the lock under which it was made.
    :ivar remove: removes it if it is not needed, under the lock, and returns whether it did.
    """

    what: str
    lock: str
    remove: Callable[[], bool]


def sweep(
    folder: TemplateFolder, is_gone: Callable[[Owner], bool]
) -> tuple[list[str], list[tuple[str, exceptions.ImageBackendError]]]:
    """Remove what killed processes left; return that, and what could not be removed, with the reason.

    :param is_gone: whether a disk of this host, which nobody makes or changes meanwhile, is provably not there.
    :raises PermissionDenied, StorageError: the folder cannot be read.
    """
    swept: list[str] = []
    failed: list[tuple[str, exceptions.ImageBackendError]] = []
    leftovers = _files(folder), _records(folder), _tags(folder), _leases(folder, is_gone), _locks(folder)
    for leftover in itertools.chain.from_iterable(leftovers):
        try:
            with locks.hold(leftover.lock, timeout=0, transient=True):
                if leftover.remove():
                    swept.append(leftover.what)
                    LOG.info("swept up: %s", leftover.what)
            faults.point("template.sweep.done")
        except exceptions.LockTimeout:
            continue  # somebody is at it
        except exceptions.ImageBackendError as error:
            LOG.warning("cannot sweep up %s: %s", leftover.what, error)
            failed.append((leftover.what, error))
    return swept, failed


def orphans(folder: TemplateFolder, is_gone: Callable[[Owner], bool]) -> Iterator[Lease]:
    """Yield the leases of this host whose disks seem to be gone; whether that is so has to be asked under their locks.

    :param is_gone: as for :func:`sweep`.
    """
    for file in folder.leased():
        for lease in leases.read_all(folder.leases(file), file):
            if lease.owner.host == folder.conf.host and is_gone(lease.owner):
                yield lease


def is_file_gone(folder: TemplateFolder, owner: Owner) -> bool:
    """Return whether a disk that would be a file of this host's is provably not there.

    That its path leads nowhere proves nothing where the file system with the disks may not be mounted.
    """
    instances = os.path.dirname(folder.locks)
    if owner.path != f"{instances}/{owner.instance}/{owner.disk}" or os.path.lexists(owner.path):
        return False
    with contextlib.suppress(OSError):
        return os.stat(instances).st_dev == os.stat(folder.path).st_dev
    return False


def disk_lock(folder: TemplateFolder, owner: Owner) -> str:
    """Return the lock file of the lock under which a disk is made and changed."""
    return locks.disk_lock(folder.locks, owner.instance, owner.disk)


def _files(folder: TemplateFolder) -> Iterator[_Leftover]:
    """Yield temporary files, and files that got their name just before a process was killed."""
    for name in publish.list_folder(folder.path):
        path = f"{folder.path}/{name}"
        if found := _TEMPORARY.fullmatch(name):
            of, kind = _innermost(found[1]), found[2]
            lock = folder.lock_file("pull" if of.endswith("@") else "verify" if kind == "verify" else "template", of)
            yield _Leftover(path, lock, functools.partial(_remove_temporary, path, kind))
        elif record.is_generation(name):
            remove = functools.partial(_remove_unrecorded, folder, name)
            yield _Leftover(path, folder.lock_file("template", name), remove)


def _innermost(name: str) -> str:
    """Return what a temporary file of a temporary file is of."""
    while found := _TEMPORARY.fullmatch(name):
        name = found[1]
    return name


def _remove_temporary(path: str, kind: str) -> bool:
    if kind == "verify":
        return _age(path) > part.LONGEST_KEPT and publish.remove_file(path)
    if kind == "partial":
        return publish.remove_file(path)
    # The part of an image that the next fetch can go on with stays as long as that is so.
    target = path.removesuffix(".part")
    return part.read(target) is None and download.remove(target)


def _remove_unrecorded(folder: TemplateFolder, file: str) -> bool:
    if folder.find(file) is not None or leases.count(folder.leases(file)):
        return False
    return publish.remove_file(folder.file(file))


def _records(folder: TemplateFolder) -> Iterator[_Leftover]:
    """Yield temporary files of records, and records whose file is that of another."""
    for name in publish.list_folder(f"{folder.path}/.records"):
        if found := _TEMPORARY.fullmatch(name):
            of = found[1].removesuffix(".json")
            remove = functools.partial(_remove_prepared, folder, of)
            yield _Leftover(f"{folder.path}/.records/{name}", folder.lock_file("template", of), remove)
    for base, names in folder.former().items():
        for name in folder.leftovers(base, names):
            remove = functools.partial(_forget_leftover, folder, name)
            yield _Leftover(folder.record(name), folder.lock_file("template", name), remove)


def _remove_prepared(folder: TemplateFolder, name: str) -> bool:
    """Remove a record that has only its temporary name, and the file that has no other."""
    template = record.read_prepared(folder.record(name), folder.path)
    if template is not None and folder.find(template.file) is None:
        if leases.count(folder.leases(template.file)):
            return False
        publish.remove_file(template.path)
    return folder.forget_prepared(name)


def _forget_leftover(folder: TemplateFolder, name: str) -> bool:
    return name in folder.leftovers(name) and folder.forget(name)


def _tags(folder: TemplateFolder) -> Iterator[_Leftover]:
    """Yield tags of templates that are gone, and temporary ones."""
    for tag in publish.list_folder(folder.tags):
        if found := _TEMPORARY.fullmatch(tag):
            path = f"{folder.tags}/{tag}"
            yield _Leftover(path, folder.lock_file("template", found[1]), functools.partial(publish.remove_file, path))
        elif not _means_something(folder, tag):
            remove = functools.partial(_remove_tag, folder, tag)
            yield _Leftover(f"{folder.tags}/{tag}", folder.lock_file("template", tag), remove)


def _means_something(folder: TemplateFolder, tag: str) -> bool:
    name = tags.read(folder.tags, tag)
    return name is not None and folder.is_recorded(name)


def _remove_tag(folder: TemplateFolder, tag: str) -> bool:
    return not _means_something(folder, tag) and tags.remove(folder.tags, tag)


def _leases(folder: TemplateFolder, is_gone: Callable[[Owner], bool]) -> Iterator[_Leftover]:
    """Yield leases whose disks are gone, and folders of leases of templates that are."""
    for lease in orphans(folder, is_gone):
        what = f"lease of {lease.owner.host}:{lease.owner.path} on {lease.template}"
        yield _Leftover(what, disk_lock(folder, lease.owner), functools.partial(_drop, folder, lease, is_gone))
    for file in folder.leased():
        if not os.path.lexists(folder.file(file)):
            remove = functools.partial(_remove_empty, folder, file)
            yield _Leftover(folder.leases(file), folder.lock_file("template", file), remove)


def _drop(folder: TemplateFolder, lease: Lease, is_gone: Callable[[Owner], bool]) -> bool:
    if not is_gone(lease.owner):
        return False
    folder.drop_lease(lease.template, lease.owner)
    return True


def _remove_empty(folder: TemplateFolder, file: str) -> bool:
    # A first lease may be made right now: then the folder is not empty, or is made again.
    with contextlib.suppress(OSError):
        if not os.path.lexists(folder.file(file)):
            os.rmdir(folder.leases(file))
            return True
    return False


def _locks(folder: TemplateFolder) -> Iterator[_Leftover]:
    """Yield locks that nobody has held for long; those of templates that are there would only be made again."""
    for name in publish.list_folder(folder.locks):
        kind = next((each for each in _LOCKS if name.startswith(each)), None)
        if kind is None or (kind == "template-" and folder.is_recorded(name.removeprefix(kind))):
            continue
        path = f"{folder.locks}/{name}"
        if _age(path) > _LOCK_AGE:
            # Whoever held it until then removes its file.
            yield _Leftover(path, path, lambda: True)


def _age(path: str) -> float:
    try:
        return time.time() - os.stat(path, follow_symlinks=False).st_mtime
    except OSError:
        return 0.0
