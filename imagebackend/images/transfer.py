# SPDX-License-Identifier: Apache-2.0
"""Whole disks in files: measured, grown, copied in and out. What Raw and Qcow2 do alike."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.images.base import Progress
from imagebackend.images.disk_file import DiskFile
from imagebackend.storage import publish, qcow2, qemu_img, reflink, sparse_copy
from imagebackend.templates import inspection

__all__ = [
    "check_filled",
    "copy",
    "extract",
    "extract_target",
    "import_file",
    "is_grown",
    "open_file",
    "resize_running",
    "virtual_size",
]

_EXTRACT_FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")


@contextlib.contextmanager
def open_file(path: str, *, writable: bool = False) -> Iterator[int]:
    """Give a file, open for reading, and for writing too if asked.

    :raises DiskNotFound: it is not there.
    :raises PermissionDenied, StorageError: it cannot be opened.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise exceptions.DiskNotFound(path) from error
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def virtual_size(path: str, disk_format: str) -> int:
    """Return the virtual size of a disk in bytes.

    :raises DiskNotFound: it is not there.
    :raises Unsupported: the format is neither raw nor qcow2.
    """
    with open_file(path) as descriptor:
        if disk_format == "qcow2":
            return qcow2.read_header(descriptor, path).virtual_size
        if disk_format == "raw":
            return -(-os.fstat(descriptor).st_size // names.SECTOR) * names.SECTOR
    raise exceptions.Unsupported(f"a disk in {disk_format}", "files hold raw or qcow2 disks")


def is_grown(path: str, current: int, size: int) -> bool:
    """Return whether a disk has the size already.

    :raises DiskTooSmall: it is larger.
    """
    if size < current:
        raise exceptions.DiskTooSmall(path, size, current, "the disk's size; disks are not shrunk")
    return size == current


def resize_running(domain: Any, path: str, size: int) -> None:
    """Grow a disk through the running domain that has it, so that its guest sees the new size.

    :param domain: a ``libvirt.virDomain``.
    :raises StorageError: libvirt refused.
    """
    import libvirt

    try:
        domain.blockResize(path, size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    except libvirt.libvirtError as error:
        raise exceptions.StorageError(path, f"libvirt did not resize it: {error}") from error


def check_filled(path: str, size: int) -> None:
    """Make sure that whoever filled a raw disk in place left it the size that it had.

    :raises StorageError: it has not.
    """
    found = os.stat(path).st_size
    if found != size:
        raise exceptions.StorageError(
            path, f"was {size} bytes, and {found} bytes after it was filled; fill it in place"
        )


def copy(conf: cfg.ConfigOpts, source: int, target: int, *, share: bool, progress: Progress | None) -> None:
    """Copy a file, or share its blocks as ``[DEFAULT] reflink`` says.

    :param share: whether sharing is wanted at all.
    :raises Unsupported: blocks must be shared, and cannot be here.
    """
    if not share or conf.reflink == "never":
        sparse_copy.copy(source, target, progress=progress, share=False)
    elif conf.reflink == "auto":
        sparse_copy.copy(source, target, progress=progress)
    elif not reflink.clone_file(source, target):
        raise exceptions.Unsupported("[DEFAULT] reflink = always", "this file system does not share blocks")


def extract_target(conf: cfg.ConfigOpts, target: str, out_format: str | None, disk_format: str) -> tuple[str, str]:
    """Return path and format of a copy that is to be extracted.

    :raises InvalidArgument: such a format is not written.
    :raises StorageError: there is no such folder.
    """
    out_format = out_format or conf.libvirt.snapshot_image_format or disk_format
    if out_format not in _EXTRACT_FORMATS:
        raise exceptions.InvalidArgument(f"format {out_format!r}: one of {', '.join(_EXTRACT_FORMATS)} is needed")
    target = os.path.abspath(target)
    if not os.path.isdir(os.path.dirname(target)):
        raise exceptions.StorageError(os.path.dirname(target), "no such folder; make it first")
    return target, out_format


def extract(disk: DiskFile, disk_format: str, target: str, out_format: str | None, progress: Progress | None) -> None:
    """Write a standalone copy of a disk, which the caller has locked, to ``target``.

    :raises InvalidArgument: such a format is not written.
    :raises DiskInUse: a guest holds the disk.
    """
    target, out_format = extract_target(disk.conf, target, out_format, disk_format)
    disk.refuse_in_use()
    compress = out_format == "qcow2" and disk.conf.libvirt.snapshot_compression
    with publish.new_file(target, durable=disk.conf.durable_writes) as (descriptor, partial):
        if disk_format == out_format == "raw":
            with open_file(disk.path) as source:
                sparse_copy.copy(source, descriptor, progress=progress)
            return
        convert(disk, disk.path, disk_format, partial, out_format, compress=compress, progress=progress)


def import_file(disk: DiskFile, default_format: str, local_file: str, progress: Progress | None = None) -> None:
    """Make a local file the disk, replacing what is there in one step.

    :param default_format: the format that a disk of this kind has. One that is replaced keeps its own, so that record
        and disk agree at every moment.
    :raises ImageUnacceptable: the file must not be used.
    :raises DiskInUse: a guest holds the disk.
    """
    local_file = os.path.abspath(local_file)
    with disk.lock(), open_file(local_file) as source:
        if disk.exists():
            disk.refuse_in_use()
        verdict = inspection.inspect(source, local_file)
        disk_format = disk.resolve_format(default_format)
        with disk.create(disk_format) as (descriptor, partial):
            if verdict.format == disk_format:
                sparse_copy.copy(source, descriptor, progress=progress, share=disk.conf.reflink != "never")
            else:
                convert(disk, local_file, verdict.format, partial, disk_format, progress=progress)


def convert(
    disk: DiskFile,
    source: str,
    source_format: str,
    target: str,
    target_format: str,
    *,
    compress: bool = False,
    options: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert with qemu-img, and compare the result: a conversion can report success though its last writes failed."""
    limits = disk.tool_options()
    qemu_img.convert(
        source, source_format, target, target_format, options=options, compress=compress, progress=progress, **limits
    )
    qemu_img.compare(source, source_format, target, target_format, **limits)
