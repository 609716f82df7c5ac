# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template``: the images that disks are made from."""

from __future__ import annotations

import click

from imagebackend.cli.template import changes, check, leases, listing, native, prune, pull
from imagebackend.cli.template.pull import default_name

__all__ = ["default_name", "template"]


@click.group
def template() -> None:
    """Images that disks are made from, in the template cache."""


for _command in (
    *(check.check, pull.add, pull.pull),
    *(listing.list_, listing.show, listing.inspect, listing.du),
    *(changes.tag, changes.untag, changes.label, changes.pin, changes.unpin, changes.verify, changes.remove),
    *(prune.prune, leases.leases, native.native),
):
    template.add_command(_command)
