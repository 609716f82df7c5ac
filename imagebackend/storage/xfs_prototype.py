# SPDX-License-Identifier: Apache-2.0
"""Trees of files as mkfs.xfs takes them, to fill an XFS without mounting it, and what xfs_db adds afterwards.

mkfs.xfs(8) reads a prototype: words between white space, without a way to quote any, or to say that two names are one
file, or that a file has attributes. It has no sticky bit either, and no times: xfs_db(8) sets those.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imagebackend import exceptions

__all__ = ["Prototype", "Script", "read"]

_BLOCK = 4096
_WHITE = frozenset(b" \t\n\v\f\r")
# mkfs.xfs reads each file into memory, in one piece.
_LARGEST = (1 << 31) - _BLOCK
# SELinux labels anew what a container has.
_ATTRIBUTES_LEFT = {"security.selinux"}
# Nanoseconds from the earliest time that XFS has ("bigtime"), 1901-12-13, to 1970.
_EPOCH = (1 << 31) * 10**9
_LATEST = (1 << 64) - 1
# What xfs_db answers to so many is well below what is taken from a tool.
_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Script:
    """Commands for xfs_db.

    :ivar content: they set what a prototype cannot say, and have xfs_db print how many blocks each file has.
    :ivar blocks: how many they must be, in that order.
    """

    content: bytes
    blocks: Sequence[int]

    def is_whole(self, said: str) -> bool:
        """Return whether each file has its blocks, by what xfs_db said.

        What mkfs.xfs finds no room for in one piece, it writes over what comes behind that piece.
        """
        found = [int(line.split()[-1]) for line in said.splitlines() if line.startswith("core.nblocks")]
        return len(found) == len(self.blocks) and all(map(int.__ge__, found, self.blocks))


@dataclass(frozen=True, slots=True)
class Prototype:
    """What a tree is to be made of.

    :ivar content: for mkfs.xfs.
    :ivar scripts: for xfs_db, one after the other.
    """

    content: bytes
    scripts: Sequence[Script]


def read(folder: str, seen_as: str, name: str) -> Prototype:
    """Look through a tree, which :func:`imagebackend.storage.tree.measure` has accepted.

    :param folder: nobody changes it meanwhile.
    :param seen_as: its path for mkfs.xfs, without white space.
    :param name: what to call it in errors.
    :raises Unsupported: there is something in it that mkfs.xfs cannot be told of.
    :raises StorageError: it cannot be read.
    """
    top = os.fsencode(folder)
    lines = [b"/", b"0 0"]
    entries = []
    try:
        for path, found in _walk(top):
            if found is None:
                lines.append(b"$")
                continue
            below = path[len(top) :]
            if reason := _obstacle(path, found):
                raise exceptions.Unsupported(
                    f"XFS made of {name}", f"{os.fsdecode(below)!r:.300} {reason}; make it ext4, which can hold it"
                )
            lines.append(_line(path, below, found, os.fsencode(seen_as) + below))
            entries.append((below or b"/", found))
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error
    parts = (entries[start : start + _AT_ONCE] for start in range(0, len(entries), _AT_ONCE))
    return Prototype(b"\n".join((*lines, b"")), [_script(part) for part in parts])


def _walk(folder: bytes) -> Iterator[tuple[bytes, os.stat_result | None]]:
    """Yield what is in a tree, itself first; None instead of its state at the end of each folder."""
    yield folder, os.lstat(folder)
    stack = [(folder, iter(sorted(os.listdir(folder))))]
    while stack:
        above, names = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
            yield above, None
            continue
        path = b"%b/%b" % (above, name)
        found = os.lstat(path)
        yield path, found
        if stat.S_ISDIR(found.st_mode):
            stack.append((path, iter(sorted(os.listdir(path)))))


def _obstacle(path: bytes, found: os.stat_result) -> str:
    """Return why a file cannot be in a prototype; empty if it can."""
    name = path.rpartition(b"/")[2]
    if not _WHITE.isdisjoint(name) or name.startswith(b":") or name == b"$":
        return "has a name that cannot be told: with white space, or ':' at its beginning, or '$'"
    if stat.S_ISLNK(found.st_mode):
        target = os.readlink(path)
        if not _WHITE.isdisjoint(target) or target.startswith(b":"):
            return "leads to a name that cannot be told: with white space, or ':' at its beginning"
    elif set(os.listxattr(path, follow_symlinks=False)) - _ATTRIBUTES_LEFT:
        return "has extended attributes, such as capabilities or an ACL"
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        return "has several names (hard links)"
    if stat.S_ISREG(found.st_mode) and found.st_size > _LARGEST:
        return f"has {found.st_size} bytes; {_LARGEST} is the limit"
    return ""


def _line(path: bytes, below: bytes, found: os.stat_result, source: bytes) -> bytes:
    mode = found.st_mode
    kind = "d" if stat.S_ISDIR(mode) else "l" if stat.S_ISLNK(mode) else "-"
    marks = f"{'u' if mode & stat.S_ISUID else '-'}{'g' if mode & stat.S_ISGID else '-'}"
    name = [path.rpartition(b"/")[2]] if below else []
    words = [*name, f"{kind}{marks}{mode & 0o777:03o} {found.st_uid} {found.st_gid}".encode()]
    if stat.S_ISLNK(mode):
        words.append(os.readlink(path))
    elif stat.S_ISREG(mode):
        words.append(source)
    return b" ".join(words)


def _script(entries: Sequence[tuple[bytes, os.stat_result]]) -> Script:
    lines, blocks = [], []
    for below, found in entries:
        lines += [b"path " + below, b"write core.mtime.sec %d" % min(max(found.st_mtime_ns + _EPOCH, 0), _LATEST)]
        if found.st_mode & stat.S_ISVTX:
            lines.append(b"write core.mode 0%o" % found.st_mode)
        if stat.S_ISREG(found.st_mode):
            lines.append(b"print core.nblocks")
            blocks.append(-(-found.st_size // _BLOCK))
    return Script(b"\n".join((*lines, b"")), blocks)
