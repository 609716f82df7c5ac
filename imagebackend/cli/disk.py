# SPDX-License-Identifier: Apache-2.0
"""``imagebackend disk``: the disks of guests."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.disk_creation import create
from imagebackend.cli.disks import describe, find
from imagebackend.cli.exit_status import status_of
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import FILE_FORMATS, complete_disk, complete_instance, parse_size
from imagebackend.cli.session import Session
from imagebackend.cli.snapshot import snapshot

if TYPE_CHECKING:
    from imagebackend.images.base import Image

__all__ = ["disk"]

_BUSES = ("virtio", "scsi", "sata", "ide", "usb", "fdc", "xen", "sd")
_CACHE_MODES = ("default", "none", "writethrough", "writeback", "directsync", "unsafe")
_DEVICES = ("disk", "cdrom", "floppy", "lun")


@click.group
def disk() -> None:
    """Disks of guests. INSTANCE is the guest's UUID or name; DISK is the disk's name in it, such as disk."""


disk.add_command(create)
disk.add_command(snapshot)


@disk.command("list")
@click.argument("instance", shell_complete=complete_instance, required=False)
@click.pass_obj
def list_(session: Session, instance: str | None) -> None:
    """List the disks of an instance, or of all."""
    described = []
    for image in session.backend.disks(instance):
        # One that was removed since it was found is no longer a disk.
        with contextlib.suppress(exceptions.DiskNotFound):
            described.append(_describe_soundly(image))
    rows = [
        (
            each["instance"],
            each["disk"],
            each["format"] or "-",
            _size(each["size"]),
            _size(each["allocated"]),
            each["template"] or "-",
            each["error"]["message"] if "error" in each else "",
        )
        for each in described
    ]
    header = ("INSTANCE", "DISK", "FORMAT", "SIZE", "ALLOCATED", "TEMPLATE", "")
    session.show({"disks": described}, output.table(header, rows))


@disk.command
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.pass_obj
def show(session: Session, instance: str, disk: str) -> None:
    """Show what a disk is."""
    shown = describe(find(session.backend, instance, disk))
    pairs = [
        ("instance", shown["instance"]),
        ("disk", shown["disk"]),
        ("type", shown["type"]),
        ("path", shown["path"]),
        ("format", shown["format"]),
        ("size", f"{human_size(shown['size'])} ({shown['size']} bytes)"),
        ("allocated", _size(shown["allocated"])),
        ("template", shown["template"] or "none: it stands alone"),
        *(("backing file", path) for path in shown["backing_files"]),
        ("chain depth", str(shown["chain_depth"])),
        ("in use", {None: "unknown", True: "yes", False: "no"}[shown["in_use"]]),
        *(("snapshot", f"{each['name']} ({each['created']})") for each in shown["snapshots"]),
    ]
    session.show(shown, output.facts(pairs))


@disk.command
@click.option("--bus", type=click.Choice(_BUSES), default="virtio", show_default=True, help="The guest's controller.")
@click.option("--dev", metavar="NAME", default="vda", show_default=True, help="The name of the device in the guest.")
@click.option("--device", type=click.Choice(_DEVICES), default="disk", show_default=True, help="What the guest sees.")
@click.option(
    "--cache-mode",
    type=click.Choice(_CACHE_MODES),
    help="Default: as [libvirt] disk_cachemodes says, or none where direct I/O works and writeback elsewhere.",
)
@click.option("--boot-order", metavar="NUMBER", type=click.IntRange(min=1), help="The place in the boot order.")
@click.option("--unit", metavar="NUMBER", type=click.IntRange(min=0), help="The unit on the SCSI controller.")
@click.option("--serial", metavar="NUMBER", help="The serial number that the guest sees.")
@click.option(
    "--extra-spec",
    "extra_specs",
    metavar="KEY=VALUE",
    multiple=True,
    help="A limit on I/O, as a flavor's extra specs say it: quota:disk_read_iops_sec=500.",
)
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.pass_obj
def xml(
    session: Session,
    instance: str,
    disk: str,
    bus: str,
    dev: str,
    device: str,
    cache_mode: str | None,
    boot_order: int | None,
    unit: int | None,
    serial: str | None,
    extra_specs: tuple[str, ...],
) -> None:
    """Print the <disk> element for a domain's XML."""
    specs = {}
    for spec in extra_specs:
        key, equals, value = spec.partition("=")
        if not equals:
            raise click.BadParameter(f"{spec!r} is not KEY=VALUE", param_hint="--extra-spec")
        specs[key] = value
    described = find(session.backend, instance, disk).libvirt_info(
        bus, dev, device, cache_mode, specs, boot_order=boot_order, disk_unit=unit, serial=serial
    )
    text = described.to_xml()
    session.show({"xml": text}, text.rstrip("\n"))


@disk.command
@click.option("--domain", metavar="NAME", help="The running libvirt domain that has the disk: name or UUID.")
@click.option("--connect", metavar="URI", help="Its hypervisor. Default: the system's, by [libvirt] virt_type.")
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.argument("size", type=parse_size)
@click.pass_obj
def resize(session: Session, instance: str, disk: str, size: int, domain: str | None, connect: str | None) -> None:
    """Make a disk larger; it is never made smaller.

    A disk that a running guest holds is resized through its domain, and the guest sees the new size at once.
    """
    if connect is not None and domain is None:
        raise click.UsageError("--connect is for --domain")
    image = find(session.backend, instance, disk)
    if domain is None:
        image.resize_image(size)
    else:
        from imagebackend.cli import hypervisor

        with hypervisor.connection(connect or hypervisor.default_uri(session.conf.libvirt.virt_type)) as connection:
            image.resize_image(size, domain=hypervisor.domain(connection, domain))
    session.show(describe(image), f"disk {image.path}: {human_size(image.get_disk_size(image.path))}")


@disk.command
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.pass_obj
def flatten(session: Session, instance: str, disk: str) -> None:
    """Cut a disk's tie to its template.

    The disk then holds all its data itself, and the template can be removed.
    """
    image = find(session.backend, instance, disk)
    with session.progress(f"Flattening {disk}") as progress:
        image.flatten(progress=progress)
    session.show(describe(image), f"disk {image.path} stands alone")


@disk.command
@click.option("--format", "out_format", type=click.Choice(FILE_FORMATS), help="Default: as configured, or the disk's.")
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.argument("target", type=click.Path(readable=False))
@click.pass_obj
def extract(session: Session, instance: str, disk: str, target: str, out_format: str | None) -> None:
    """Write a standalone copy of a disk to a file.

    A file that is there is replaced once the copy is whole.
    """
    image = find(session.backend, instance, disk)
    with session.progress(f"Extracting {disk}") as progress:
        image.snapshot_extract(target, out_format, progress=progress)
    size = os.stat(target).st_size
    shown = f"disk {image.path} extracted to {target}: {human_size(size)}"
    session.show({"target": os.path.abspath(target), "file_size": size}, output.printable(shown))


@disk.command
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.pass_obj
def remove(session: Session, instance: str, disk: str) -> None:
    """Remove a disk with its snapshots.

    Of a disk that is not there, what an interrupted removal left is cleared, and the exit status is 3.
    """
    try:
        image = find(session.backend, instance, disk)
    except exceptions.DiskNotFound:
        session.backend.image(instance, disk).remove()
        raise
    image.remove()
    session.show({"removed": image.path}, f"disk {image.path} removed")


def _describe_soundly(image: Image) -> dict[str, Any]:
    """Describe a disk also if it is damaged: the list must not end there."""
    try:
        return describe(image)
    except exceptions.DiskNotFound:
        raise
    except exceptions.ImageBackendError as error:
        unknown = dict.fromkeys(("format", "size", "allocated", "template"))
        names = {"instance": image.instance, "disk": image.disk_name, "path": image.path}
        return {**names, **unknown, "error": output.error_document(error, status_of(error))}


def _size(size: int | None) -> str:
    return "-" if size is None else human_size(size)
