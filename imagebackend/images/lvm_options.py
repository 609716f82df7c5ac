# SPDX-License-Identifier: Apache-2.0
"""What the options say about disks in logical volumes. No I/O."""

from __future__ import annotations

import os
import shlex

from oslo_config import cfg

from imagebackend import exceptions, locks
from imagebackend.images import lvm_naming
from imagebackend.storage import lvm2
from imagebackend.storage.lvm2 import Layout, VolumeGroup

__all__ = ["group", "layout", "maker_tag", "root_helper", "thin_pool"]


def group(conf: cfg.ConfigOpts, name: str | None = None) -> VolumeGroup:
    """Return the volume group that stores disks.

    :param name: that of another one.
    :raises InvalidConfiguration: none is configured, or none can be called that.
    """
    option = "[libvirt] images_volume_group"
    name = name or conf.libvirt.images_volume_group
    if not name:
        raise exceptions.InvalidConfiguration(option, "needed for disks in logical volumes; 'vgs' lists what there is")
    try:
        return VolumeGroup(name, timeout=conf.libvirt.images_tool_timeout, root_helper=root_helper(conf))
    except exceptions.InvalidName as error:
        raise exceptions.InvalidConfiguration(option, str(error)) from error


def thin_pool(conf: cfg.ConfigOpts) -> str | None:
    """Return the name of the pool that stores disks; None: they are volumes of their own.

    :raises InvalidConfiguration: none can be called that.
    """
    name = conf.libvirt.images_thin_pool
    try:
        return lvm2.check_name(name) if name else None
    except exceptions.InvalidName as error:
        raise exceptions.InvalidConfiguration("[libvirt] images_thin_pool", str(error)) from error


def layout(conf: cfg.ConfigOpts) -> Layout:
    """Return how volumes that are in no pool lie on their physical volumes."""
    return Layout(conf.libvirt.images_volume_stripes, conf.libvirt.images_volume_raid_type)


def maker_tag(conf: cfg.ConfigOpts) -> str:
    """Return the tag of volumes that nobody makes or removes but under this host's locks in ``instances_path``."""
    return lvm_naming.maker_tag(conf.host, locks.folder(os.path.abspath(conf.instances_path)))


def root_helper(conf: cfg.ConfigOpts) -> list[str]:
    """Return what runs commands as root, as words.

    :raises InvalidConfiguration: its quotes are not balanced.
    """
    try:
        return shlex.split(conf.root_helper)
    except ValueError as error:
        raise exceptions.InvalidConfiguration("[DEFAULT] root_helper", f"{conf.root_helper!r}: {error}") from error
