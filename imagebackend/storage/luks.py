# SPDX-License-Identifier: Apache-2.0
"""The header of LUKS1, before the data of an encrypted raw disk (LUKS1 On-Disk Format Specification, 1.2.3).

A guest cannot write it: what it writes comes behind it.
"""

from __future__ import annotations

import os
import struct

from imagebackend import exceptions
from imagebackend.names import SECTOR

__all__ = ["header_size"]

_MAGIC = b"LUKS\xba\xbe"
# Magic, version, names of cipher, mode and hash, and where the data begin, in sectors.
_HEADER = struct.Struct(">6sH32s32s32sI")


def header_size(descriptor: int, name: str) -> int:
    """Return how many bytes of an open file are before the data.

    :param name: what to call the image in errors.
    :raises CorruptDisk: there is no header of LUKS1.
    :raises StorageError: the file cannot be read.
    """
    try:
        head = os.pread(descriptor, _HEADER.size, 0)
        length = os.fstat(descriptor).st_size
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    if len(head) == _HEADER.size:
        magic, version, *_, sectors = _HEADER.unpack(head)
        if magic == _MAGIC and version == 1 and 0 < sectors * SECTOR <= length:
            return int(sectors * SECTOR)
    raise exceptions.CorruptDisk(name, "it is recorded as encrypted, and does not begin with a header of LUKS1")
