# SPDX-License-Identifier: Apache-2.0
"""The only module that takes a lock.

A lock is a byte range of a file, locked by the open file description (``F_OFD_SETLK``, fcntl(2)): one mechanism
for threads, processes and hosts that share the folder, released by the kernel when its holder dies. It excludes
the POSIX locks that oslo.concurrency takes on the same file, and those of Nova with it, but unlike them it can be
shared, has a deadline, and is not dropped when another thread closes the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator

from imagebackend import exceptions

__all__ = ["disk_lock", "folder", "hold", "is_held", "is_range_locked", "lock_range"]

# struct flock: l_type, l_whence, l_start, l_len, l_pid (which must be 0 for an open file description lock).
_FLOCK = struct.Struct("hhqqi4x")
_CONFLICT = (errno.EAGAIN, errno.EACCES)
_FIRST_DELAY, _LAST_DELAY = 0.001, 0.1


def folder(instances: str) -> str:
    """Return the folder of the lock files, by ``[DEFAULT] instances_path``, absolute."""
    return f"{instances}/locks"


def disk_lock(folder: str, instance: str, disk: str) -> str:
    """Return the lock file of the lock under which a disk is made and changed, whatever it is stored in.

    :param folder: as :func:`folder` returns it.
    """
    return f"{folder}/disk-{instance}_{disk}"


@contextlib.contextmanager
def hold(path: str, *, timeout: float, shared: bool = False, transient: bool = False) -> Iterator[None]:
    """Hold the lock ``path`` in the block.

    :param path: the lock file; it and its folder are made if absent.
    :param timeout: seconds to wait at most.
    :param shared: let other shared holders in, keep exclusive ones out.
    :param transient: remove the lock file at the end, so that such files do not pile up; exclusive locks only.
    :raises LockTimeout: someone else held it all that time.
    :raises PermissionDenied, InsufficientSpace, StorageError: the lock file cannot be made, or not be locked.
    """
    try:
        descriptor = _acquire(path, timeout, shared)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    try:
        yield
    finally:
        if transient:
            # One that stays is harmless, since the kernel's lock decides.
            with contextlib.suppress(OSError):
                os.unlink(path)
        else:
            # A process that was forked meanwhile has the descriptor too, so that closing it here does not unlock.
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
        os.close(descriptor)


def is_held(path: str) -> bool:
    """Return whether anybody holds the lock ``path``, in whatever way.

    :raises PermissionDenied, StorageError: it cannot be known.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return is_range_locked(descriptor, 0, 0)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def lock_range(descriptor: int, start: int, length: int, *, shared: bool) -> bool:
    """Lock bytes of an open file at once, or return False; closing the descriptor unlocks them."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in _CONFLICT:
            return False
        raise
    return True


def is_range_locked(descriptor: int, start: int, length: int) -> bool:
    """Return whether anybody else holds a lock on bytes of an open file."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _acquire(path: str, timeout: float, shared: bool) -> int:
    deadline = time.monotonic() + timeout
    delay = _FIRST_DELAY
    while True:
        descriptor = _open(path)
        try:
            # A transient lock's file may have been removed, and made anew, between open and lock.
            while lock_range(descriptor, 0, 0, shared=shared):
                if _is_still(path, descriptor):
                    held, descriptor = descriptor, -1
                    return held
                os.close(descriptor)
                descriptor = _open(path)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if time.monotonic() >= deadline:
            raise exceptions.LockTimeout(path, timeout)
        time.sleep(delay)
        delay = min(delay * 2, _LAST_DELAY)


def _open(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        return os.open(path, flags, 0o644)


def _is_still(path: str, descriptor: int) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
