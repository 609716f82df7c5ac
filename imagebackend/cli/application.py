# SPDX-License-Identifier: Apache-2.0
"""The top of the command: its own options, its logging, and what becomes of errors."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import click

from imagebackend import exceptions
from imagebackend.cli import exit_status, output
from imagebackend.cli.disk import disk
from imagebackend.cli.doctor import doctor
from imagebackend.cli.session import DEFAULT_CONFIG_FILE, Session
from imagebackend.cli.template import template

__all__ = ["Application", "application", "run"]

_PROGRAM = "imagebackend"
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class Application(click.Group):
    """A group of commands whose errors end in messages and exit statuses, whoever runs it."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Run a command and leave with :class:`SystemExit`."""
        arguments = list(sys.argv[1:] if args is None else args)
        # Until the options are parsed; they may be what is wrong.
        session = extra.pop("obj", None) or Session()
        session.json = "--json" in itertools.takewhile(lambda word: word != "--", arguments)
        options = {**extra, "prog_name": _PROGRAM, "standalone_mode": False, "obj": session}
        try:
            status = super().main(arguments, **options)
        # Also what nobody foresaw: a shell is no place for a traceback that nobody asked for.
        except Exception as error:
            status = _report(session, error)
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context is for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise exceptions.Cancelled(ctx.obj.interruption.message) from error

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of exit statuses."""
        with formatter.section("Exit status"):
            formatter.write_dl([(str(status.code), status.meaning) for status in exit_status.TABLE])


@click.group(cls=Application, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config-file",
    "config_files",
    multiple=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help=f"Read this ini file; a later one overrides an earlier one. Default: {DEFAULT_CONFIG_FILE}, if it is there.",
)
@click.option(
    "--config-dir",
    "config_dirs",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False),
    help="Read the *.conf files of this folder after them, in sorted order.",
)
@click.option("--json", is_flag=True, help="Print one JSON document, errors included, on stdout, and no progress.")
@click.option(
    "-v",
    "--verbose",
    count=True,
    help="Log to stderr what is done; twice: every detail, and the traceback of an error.",
)
@click.version_option(package_name=_PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def application(
    ctx: click.Context, config_files: tuple[str, ...], config_dirs: tuple[str, ...], json: bool, verbose: int
) -> None:
    """Keep the disks of libvirt guests, and the templates that they are made from.

    Sizes are whole numbers of bytes, or of units of 1024 with K, M, G or T: 20G.
    """
    session: Session = ctx.obj
    session.config_files = config_files
    session.config_dirs = config_dirs
    session.json = json
    session.verbosity = verbose
    ctx.with_resource(_logging(session))


application.add_command(template)
application.add_command(disk)
application.add_command(doctor)


def run() -> int:
    """Run the command with the process's arguments, signals and streams; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        # A name in another encoding than the terminal's is shown escaped. A stream that is closed is None.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    session = Session()
    with session.interruption.handled():
        try:
            application.main(obj=session)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


@contextlib.contextmanager
def _logging(session: Session) -> Iterator[None]:
    """Log to stderr in the block, from this library only."""
    logger = logging.getLogger("imagebackend")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level, logger.propagate
    quiet = session.json and not session.verbosity
    logger.setLevel(logging.CRITICAL if quiet else _LEVELS[min(session.verbosity, len(_LEVELS) - 1)])
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _report(session: Session, error: Exception) -> int:
    """Tell an error, and return the exit status for it."""
    status = _status(session, error)
    if session.json:
        click.echo(output.to_json({"error": _document(error, status)}))
    elif isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
    else:
        if session.verbosity >= len(_LEVELS) - 1:
            click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
        if isinstance(error, click.UsageError) and error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        click.echo(f"{_PROGRAM}: {output.printable(_message(error))}", err=True)
    return status


def _status(session: Session, error: Exception) -> int:
    interrupted = session.interruption.signal
    if isinstance(error, exceptions.Cancelled | click.Abort) and interrupted is not None:
        return 128 + interrupted
    if isinstance(error, click.Abort):
        return exit_status.status_of(exceptions.Cancelled())
    if isinstance(error, click.ClickException):
        return error.exit_code
    return exit_status.status_of(error)


def _message(error: Exception) -> str:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return "Missing command."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, click.Abort):
        return "interrupted"
    if isinstance(error, exceptions.ImageBackendError):
        return output.message(error)
    return (
        f"unexpected {type(error).__name__}: {output.message(error)}; run it with -vv for the traceback, and report it"
    )


def _document(error: Exception, status: int) -> dict[str, Any]:
    if isinstance(error, exceptions.ImageBackendError):
        return output.error_document(error, status)
    return {"type": type(error).__name__, "message": _message(error), "exit_status": status}
