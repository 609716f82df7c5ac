# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole: filled under a temporary name, made durable, then renamed to their own.

The caller holds the lock under which the file is made, so that one maker at most uses its temporary name, and
whatever a killed one left there may be thrown away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator

from imagebackend import exceptions, faults

__all__ = [
    "close_quietly",
    "commit",
    "create",
    "list_folder",
    "new_file",
    "new_folder",
    "new_scratch",
    "opened",
    "opened_new",
    "partial_path",
    "prepare_file",
    "publish_prepared",
    "read_file",
    "remove_file",
    "remove_folder",
    "remove_partial",
    "remove_quietly",
    "sync_folder",
    "write_file",
]


_ATTEMPTS = 10


def partial_path(path: str) -> str:
    """Return the temporary name of ``path``: in the same folder, and no name that a user can give."""
    folder, name = os.path.split(path)
    return f"{folder}/.{name}.partial"


@contextlib.contextmanager
def new_file(path: str, *, durable: bool, replace: bool = False) -> Iterator[tuple[int, str]]:
    """Give an empty file to fill in the block; at the end of the block it gets its name.

    On an exception the file is removed and nothing has changed. Its mode is 0600, that of folders that were made 0755.

    :param path: the final name, absolute.
    :param durable: the data reach stable storage before the name does, and the name before the block is left.
    :param replace: another file may have the name; otherwise the caller knows that none has.
    :returns: the open descriptor (read and write) and the temporary path, for tools that need one.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says. What the block raises
        propagates as it is.
    """
    partial = partial_path(path)
    with _created(partial) as descriptor, contextlib.ExitStack() as discard:
        discard.callback(remove_quietly, partial)
        yield descriptor, partial
        commit(descriptor, partial, path, durable=durable, replace=replace)
        discard.pop_all()


@contextlib.contextmanager
def opened_new(path: str) -> Iterator[int]:
    """Give a new file, open for reading and writing, in a folder that is still under its temporary name.

    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    with _created(path) as descriptor:
        yield descriptor
        try:
            _finish(descriptor, durable=False)
        except OSError as error:
            raise exceptions.storage_error(error, path) from error


@contextlib.contextmanager
def new_scratch(path: str) -> Iterator[int]:
    """Give an empty file, open for reading and writing, that is gone at the end of the block.

    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says; also if the file stays.
    """
    with _created(path) as descriptor, contextlib.ExitStack() as discard:
        discard.callback(remove_quietly, path)
        yield descriptor
        # As large as a disk's data: it must not stay without anybody being told.
        remove_file(path)
        discard.pop_all()


@contextlib.contextmanager
def new_folder(path: str, *, durable: bool) -> Iterator[str]:
    """Give an empty folder, of mode 0755, to fill in the block; at the end of the block it gets its name.

    :param path: the final name, absolute, which no other file or folder has.
    :param durable: what the block has put into the folder reaches stable storage before the name does, and the name
        before the block is left. The block syncs the files.
    :returns: the temporary path.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says. What the block raises
        propagates as it is.
    """
    partial = partial_path(path)
    remove_partial(path)
    try:
        _make_folder(partial)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    with contextlib.ExitStack() as discard:
        discard.callback(remove_quietly, partial)
        yield partial
        faults.point("publish.filled")
        if durable:
            sync_folder(partial)
        faults.point("publish.synced")
        try:
            os.rename(partial, path)
        except OSError as error:
            raise exceptions.storage_error(error, path) from error
        discard.pop_all()
    faults.point("publish.renamed")
    if durable:
        with contextlib.ExitStack() as undo:
            undo.callback(remove_quietly, path)
            sync_folder(os.path.dirname(path))
            undo.pop_all()


def commit(descriptor: int, partial: str, path: str, *, durable: bool, replace: bool = False) -> None:
    """Give a file that is complete its final name.

    :param descriptor: the file, open since before it was written.
    :param partial: its temporary name; whatever file has it now is meant, since tools may replace the file.
    :param durable, replace: as for :func:`new_file`.
    :raises InsufficientSpace, PermissionDenied, StorageError: it has not got the name; or it replaced another file,
        and may not keep the name through a power cut.
    """
    try:
        with contextlib.ExitStack() as stack:
            there = os.stat(partial, follow_symlinks=False)
            if there.st_ino != os.fstat(descriptor).st_ino:
                if not stat.S_ISREG(there.st_mode):
                    raise exceptions.StorageError(partial, "not a regular file")
                descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                stack.callback(close_quietly, descriptor)
            os.fchmod(descriptor, 0o600)
            faults.point("publish.filled")
            _finish(descriptor, durable)
            faults.point("publish.synced")
            os.rename(partial, path)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    faults.point("publish.renamed")
    if durable:
        with contextlib.ExitStack() as undo:
            if not replace:
                undo.callback(remove_quietly, path)
            sync_folder(os.path.dirname(path))
            undo.pop_all()


def write_file(path: str, content: bytes, *, durable: bool) -> None:
    """Replace a small file, of mode 0600, in one step, without syncing its folder: the caller does, once for all.

    :raises InsufficientSpace, PermissionDenied, StorageError: the old content, if any, is still there.
    """
    prepare_file(path, content, durable=durable)
    publish_prepared(path)


def prepare_file(path: str, content: bytes, *, durable: bool) -> None:
    """Do what :func:`write_file` does, but for the last step.

    :raises InsufficientSpace, PermissionDenied, StorageError: nothing has changed.
    """
    partial = partial_path(path)
    try:
        with contextlib.ExitStack() as undo:
            descriptor = create(partial)
            undo.callback(remove_quietly, partial)
            try:
                os.fchmod(descriptor, 0o600)
                left = memoryview(content)
                while left:
                    left = left[os.write(descriptor, left) :]
                faults.point("publish.filled")
                _finish(descriptor, durable)
            finally:
                close_quietly(descriptor)
            undo.pop_all()
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def publish_prepared(path: str) -> None:
    """Give a file of :func:`prepare_file` its name.

    :raises PermissionDenied, StorageError: it has not got it, and is gone.
    """
    partial = partial_path(path)
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(remove_quietly, partial)
            os.rename(partial, path)
            undo.pop_all()
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    faults.point("publish.renamed")


def read_file(path: str, largest: int) -> bytes | None:
    """Return the content of a small file, of which at most ``largest`` bytes are read, or None if it is not there.

    :raises PermissionDenied, StorageError: it cannot be read, or is a link.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return os.read(descriptor, largest)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


@contextlib.contextmanager
def opened(path: str, mode: int = os.O_RDONLY) -> Iterator[int]:
    """Give a file, open in a mode of open(2), whatever may be at its path.

    :raises PermissionDenied, StorageError: it cannot be opened, or is a link.
    """
    try:
        descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    try:
        yield descriptor
    finally:
        close_quietly(descriptor)


def list_folder(path: str) -> list[str]:
    """Return the names of what is in a folder, sorted; none if it is not there.

    :raises PermissionDenied, StorageError: it cannot be read.
    """
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def remove_file(path: str) -> bool:
    """Remove a file if it is there; return whether it was.

    :raises PermissionDenied, StorageError: it is still there.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    return True


def remove_folder(path: str) -> bool:
    """Remove a folder and what is in it if it is there, whole or, for whoever looks at its name, not at all.

    :returns: whether it was there.
    :raises PermissionDenied, StorageError: it is still there, or a part of it under its temporary name.
    """
    remove_partial(path)
    try:
        os.rename(path, partial_path(path))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    faults.point("publish.removed")
    remove_partial(path)
    return True


def remove_partial(path: str) -> None:
    """Remove what a killed maker, or remover, left of ``path`` under its temporary name.

    :raises PermissionDenied, StorageError: it is still there.
    """
    partial = partial_path(path)
    try:
        with contextlib.suppress(FileNotFoundError):
            _remove(partial)
    except OSError as error:
        raise exceptions.storage_error(error, partial) from error


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable.

    :raises StorageError: they may not be.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error


def create(partial: str) -> int:
    """Make an empty file of mode 0600 under a temporary name, in place of what a killed maker left; return it open.

    :raises OSError: as the operating system says.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(_ATTEMPTS):
        try:
            return os.open(partial, flags, 0o600)
        except FileExistsError:
            # Not truncated but replaced: a tool that the killed maker started may still be writing there.
            _remove(partial)
        except FileNotFoundError:
            # Perhaps not for the first time: whoever removes the last disk of an instance removes its folder.
            _make_folder(os.path.dirname(partial))
    return os.open(partial, flags, 0o600)


def remove_quietly(partial: str) -> None:
    """Remove a temporary file as an undo step: the error that led here matters more than what is left."""
    with contextlib.suppress(OSError):
        _remove(partial)


def close_quietly(descriptor: int) -> None:
    """Close a file that was synced or handed over before, or that is thrown away: an error says nothing new."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _finish(descriptor: int, durable: bool) -> None:
    """Learn what may have gone wrong with writing a file, while nothing has its name yet."""
    if durable:
        os.fdatasync(descriptor)
    else:
        # A network file system sends what was written when a descriptor is closed, any of them, and tells then.
        os.close(os.dup(descriptor))


@contextlib.contextmanager
def _created(path: str) -> Iterator[int]:
    try:
        descriptor = create(path)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    try:
        yield descriptor
    finally:
        close_quietly(descriptor)


def _remove(partial: str) -> None:
    try:
        os.unlink(partial)
    except IsADirectoryError:
        # What a caller's function made of the file that it was to fill.
        shutil.rmtree(partial)


def _make_folder(folder: str) -> None:
    # Mode 0755 whatever the umask: QEMU runs as a user of its own and has to reach the disks below.
    if not os.path.isdir(folder):
        _make_folder(os.path.dirname(folder))
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            os.chmod(folder, 0o755)  # noqa: S103  to be read and entered by everybody
