# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template add`` and ``pull``: from a source into the cache."""

from __future__ import annotations

import functools
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions, names
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import FILE_FORMATS, complete_format, parse_format, parse_size
from imagebackend.cli.session import Session

if TYPE_CHECKING:
    from imagebackend.templates.record import Template
    from imagebackend.templates.sources import Source

__all__ = ["add", "default_name", "pull"]

_EXTENSIONS = tuple(f".{extension}" for extension in (*FILE_FORMATS, "img", "iso", "vhd"))
_COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
_SCHEMES = ("file", "glance", "http", "https", "rbd")


@dataclass(frozen=True)
class _Wanted:
    """What an image has to be.

    :ivar tree: it is made of a root file system.
    :ivar tree_size: the size of the disk, in bytes, that it is on then.
    """

    claimed: str | None
    checksum: str | None
    tree: bool
    tree_size: int | None

    def open(self, session: Session, url: str) -> Source:
        from imagebackend.templates.sources import open_source, open_tree

        if not self.tree:
            if self.tree_size is not None:
                raise click.UsageError("--tree-size goes with --tree")
            return open_source(url, session.conf, checksum=self.checksum, disk_format=self.claimed)
        if self.claimed not in (None, "raw"):
            raise click.UsageError(f"--tree makes a raw disk, and not {self.claimed}")
        return open_tree(url, session.conf, size=self.tree_size, checksum=self.checksum)


def _describes_source(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what an image has to be."""

    @functools.wraps(command)
    def describe(
        *args: Any, claimed: str | None, checksum: str | None, tree: bool, tree_size: int | None, **others: Any
    ) -> Any:
        return command(*args, wanted=_Wanted(claimed, checksum, tree, tree_size), **others)

    options = (
        click.option(
            "--name",
            metavar="NAME",
            help="What to call the template. Default: the last part of the URL, without its extension.",
        ),
        click.option(
            "--format",
            "claimed",
            type=parse_format,
            shell_complete=complete_format,
            metavar="FORMAT",
            help="Refuse an image that is not in this format.",
        ),
        click.option(
            "--checksum",
            metavar="ALG:HEX_OR_URL",
            help="Refuse an image with another digest: sha256:9f86d0…, or the URL of the publisher's checksum file.",
        ),
        click.option(
            "--tree",
            is_flag=True,
            help="It is a root file system, a folder or a tar archive: make a disk of it, with ext4.",
        ),
        click.option(
            "--tree-size",
            metavar="SIZE",
            type=parse_size,
            help="The size of that disk: 4G. Default: what the files take, and some room.",
        ),
    )
    described: Callable[..., Any] = describe
    for option in reversed(options):
        described = option(described)
    return described


@click.command
@_describes_source
@click.argument("url", metavar="URL_OR_FILE")
@click.pass_obj
def add(session: Session, name: str | None, wanted: _Wanted, url: str) -> None:
    """Fetch an image, inspect it, and put it into the cache under a name that is free.

    The image comes from a file, by http or https, from Glance (glance:CLOUD/IMAGE) or from a Ceph pool
    (rbd:POOL/IMAGE@SNAPSHOT). It is converted to raw unless [DEFAULT] force_raw_images is off.
    """
    name = name or default_name(url)
    added, fetched = _pulled(session, name, url, wanted, "missing")
    if not fetched:
        raise exceptions.TemplateExists(name, f"it came from {added.source}; 'template pull' looks for a newer one")
    session.show(added.as_dict(), f"template {name} added: {added.format}, {human_size(added.virtual_size)}")


@click.command
@_describes_source
@click.option(
    "--policy",
    type=click.Choice(("always", "missing", "newer", "never")),
    default="missing",
    show_default=True,
    help="When to ask the source for a template that is there.",
)
@click.argument("url", metavar="URL_OR_FILE")
@click.pass_obj
def pull(session: Session, name: str | None, wanted: _Wanted, policy: str, url: str) -> None:
    """Make sure that an image is in the cache, and, with --policy newer, that it is the one that its source has.

    A template that is there is kept until what replaces it is complete, and for as long as disks depend on it: then it
    goes by NAME@DIGITS. A source that cannot be reached is an error only if there is nothing to go on with.
    """
    name = name or default_name(url)
    pulled, fetched = _pulled(session, name, url, wanted, policy)
    outcome = "pulled" if fetched else "is up to date" if policy == "newer" else "is there"
    size = human_size(pulled.virtual_size)
    session.show({**pulled.as_dict(), "pulled": fetched}, f"template {name} {outcome}: {pulled.format}, {size}")


def _pulled(session: Session, name: str, url: str, wanted: _Wanted, policy: str) -> tuple[Template, bool]:
    """Return a template, and whether it was fetched."""
    from imagebackend.cli.shown_source import ShownSource

    source = ShownSource(session, name, wanted.open(session, url))
    with session.progress(f"Converting {name}") as progress:
        template = session.backend.templates.pull(name, source, policy, progress=progress)
    return template, source.fetched


def default_name(url: str) -> str:
    """Return what a template is called after its source: the last part of its path, without a known extension.

    An image in Ceph is meant by its own name, not by its snapshot's.

    :raises click.UsageError: that is no name for a template.
    """
    scheme, colon, _ = url.partition(":")
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path) if colon and scheme.lower() in _SCHEMES else url
    if scheme.lower() == "rbd":
        path = path.rpartition("/")[0] if url[len(scheme) :].startswith("://") else path.partition("@")[0]
    name = path.rpartition("/")[2]
    for extension in (*(f"{each}{packed}" for each in _EXTENSIONS for packed in _COMPRESSED), *_EXTENSIONS):
        name = name.removesuffix(extension)
    try:
        return names.check_name("template", name)
    except exceptions.InvalidName as error:
        raise click.UsageError(f"give a --name: {error}") from error
