# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template verify``, ``remove``, ``tag`` and ``untag``: what is done with single templates."""

from __future__ import annotations

import click

from imagebackend.cli.parameters import complete_template
from imagebackend.cli.session import Session, Tally

__all__ = ["remove", "tag", "untag", "verify"]


@click.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def verify(session: Session, names: tuple[str, ...]) -> None:
    """Read templates again and compare them with their digests."""
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} is sound"), session.progress(f"Verifying {name}") as progress:
            session.backend.templates.verify(name, progress)
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
    session.backend.templates.tag(name, tag)
    session.show({"name": name, "tag": tag}, f"template {name} is {tag}, too")


@click.command
@click.argument("tags", metavar="TAG...", nargs=-1, required=True)
@click.pass_obj
def untag(session: Session, tags: tuple[str, ...]) -> None:
    """Take tags away from the templates that have them, which stay."""
    tally = Tally(session)
    for each in tags:
        with tally.one(each, f"tag {each} taken away"):
            session.backend.templates.untag(each)
    tally.finish("tags")
