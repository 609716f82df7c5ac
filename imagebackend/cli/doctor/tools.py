# SPDX-License-Identifier: Apache-2.0
"""Are the commands there that the library runs?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imagebackend import exceptions, process
from imagebackend.cli.doctor.finding import Finding, error, fine, warning

__all__ = ["TOOLS", "Presence", "Tool", "find_tools", "judge_tools"]

_TIMEOUT = 10.0
_VERSION = re.compile(r"\d+(?:\.\d+)+")
#: The first qemu-img with everything that is asked of it, and the one that the tests run with.
_NEEDED, _TESTED = (5, 2), (7, 2)


@dataclass(frozen=True)
class Tool:
    """A command.

    :ivar package: the Debian package that has it.
    :ivar purpose: what it is for.
    :ivar filesystem: the file system of ephemeral disks that it makes; empty: something else.
    :ivar essential: nothing works without it.
    :ivar version_option: what makes it tell its version.
    """

    command: str
    package: str
    purpose: str
    filesystem: str = ""
    essential: bool = False
    version_option: str = "--version"


@dataclass(frozen=True)
class Presence:
    """Whether a command is there.

    :ivar path: where; None: it is not there.
    :ivar version: what it says of itself; empty: nothing that could be understood.
    """

    path: str | None
    version: str = ""


TOOLS = (
    Tool("setpriv", "util-linux", "running every other command", essential=True),
    Tool("prlimit", "util-linux", "limiting commands that read images", essential=True),
    Tool("qemu-img", "qemu-utils", "converting and changing images", essential=True),
    Tool("mkswap", "util-linux", "swap disks"),
    Tool("mkfs.ext4", "e2fsprogs", "ephemeral disks", "ext4", version_option="-V"),
    Tool("mkfs.ext3", "e2fsprogs", "ephemeral disks", "ext3", version_option="-V"),
    Tool("mkfs.ext2", "e2fsprogs", "ephemeral disks", "ext2", version_option="-V"),
    Tool("mkfs.xfs", "xfsprogs", "ephemeral disks", "xfs", version_option="-V"),
    Tool("mkfs.vfat", "dosfstools", "ephemeral disks", "vfat", version_option="--help"),
    Tool("mkfs.ntfs", "ntfs-3g", "ephemeral disks", "ntfs", version_option="-V"),
)


def find_tools(tools: Iterable[Tool]) -> dict[str, Presence]:
    """Look for commands, and ask those that are there for their version."""
    return {tool.command: _find(tool) for tool in tools}


def judge_tools(presence: Mapping[str, Presence], default_filesystem: str | None) -> list[Finding]:
    """Return what is to be said of the commands.

    :param presence: by command.
    :param default_filesystem: ``[DEFAULT] default_ephemeral_format``.
    """
    return [_judge(tool, presence[tool.command], default_filesystem) for tool in TOOLS]


def _judge(tool: Tool, found: Presence, default_filesystem: str | None) -> Finding:
    check = f"tool {tool.command}"
    advice = f"install the package {tool.package}"
    if found.path is None:
        missing = f"not found in {process.PATH}; it is for {tool.purpose}"
        if tool.essential:
            return error(check, missing, advice)
        if tool.filesystem and tool.filesystem == default_filesystem:
            return error(check, f"{missing}, and configured for them", advice)
        if tool.filesystem and tool.filesystem != "ext4":
            return fine(check, f"not installed: no {tool.purpose} with {tool.filesystem} (package {tool.package})")
        return warning(check, missing, advice)
    if tool.command == "qemu-img":
        return _judge_qemu_img(check, found, advice)
    return fine(check, f"{found.path}, {found.version or 'version unknown'}")


def _judge_qemu_img(check: str, found: Presence, advice: str) -> Finding:
    version = tuple(int(number) for number in found.version.split(".")) if found.version else ()
    if not version:
        return error(check, f"{found.path} does not tell its version, so it may not run at all", advice)
    if version < _NEEDED:
        return error(check, f"{found.path} is version {found.version}; 5.2 is needed", "install a later QEMU")
    if version < _TESTED:
        return warning(check, f"{found.path} is version {found.version}; 7.2 is tested", "prefer a later QEMU")
    return fine(check, f"{found.path}, {found.version}")


def _find(tool: Tool) -> Presence:
    path = process.find(tool.command)
    # Every command runs under setpriv.
    if path is None or process.find("setpriv") is None:
        return Presence(path)
    try:
        # mkfs.vfat ends with 1 after its help.
        said = process.run([tool.command, tool.version_option], timeout=_TIMEOUT, success=(0, 1))
    except exceptions.ToolFailed:
        return Presence(path)
    match = _VERSION.search(said.stdout) or _VERSION.search(said.stderr)
    return Presence(path, match[0] if match else "")
