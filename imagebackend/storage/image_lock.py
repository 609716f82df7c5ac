# SPDX-License-Identifier: Apache-2.0
"""QEMU's locks on image files (QEMU's docs/system/qemu-block-drivers.rst.inc, block/file-posix.c).

A QEMU that has a file open holds a shared lock on byte 100 + N for each permission N that it uses, and on byte 200 + N
for each one that it allows to nobody else. Whoever opens the file locks its own bytes first and then looks for the
opposite ones of others. All locks belong to open file descriptions, so they end with their holder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imagebackend import exceptions, locks

__all__ = ["hold", "is_in_use"]

_USED, _NOT_ALLOWED = 100, 200
# QEMU's permissions (include/block/block-common.h): the numbers of their bits.
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3


def is_in_use(path: str) -> bool:
    """Return whether a process has an image open for writing: a guest, running or paused, or a tool.

    Readers do not count, so neither does a template that is the backing file of running guests.

    :param path: a file or block device.
    :raises DiskNotFound: it is not there.
    :raises PermissionDenied, StorageError: as the operating system says.
    """
    with _opened(path) as descriptor, _typed_errors(path):
        return locks.is_range_locked(descriptor, _USED + _WRITE, 1)


@contextlib.contextmanager
def hold(path: str, *, shared: bool = False) -> Iterator[None]:
    """Keep QEMU away from an image in the block, as a QEMU that had it open would.

    That goes for this process's own qemu-img, too: what is done in the block is done by other means. The locks are on
    the file, so that they do not protect one that takes its name.

    :param path: a file or block device.
    :param shared: hold it as a reader: others may read, none may write. Otherwise, as a writer: none may do either.
    :raises DiskInUse: somebody has it open in a way that excludes this one.
    :raises DiskNotFound: it is not there.
    :raises PermissionDenied, StorageError: as the operating system says.
    """
    with _opened(path) as descriptor:
        with _typed_errors(path):
            _lock(path, descriptor, (_CONSISTENT_READ,) if shared else (_CONSISTENT_READ, _WRITE, _RESIZE))
        yield


def _lock(path: str, descriptor: int, used: tuple[int, ...]) -> None:
    not_allowed = (_WRITE, _RESIZE)
    mine = [*(_USED + number for number in used), *(_NOT_ALLOWED + number for number in not_allowed)]
    theirs = [*(_NOT_ALLOWED + number for number in used), *(_USED + number for number in not_allowed)]
    # First locked, then looked: of two that come at once, at least one sees the other.
    if not all(locks.lock_range(descriptor, byte, 1, shared=True) for byte in mine):
        raise exceptions.DiskInUse(path, "another process has locked the whole file")
    if any(locks.is_range_locked(descriptor, byte, 1) for byte in theirs):
        raise exceptions.DiskInUse(path, "a running guest or a tool has it open; stop the guest first")


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    with _typed_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _typed_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise exceptions.DiskNotFound(path) from error
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
