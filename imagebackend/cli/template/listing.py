# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template list``, ``show``, ``inspect`` and ``du``: what is in the cache."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.output import human_age, human_size
from imagebackend.cli.parameters import complete_template
from imagebackend.cli.session import Session

if TYPE_CHECKING:
    from imagebackend.templates.entries import Entry

__all__ = ["du", "inspect", "list_", "show"]


@click.command("list")
@click.option("--in-use/--unused", "in_use", default=None, help="Those that disks depend on, or the others.")
@click.option("--dangling", is_flag=True, default=None, help="Those whose name another image has taken.")
@click.option("--label", "labels", metavar="KEY[=VALUE]", multiple=True, help="Those with this label.")
@click.option("--before", metavar="TIME_OR_NAME", help="Those fetched before this time, or this template.")
@click.option("--since", metavar="TIME_OR_NAME", help="Those fetched at this time or later, or after this template.")
@click.option("--format", "disk_format", type=click.Choice(("raw", "qcow2")), help="Those whose file is in it.")
@click.option("--backend", "image_type", metavar="TYPE", help="Those that are made ahead in the store of this type.")
@click.pass_obj
def list_(
    session: Session,
    in_use: bool | None,
    dangling: bool | None,
    labels: tuple[str, ...],
    before: str | None,
    since: str | None,
    disk_format: str | None,
    image_type: str | None,
) -> None:
    """List the templates in the cache, or those that all the options ask for.

    OWN is the storage that removing a template gives back, SHARED what its file shares with others, such as the disks
    that are reflinks of it.
    """
    from imagebackend.templates.entries import Filter

    wanted = Filter(
        in_use=in_use,
        dangling=dangling,
        labels=dict(_label(each) for each in labels),
        before=_time(session, before),
        since=_time(session, since, after=True),
        disk_format=disk_format,
        names=_made_ahead(session, image_type),
    )
    entries = session.backend.templates.catalogue.entries(wanted)
    session.show(_listed(entries), _table(entries))


@click.command
@click.argument("name", shell_complete=complete_template)
@click.pass_obj
def show(session: Session, name: str) -> None:
    """Show what a template is, where it came from, and the disks that depend on it."""
    shown = session.backend.templates.catalogue.inspect(name)
    session.show(shown, output.facts(_facts(shown)))


@click.command
@click.argument("names", metavar="NAME...", shell_complete=complete_template, nargs=-1, required=True)
@click.pass_obj
def inspect(session: Session, names: tuple[str, ...]) -> None:
    """Show everything that is known of templates: the whole record, details of the format, the history."""
    found = [session.backend.templates.catalogue.inspect(name) for name in names]
    text = "\n\n".join(output.facts([*_facts(each), *_more_facts(each)]) for each in found)
    session.show({"templates": found}, text)


@click.command
@click.pass_obj
def du(session: Session) -> None:
    """Show what the cache takes of the storage.

    RECLAIMABLE is what pruning gives back if age does not matter: templates that no disk depends on, and that are not
    pinned.
    """
    usage = session.backend.templates.catalogue.usage()
    rows = [
        (kind, str(part.count), human_size(part.allocated), human_size(part.own), human_size(part.reclaimable))
        for kind, part in usage.parts.items()
    ]
    table = output.table(("KIND", "COUNT", "SIZE", "OWN", "RECLAIMABLE"), rows)
    document = {
        "parts": {kind: {**vars(part)} for kind, part in usage.parts.items()},
        "free": usage.free,
        "total": usage.total,
    }
    session.show(document, f"{table}\nfree: {human_size(usage.free)} of {human_size(usage.total)}")


def _label(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    return key, value if equals else None


def _time(session: Session, text: str | None, *, after: bool = False) -> float | None:
    """Return a time, or that at which a template was fetched; ``after``: the first moment after that."""
    if text is None:
        return None
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        template = session.backend.templates.catalogue.entry(text).template
    if template is None:
        raise exceptions.TemplateNotFound(text, "its record is damaged")
    # Records are in whole seconds.
    return datetime.datetime.fromisoformat(template.fetched).timestamp() + (1 if after else 0)


def _made_ahead(session: Session, image_type: str | None) -> set[str] | None:
    if image_type is None:
        return None
    store = session.backend.backend(image_type).native_templates(session.conf)
    return None if store is None else {each.name for each in store.list()}


def _listed(entries: Sequence[Entry]) -> dict[str, Any]:
    from imagebackend.templates.details import summary

    now = time.time()
    damaged = [(each.name, each.damage) for each in entries if each.damage is not None]
    return {
        "templates": [summary(each, now) for each in entries if each.template is not None],
        "damaged": [{"name": name, "path": error.path, "reason": error.reason} for name, error in damaged],
    }


def _table(entries: Sequence[Entry]) -> str:
    now = time.time()
    rows = []
    for each in entries:
        template = each.template
        if template is None:
            rows.append((each.name, "damaged", "-", "-", "-", str(each.users), "-", _state(each)))
            continue
        virtual_size, own, shared = map(human_size, (template.virtual_size, each.own, each.shared))
        age = f"{human_age(each.age(now))} ago"
        rows.append((each.name, template.format, virtual_size, own, shared, str(each.users), age, _state(each)))
    return output.table(("NAME", "FORMAT", "VIRTUAL SIZE", "OWN", "SHARED", "USERS", "LAST USED", "NOTES"), rows)


def _state(entry: Entry) -> str:
    notes = [] if entry.damage is None else [entry.damage.reason]
    if entry.tags:
        notes.append(f"tags: {' '.join(entry.tags)}")
    if entry.template is not None and entry.template.pinned:
        notes.append("pinned")
    return "; ".join(notes)


def _facts(shown: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("name", shown["name"]),
        ("path", shown["path"]),
        ("format", shown["format"]),
        ("virtual size", _size(shown["virtual_size"])),
        ("file size", _size(shown["size"])),
        ("on disk", f"{_size(shown['own'])} of its own, {human_size(shown['shared'])} shared"),
        ("source", shown["source"]),
        ("source format", " ".join(filter(None, (shown["source_format"], shown["compression"])))),
        ("sha256 of source", shown["sha256"]),
        ("digest of file", shown["digest"]),
        ("fetched", shown["fetched"]),
        ("last used", f"{shown['last_used']} ({human_age(shown['age'])} ago)"),
        ("inspector", f"version {shown['inspector']}"),
        ("notes", ", ".join(shown["notes"])),
        ("damage", shown["damage"] or "none is known"),
        ("pinned", "yes" if shown["pinned"] else "no"),
        *(("tag", tag) for tag in shown["tags"]),
        *(("label", f"{key}={value}") for key, value in sorted(shown["labels"].items())),
        *(("user", f"{user['host']}:{user['path']}") for user in shown["users"]),
    ]


def _more_facts(shown: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("etag", shown["etag"]),
        ("last modified", shown["last_modified"]),
        ("sha256 of content", shown["content_sha256"] or shown["sha256"]),
        ("digest by blocks", shown["block_digest"]),
        ("smallest disk", _size(shown["min_disk"]) if shown["min_disk"] else ""),
        ("superseded", shown["superseded"]),
        *((key.replace("_", " "), str(value)) for key, value in shown["format_details"].items()),
        *(("history", " ".join(filter(None, each.values()))) for each in map(_happening, shown["history"])),
    ]


def _happening(each: dict[str, str]) -> dict[str, str]:
    return {"time": each["time"], "event": each["event"], "detail": each["detail"] and f"({each['detail']})"}


def _size(size: int) -> str:
    return f"{human_size(size)} ({size} bytes)"
