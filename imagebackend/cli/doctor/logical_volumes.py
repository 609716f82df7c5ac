# SPDX-License-Identifier: Apache-2.0
"""Can the volume group hold disks?"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.cli.doctor.finding import Finding, error, fine, warning
from imagebackend.images import lvm_options
from imagebackend.storage.lvm2 import Volume

__all__ = ["Group", "judge_group", "look_at_group"]

_GROUP = "[libvirt] images_volume_group"
_POOL = "[libvirt] images_thin_pool"
_ENCRYPTION = "[ephemeral_storage_encryption] enabled"


@dataclass(frozen=True)
class Group:
    """A volume group.

    :ivar volumes: what is in it.
    :ivar failure: why that could not be found out; None: it could.
    :ivar cryptsetup: there is a command of that name.
    """

    volumes: tuple[Volume, ...] = ()
    failure: exceptions.ImageBackendError | None = None
    cryptsetup: bool = True


def look_at_group(conf: cfg.ConfigOpts) -> Group:
    """Ask LVM for what is in the volume group; nothing is made."""
    cryptsetup = shutil.which("cryptsetup", path="/usr/sbin:/usr/bin:/sbin:/bin") is not None
    try:
        return Group(tuple(lvm_options.group(conf).report()), None, cryptsetup)
    except exceptions.ImageBackendError as failure:
        return Group((), failure, cryptsetup)


def judge_group(found: Group, conf: cfg.ConfigOpts) -> list[Finding]:
    """Return what is to be said of a volume group and of the thin pool in it."""
    name = conf.libvirt.images_volume_group
    if found.failure is not None:
        advice = (
            "make it (vgcreate), correct the option, or let LVM see its devices (lvmdevices, filters in lvm.conf); "
            "LVM's commands need root: see [DEFAULT] root_helper"
        )
        return [error(_GROUP, str(found.failure), advice)]
    findings = [fine(_GROUP, f"{name}: {len(found.volumes)} volumes")]
    if conf.libvirt.images_thin_pool:
        findings.append(_judge_pool(found, conf))
    if conf.ephemeral_storage_encryption.enabled and not found.cryptsetup:
        findings.append(error(_ENCRYPTION, "there is no cryptsetup", "install the package cryptsetup-bin"))
    return findings


def _judge_pool(found: Group, conf: cfg.ConfigOpts) -> Finding:
    libvirt = conf.libvirt
    name = libvirt.images_thin_pool
    pool = next((volume for volume in found.volumes if volume.name == name), None)
    if pool is None:
        if libvirt.images_thin_pool_size:
            return fine(_POOL, f"{name} is not there yet; it will be made with {libvirt.images_thin_pool_size} GiB")
        return error(_POOL, f"there is no {name}", "make it (lvcreate --type thin-pool), or set images_thin_pool_size")
    if pool.kind != "thin-pool":
        return error(_POOL, f"{name} is a {pool.kind} volume", "name a thin pool ('lvs -o+segtype')")
    data, metadata = pool.data_percent, pool.metadata_percent
    if data is None or metadata is None:
        return warning(_POOL, f"{name} is not active", "it will be activated; 'lvs -a' shows its state")
    message = f"{name}: {data:.1f} % of its data and {metadata:.1f} % of its metadata space are used"
    if data > libvirt.images_thin_pool_data_limit or metadata > libvirt.images_thin_pool_metadata_limit:
        return error(_POOL, f"{message}; no disk is made any more", "extend it (lvextend), or remove disks")
    return fine(_POOL, message)
