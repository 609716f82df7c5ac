# SPDX-License-Identifier: Apache-2.0
"""``imagebackend disk create``: from a template, empty, or formatted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from imagebackend import exceptions
from imagebackend.cli.disks import describe
from imagebackend.cli.output import human_size
from imagebackend.cli.parameters import (
    complete_disk,
    complete_format,
    complete_instance,
    complete_template,
    parse_format,
    parse_size,
)
from imagebackend.cli.session import Session
from imagebackend.cli.template import default_name

if TYPE_CHECKING:
    from imagebackend.images.base import Image

__all__ = ["create"]

_CONTENTS = ("blank", "ephemeral", "swap")


@click.command
@click.option(
    "--template", metavar="NAME", shell_complete=complete_template, help="Make it from this template of the cache."
)
@click.option("--from", "url", metavar="URL_OR_FILE", help="Fetch the template from here if it is not in the cache.")
@click.option(
    "--format",
    "claimed",
    type=parse_format,
    shell_complete=complete_format,
    metavar="FORMAT",
    help="With --from: refuse an image in another format.",
)
@click.option(
    "--checksum",
    metavar="ALG:HEX_OR_URL",
    help="With --from: refuse an image with another digest, as for template add.",
)
@click.option("--blank", "content", flag_value="blank", help="Make an empty disk, without a template.")
@click.option("--ephemeral", "content", flag_value="ephemeral", help="Make a disk with an empty file system.")
@click.option("--swap", "content", flag_value="swap", help="Make a swap disk.")
@click.option(
    "--filesystem", metavar="NAME", help="With --ephemeral. Default: as configured, or what suits --os-type."
)
@click.option(
    "--os-type",
    metavar="NAME",
    default="linux",
    show_default=True,
    help="With --ephemeral: the guest's operating system.",
)
@click.option("--label", metavar="NAME", help="With --ephemeral and --swap: the label.")
@click.option("--size", metavar="SIZE", type=parse_size, help="Default: as large as the template.")
@click.option("--type", "image_type", metavar="TYPE", help="raw, qcow2 … Default: [libvirt] images_type.")
@click.argument("instance", shell_complete=complete_instance)
@click.argument("disk", shell_complete=complete_disk)
@click.pass_obj
def create(
    session: Session,
    instance: str,
    disk: str,
    template: str | None,
    url: str | None,
    claimed: str | None,
    checksum: str | None,
    content: str | None,
    filesystem: str | None,
    os_type: str,
    label: str | None,
    size: int | None,
    image_type: str | None,
) -> None:
    """Make a disk from a template, or an empty or formatted one.

    The template has to be in the cache, or --from says where to fetch it.
    """
    if (template or url) and content:
        raise click.UsageError(f"--{content} is for disks without a template")
    if (claimed or checksum) and not url:
        raise click.UsageError("--format and --checksum are for --from")
    if (filesystem and content != "ephemeral") or (label and content not in ("ephemeral", "swap")):
        raise click.UsageError("--filesystem is for --ephemeral, and --label for --ephemeral and --swap")
    image = session.backend.image(instance, disk, image_type)
    if template or url:
        name = template or default_name(url or "")
        fetch = _fetch(session, name, url, checksum, claimed)
        _refuse_existing(image)
        with session.progress(f"Making {disk}") as progress:
            image.cache(fetch, name, size, progress=progress)
    elif content:
        if size is None:
            raise click.UsageError(f"--{content} needs a --size")
        _refuse_existing(image)
        _make_without_template(image, content, size, filesystem, os_type, label)
    else:
        contents = ", ".join(f"--{each}" for each in _CONTENTS)
        raise click.UsageError(f"one of --template, --from, {contents} is needed")
    made = describe(image)
    session.show(made, f"disk {image.path} made: {made['format']}, {human_size(made['size'])}")


def _refuse_existing(image: Image) -> None:
    # The library makes a disk once and says yes ever after; at a shell it would hide that nothing was made.
    if image.exists():
        raise exceptions.DiskExists(image.path)


def _fetch(
    session: Session, name: str, url: str | None, checksum: str | None, claimed: str | None
) -> Callable[..., object]:
    if url is None:

        def refuse(target: str, progress: object = None) -> object:
            raise exceptions.TemplateNotFound(name, "add it with 'imagebackend template add', or say --from")

        return refuse
    from imagebackend.cli.shown_source import ShownSource
    from imagebackend.templates.sources import open_source

    source = open_source(url, session.conf, checksum=checksum, disk_format=claimed)
    return ShownSource(session, name, source).fetch


def _make_without_template(
    image: Image, content: str, size: int, filesystem: str | None, os_type: str, label: str | None
) -> None:
    from imagebackend.images.ephemeral import create_ephemeral, create_swap

    if content == "ephemeral":
        create_ephemeral(image, size, os_type=os_type, specified_fs=filesystem, fs_label=label)
    elif content == "swap":
        create_swap(image, size, label=label)
    else:
        image.create_from_func(lambda target: None, size)
