# SPDX-License-Identifier: Apache-2.0
"""Files that share their blocks until one is written to: XFS, btrfs, bcachefs, NFS 4.2 (ioctl_ficlonerange(2))."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile

from imagebackend import exceptions

__all__ = ["clone_file", "clone_range", "file_path", "is_supported"]

# linux/fs.h: _IOW(0x94, 9, int) and _IOW(0x94, 13, struct file_clone_range).
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
# struct file_clone_range: src_fd, src_offset, src_length, dest_offset.
_RANGE = struct.Struct("=qQQQ")

# "Not supported here", and nothing else: EOPNOTSUPP and ENOTTY say that a file system cannot do it, EXDEV that two
# are involved, EINVAL that these files or ranges cannot share (alignment, a btrfs file without copy-on-write, an XFS
# realtime file, no regular file). EBADF, EPERM and ETXTBSY are mistakes or protection, so they are errors.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL)


def clone_file(source: int, target: int) -> bool:
    """Let a file share all blocks of another, whatever their number, in one step.

    :param source: descriptor open for reading.
    :param target: descriptor of an empty file, open for writing; it gets the size of the source.
    :returns: False where these files cannot share blocks; the target is as before.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    return _clone(target, _FICLONE, source)


def clone_range(source: int, target: int, source_offset: int, length: int, target_offset: int) -> bool:
    """Let bytes of a file share the blocks of bytes of another file.

    :param source: descriptor open for reading.
    :param target: descriptor open for writing; it grows if needed.
    :param source_offset, length, target_offset: bytes, multiples of the file system's block size, except that the
        length may also reach the end of the source. The length is above 0.
    :returns: False where they cannot share blocks, also for want of alignment; the target is as before.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    return _clone(target, _FICLONERANGE, _RANGE.pack(source, source_offset, length, target_offset))


def is_supported(folder: str) -> bool:
    """Return whether files in a folder can share blocks; two unnamed files there tell.

    :raises InsufficientSpace, PermissionDenied, StorageError: nothing can be written there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as source, tempfile.TemporaryFile(dir=folder) as target:
            # An empty file is cloned by some file systems that share no blocks.
            os.write(source.fileno(), bytes(4096))
            return clone_file(source.fileno(), target.fileno())
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error


def file_path(descriptor: int) -> str:
    """Return the path by which the kernel knows an open file, for errors."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _clone(target: int, request: int, argument: int | bytes) -> bool:
    try:
        fcntl.ioctl(target, request, argument)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise exceptions.storage_error(error, file_path(target)) from error
    return True
