# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template add`` and ``pull``: from a source into the cache."""

from __future__ import annotations

import contextlib
import functools
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions, names
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import FILE_FORMATS, complete_format, parse_format, parse_size
from imagebackend.cli.session import Session, Tally

if TYPE_CHECKING:
    from imagebackend.templates.precaching import Precached, Wanted
    from imagebackend.templates.sources import Source

__all__ = ["add", "default_name", "pull"]

_EXTENSIONS = tuple(f".{extension}" for extension in (*FILE_FORMATS, "img", "iso", "vhd"))
_COMPRESSED = (".bz2", ".gz", ".xz", ".zst")
_SCHEMES = ("file", "glance", "http", "https", "rbd")


@dataclass(frozen=True)
class _Description:
    """What an image has to be.

    :ivar tree: it is made of a root file system.
    :ivar tree_size: the size of the disk, in bytes, that it is on then.
    :ivar tree_filesystem: what the disk is formatted with.
    """

    claimed: str | None
    checksum: str | None
    tree: bool
    tree_size: int | None
    tree_filesystem: str | None

    def open(self, session: Session, url: str) -> Source:
        from imagebackend.templates.sources import open_source, open_tree

        if not self.tree:
            if self.tree_size is not None:
                raise click.UsageError("--tree-size goes with --tree")
            if self.tree_filesystem is not None:
                raise click.UsageError("--tree-filesystem goes with --tree")
            return open_source(url, session.conf, checksum=self.checksum, disk_format=self.claimed)
        if self.claimed not in (None, "raw"):
            raise click.UsageError(f"--tree makes a raw disk, and not {self.claimed}")
        filesystem = self.tree_filesystem or "ext4"
        return open_tree(url, session.conf, size=self.tree_size, filesystem=filesystem, checksum=self.checksum)


def _describes_source(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what an image has to be."""

    @functools.wraps(command)
    def describe(
        *args: Any,
        claimed: str | None,
        checksum: str | None,
        tree: bool,
        tree_size: int | None,
        tree_filesystem: str | None,
        **others: Any,
    ) -> Any:
        description = _Description(claimed, checksum, tree, tree_size, tree_filesystem)
        return command(*args, description=description, **others)

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
            help="Refuse an image in another format. A disk of ploop may be a folder, or a tar archive of one.",
        ),
        click.option(
            "--checksum",
            metavar="ALG:HEX_OR_URL",
            help="Refuse an image with another digest: sha256:9f86d0…, or the URL of the publisher's checksum file.",
        ),
        click.option(
            "--tree",
            is_flag=True,
            help="It is a root file system, a folder or a tar archive: make a disk of it.",
        ),
        click.option(
            "--tree-size",
            metavar="SIZE",
            type=parse_size,
            help="The size of that disk: 4G. Default: what the files take, and some room.",
        ),
        click.option(
            "--tree-filesystem",
            type=click.Choice(("ext4", "xfs")),
            help="What that disk is formatted with. Default: ext4, which holds all that a tree can have.",
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
def add(session: Session, name: str | None, description: _Description, url: str) -> None:
    """Fetch an image, inspect it, and put it into the cache under a name that is free.

    The image comes from a file, by http or https, from Glance (glance:CLOUD/IMAGE) or from a Ceph pool
    (rbd:POOL/IMAGE@SNAPSHOT). It is converted to raw unless [DEFAULT] force_raw_images is off.
    """
    name = name or default_name(url)
    pull = _Pull(session, name, url, description, is_one_of_several=False)
    with session.progress(f"Converting {name}") as progress:
        added = session.backend.templates.pull(name, pull.source, progress=progress)
    if not pull.source.fetched:
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
@click.option(
    "--for-backend",
    "image_types",
    metavar="TYPE",
    multiple=True,
    help="Also make what the store of this type makes disks from, so that the first guest does not wait for it.",
)
@click.option(
    "--at-once",
    metavar="NUMBER",
    type=click.IntRange(1),
    help="How many images to pull at a time. Default: [image_cache] precache_concurrency.",
)
@click.argument("urls", metavar="URL_OR_FILE...", nargs=-1, required=True)
@click.pass_obj
def pull(
    session: Session,
    name: str | None,
    description: _Description,
    policy: str,
    image_types: tuple[str, ...],
    at_once: int | None,
    urls: tuple[str, ...],
) -> None:
    """Make sure that images are in the cache, and, with --policy newer, that they are those that their sources have.

    A template that is there is kept until what replaces it is complete, and for as long as disks depend on it: then it
    goes by NAME@DIGITS. A source that cannot be reached is an error only if there is nothing to go on with.

    With several images, one that cannot be pulled does not keep the others.
    """
    if len(urls) > 1 and (name or description.checksum):
        raise click.UsageError("--name and --checksum are for one image")
    pulls = [_Pull(session, name or default_name(url), url, description, len(urls) > 1) for url in urls]
    twice = {each.name for each in pulls if [other.name for other in pulls].count(each.name) > 1}
    if twice:
        raise click.UsageError(f"several images would be called {', '.join(sorted(twice))}")
    stores = session.backend.native_templates(*image_types) if image_types else []
    with contextlib.ExitStack() as shown:
        wanted = [each.wanted(policy, shown) for each in pulls]
        results = session.backend.templates.precache(wanted, stores, at_once=at_once)
    _show(session, pulls, results, policy)


class _Pull:
    """An image that is to be pulled, and how that is shown."""

    def __init__(
        self, session: Session, name: str, url: str, description: _Description, is_one_of_several: bool
    ) -> None:
        from imagebackend.cli.shown_source import ShownSource

        self.name = name
        self._session = session
        self._lines = is_one_of_several
        self.source = ShownSource(session, name, description.open(session, url), lines=is_one_of_several)

    def wanted(self, policy: str, shown: contextlib.ExitStack) -> Wanted:
        """Return what the library is asked for; its progress is shown until the end of ``shown``."""
        from imagebackend.templates.precaching import Wanted

        progress = shown.enter_context(self._session.progress(f"Converting {self.name}", lines=self._lines))
        return Wanted(self.name, self.source, policy, progress)

    def outcome(self, policy: str) -> str:
        """Return what to say of a pull that succeeded."""
        return "pulled" if self.source.fetched else "is up to date" if policy == "newer" else "is there"


def _show(session: Session, pulls: list[_Pull], results: Sequence[Precached], policy: str) -> None:
    if len(results) == 1 and results[0].error is not None:
        raise results[0].error
    tally = Tally(session)
    for each, result in zip(pulls, results, strict=True):
        facts: dict[str, Any] = {}
        text = ""
        if result.template is not None:
            size = human_size(result.template.virtual_size)
            text = f"template {each.name} {each.outcome(policy)}: {result.template.format}, {size}"
            text += "".join(f"; ready in {store}" for store in result.stores)
            facts = {**result.template.as_dict(), "pulled": each.source.fetched, "stores": list(result.stores)}
        if len(results) == 1:
            session.show(facts, text)
            return
        with tally.one(each.name, text, facts):
            if result.error is not None:
                raise result.error
    tally.finish("templates")


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
