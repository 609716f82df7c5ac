# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template native``: templates in the form that a store makes disks from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import complete_template
from imagebackend.cli.session import Session, Tally

if TYPE_CHECKING:
    from imagebackend.templates.native import NativeTemplate, NativeTemplates

__all__ = ["native"]

_type = click.option("--type", "image_type", metavar="TYPE", help="rbd, lvm or ploop. Default: [libvirt] images_type.")
_names = click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)


@click.group
def native() -> None:
    """Templates in a store of its own, such as a Ceph pool, which disks there are made from.

    The first disk from a template makes one there, for all hosts; they are shared, and this host need not have the
    template in its cache.
    """


@native.command("list")
@_type
@click.pass_obj
def list_(session: Session, image_type: str | None) -> None:
    """List the templates in the store, and how many disks depend on each."""
    store = _store(session, image_type)
    found = store.list()
    rows = [
        (each.name, human_size(each.virtual_size), human_size(each.used), str(len(each.users)), each.made)
        for each in found
    ]
    document = {"type": store.image_type, "templates": [_document(each) for each in found]}
    session.show(document, output.table(("NAME", "VIRTUAL SIZE", "USED", "USERS", "MADE"), rows))


@native.command
@_type
@_names
@click.pass_obj
def prepare(session: Session, names: tuple[str, ...], image_type: str | None) -> None:
    """Make templates of the cache in the store, ahead of their first disks."""
    store = _store(session, image_type)
    tally = Tally(session)
    for name in names:
        with (
            tally.one(name, f"template {name} is in the store"),
            session.progress(f"Importing {name}") as progress,
            session.backend.templates.use(name) as template,
        ):
            store.prepare(template, progress)
    tally.finish("templates")


@native.command
@_type
@_names
@click.pass_obj
def remove(session: Session, names: tuple[str, ...], image_type: str | None) -> None:
    """Remove templates from the store that no disk depends on; those in the cache stay."""
    store = _store(session, image_type)
    tally = Tally(session)
    for name in names:
        with tally.one(name, f"template {name} removed from the store"):
            store.remove(name)
    tally.finish("templates")


@native.command
@_type
@click.pass_obj
def sweep(session: Session, image_type: str | None) -> None:
    """Remove what killed processes left in the store, of templates and of disks."""
    kind = session.backend.backend(image_type)
    store = kind.native_templates(session.conf)
    removed = [*([] if store is None else store.sweep()), *kind.sweep_disks(session.conf)]
    session.show({"removed": removed}, output.printable("\n".join(f"{name} removed" for name in removed)))


def _store(session: Session, image_type: str | None) -> NativeTemplates:
    kind = session.backend.backend(image_type)
    store = kind.native_templates(session.conf)
    if store is None:
        wanted = image_type or session.conf.libvirt.images_type
        raise exceptions.Unsupported(f"a template in a store of type {wanted}", "its disks are made from the cache")
    return store


def _document(template: NativeTemplate) -> dict[str, Any]:
    return dataclasses.asdict(template)
