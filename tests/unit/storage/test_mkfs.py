# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from imagebackend import exceptions
from imagebackend.storage import mkfs

COMMANDS = {"linux": "mkfs.ext3 %(target)s", "default": "mkfs.ext2 %(target)s"}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("os_type", "specified", "default", "expected"),
    [
        ("linux", None, None, "ext4"),
        ("windows", None, None, "ntfs"),
        ("solaris", None, None, "vfat"),
        ("", None, None, "vfat"),
        (None, None, None, "vfat"),
        ("linux", None, "xfs", "xfs"),
        ("windows", None, "xfs", "xfs"),
        (None, None, "xfs", "xfs"),
        ("linux", "vfat", None, "vfat"),
        ("linux", "vfat", "xfs", "vfat"),
        ("linux", "", "", "ext4"),
    ],
)
def test_filesystem_without_commands(
    os_type: str | None, specified: str | None, default: str | None, expected: str
) -> None:
    assert mkfs.filesystem_for(os_type, specified=specified, default=default) == mkfs.Filesystem(expected)


@pytest.mark.parametrize(
    ("os_type", "expected"),
    [("linux", COMMANDS["linux"]), ("windows", COMMANDS["default"]), (None, COMMANDS["default"])],
)
def test_commands_come_first(os_type: str | None, expected: str) -> None:
    found = mkfs.filesystem_for(os_type, specified="xfs", default="xfs", commands=COMMANDS)
    assert found.command == expected
    assert found.name.startswith("mkfs-")


def test_command_for_another_type_is_not_taken() -> None:
    assert mkfs.filesystem_for("windows", commands={"linux": "x %(target)s"}) == mkfs.Filesystem("ntfs")


def test_unknown_filesystems() -> None:
    with pytest.raises(exceptions.InvalidArgument, match=r"'minix'.*ext4"):
        mkfs.filesystem_for("linux", specified="minix")
    with pytest.raises(exceptions.InvalidConfiguration, match=r"default_ephemeral_format.*'minix'.*ext4"):
        mkfs.filesystem_for("linux", default="minix")


def test_template_names() -> None:
    ext4 = mkfs.filesystem_for("linux")
    assert mkfs.ephemeral_template_name(GIB, ext4) == "ephemeral_1073741824_ext4"
    assert mkfs.ephemeral_template_name(GIB, ext4, "ephemeral0") == "ephemeral_1073741824_ext4_ephemeral0"


def test_template_names_tell_contents_apart() -> None:
    filesystems = [
        mkfs.filesystem_for("linux"),
        mkfs.filesystem_for("windows"),
        mkfs.filesystem_for("linux", commands=COMMANDS),
        mkfs.filesystem_for("windows", commands=COMMANDS),
    ]
    names = {
        mkfs.ephemeral_template_name(size, filesystem, label)
        for size in (GIB, 2 * GIB)
        for filesystem in filesystems
        for label in (None, "ephemeral0", "ephemeral1")
    }
    assert len(names) == 2 * 4 * 3


@pytest.mark.parametrize("label", ["a b", "../x", "x" * 128, "new\nline"])
def test_template_names_are_safe(label: str) -> None:
    with pytest.raises(exceptions.InvalidName):
        mkfs.ephemeral_template_name(GIB, mkfs.Filesystem("ext4"), label)


def test_parse_commands() -> None:
    values = [
        "linux=mkfs.ext4 -L %(fs_label)s -O has_journal=1 %(target)s",
        " windows = mkfs.ntfs %(target)s ",
        "linux=mkfs.ext3 '%(target)s'",
    ]
    assert mkfs.parse_commands(values) == {"linux": "mkfs.ext3 '%(target)s'", "windows": "mkfs.ntfs %(target)s"}
    assert mkfs.parse_commands([]) == {}


@pytest.mark.parametrize(
    "value",
    [
        "mkfs.ext4 %(target)s",
        "=mkfs.ext4 %(target)s",
        "linux=",
        "linux=  ",
        "linux=mkfs.ext4",
        "linux=mkfs.ext4 -L %(fs_label)s",
        "linux=mkfs.ext4 '%(target)s",
        "linux=mkfs.ext4 %(target)s %(size)s",
        "linux=mkfs.ext4 %(target)s 100%",
        "linux=mkfs.ext4 %(target)s %s%s",
        "linux=mkfs.ext4 %(target)d",
    ],
)
def test_parse_commands_refuses(value: str) -> None:
    with pytest.raises(exceptions.InvalidConfiguration, match="virt_mkfs"):
        mkfs.parse_commands([value])
