# SPDX-License-Identifier: Apache-2.0
"""What of a file's storage is shared with other files: its extents, as the file system tells them (FIEMAP)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from imagebackend import exceptions

__all__ = ["shared_size"]

# linux/fs.h and linux/fiemap.h: _IOWR('f', 11, struct fiemap).
_FS_IOC_FIEMAP = 0xC020660B
# struct fiemap: fm_start, fm_length, fm_flags, fm_mapped_extents, fm_extent_count, fm_reserved.
_HEAD = struct.Struct("=QQLLLL")
# struct fiemap_extent: fe_logical, fe_physical, fe_length, two reserved, fe_flags, three reserved.
_EXTENT = struct.Struct("=QQQQQLLLL")
_LAST, _SHARED = 0x1, 0x2000
_AT_A_TIME = 512
_END = (1 << 64) - 1
# File systems without it, such as tmpfs and NFS.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL)


def shared_size(path: str) -> int:
    """Return how many bytes of a file's storage other files share; 0 where the file system does not tell.

    :raises NotFound, PermissionDenied, StorageError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return _shared_size(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return 0
        raise exceptions.storage_error(error, path) from error


def _shared_size(descriptor: int) -> int:
    start = shared = 0
    while True:
        request = bytearray(_HEAD.size + _AT_A_TIME * _EXTENT.size)
        _HEAD.pack_into(request, 0, start, _END - start, 0, 0, _AT_A_TIME, 0)
        fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, request)
        mapped = _HEAD.unpack_from(request)[3]
        flags = _LAST
        for number in range(mapped):
            logical, _, length, _, _, flags, *_ = _EXTENT.unpack_from(request, _HEAD.size + number * _EXTENT.size)
            shared += length if flags & _SHARED else 0
            start = logical + length
        if not mapped or flags & _LAST:
            return shared
