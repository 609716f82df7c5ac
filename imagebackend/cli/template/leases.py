# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template leases``: which disks depend on which templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions
from imagebackend.cli import hypervisor, output
from imagebackend.cli.session import Session, failures_document

if TYPE_CHECKING:
    from imagebackend.templates.lease_book import LeaseBook
    from imagebackend.templates.leases import Lease

__all__ = ["leases"]


@click.command
@click.option("--host", metavar="HOST", help="Only those of the disks of this host.")
@click.option("--rebuild", is_flag=True, help="Make them anew from what the disks and libvirt's domains say.")
@click.option("--no-domains", is_flag=True, help="With --rebuild: do not ask libvirt.")
@click.option("--connect", metavar="URI", help="The hypervisor to ask. Default: the system's, by [libvirt] virt_type.")
@click.option(
    "--backend",
    "image_types",
    metavar="TYPE",
    multiple=True,
    help="With --rebuild: ask the store of this type, too. Default: [libvirt] images_type.",
)
@click.option("--drop-host", metavar="HOST", help="Drop those of a host that will not come back.")
@click.pass_obj
def leases(
    session: Session,
    host: str | None,
    rebuild: bool,
    no_domains: bool,
    connect: str | None,
    image_types: tuple[str, ...],
    drop_host: str | None,
) -> None:
    """Show which disks depend on which templates, of all hosts that share the cache.

    A lease keeps a template from being removed. One that is missing, after a restore of the cache for example, is made
    anew by --rebuild; that also drops those of this host whose disks are gone, or depend on something else. What
    --drop-host drops are only leases of disks that cannot be seen from here.
    """
    if rebuild + (drop_host is not None) + (host is not None) > 1:
        raise click.UsageError("--host, --rebuild and --drop-host exclude each other")
    if not rebuild and (no_domains or connect or image_types):
        raise click.UsageError("--no-domains, --connect and --backend are for --rebuild")
    if rebuild:
        _rebuild(session, no_domains, connect, image_types)
    elif drop_host is not None:
        _drop(session, drop_host)
    else:
        book = session.backend.templates.lease_book
        found = book.leases(host)
        session.show({"leases": [_document(each, book) for each in found]}, _table(found, book))


def _rebuild(session: Session, no_domains: bool, connect: str | None, image_types: tuple[str, ...]) -> None:
    failed: list[tuple[str, exceptions.ImageBackendError]] = []
    domains: list[str] = []
    if not no_domains:
        try:
            with hypervisor.connection(connect or hypervisor.default_uri(session.conf.libvirt.virt_type)) as opened:
                domains = hypervisor.descriptions(opened)
        except exceptions.ImageBackendError as error:
            failed.append(("libvirt", error))
    rebuilt = session.backend.rebuild_leases(domains, *image_types)
    failed += rebuilt.failed
    document = {
        "made": list(map(_facts, rebuilt.made)),
        "dropped": list(map(_facts, rebuilt.dropped)),
        "failed": failures_document(failed),
    }
    outcome = f"{len(rebuilt.made)} made, {len(rebuilt.dropped)} dropped"
    session.show(document, "\n".join([*_lines(made=rebuilt.made, dropped=rebuilt.dropped), outcome]))
    session.end_if_failed(failed)


def _drop(session: Session, host: str) -> None:
    dropped, kept = session.backend.templates.lease_book.drop_host(host)
    document = {"dropped": list(map(_facts, dropped)), "kept": list(map(_facts, kept))}
    outcome = f"{len(dropped)} dropped, {len(kept)} kept, whose disks can be seen from here"
    session.show(document, "\n".join([*_lines(dropped=dropped, kept=kept), outcome]))


def _lines(**leases: Sequence[Lease]) -> list[str]:
    return [
        output.printable(f"{what} {each.template}: {each.owner.host}:{each.owner.path}")
        for what, found in leases.items()
        for each in found
    ]


def _facts(lease: Lease) -> dict[str, Any]:
    return {"template": lease.template, **vars(lease.owner)}


def _document(lease: Lease, book: LeaseBook) -> dict[str, Any]:
    return {**_facts(lease), "seen": book.is_seen(lease.owner)}


def _table(found: Sequence[Lease], book: LeaseBook) -> str:
    header = ("TEMPLATE", "HOST", "INSTANCE", "DISK", "SEEN", "PATH")
    rows = []
    for each in found:
        owner = each.owner
        seen = "yes" if book.is_seen(owner) else "no"
        rows.append((each.template, owner.host, owner.instance, owner.disk, seen, owner.path))
    return output.table(header, rows)
