# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template list`` and ``show``: what is in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import complete_template
from imagebackend.cli.session import Session

if TYPE_CHECKING:
    from imagebackend.templates.cache import Template
    from imagebackend.templates.leases import Lease

__all__ = ["document", "list_", "show"]


@click.command("list")
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
    listed = {
        "templates": [document(each, leases) for each, leases in found],
        "damaged": [{"name": name, "path": error.path, "reason": error.reason} for name, error in damaged],
    }
    session.show(listed, output.table(("NAME", "FORMAT", "VIRTUAL SIZE", "FILE SIZE", "USERS", "FETCHED"), rows))


@click.command
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
    session.show(document(shown, leases), output.facts(pairs))


def document(shown: Template, leases: Sequence[Lease]) -> dict[str, Any]:
    """Return a template and its users as JSON has them."""
    users = [
        {"instance": each.owner.instance, "disk": each.owner.disk, "host": each.owner.host, "path": each.owner.path}
        for each in leases
    ]
    return {**shown.as_dict(), "users": users}


def _user(lease: Lease) -> str:
    return f"{lease.owner.host}:{lease.owner.path}"
