# SPDX-License-Identifier: Apache-2.0
"""Trees of files: the root file systems of containers, unpacked from archives and measured. No name is trusted.

What lies in a tree is never followed: each folder is opened from the one above it, without links.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imagebackend import exceptions

__all__ = ["Measured", "extract", "measure"]

Progress = Callable[[int, int], None]

_BLOCK = 4096
_PIECE = 1 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What sparse files may expand to: all else is as large as the archive at most.
_MOST_SPARSE = 64 << 30
_XATTR = "SCHILY.xattr."
_KEPT_XATTRS = ("security.capability", "user.")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a tree takes.

    :ivar files: how many files, links and folders are in it, itself included.
    :ivar size: of their data, in bytes, each rounded up to whole blocks of 4 KiB.
    :ivar full_size: the same, if all holes were filled.
    :ivar largest: what the largest file has of that.
    """

    files: int
    size: int
    full_size: int
    largest: int


def measure(folder: str, name: str) -> Measured:
    """Look through a tree, and return what it takes.

    :param name: what to call it in errors.
    :raises ImageUnacceptable: there is a device, a FIFO, a socket, or another file system in it.
    :raises StorageError: it cannot be read.
    """
    seen: set[int] = set()
    size = full_size = largest = 0

    def refused(path: str, what: str) -> exceptions.ImageUnacceptable:
        return exceptions.ImageUnacceptable(name, f"{os.path.relpath(path, folder)!r:.300} is {what}")

    try:
        device = os.lstat(folder).st_dev
        for path, folders, files, descriptor in os.fwalk(folder, follow_symlinks=False, onerror=_fail):
            size += _BLOCK
            full_size += _BLOCK
            for entry in (*folders, *files):
                found = os.stat(entry, dir_fd=descriptor, follow_symlinks=False)
                if found.st_dev != device:
                    raise refused(f"{path}/{entry}", "another file system or subvolume: leave it out")
                if what := _special(found.st_mode):
                    raise refused(f"{path}/{entry}", what)
                if found.st_ino not in seen:
                    seen.add(found.st_ino)
                    length = found.st_size if stat.S_ISREG(found.st_mode) else 0
                    size += -(-min(length, found.st_blocks * 512) // _BLOCK) * _BLOCK
                    full = -(-length // _BLOCK) * _BLOCK
                    full_size += full
                    largest = max(largest, full)
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error
    return Measured(len(seen) + 1, size, full_size, largest)


def extract(archive: int, folder: str, name: str, *, progress: Progress | None = None) -> None:
    """Unpack a tar archive into an empty folder, with owners, modes, times, links, and capabilities.

    :param archive: open for reading; plain, not compressed.
    :param folder: nobody else writes to it meanwhile.
    :param name: what to call the archive in errors.
    :param progress: called with the bytes of the archive that are done, and in all.
    :raises ImageUnacceptable: it is no such archive, is damaged, or has a member whose name leads out of the folder
        or through a link, that is a device or a FIFO, or that is there twice.
    :raises InsufficientSpace, PermissionDenied, StorageError: as the operating system says.
    """
    reader = _Reader(archive)
    try:
        with (
            _Writer(folder, name) as writer,
            tarfile.open(fileobj=reader, mode="r:", encoding="utf-8") as tar,  # type: ignore[call-overload]
        ):
            _extract_all(tar, writer, reader.size, progress)
            # tarfile takes a header that it cannot read for the end.
            reader.seek(tar.offset)
            if reader.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is cut off, or damaged, at {tar.offset}")
    except tarfile.TarError as error:
        raise exceptions.ImageUnacceptable(name, f"it is not a whole tar archive: {error}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise exceptions.ImageUnacceptable(name, f"a member of it cannot be understood: {error}") from error
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error


def _extract_all(tar: tarfile.TarFile, writer: _Writer, size: int, progress: Progress | None) -> None:
    end = -1
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
        if member.size < 0 or member.offset <= end:
            raise tarfile.ReadError("its members do not follow each other")
        end = member.offset
        writer.add(tar, member)
        if progress is not None:
            progress(min(end, size), size)
    if progress is not None:
        progress(size, size)


class _Reader:
    """The archive, of which tarfile reads no more at once than it has to, whatever a header makes it believe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0
        self.size = os.fstat(descriptor).st_size

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _PIECE:
            raise tarfile.ReadError(f"a header of {length} bytes")
        found = os.pread(self._descriptor, length, self._position) if length else b""
        self._position += len(found)
        return found

    def seek(self, position: int) -> None:
        if not 0 <= position < 1 << 62:
            raise tarfile.ReadError(f"a member at {position}")
        self._position = position

    def tell(self) -> int:
        return self._position


class _Writer:
    """The folder that is filled."""

    def __init__(self, folder: str, name: str) -> None:
        self._root = os.open(folder, _FOLDER)
        self._name = name
        self._sparse = 0
        #: Modes and times of folders, which are set when nothing is put into them any more.
        self._folders: dict[tuple[str, ...], tarfile.TarInfo] = {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                for parts, member in self._folders.items():
                    with self._opened(member, parts) as descriptor:
                        _apply(descriptor, member)
        finally:
            os.close(self._root)

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = self._parts(member, member.name)
        if member.isdir():
            with self._opened(member, parts):
                self._folders[parts] = member
            return
        if not parts:
            raise self._refusal(member, "the root itself, and no folder")
        with self._opened(member, parts[:-1]) as folder:
            try:
                self._make(tar, member, parts[-1], folder)
            except FileExistsError:
                raise self._refusal(member, "there twice") from None

    def _make(self, tar: tarfile.TarFile, member: tarfile.TarInfo, entry: str, folder: int) -> None:
        if member.issym():
            os.symlink(member.linkname, entry, dir_fd=folder)
            os.chown(entry, member.uid, member.gid, dir_fd=folder, follow_symlinks=False)
        elif member.islnk():
            self._link(member, entry, folder)
        elif member.isreg():
            self._fill(tar, member, entry, folder)
        else:
            what = "a device" if member.isdev() and not member.isfifo() else "a FIFO or something else"
            reason = f"{what}, which an image of a container has no use for: leave it out, as all of /dev"
            raise self._refusal(member, reason)

    def _link(self, member: tarfile.TarInfo, entry: str, folder: int) -> None:
        *above, linked = self._parts(member, member.linkname) or ("",)
        with self._opened(member, tuple(above)) as other:
            try:
                is_file = stat.S_ISREG(os.stat(linked, dir_fd=other, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                is_file = False
            if not is_file:
                raise self._refusal(member, f"a link to {member.linkname!r:.200}, which is no file before it")
            os.link(linked, entry, src_dir_fd=other, dst_dir_fd=folder, follow_symlinks=False)

    def _fill(self, tar: tarfile.TarFile, member: tarfile.TarInfo, entry: str, folder: int) -> None:
        if member.issparse():
            self._sparse += member.size
            if self._sparse > _MOST_SPARSE:
                raise self._refusal(member, f"sparse, and with the others would have more than {_MOST_SPARSE} bytes")
        source = tar.extractfile(member)
        assert source is not None
        descriptor = os.open(entry, _NEW, 0o600, dir_fd=folder)
        try:
            left = member.size
            while left:
                piece = source.read(min(left, _PIECE))
                if not piece:
                    raise tarfile.ReadError("unexpected end of data")
                if piece.count(0) == len(piece):
                    os.lseek(descriptor, len(piece), os.SEEK_CUR)
                else:
                    _write(descriptor, piece)
                left -= len(piece)
            os.ftruncate(descriptor, member.size)
            _apply(descriptor, member)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _opened(self, member: tarfile.TarInfo, parts: tuple[str, ...]) -> Iterator[int]:
        """Give a folder, open, and made if it is not there; no link leads to it."""
        descriptor = os.dup(self._root)
        try:
            for part in parts:
                try:
                    below = _open_or_make(part, descriptor)
                except (NotADirectoryError, FileExistsError):
                    raise self._refusal(member, f"below {part!r:.200}, which is no folder") from None
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def _parts(self, member: tarfile.TarInfo, path: str) -> tuple[str, ...]:
        if path.startswith("/"):
            raise self._refusal(member, f"named by the absolute path {path!r:.200}")
        parts = tuple(part for part in path.split("/") if part not in ("", "."))
        if ".." in parts or "\0" in path:
            raise self._refusal(member, f"named by {path!r:.200}, which may lead out of the tree")
        return parts

    def _refusal(self, member: tarfile.TarInfo, reason: str) -> exceptions.ImageUnacceptable:
        return exceptions.ImageUnacceptable(self._name, f"its member {member.name!r:.200} is {reason}")


def _open_or_make(part: str, above: int) -> int:
    try:
        return os.open(part, _FOLDER, dir_fd=above)
    except FileNotFoundError:
        os.mkdir(part, 0o755, dir_fd=above)
        return os.open(part, _FOLDER, dir_fd=above)


def _apply(descriptor: int, member: tarfile.TarInfo) -> None:
    os.fchown(descriptor, member.uid, member.gid)
    os.fchmod(descriptor, member.mode & 0o7777)  # after the owner, whose change takes setuid away
    for key, value in member.pax_headers.items():
        attribute = key.removeprefix(_XATTR)
        if attribute != key and attribute.startswith(_KEPT_XATTRS):
            os.setxattr(descriptor, attribute, value.encode(errors="surrogateescape"))
    os.utime(descriptor, (member.mtime, member.mtime))


def _write(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _special(mode: int) -> str:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
        return ""
    return "a device, a FIFO or a socket, which an image of a container has no use for: leave it out"


def _fail(error: OSError) -> None:
    raise error
