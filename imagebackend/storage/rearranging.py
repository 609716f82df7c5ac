# SPDX-License-Identifier: Apache-2.0
"""Moving the data of a file without copying them: ranges are cut out of it and holes put in (fallocate(2)).

ext4, XFS and f2fs can. What is moved are the numbers in a table of extents, so that gigabytes take milliseconds.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import reflink
from imagebackend.storage.qcow2 import Run

__all__ = ["is_supported", "rearrange"]

# linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE, _COLLAPSE_RANGE, _INSERT_RANGE = 1, 2, 8, 32
# "Not supported here": EINVAL stands for file systems that allocate in larger units.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def is_supported(folder: str, unit: int) -> bool:
    """Return whether data in files of a folder can be moved by multiples of ``unit``; an unnamed file there tells.

    :raises InsufficientSpace, PermissionDenied, StorageError: nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.ftruncate(file.fileno(), 4 * unit)
            try:
                _fallocate(file.fileno(), _COLLAPSE_RANGE, 0, unit)
                _fallocate(file.fileno(), _INSERT_RANGE, 0, unit)
            except OSError as error:
                if error.errno in _NOT_SUPPORTED:
                    return False
                raise
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error
    return True


def rearrange(descriptor: int, runs: Sequence[Run], size: int) -> None:
    """Put the data of a file from where they are to where they should be, with holes between them.

    What is not part of a run is dropped. What was written reaches the storage on the way, but is not durable: the
    caller owes an fdatasync.

    :param descriptor: of a regular file, open for reading and writing, whose file system can; what it holds after an
        error is of no use.
    :param runs: in the order in which they are in the file, which is also that in which they should be. Offsets are
        multiples of a unit that :func:`is_supported` accepts, and so are all lengths but the last.
    :param size: what the file should have, no less than the end of the last run.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    # Up to ``done`` the file is as it should be; from there on it is what it was from ``rest`` on.
    done = rest = 0
    try:
        for run in runs:
            dropped, hole = run.host_offset - rest, run.guest_offset - done
            if both := min(dropped, hole):
                _fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, done, both)
            if dropped > hole:
                _fallocate(descriptor, _COLLAPSE_RANGE, done + both, dropped - hole)
            elif hole > dropped:
                _fallocate(descriptor, _INSERT_RANGE, done + both, hole - dropped)
            done, rest = run.guest_offset + run.length, run.host_offset + run.length
        os.ftruncate(descriptor, done)
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(descriptor)) from error


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    # os.posix_fallocate knows no modes.
    if _function()(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@functools.cache
def _function() -> Any:
    function = ctypes.CDLL(None, use_errno=True).fallocate64
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function
