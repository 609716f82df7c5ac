# SPDX-License-Identifier: Apache-2.0
"""File systems for ephemeral disks, and swap areas.

What a disk is formatted with is decided by :func:`filesystem_for`, in Nova's order, and carried out by
:func:`make_filesystem`. The name of the template that holds the result says both, so that disks of one size and
different content never share a template.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from imagebackend import exceptions, names, process
from imagebackend.storage import xfs_prototype
from imagebackend.storage.tree import Measured

__all__ = [
    "FILESYSTEMS",
    "ROOT_FILESYSTEMS",
    "Filesystem",
    "ephemeral_template_name",
    "filesystem_for",
    "make_filesystem",
    "make_root",
    "make_swap",
    "parse_commands",
    "root_size",
]

_KI, _MI = 1 << 10, 1 << 20
# What mke2fs gives ext4 by default: one inode of 256 bytes for each 16 KiB.
_BYTES_PER_INODE = 16 << 10
_INODE = 256
# Of mkfs.xfs: its log has at least 64 MiB, and up to 4 TiB there are four allocation groups.
_XFS_INODE, _XFS_LOG, _XFS_GROUPS = 512, 64 * _MI, 4


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What a disk is formatted with.

    :ivar name: one of :data:`FILESYSTEMS`, or ``mkfs-`` and a digest of ``command``.
    :ivar command: an operator's own command, with ``%(fs_label)s`` and ``%(target)s`` in it.
    """

    name: str
    command: str | None = None


@dataclass(frozen=True, slots=True)
class _Tool:
    # `smallest` is the size in bytes below which the tool fails, or leaves out a part such as the journal. A label
    # has at most `label_length` characters: mke2fs(8), mkfs.xfs(8), mkfs.fat(8), mkswap(8); for NTFS, Windows' limit.
    command: tuple[str, ...]
    label_option: str
    label_length: int
    smallest: int
    package: str


_TOOLS = {
    "ext2": _Tool(("mkfs.ext2", "-q", "-F"), "-L", 16, _MI, "e2fsprogs"),
    "ext3": _Tool(("mkfs.ext3", "-q", "-F"), "-L", 16, 2 * _MI, "e2fsprogs"),
    "ext4": _Tool(("mkfs.ext4", "-q", "-F"), "-L", 16, 2 * _MI, "e2fsprogs"),
    "xfs": _Tool(("mkfs.xfs", "-q", "-f"), "-L", 12, 300 * _MI, "xfsprogs"),
    "vfat": _Tool(("mkfs.vfat", "-I"), "-n", 11, _MI, "dosfstools"),
    "ntfs": _Tool(("mkfs.ntfs", "-q", "-f", "-F"), "-L", 32, 2 * _MI, "ntfs-3g"),
}
_SWAP = _Tool(("mkswap",), "-L", 15, 40 * _KI, "util-linux")

#: The file systems that can be made without an operator's own command.
FILESYSTEMS = tuple(_TOOLS)

#: Those that can be filled with a tree without being mounted.
ROOT_FILESYSTEMS = ("ext4", "xfs")

_BY_OS_TYPE = {"linux": "ext4", "windows": "ntfs"}
_FOR_OTHERS = "vfat"
_OPTION = "[DEFAULT] virt_mkfs"


def parse_commands(values: Sequence[str]) -> dict[str, str]:
    """Return the commands of the option ``[DEFAULT] virt_mkfs`` by type of operating system.

    :param values: ``os_type=command`` each; of two for one type the last one counts.
    :raises InvalidConfiguration: no such form, no words, unbalanced quotes, unknown placeholders, or no target.
    """
    commands = {}
    for value in values:
        os_type, _, command = value.partition("=")
        if not os_type.strip() or not command.strip():
            raise exceptions.InvalidConfiguration(_OPTION, f"{value!r} is not of the form os_type=command")
        if "/target" not in "".join(_words(command, "/target", "label")):
            raise exceptions.InvalidConfiguration(_OPTION, f"{value!r} does not name its %(target)s")
        commands[os_type.strip()] = command.strip()
    return commands


def filesystem_for(
    os_type: str | None,
    *,
    specified: str | None = None,
    default: str | None = None,
    commands: Mapping[str, str] | None = None,
) -> Filesystem:
    """Decide what a disk is formatted with.

    The order is: the operator's command for the type of operating system, that for ``default``, what was asked for,
    the operator's default, ext4 for Linux and ntfs for Windows, vfat for others.

    :param os_type: ``linux``, ``windows`` or another word, as the guest's image says; None: not known.
    :param specified: the file system that the user asked for.
    :param default: ``[DEFAULT] default_ephemeral_format``.
    :param commands: from :func:`parse_commands`.
    :raises InvalidArgument: ``specified`` is none of :data:`FILESYSTEMS`.
    :raises InvalidConfiguration: ``default`` is none of them.
    """
    commands = commands or {}
    command = commands.get(os_type or "default") or commands.get("default")
    if command:
        return Filesystem(f"mkfs-{hashlib.sha256(command.encode()).hexdigest()[:16]}", command)
    known = f"not among {', '.join(FILESYSTEMS)}"
    if specified:
        if specified not in _TOOLS:
            raise exceptions.InvalidArgument(f"file system {specified!r}: {known}")
        return Filesystem(specified)
    if default:
        if default not in _TOOLS:
            raise exceptions.InvalidConfiguration("[DEFAULT] default_ephemeral_format", f"{default!r} is {known}")
        return Filesystem(default)
    return Filesystem(_BY_OS_TYPE.get(os_type or "", _FOR_OTHERS))


def ephemeral_template_name(size: int, filesystem: Filesystem, label: str | None = None) -> str:
    """Return the name of the template from which such ephemeral disks are made: ``ephemeral_1073741824_ext4``.

    :param size: bytes.
    :param label: becomes a part of the name: the label is in the template, and so is the file system's UUID, which
        two XFS disks of one guest must not share.
    :raises InvalidName: the label is not safe, or too long together with the rest.
    """
    name = f"ephemeral_{size}_{filesystem.name}"
    return names.check_name("template", name if label is None else f"{name}_{label}")


def make_filesystem(target: str, filesystem: Filesystem, *, label: str | None = None, timeout: float) -> None:
    """Format a file or block device, all of it, whatever it holds.

    :param target: it has its final size.
    :param label: the label of the file system; letters, digits, ``.``, ``_`` and ``-``.
    :param timeout: seconds of wall clock.
    :raises InvalidName: the label is not safe, or too long for this file system.
    :raises DiskTooSmall: the target is too small for this file system.
    :raises InsufficientSpace: the host's file system is full. mkfs.vfat does not tell why it failed: ToolFailed.
    :raises ToolMissing, ToolTimeout, ToolFailed: as :func:`imagebackend.process.run` says.
    """
    if filesystem.command is None:
        _make(_TOOLS[filesystem.name], filesystem.name, target, label, timeout)
        return
    if label is not None:
        names.check_name("label", label)
    _run(_words(filesystem.command, os.path.abspath(target), label or ""), target, "", timeout)


def make_swap(target: str, *, label: str | None = None, timeout: float) -> None:
    """Make a file or block device, all of it, a swap area. Parameters and errors: :func:`make_filesystem`."""
    _make(_SWAP, "swap", target, label, timeout)


def root_size(tree: Measured, filesystem: str = "ext4") -> int:
    """Return a size, in bytes, for a disk whose file system holds a tree and has some room left."""
    needed = _required(tree, filesystem)
    return max(-(-(needed + needed // 4 + 32 * _MI) // _MI) * _MI, _TOOLS[filesystem].smallest)


def make_root(
    target: str,
    folder: str,
    tree: Measured,
    *,
    filesystem: str = "ext4",
    name: str,
    label: str | None = None,
    timeout: float,
    on_output: Callable[[str], None] | None = None,
) -> None:
    """Format a file, and put what is in a folder into it. Nothing is mounted.

    :param target: it has its final size.
    :param folder: nobody changes it meanwhile. Links in it are copied, never followed.
    :param tree: what the folder takes.
    :param filesystem: one of :data:`ROOT_FILESYSTEMS`.
    :param name: what to call the tree in errors.
    :param label, timeout: as in :func:`make_filesystem`.
    :param on_output: called at least every half second; an exception raised there ends it, and propagates.
    :raises DiskTooSmall: the tree does not fit.
    :raises Unsupported: there is something in it that XFS cannot be made with.
    :raises: as :func:`make_filesystem`.
    """
    size, required = _size(target), _required(tree, filesystem)
    too_small = exceptions.DiskTooSmall(target, size, required, "what the tree takes, and its file system beside it")
    if size < required:
        raise too_small
    try:
        if filesystem == "xfs":
            if not _make_xfs_root(target, folder, name, label, timeout, on_output):
                raise too_small
            return
        # As for the disk of a guest, however small it is: it may grow. More inodes if the files are many and small.
        options = ["-T", "default", "-b", "4096", "-E", "root_owner=0:0,nodiscard", "-d", os.path.abspath(folder)]
        if tree.files > size // _BYTES_PER_INODE // 2:
            options += ["-N", str(2 * tree.files)]
        _make(_with("ext4", options), "ext4", target, label, timeout, on_output)
    except exceptions.ToolFailed as error:
        if _is_full_inside(error):
            raise too_small from error
        raise


def _make_xfs_root(
    target: str, folder: str, name: str, label: str | None, timeout: float, on_output: Callable[[str], None] | None
) -> bool:
    """Do what :func:`make_root` does, with XFS; return whether all of the tree has found room."""
    with contextlib.ExitStack() as stack:
        tree = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, tree)
        # The folder's own path may have white space in it.
        prototype = xfs_prototype.read(folder, f"/proc/self/fd/{tree}", name)
        described = stack.enter_context(_in_memory(prototype.content))
        tool = _with("xfs", ["-p", f"/proc/self/fd/{described}"])
        _make(tool, "xfs", target, label, timeout, on_output, pass_fds=(tree, described))
    for script in prototype.scripts:
        # Of its standard input, it drops what is not ASCII.
        with _in_memory(script.content) as commands:
            command = ["xfs_db", "-x", "-f", "-c", f"source /proc/self/fd/{commands}", os.path.abspath(target)]
            said = _run(command, target, tool.package, timeout, on_output, pass_fds=(commands,)).stdout
        if not script.is_whole(said):
            return False
    return True


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """Give a file with a content, open for reading."""
    with os.fdopen(os.memfd_create("imagebackend"), "w+b") as file:
        file.write(content)
        file.flush()
        yield file.fileno()


def _with(filesystem: str, options: Sequence[str]) -> _Tool:
    tool = _TOOLS[filesystem]
    return replace(tool, command=(*tool.command, *options))


def _required(tree: Measured, filesystem: str) -> int:
    if filesystem == "xfs":
        # mkfs.xfs wants room for each file in one piece, within one of four groups.
        return tree.full_size + tree.files * _XFS_INODE + _XFS_LOG + _XFS_GROUPS * tree.largest
    return tree.size + tree.files * _INODE


def _make(
    tool: _Tool,
    name: str,
    target: str,
    label: str | None,
    timeout: float,
    on_output: Callable[[str], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> None:
    command = list(tool.command)
    if label is not None:
        names.check_name("label", label)
        if len(label) > tool.label_length:
            raise exceptions.InvalidName("label", label, f"{name} allows {tool.label_length} characters")
        command += [tool.label_option, label]
    size = _size(target)
    if size < tool.smallest:
        raise exceptions.DiskTooSmall(target, size, tool.smallest, f"this is the least for {name}")
    _run([*command, os.path.abspath(target)], target, tool.package, timeout, on_output, pass_fds)


def _run(
    command: list[str],
    target: str,
    package: str,
    timeout: float,
    on_output: Callable[[str], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> process.Result:
    try:
        return process.run(command, timeout=timeout, package=package, on_output=on_output, pass_fds=pass_fds)
    except exceptions.ToolFailed as error:
        if "No space left on device" in error.stderr and not _is_full_inside(error):
            raise exceptions.InsufficientSpace(target) from error
        raise


def _is_full_inside(error: exceptions.ToolFailed) -> bool:
    """Return whether there is room on the host, and none in the file system that is being filled."""
    return any(words in error.stderr for words in ("Could not allocate", "cannot reserve space"))


def _size(target: str) -> int:
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.lseek(descriptor, 0, os.SEEK_END)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise exceptions.storage_error(error, target) from error


def _words(command: str, target: str, label: str) -> list[str]:
    # Split first, so that nothing in a path can add words.
    try:
        return [word % {"fs_label": label, "target": target} for word in shlex.split(command)]
    except (KeyError, TypeError, ValueError) as error:
        raise exceptions.InvalidConfiguration(
            _OPTION, f"{command!r}: {error}; only %(fs_label)s and %(target)s are replaced"
        ) from error
