# SPDX-License-Identifier: Apache-2.0
"""The kinds of values that commands take, and what a shell completes names with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import click

from imagebackend import exceptions
from imagebackend.cli.session import Session

if TYPE_CHECKING:
    from imagebackend.backend import Backend

__all__ = [
    "FILE_FORMATS",
    "complete_disk",
    "complete_format",
    "complete_instance",
    "complete_template",
    "parse_age",
    "parse_format",
    "parse_size",
]

#: The formats that an image can be extracted in.
FILE_FORMATS = ("raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx")

# What else QEMU and Glance call formats: other names of those, ploop, and some that the inspector refuses with
# a reason.
_OTHER_FORMATS = (
    *("vhd", "iso", "gpt", "ami", "ari", "aki"),
    *("bochs", "cloop", "dmg", "docker", "luks", "ova", "parallels", "ploop", "qcow", "qed"),
)
_SIZE = re.compile(r"([0-9]{1,19})([KMGT]?)\Z", re.ASCII)
_AGE = re.compile(r"([0-9]{1,10})([smhd]?)\Z", re.ASCII)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

Completion = Callable[[click.Context, click.Parameter, str], list[str]]


def parse_size(value: str) -> int:
    """Return a size in bytes.

    :param value: a number of bytes, or one with K, M, G or T: units of 1024 bytes and its powers.
    :raises click.BadParameter: it is neither.
    """
    match = _SIZE.match(value)
    if match is None:
        raise click.BadParameter(
            f"{value!r}: a whole number of bytes is needed, or one with K, M, G or T (powers of 1024), such as 20G"
        )
    number: int = int(match[1]) * 1024 ** _POWERS[match[2]]
    return number


def parse_age(value: str) -> int:
    """Return a time in seconds.

    :param value: a number of seconds, or one with s, m, h or d: seconds, minutes, hours, days.
    :raises click.BadParameter: it is neither.
    """
    match = _AGE.match(value)
    if match is None:
        raise click.BadParameter(f"{value!r}: a whole number of seconds is needed, or one with m, h or d, such as 12h")
    return int(match[1]) * _SECONDS[match[2]]


def parse_format(value: str) -> str:
    """Return a format that somebody claims an image to have.

    :raises click.BadParameter: neither QEMU nor Glance knows the word.
    """
    if value not in FILE_FORMATS and value not in _OTHER_FORMATS:
        raise click.BadParameter(f"{value!r}: a format is needed, such as {', '.join(FILE_FORMATS)}")
    return value


def complete_format(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the formats that templates can have."""
    return [each for each in FILE_FORMATS if each.startswith(incomplete)]


def _completion(find: Callable[[Backend, click.Context], Iterable[str]]) -> Completion:
    """Return what completes a name with those that are there."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        options = ctx.find_root().params
        session = Session(config_files=options["config_files"], config_dirs=options["config_dirs"])
        found: set[str] = set()
        # A shell that completes a word is no place for error messages.
        with contextlib.suppress(exceptions.ImageBackendError):
            found.update(find(session.backend, ctx))
        return sorted(each for each in found if each.startswith(incomplete))

    return complete


complete_instance = _completion(lambda backend, ctx: (image.instance for image in backend.disks()))
complete_disk = _completion(lambda backend, ctx: (image.disk_name for image in backend.disks(ctx.params["instance"])))
complete_template = _completion(lambda backend, ctx: backend.templates.names())
