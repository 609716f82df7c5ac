# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template``: the images that disks are made from."""

from __future__ import annotations

import os
import urllib.parse
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions, names
from imagebackend.cli import output
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import FILE_FORMATS, complete_format, complete_template, parse_format
from imagebackend.cli.session import Session, Tally

if TYPE_CHECKING:
    from imagebackend.templates.cache import Template
    from imagebackend.templates.leases import Lease

__all__ = ["default_name", "template"]

_EXTENSIONS = tuple(f".{extension}" for extension in (*FILE_FORMATS, "img", "iso", "vhd"))
_COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
_SCHEMES = ("file", "http", "https")


@click.group
def template() -> None:
    """Images that disks are made from, in the template cache."""


@template.command
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


@template.command
@click.option(
    "--name",
    metavar="NAME",
    help="What to call the template. Default: the last part of the URL, without its extension.",
)
@click.option(
    "--format",
    "claimed",
    type=parse_format,
    shell_complete=complete_format,
    metavar="FORMAT",
    help="Refuse an image that is not in this format.",
)
@click.option(
    "--checksum",
    metavar="ALG:HEX_OR_URL",
    help="Refuse an image with another digest: sha256:9f86d0…, or the URL of the publisher's checksum file.",
)
@click.argument("url", metavar="URL_OR_FILE")
@click.pass_obj
def add(session: Session, name: str | None, claimed: str | None, checksum: str | None, url: str) -> None:
    """Fetch an image, inspect it, and put it into the cache.

    The image comes from a file, or by http or https. It is converted to raw unless [DEFAULT] force_raw_images is off.
    """
    from imagebackend.cli.shown_source import ShownSource

    name = name or default_name(url)
    source = ShownSource(session, name, url, checksum=checksum, disk_format=claimed)
    with session.progress(f"Converting {name}") as progress:
        added = session.backend.templates.fetch(name, source.fetch, progress=progress)
    if not source.fetched:
        raise exceptions.TemplateExists(name, f"it came from {added.source}; remove it first, or choose another name")
    session.show(_document(added, []), f"template {name} added: {added.format}, {human_size(added.virtual_size)}")


@template.command("list")
@click.pass_obj
def list_(session: Session) -> None:
    """List the templates in the cache."""
    cache = session.backend.templates
    found, damaged = [], []
    for name in cache.names():
        try:
            found.append((cache.get(name), cache.leases(name)))
        except exceptions.TemplateNotFound:
            continue  # removed since it was listed
        except exceptions.Corrupt as error:
            damaged.append((name, error))
    rows = [
        (each.name, each.format, human_size(each.virtual_size), human_size(each.size), str(len(leases)), each.fetched)
        for each, leases in found
    ]
    rows += [(name, "damaged", "-", "-", "-", error.reason) for name, error in damaged]
    document = {
        "templates": [_document(each, leases) for each, leases in found],
        "damaged": [{"name": name, "path": error.path, "reason": error.reason} for name, error in damaged],
    }
    session.show(document, output.table(("NAME", "FORMAT", "VIRTUAL SIZE", "FILE SIZE", "USERS", "FETCHED"), rows))


@template.command
@click.argument("name", shell_complete=complete_template)
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show what is recorded of a template, and the disks that depend on it."""
    cache = session.backend.templates
    shown, leases = cache.get(name), cache.leases(name)
    pairs = [
        ("name", shown.name),
        ("path", shown.path),
        ("format", shown.format),
        ("virtual size", f"{human_size(shown.virtual_size)} ({shown.virtual_size} bytes)"),
        ("file size", f"{human_size(shown.size)} ({shown.size} bytes)"),
        ("source", shown.source),
        ("source format", shown.source_format),
        ("sha256 of source", shown.sha256),
        ("digest of file", shown.digest),
        ("fetched", shown.fetched),
        ("inspector", f"version {shown.inspector}"),
        ("notes", ", ".join(shown.notes)),
        *(("user", _user(lease)) for lease in leases),
    ]
    session.show(_document(shown, leases), output.facts(pairs))


@template.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def verify(session: Session, names: tuple[str, ...]) -> None:
    """Read templates again and compare them with their digests."""
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} is sound"), session.progress(f"Verifying {name}") as progress:
            session.backend.templates.verify(name, progress)
    tally.finish("templates")


@template.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def remove(session: Session, names: tuple[str, ...]) -> None:
    """Remove templates that no disk depends on."""
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} removed"):
            session.backend.templates.remove(name)
    tally.finish("templates")


def default_name(url: str) -> str:
    """Return what a template is called after its source: the last part of its path, without a known extension.

    :raises click.UsageError: that is no name for a template.
    """
    scheme, colon, _ = url.partition(":")
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path) if colon and scheme.lower() in _SCHEMES else url
    name = path.rpartition("/")[2]
    for extension in (*(f"{each}{packed}" for each in _EXTENSIONS for packed in _COMPRESSED), *_EXTENSIONS):
        name = name.removesuffix(extension)
    try:
        return names.check_name("template", name)
    except exceptions.InvalidName as error:
        raise click.UsageError(f"give a --name: {error}") from error


def _document(shown: Template, leases: Any) -> dict[str, Any]:
    users = [
        {"instance": each.owner.instance, "disk": each.owner.disk, "host": each.owner.host, "path": each.owner.path}
        for each in leases
    ]
    return {**shown.as_dict(), "users": users}


def _user(lease: Lease) -> str:
    return f"{lease.owner.host}:{lease.owner.path}"


def _unreadable(file: str, error: Exception) -> click.BadParameter:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return click.BadParameter(f"{file!r} cannot be read: {reason}", param_hint="FILE")
