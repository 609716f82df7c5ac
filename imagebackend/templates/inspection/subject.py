# SPDX-License-Identifier: Apache-2.0
"""The file under inspection, read within bounds, and what is said of it in the end."""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from imagebackend import exceptions
from imagebackend.names import SECTOR

__all__ = ["BLOCK", "Subject", "Verdict", "round_up", "upper_bound"]

#: The block in which file systems allocate.
BLOCK = 4096

#: The largest table of any format read here is the grain tables of a 2 TiB VMDK, 128 MiB.
_READ_LIMIT = 160 << 20
_PIECE = 1 << 20
_MAX_VIRTUAL_SIZE = 1 << 62


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an acceptable image is.

    :ivar format: by qemu-img's name: ``raw``, ``qcow2``, ``vmdk``, ``vpc``, ``vhdx``, ``vdi`` or ``parallels``,
        which is ploop's.
    :ivar virtual_size: the size of the disk in bytes, as qemu-img sees it.
    :ivar allocated_size: an upper bound of the bytes that it occupies once converted to raw.
    :ivar notes: what else was seen, for people: ``gpt``, ``mbr``, ``iso9660``, ``zstd``, ``snapshots`` …
    """

    format: str
    virtual_size: int
    allocated_size: int
    notes: tuple[str, ...] = ()


def round_up(size: int, step: int) -> int:
    """Return the smallest multiple of ``step`` that is not below ``size``."""
    return -(-size // step) * step


def upper_bound(data: int, virtual_size: int) -> int:
    """Return how many bytes a disk occupies at most as a raw file that QEMU writes.

    :param data: bytes of its clusters, grains or blocks that are allocated, of which none is below a :data:`BLOCK`.
    """
    # QEMU always allocates the first block of a raw file that it makes, to find out what direct I/O needs.
    return min(data + BLOCK, round_up(virtual_size, BLOCK))


class Subject:
    """A regular file that is open for reading, of which at most 160 MiB are read.

    :param name: what to call the image in errors.
    :raises ImageUnacceptable: not a regular file.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        self.name = name
        self._left = _READ_LIMIT
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise self.refusal("not a regular file")
        self.size = found.st_size

    def refusal(self, reason: str) -> exceptions.ImageUnacceptable:
        """Return the error to raise."""
        return exceptions.ImageUnacceptable(self.name, reason)

    def read_up_to(self, offset: int, length: int) -> bytes:
        """Return the bytes at ``offset``, fewer where the file ends.

        :raises ImageUnacceptable: more was read of this image than any good one needs.
        :raises StorageError: the file cannot be read.
        """
        length = max(0, min(length, self.size - offset))
        self._left -= length
        if self._left < 0:
            raise self.refusal(f"its tables take more than {_READ_LIMIT} bytes")
        try:
            return os.pread(self.descriptor, length, offset) if length else b""
        except OSError as error:
            raise exceptions.storage_error(error, self.name) from error

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Return the bytes at ``offset``.

        :param what: what they are, for the error.
        :raises ImageUnacceptable: the file ends before them.
        """
        self.check_inside(offset, length, what)
        found = self.read_up_to(offset, length)
        if len(found) < length:
            raise self.refusal(f"it was cut while its {what} was read")
        return found

    def check_inside(self, offset: int, length: int, what: str) -> None:
        """Refuse a place that is not in the file.

        :raises ImageUnacceptable: it begins or ends elsewhere.
        """
        if offset < 0 or offset + length > self.size:
            raise self.refusal(f"its {what} ({length} bytes at {offset}) is not in the file of {self.size} bytes")

    def check_virtual_size(self, virtual_size: int) -> None:
        """Refuse a size that no disk can have.

        :raises ImageUnacceptable: 0, not a multiple of 512, or beyond what QEMU addresses.
        """
        if not 0 < virtual_size <= _MAX_VIRTUAL_SIZE or virtual_size % SECTOR:
            raise self.refusal(f"a virtual size of {virtual_size} bytes is not possible")

    def entries(
        self, offset: int, count: int, code: Literal["I", "Q"], order: Literal["little", "big"], what: str
    ) -> Iterator[tuple[int, array[int]]]:
        """Yield a table of integers, a megabyte at a time, each piece with the index of its first entry.

        :param code: ``I`` for 32 bits, ``Q`` for 64.
        :raises ImageUnacceptable: the table is not in the file.
        """
        size = array(code).itemsize
        self.check_inside(offset, count * size, what)
        step = _PIECE // size
        for first in range(0, count, step):
            piece = array(code, self.read(offset + first * size, min(step, count - first) * size, what))
            if sys.byteorder != order:
                piece.byteswap()
            yield first, piece
