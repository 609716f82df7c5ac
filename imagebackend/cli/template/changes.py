# SPDX-License-Identifier: Apache-2.0
"""What is done with single templates: ``imagebackend template verify``, ``remove``, ``tag``, ``label``, ``pin`` …"""

from __future__ import annotations

import click

from imagebackend.cli.parameters import complete_template, parse_size
from imagebackend.cli.session import Session, Tally

__all__ = ["label", "pin", "remove", "tag", "unpin", "untag", "verify"]


@click.command
@click.option("--all", "every", is_flag=True, help="Verify every template.")
@click.option(
    "--rate", metavar="SIZE", type=parse_size, default="0", help="Read at most SIZE bytes a second. Default: no limit."
)
@click.argument("names", metavar="[NAME]...", shell_complete=complete_template, nargs=-1)
@click.pass_obj
def verify(session: Session, names: tuple[str, ...], every: bool, rate: int) -> None:
    """Read templates again, from the storage, and compare them with their digests.

    One that is damaged is put into quarantine: it stays for the disks that depend on it, which are named, and no disk
    is made from it until it is pulled again, or restored and verified. A verification that was cut short goes on where
    it was, within a day.
    """
    cache = session.backend.templates
    if bool(names) == every:
        raise click.UsageError("name templates, or say --all")
    tally = Tally(session)
    for name in cache.names(former=True) if every else names:
        with tally.one(name, f"template {name} is sound"), session.progress(f"Verifying {name}") as progress:
            cache.verify(name, progress, rate=rate)
    tally.finish("templates")


@click.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def remove(session: Session, names: tuple[str, ...]) -> None:
    """Remove templates that no disk depends on."""
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} removed"):
            session.backend.templates.remove(name)
    tally.finish("templates")


@click.command
@click.argument("name", shell_complete=complete_template)
@click.argument("tag", metavar="TAG")
@click.pass_obj
def tag(session: Session, name: str, tag: str) -> None:
    """Give a template another name, TAG.

    A TAG that another template has is moved. Disks can be made from a template by its tags as by its name.
    """
    session.backend.templates.catalogue.tag(name, tag)
    session.show({"name": name, "tag": tag}, f"template {name} is {tag}, too")


@click.command
@click.argument("tags", metavar="TAG...", nargs=-1, required=True)
@click.pass_obj
def untag(session: Session, tags: tuple[str, ...]) -> None:
    """Take tags away from the templates that have them, which stay."""
    tally = Tally(session)
    for each in tags:
        with tally.one(each, f"tag {each} taken away"):
            session.backend.templates.catalogue.untag(each)
    tally.finish("tags")


@click.command
@click.option("--remove", "removed", metavar="KEY", multiple=True, help="Take this label away.")
@click.argument("name", shell_complete=complete_template)
@click.argument("labels", metavar="[KEY=VALUE]...", nargs=-1)
@click.pass_obj
def label(session: Session, name: str, labels: tuple[str, ...], removed: tuple[str, ...]) -> None:
    """Give a template labels, by which it can be listed."""
    changes: dict[str, str | None] = dict.fromkeys(removed)
    for each in labels:
        key, equals, value = each.partition("=")
        if not equals:
            raise click.UsageError(f"{each!r}: KEY=VALUE is needed")
        changes[key] = value
    if not changes:
        raise click.UsageError("labels to give, or --remove, are needed")
    found = session.backend.templates.catalogue.label(name, changes).labels
    text = ", ".join(f"{key}={value}" for key, value in sorted(found.items())) or "none"
    session.show({"name": name, "labels": dict(found)}, f"labels of template {name}: {text}")


@click.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def pin(session: Session, names: tuple[str, ...]) -> None:
    """Keep pruning away from templates, whatever their age and size."""
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} pinned"):
            session.backend.templates.catalogue.pin(name)
    tally.finish("templates")


@click.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def unpin(session: Session, names: tuple[str, ...]) -> None:
    """Let pruning remove templates again."""
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} unpinned"):
            session.backend.templates.catalogue.pin(name, pinned=False)
    tally.finish("templates")
