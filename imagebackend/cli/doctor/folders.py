# SPDX-License-Identifier: Apache-2.0
"""Can the folders hold disks, and what can their file system do?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from imagebackend import exceptions, locks
from imagebackend.cli.doctor.finding import Finding, error, fine, warning
from imagebackend.cli.output import human_size
from imagebackend.storage import direct_io, reflink

__all__ = ["FileSystem", "Folder", "judge_file_system", "judge_folder", "look_at_file_system", "look_at_folder"]

_LITTLE_SPACE = 1 << 30
_LITTLE_SHARE = 0.05
_TOO_FULL = "could not be tried: the file system is full"
_FREE_SPACE = "remove templates and disks that nobody needs, or enlarge the file system"


@dataclass(frozen=True)
class Folder:
    """A folder.

    :ivar path: what is configured.
    :ivar nearest: itself if it is there, or the next one above it that is.
    :ivar failure: why nothing can be made in that; None: it can.
    """

    path: str
    nearest: str
    failure: str | None = None


@dataclass(frozen=True)
class FileSystem:
    """A file system, by what was tried on it.

    :ivar direct_io, reflink: whether it can do that; None: it is too full to try.
    :ivar lock_failure: why locks do not keep others out; None: they do.
    :ivar free, size: bytes.
    :ivar free_files, files: how many files it has room for, and can have; 0: it does not limit them.
    """

    direct_io: bool | None
    reflink: bool | None
    lock_failure: str | None
    free: int
    size: int
    free_files: int
    files: int


def look_at_folder(path: str) -> Folder:
    """Try to make an unnamed file in a folder."""
    nearest = path
    while not os.path.lexists(nearest) and nearest != "/":
        nearest = os.path.dirname(nearest)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return Folder(path, nearest)
    except OSError as failure:
        return Folder(path, nearest, failure.strerror or str(failure))


def judge_folder(option: str, folder: Folder, user: int) -> Finding:
    """Return what is to be said of a folder.

    :param option: what configures it.
    :param user: the user ID that was tried with.
    """
    check = f"{option} {folder.path}"
    if folder.failure is not None:
        what = "it" if folder.nearest == folder.path else f"{folder.nearest}, and it is not there"
        advice = f"give user {user} the right to write there, or configure another folder"
        return error(check, f"nothing can be made in {what}: {folder.failure}", advice)
    if folder.nearest != folder.path:
        return fine(check, f"not there yet; it will be made in {folder.nearest}")
    return fine(check, f"user {user} can write there")


def look_at_file_system(folder: str) -> FileSystem:
    """Try what the file system of a folder can do; nothing is left there.

    :raises StorageError: nothing can be made there.
    """
    found = os.statvfs(folder)
    return FileSystem(
        direct_io=_try(direct_io.is_supported, folder),
        reflink=_try(reflink.is_supported, folder),
        lock_failure=_try_lock(folder),
        free=found.f_bavail * found.f_frsize,
        size=found.f_blocks * found.f_frsize,
        free_files=found.f_favail,
        files=found.f_files,
    )


def judge_file_system(found: FileSystem, reflink_option: str, *, copies: bool) -> list[Finding]:
    """Return what is to be said of the file system under ``instances_path``.

    :param reflink_option: ``[DEFAULT] reflink``.
    :param copies: disks are copies of their templates.
    """
    return [
        _judge_direct_io(found),
        _judge_reflink(found, reflink_option, copies),
        _judge_locks(found),
        _judge_space(found),
        _judge_files(found),
    ]


def _judge_direct_io(found: FileSystem) -> Finding:
    if found.direct_io is None:
        return warning("direct I/O", _TOO_FULL, _FREE_SPACE)
    if found.direct_io:
        return fine("direct I/O", "works; disks get the cache mode none")
    advice = "keep disks on a file system with O_DIRECT, such as ext4 or XFS, if guests need the speed"
    return warning("direct I/O", "not supported; disks get the cache mode writeback", advice)


def _judge_reflink(found: FileSystem, option: str, copies: bool) -> Finding:
    advice = "keep disks on XFS (mkfs.xfs -m reflink=1) or btrfs"
    if option == "never":
        return fine("reflink", "switched off by [DEFAULT] reflink = never")
    if found.reflink is None:
        return warning("reflink", _TOO_FULL, _FREE_SPACE)
    if found.reflink:
        return fine("reflink", "works; raw disks share their template's blocks")
    if option == "always":
        reason = "not supported, and [DEFAULT] reflink = always: no raw disk can be made"
        return error("reflink", reason, f"{advice}, or set reflink = auto")
    if copies:
        return warning("reflink", "not supported; each raw disk is a full copy, and has no snapshots", advice)
    return fine("reflink", "not supported; qcow2 disks do not need it")


def _judge_locks(found: FileSystem) -> Finding:
    if found.lock_failure is None:
        return fine("locks", "keep others out")
    advice = "use a file system with fcntl(2) locks; on NFS, version 4, or a running lockd"
    return error("locks", found.lock_failure, advice)


def _judge_space(found: FileSystem) -> Finding:
    message = f"{human_size(found.free)} of {human_size(found.size)} free"
    if not found.size:
        return fine("space", "the file system does not tell")
    if not found.free:
        return error("space", message, _FREE_SPACE)
    if found.free < _LITTLE_SPACE or found.free < found.size * _LITTLE_SHARE:
        return warning("space", message, _FREE_SPACE)
    return fine("space", message)


def _judge_files(found: FileSystem) -> Finding:
    if not found.files:
        return fine("inodes", "not limited")
    message = f"{found.free_files} of {found.files} free"
    advice = "remove files, or make the file system anew with more inodes"
    if not found.free_files:
        return error("inodes", message, advice)
    if found.free_files < found.files * _LITTLE_SHARE:
        return warning("inodes", message, advice)
    return fine("inodes", message)


def _try(is_supported: Callable[[str], bool], folder: str) -> bool | None:
    try:
        return is_supported(folder)
    except exceptions.InsufficientSpace:
        return None


def _try_lock(folder: str) -> str | None:
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            path = f"{scratch}/lock"
            with locks.hold(path, timeout=0):
                try:
                    with locks.hold(path, timeout=0):
                        return "a lock that is held does not keep another holder out"
                except exceptions.LockTimeout:
                    return None
    except OSError as failure:
        return f"a lock cannot be taken: {failure.strerror or failure}"
    except exceptions.ImageBackendError as failure:
        return f"a lock cannot be taken: {failure}"
