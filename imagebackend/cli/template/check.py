# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template check``: whether a file may become a template."""

from __future__ import annotations

import os

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import complete_format, parse_format
from imagebackend.cli.session import Session

__all__ = ["check"]


@click.command
@click.option(
    "--format",
    "claimed",
    type=parse_format,
    shell_complete=complete_format,
    metavar="FORMAT",
    required=True,
    help="The format that it is said to have.",
)
@click.argument("file", type=click.Path(readable=False))
@click.pass_obj
def check(session: Session, claimed: str, file: str) -> None:
    """Tell whether a file may become a template.

    The file is inspected as an image that is claimed to be in a format; nothing is changed, and no configuration is
    read. Exit status 0: acceptable. 1: refused, with the reason. 2: wrong usage, or the file cannot be read, so there
    is no verdict.
    """
    from imagebackend.templates import inspection

    try:
        # Without O_NONBLOCK a FIFO would hang until somebody writes to it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        verdict = inspection.inspect(descriptor, file, claimed)
    except exceptions.StorageError as error:
        raise _unreadable(file, error) from error
    finally:
        os.close(descriptor)
    document = {
        "acceptable": True,
        "file": file,
        "format": verdict.format,
        "virtual_size": verdict.virtual_size,
        "allocated_size": verdict.allocated_size,
        "notes": list(verdict.notes),
        "inspector": inspection.INSPECTOR_VERSION,
    }
    notes = f" ({', '.join(verdict.notes)})" if verdict.notes else ""
    size = human_size(verdict.virtual_size)
    session.show(document, output.printable(f"{file}: acceptable as {claimed}, virtual size {size}{notes}"))


def _unreadable(file: str, error: Exception) -> click.BadParameter:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return click.BadParameter(f"{file!r} cannot be read: {reason}", param_hint="FILE")
