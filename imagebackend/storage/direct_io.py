# SPDX-License-Identifier: Apache-2.0
"""Input and output past the page cache: O_DIRECT (open(2))."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile

from imagebackend import exceptions

__all__ = ["is_supported", "reads"]

# The largest logical block of the disks that there are; memory from mmap(2) is aligned to a page, which is no smaller.
_BLOCK = 4096
# EINVAL is what file systems without O_DIRECT say, EOPNOTSUPP some network file systems.
_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)


def reads(path: str) -> bool:
    """Return whether a file can be read with O_DIRECT; reading its first block tells, and needs no room.

    :raises PermissionDenied, StorageError: it cannot be read at all.
    """
    try:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return False
            raise
        try:
            with mmap.mmap(-1, _BLOCK) as block:
                os.preadv(descriptor, [block], 0)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                return False
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    return True


def is_supported(folder: str) -> bool:
    """Return whether files in a folder can be written with O_DIRECT; writing 4096 bytes to an unnamed file tells.

    :raises InsufficientSpace, PermissionDenied, StorageError: nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file, mmap.mmap(-1, _BLOCK) as block:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            try:
                fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
                os.pwrite(file.fileno(), block, 0)
            except OSError as error:
                if error.errno in _NOT_SUPPORTED:
                    return False
                raise
            finally:
                # An overlay takes the flag, and then fails to close the file if what is below it does not.
                fcntl.fcntl(file, fcntl.F_SETFL, flags)
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error
    return True
