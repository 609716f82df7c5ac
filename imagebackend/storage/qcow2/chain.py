# SPDX-License-Identifier: Apache-2.0
"""The chain of files under a qcow2 image, by what the headers record and nothing else."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from imagebackend import exceptions
from imagebackend.names import SECTOR
from imagebackend.storage.qcow2.header import read_header

__all__ = ["BackingFile", "backing_chain"]

_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class BackingFile:
    """One file of a chain.

    :ivar path: as QEMU would open it: relative names are resolved against the file that names them.
    :ivar format: ``qcow2`` or ``raw``, as recorded above it.
    :ivar virtual_size: bytes.
    """

    path: str
    format: str
    virtual_size: int


def backing_chain(path: str, *, limit: int = _MAX_DEPTH) -> list[BackingFile]:
    """Return a qcow2 image and the files under it, the image itself first.

    No file is probed: a format that the header above does not record is an error, not a guess.

    :param path: a qcow2 image.
    :param limit: how many files a chain may have.
    :raises NotFound: a file of the chain does not exist.
    :raises ImageUnacceptable: a header breaks the format's rules, records no format or one that is neither raw nor
        qcow2, or names no local file; the chain returns to a file, or is longer than ``limit``.
    :raises StorageError: a file cannot be opened or read.
    """
    chain: list[BackingFile] = []
    seen: set[tuple[int, int]] = set()
    next_path: str | None = path
    image_format = "qcow2"
    while next_path is not None:
        if len(chain) == limit:
            raise exceptions.ImageUnacceptable(path, f"its backing chain has more than {limit} files")
        current = next_path
        descriptor = _open(current)
        try:
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) in seen:
                raise exceptions.ImageUnacceptable(path, f"its backing chain returns to {current}")
            seen.add((found.st_dev, found.st_ino))
            if image_format == "raw":
                chain.append(BackingFile(current, "raw", _raw_size(descriptor, found)))
                return chain
            header = read_header(descriptor, current)
        finally:
            os.close(descriptor)
        chain.append(BackingFile(current, "qcow2", header.virtual_size))
        if header.backing_file is None:
            return chain
        next_path = _resolve(current, header.backing_file)
        image_format = _check_format(current, header.backing_format)
    return chain


def _resolve(path: str, backing_file: str) -> str:
    if ":" in backing_file.split("/", 1)[0] or "\x00" in backing_file:
        raise exceptions.ImageUnacceptable(path, f"its backing file {backing_file!r} is not a local file")
    return os.path.join(os.path.dirname(path), backing_file)


def _check_format(path: str, backing_format: str | None) -> str:
    if backing_format is None:
        raise exceptions.ImageUnacceptable(path, "it does not record the format of its backing file")
    if backing_format not in ("raw", "qcow2"):
        raise exceptions.ImageUnacceptable(path, f"its backing file is recorded as {backing_format!r}")
    return backing_format


def _open(path: str) -> int:
    try:
        # A FIFO that has no writer must not block the caller.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise exceptions.DiskNotFound(path) from error
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(descriptor)
        raise exceptions.ImageUnacceptable(path, "neither a regular file nor a block device")
    return descriptor


def _raw_size(descriptor: int, found: os.stat_result) -> int:
    size = os.lseek(descriptor, 0, os.SEEK_END) if stat.S_ISBLK(found.st_mode) else found.st_size
    # QEMU shows a raw file that ends within a sector as if the sector were whole.
    return -(-size // SECTOR) * SECTOR
