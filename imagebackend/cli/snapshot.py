# SPDX-License-Identifier: Apache-2.0
"""``imagebackend disk snapshot``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.disks import find
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import complete_disk, complete_instance
from imagebackend.cli.session import Session

if TYPE_CHECKING:
    from imagebackend.images.base import Image

__all__ = ["snapshot"]


@click.group
def snapshot() -> None:
    """Snapshots of disks, kept where the disk is."""


@snapshot.command
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.argument("name")
@click.pass_obj
def create(session: Session, instance: str, disk: str, name: str) -> None:
    """Make a snapshot of a disk that no running guest holds."""
    image = _find(session, instance, disk)
    image.create_snap(name)
    session.show({"path": image.path, "snapshot": name}, f"snapshot {name} of {image.path} made")


@snapshot.command("list")
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.pass_obj
def list_(session: Session, instance: str, disk: str) -> None:
    """List the snapshots of a disk, oldest first."""
    found = find(session.backend, instance, disk).list_snaps()
    rows = [(each.name, each.created, human_size(each.virtual_size)) for each in found]
    document = {"snapshots": [dataclasses.asdict(each) for each in found]}
    session.show(document, output.table(("NAME", "CREATED", "SIZE"), rows))


@snapshot.command
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.argument("name")
@click.pass_obj
def rollback(session: Session, instance: str, disk: str, name: str) -> None:
    """Make a disk what it was when the snapshot was made; what came later is lost."""
    image = _find(session, instance, disk)
    image.rollback_to_snap(name)
    session.show({"path": image.path, "snapshot": name}, f"{image.path} is as in snapshot {name} again")


@snapshot.command
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.argument("name")
@click.pass_obj
def remove(session: Session, instance: str, disk: str, name: str) -> None:
    """Remove a snapshot; the disk stays as it is."""
    image = _find(session, instance, disk)
    image.remove_snap(name)
    session.show({"path": image.path, "snapshot": name}, f"snapshot {name} of {image.path} removed")


def _find(session: Session, instance: str, disk: str) -> Image:
    image = find(session.backend, instance, disk)
    # The library only logs that it did nothing, as its contract says; here somebody waits for the answer.
    if not image.capabilities.snapshots:
        reason = f"the storage of {image.path} has none; use a qcow2 disk, or a file system with reflink"
        raise exceptions.Unsupported("a snapshot", reason)
    return image
