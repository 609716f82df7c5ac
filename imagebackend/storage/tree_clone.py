# SPDX-License-Identifier: Apache-2.0
"""Clones of trees of files: a snapshot of a btrfs subvolume, or files that share their blocks, or a copy."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator

from imagebackend import exceptions
from imagebackend.storage import reflink, sparse_copy

__all__ = ["clone", "is_subvolume", "snapshot", "sync"]

Progress = Callable[[int, int], None]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOURCE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# linux/btrfs.h: _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2), which is fd, transid, flags, four unused, and a name;
# and _IOR(0x94, 25, __u64), which only btrfs answers.
_SNAP_CREATE_V2 = 0x50009417
_SUBVOL_GETFLAGS = 0x80089419
_VOL_ARGS_V2 = struct.Struct("=qQQ32x4040s")
#: The inode of every subvolume's own folder.
_ROOT_INODE = 256


def is_subvolume(folder: str) -> bool:
    """Return whether a folder is a subvolume of btrfs.

    :raises StorageError: it cannot be opened.
    """
    try:
        with _opened(folder) as descriptor:
            if os.fstat(descriptor).st_ino != _ROOT_INODE:
                return False
            fcntl.ioctl(descriptor, _SUBVOL_GETFLAGS, bytes(8))
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise exceptions.storage_error(error, folder) from error
    return True


def snapshot(subvolume: str, target: str) -> bool:
    """Make a snapshot that can be written to, in one step whatever the size; subvolumes below it are empty in it.

    :param target: the name that it gets; nothing has it.
    :returns: False where the target is on another file system.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    folder, name = os.path.split(target)
    try:
        with _opened(subvolume) as source, _opened(folder) as above:
            # Of bytes, ioctl takes no more than 1024.
            fcntl.ioctl(above, _SNAP_CREATE_V2, bytearray(_VOL_ARGS_V2.pack(source, 0, 0, os.fsencode(name))))
    except OSError as error:
        if error.errno == errno.EXDEV or (error.errno == errno.ENOTTY and not is_subvolume(folder)):
            return False
        raise exceptions.storage_error(error, target) from error
    return True


def clone(source: str, target: str, size: int, *, share: str, progress: Progress | None = None) -> None:
    """Fill an empty folder with what is in another one: owners, modes, times, links and extended attributes, too.

    :param source: nobody changes it meanwhile. Links in it are copied, never followed.
    :param target: nobody else writes to it.
    :param size: of what is in the source, in bytes, for the progress.
    :param share: whether files may share their blocks with those of the source: ``auto``, ``always``, ``never``.
    :param progress: called with the bytes done and in all.
    :raises Unsupported: they must, and cannot.
    :raises ImageUnacceptable: a device, a FIFO or a socket is in it.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    done = 0
    first: dict[int, str] = {}
    try:
        for path, folders, files, here in os.fwalk(source, follow_symlinks=False, onerror=_fail):
            below = os.path.normpath(os.path.join(target, os.path.relpath(path, source)))
            with _opened(below) as there:
                for entry in (*folders, *files):
                    found = os.stat(entry, dir_fd=here, follow_symlinks=False)
                    if found.st_ino in first:
                        os.link(first[found.st_ino], entry, dst_dir_fd=there, follow_symlinks=False)
                        continue
                    _clone_entry(entry, found, here, there, share)
                    if not stat.S_ISDIR(found.st_mode):
                        if found.st_nlink > 1:
                            first[found.st_ino] = f"{below}/{entry}"
                        done += found.st_size
                        if progress is not None:
                            progress(min(done, size), size)
                _apply(here, there)
    except OSError as error:
        raise exceptions.storage_error(error, target) from error
    if progress is not None:
        progress(size, size)


def sync(folder: str) -> None:
    """Bring what was written to a folder's file system to stable storage (syncfs(2)).

    :raises StorageError: it may not be there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with _opened(folder) as descriptor:
            if libc.syncfs(descriptor):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error


def _clone_entry(entry: str, found: os.stat_result, here: int, there: int, share: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        os.mkdir(entry, 0o700, dir_fd=there)
    elif stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(entry, dir_fd=here), entry, dir_fd=there)
        os.chown(entry, found.st_uid, found.st_gid, dir_fd=there, follow_symlinks=False)
        os.utime(entry, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=there, follow_symlinks=False)
    elif stat.S_ISREG(found.st_mode):
        _clone_file(entry, here, there, share)
    else:
        raise exceptions.ImageUnacceptable(
            f"{reflink.file_path(here)}/{entry}", "a device, a FIFO or a socket, which a container has no use for"
        )


def _clone_file(entry: str, here: int, there: int, share: str) -> None:
    source = os.open(entry, _SOURCE, dir_fd=here)
    try:
        target = os.open(entry, _NEW, 0o600, dir_fd=there)
        try:
            if share != "always":
                sparse_copy.copy(source, target, share=share == "auto")
            elif not reflink.clone_file(source, target):
                raise exceptions.Unsupported(
                    "[DEFAULT] reflink = always", f"{reflink.file_path(there)} does not share blocks with the source"
                )
            _apply(source, target)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _apply(source: int, target: int) -> None:
    """Give an open file or folder what another one has beside its content."""
    found = os.fstat(source)
    os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode))  # after the owner, whose change takes setuid away
    for name in os.listxattr(source):
        os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    descriptor = os.open(folder, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _fail(error: OSError) -> None:
    raise error
