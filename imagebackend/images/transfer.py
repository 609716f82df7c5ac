# SPDX-License-Identifier: Apache-2.0
"""Whole disks in files: measured, grown, copied in and out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, locks, names
from imagebackend.images.base import Progress
from imagebackend.images.disk_file import DiskFile
from imagebackend.images.encryption import Encryption
from imagebackend.images.qcow2_options import creation_options
from imagebackend.storage import image_lock, luks, publish, qcow2, qemu_img, reflink, sparse_copy
from imagebackend.templates import inspection

__all__ = [
    "check_filled",
    "convert",
    "copy",
    "existing",
    "extract",
    "extract_target",
    "extracting",
    "import_file",
    "is_grown",
    "is_running",
    "open_file",
    "resize_running",
    "set_length",
    "set_size",
    "set_time",
    "shares_blocks",
    "sync",
    "virtual_size",
]

_EXTRACT_FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")


@contextlib.contextmanager
def open_file(path: str, *, writable: bool = False) -> Iterator[int]:
    """Give a file, open for reading, and for writing too if asked.

    :raises DiskNotFound: it is not there.
    :raises PermissionDenied, StorageError: it cannot be opened; or what was written to it may be lost.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise exceptions.DiskNotFound(path) from error
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    with contextlib.ExitStack() as undo:
        undo.callback(publish.close_quietly, descriptor)
        yield descriptor
        undo.pop_all()
    try:
        os.close(descriptor)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def virtual_size(path: str, disk_format: str) -> int:
    """Return the virtual size of a disk in bytes.

    :raises DiskNotFound: it is not there.
    :raises Unsupported: the format is none of raw, luks and qcow2.
    """
    with open_file(path) as descriptor:
        if disk_format == "qcow2":
            return qcow2.read_header(descriptor, path).virtual_size
        if disk_format in ("raw", "luks"):
            header = luks.header_size(descriptor, path) if disk_format == "luks" else 0
            return -(-os.fstat(descriptor).st_size // names.SECTOR) * names.SECTOR - header
    raise exceptions.Unsupported(f"a disk in {disk_format}", "files hold raw, luks or qcow2 disks")


def is_grown(path: str, current: int, size: int) -> bool:
    """Return whether a disk has the size already.

    :raises DiskTooSmall: it is larger.
    """
    if size < current:
        raise exceptions.DiskTooSmall(path, size, current, "the disk's size; disks are not shrunk")
    return size == current


def is_running(domain: Any) -> bool:
    """Return whether a domain runs.

    :param domain: a ``libvirt.virDomain``.
    :raises StorageError: libvirt does not tell.
    """
    import libvirt

    try:
        return bool(domain.isActive())
    except libvirt.libvirtError as error:
        raise exceptions.StorageError(domain.name(), f"libvirt does not tell whether it runs: {error}") from error


def resize_running(domain: Any, path: str, size: int) -> None:
    """Grow a disk through the running domain that has it, so that its guest sees the new size.

    :param domain: a ``libvirt.virDomain``.
    :raises StorageError: libvirt refused, for one because the domain does not have this disk.
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
    try:
        found = os.stat(path).st_size
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    if found != size:
        raise exceptions.StorageError(
            path, f"was {size} bytes, and {found} bytes after it was filled; fill it in place"
        )


def set_length(descriptor: int, size: int, path: str) -> None:
    """Make a file ``size`` bytes long.

    :raises InsufficientSpace, StorageError: it is not.
    """
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def set_size(conf: cfg.ConfigOpts, descriptor: int, size: int, path: str) -> None:
    """Make a raw disk ``size`` bytes long, with storage for all of it if ``preallocate_images`` says so.

    :raises InsufficientSpace, StorageError: it is as long as before.
    """
    if conf.preallocate_images == "space":
        sparse_copy.allocate(descriptor, size)
    else:
        set_length(descriptor, size, path)


def sync(descriptor: int, path: str) -> None:
    """Make what was written to a file durable.

    :raises StorageError: it may not be.
    """
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def copy(conf: cfg.ConfigOpts, source: int, target: int, *, progress: Progress | None, allocate: bool = True) -> None:
    """Copy a file, or share its blocks, as ``reflink`` and ``preallocate_images`` say.

    :param allocate: let ``preallocate_images`` have its say: it is for disks, not for their snapshots.
    :raises Unsupported: blocks must be shared, and cannot be here.
    """
    if conf.reflink == "never" or (allocate and conf.preallocate_images == "space"):
        sparse_copy.copy(source, target, progress=progress, share=False)
    elif conf.reflink == "auto":
        sparse_copy.copy(source, target, progress=progress)
    elif not reflink.clone_file(source, target):
        raise exceptions.Unsupported("[DEFAULT] reflink = always", "this file system does not share blocks")


def existing(folder: str) -> str:
    """Return a folder, or the nearest one above it that is there."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def shares_blocks(folder: str) -> bool:
    """Return whether files in a folder, which may be still to be made, can share blocks; False if nobody knows."""
    folder = existing(folder)
    try:
        # By device: another file system may have been mounted there.
        return _shares_blocks(folder, os.stat(folder).st_dev)
    except exceptions.StorageError:
        return False  # nothing can be written there now, not even to find out


@functools.lru_cache(maxsize=16)
def _shares_blocks(folder: str, device: int) -> bool:
    return reflink.is_supported(folder)


def set_time(descriptor: int, path: str) -> None:
    """Set a file's time of change to the nanosecond: snapshots are listed by it.

    The kernel's own may be the same for all that happens within 4 ms.
    """
    now = time.time_ns()
    try:
        os.utime(descriptor, ns=(now, now))
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def extract_target(conf: cfg.ConfigOpts, target: str, out_format: str | None, disk_format: str) -> tuple[str, str]:
    """Return path and format of a copy that is to be extracted.

    :raises InvalidArgument: such a format is not written, or the target is among disks and templates.
    :raises StorageError: there is no such folder.
    """
    out_format = out_format or conf.libvirt.snapshot_image_format or disk_format
    if out_format not in _EXTRACT_FORMATS:
        raise exceptions.InvalidArgument(f"format {out_format!r}: one of {', '.join(_EXTRACT_FORMATS)} is needed")
    return _extract_path(conf, target), out_format


def extract(disk: DiskFile, disk_format: str, target: str, out_format: str | None, progress: Progress | None) -> None:
    """Write a standalone copy of a disk, which the caller has locked, to ``target``.

    :raises InvalidArgument: such a format is not written, or the target is among disks and templates.
    :raises DiskInUse: a guest holds the disk.
    """
    target, out_format = extract_target(disk.conf, target, out_format, disk_format)
    with extracting(disk, disk.path, target) as (descriptor, partial):
        if disk_format == out_format == "raw":
            with open_file(disk.path) as source:
                sparse_copy.copy(source, descriptor, progress=progress)
        else:
            convert(
                disk,
                disk.path,
                disk_format,
                partial,
                out_format,
                compress=out_format == "qcow2" and disk.conf.libvirt.snapshot_compression,
                source_passphrase=disk.passphrase(),
                progress=progress,
            )


@contextlib.contextmanager
def extracting(disk: DiskFile, image: str, target: str) -> Iterator[tuple[int, str]]:
    """Give an empty file for a copy of a disk, to which nobody writes meanwhile; at the end it gets its name.

    :param image: the file that the disk's writers have open.
    :param target: from :func:`extract_target`.
    :returns: the open descriptor and the temporary path.
    :raises DiskInUse: a guest holds the disk.
    """
    lock = f"{disk.locks}/extract-{hashlib.sha256(os.fsencode(target)).hexdigest()[:32]}"
    with (
        locks.hold(lock, timeout=disk.conf.lock_timeout, transient=True),
        _kept_from_writers(disk, image),
        publish.new_file(target, durable=disk.conf.durable_writes, replace=True) as (descriptor, partial),
    ):
        yield descriptor, partial


def _extract_path(conf: cfg.ConfigOpts, target: str) -> str:
    snapshots = os.path.abspath(conf.libvirt.snapshots_directory)
    target = os.path.join(snapshots, target)
    folder = os.path.realpath(os.path.dirname(target))
    if folder == os.path.realpath(snapshots):
        os.makedirs(folder, mode=0o755, exist_ok=True)
    elif not os.path.isdir(folder):
        raise exceptions.StorageError(folder, "no such folder; make it first")
    elif f"{folder}/".startswith(f"{os.path.realpath(conf.instances_path)}/"):
        reason = f"disks and templates are kept there; choose a folder outside, or {snapshots}"
        raise exceptions.InvalidArgument(f"target {target}: {reason}")
    return f"{folder}/{os.path.basename(target)}"


@contextlib.contextmanager
def _kept_from_writers(disk: DiskFile, image: str) -> Iterator[None]:
    """Let nobody begin to write to the disk in the block; who only reads is welcome, ourselves among them."""
    disk.refuse_in_use()
    with image_lock.hold(image, shared=True):
        yield


def import_file(disk: DiskFile, default_format: str, local_file: str) -> None:
    """Make a local file the disk, which the caller has locked, replacing what is there in one step.

    :param default_format: the format that a disk of this kind has. One that is replaced keeps its own, so that record
        and disk agree at every moment.
    :raises ImageUnacceptable: the file must not be used.
    :raises DiskInUse: a guest holds the disk.
    """
    local_file = os.path.abspath(local_file)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_file(local_file))
        verdict = inspection.inspect(source, local_file)
        exists = disk.exists()
        if exists:
            disk.passphrase()
            disk.refuse_in_use()
            stack.enter_context(image_lock.hold(disk.path))
        disk_format = disk.resolve_format(default_format) if exists else default_format
        descriptor, partial = stack.enter_context(disk.create(disk_format, replace=exists))
        if disk_format == "raw" and verdict.format == "raw":
            copy(disk.conf, source, descriptor, progress=None)
            set_size(disk.conf, descriptor, os.fstat(source).st_size, partial)
        elif disk_format == "raw":
            convert(disk, local_file, verdict.format, partial, "raw")
            set_size(disk.conf, descriptor, verdict.virtual_size, partial)
        else:
            options = creation_options(disk.conf, backed=False) if disk_format == "qcow2" else None
            encryption = disk.encryption
            convert(disk, local_file, verdict.format, partial, disk_format, options=options, encryption=encryption)


def convert(
    disk: DiskFile,
    source: str,
    source_format: str,
    target: str,
    target_format: str,
    *,
    compress: bool = False,
    options: dict[str, str] | None = None,
    source_passphrase: str | None = None,
    encryption: Encryption | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert with qemu-img, and compare the result: a conversion can report success though its last writes failed.

    :param encryption: of the target.
    :param progress: called for the conversion, then for the comparison.
    """
    images, limits = (source, source_format, target, target_format), disk.tool_options()
    target_passphrase = encryption.passphrase if encryption else None
    qemu_img.convert(
        *images,
        options=options,
        compress=compress,
        source_passphrase=source_passphrase,
        target_passphrase=target_passphrase,
        iter_time=encryption.iter_time if encryption else None,
        progress=progress,
        **limits,
    )
    qemu_img.compare(
        *images,
        first_passphrase=source_passphrase,
        second_passphrase=target_passphrase,
        progress=progress,
        **limits,
    )
