# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template prune``: make room in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from imagebackend.cli import output
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import parse_age, parse_size
from imagebackend.cli.session import Session, failures_document

if TYPE_CHECKING:
    from imagebackend.templates.eviction import Report
    from imagebackend.templates.pruning import Candidate

__all__ = ["prune"]


@click.command
@click.option("--dry-run", is_flag=True, help="Only show what would be removed, and why the others would not.")
@click.option(
    "--older-than",
    metavar="AGE",
    type=parse_age,
    help="Remove what was not used for as long, such as 12h or 7d. Default: as configured.",
)
@click.option(
    "--total-size", metavar="SIZE", type=parse_size, help="Remove more until the templates take no more than this."
)
@click.option("--free-space", metavar="SIZE", type=parse_size, help="Remove more until this much is free.")
@click.option(
    "--backend",
    "image_types",
    metavar="TYPE",
    multiple=True,
    help="Also in the store of this type. Default: [libvirt] images_type.",
)
@click.pass_obj
def prune(
    session: Session,
    dry_run: bool,
    older_than: int | None,
    total_size: int | None,
    free_space: int | None,
    image_types: tuple[str, ...],
) -> None:
    """Remove templates that no disk depends on, and what killed processes left.

    What was not used for as long as [image_cache] says goes, and then, until the limits are kept, what was not used
    for longest. Nothing goes that a disk depends on, that is pinned, or that somebody is at.
    """
    given = {
        "minimum_age": older_than,
        "native_minimum_age": older_than,
        "total_size_limit": total_size,
        "free_space_target": free_space,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if changes:
        changes["enabled"] = True  # who says what is to go wants it to go
    backend = session.backend
    stores = backend.native_templates(*image_types) if image_types else None
    report = backend.templates.prune(backend.templates.policy(**changes), stores=stores, dry_run=dry_run)
    session.show(_document(report, dry_run), _text(report, dry_run))
    session.end_if_failed(report.failed)


def _document(report: Report, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "decisions": [
            {**vars(each.candidate), "remove": each.remove, "reason": each.reason} for each in report.decisions
        ],
        "removed": [{"name": each.name, "store": each.store, "own": each.own} for each in report.removed],
        "failed": failures_document(report.failed),
        "swept": report.swept,
        "reclaimed": report.reclaimed,
    }


def _text(report: Report, dry_run: bool) -> str:
    removed = [each.candidate for each in report.decisions if each.remove] if dry_run else report.removed
    rows = []
    for decision in report.decisions:
        candidate = decision.candidate
        action = _action(candidate, decision.remove, removed)
        rows.append((action, _name(candidate), human_size(candidate.own), decision.reason))
    table = output.table(("", "NAME", "OWN", "REASON"), rows)
    swept = "\n".join(f"swept up: {output.printable(each)}" for each in report.swept)
    size = human_size(sum(each.own for each in removed))
    outcome = f"{'would remove' if dry_run else 'removed'} {len(removed)} of {len(rows)} templates, {size}"
    return "\n".join(filter(None, (table, swept, outcome)))


def _action(candidate: Candidate, remove: bool, removed: list[Candidate]) -> str:
    if not remove:
        return "keep"
    return "remove" if candidate in removed else "kept"


def _name(candidate: Candidate) -> str:
    return f"{candidate.store}:{candidate.name}" if candidate.store else candidate.name
