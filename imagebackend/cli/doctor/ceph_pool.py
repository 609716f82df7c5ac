# SPDX-License-Identifier: Apache-2.0
"""Can disks be made in the Ceph pool, and can guests have them?"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass

from oslo_config import cfg

from imagebackend import exceptions, process
from imagebackend.cli import hypervisor
from imagebackend.cli.doctor.finding import Finding, error, fine, warning
from imagebackend.images import rbd_encryption, rbd_options
from imagebackend.storage import ceph, ceph_connection

__all__ = [
    "PoolFacts",
    "judge_driver",
    "judge_pool",
    "judge_secret",
    "look_at_driver",
    "look_at_pool",
    "look_at_secret",
]

_CHECK = "Ceph pool"
_TIMEOUT = 15
_LITTLE = 0.1
_MIB = 1 << 20


@dataclass(frozen=True)
class PoolFacts:
    """What was learned of the pool.

    :ivar failure: why no disk can be made in it; None: one can.
    :ivar name: the pool, with its namespace.
    :ivar fsid: the cluster.
    :ivar librbd: the version of librbd.
    :ivar monitors: how many monitors the cluster has.
    :ivar free, size: bytes of the cluster's storage, not divided by the number of copies.
    """

    failure: exceptions.ImageBackendError | None = None
    name: str = ""
    fsid: str = ""
    librbd: str = ""
    monitors: int = 0
    free: int = 0
    size: int = 0


def look_at_pool(conf: cfg.ConfigOpts) -> PoolFacts:
    """Connect to the cluster, and make and remove an image in the pool as templates and disks are made."""
    try:
        rbd_encryption.can_clone(conf)
        configured, layout = rbd_options.pool(conf), rbd_options.layout(conf)
        settings = dataclasses.replace(configured.settings, operation_timeout=_TIMEOUT)
        pool = ceph.Pool(settings, configured.name, configured.namespace)
        # What is left of a killed one is swept as an import that was cut short.
        image = f"partial:template:doctor-{secrets.token_hex(8)}"
        pool.create(image, _MIB, layout)
        try:
            with pool.open(image) as opened:
                opened.write(b"doctor", 0)
        finally:
            pool.remove(image)
        free, size = pool.cluster_space()
        version = ceph_connection.librbd_version()
        name = pool.spec("").rstrip("/")
        return PoolFacts(None, name, pool.fsid(), version, len(pool.monitors()), free, size)
    except exceptions.ImageBackendError as failure:
        return PoolFacts(failure)


def judge_pool(found: PoolFacts) -> list[Finding]:
    """Return what is to be said of the pool."""
    match found.failure:
        case None:
            pass
        case exceptions.InvalidConfiguration() as failure:
            return [error(failure.option, failure.reason, "correct it")]
        case exceptions.StorageTimeout() as failure:
            advice = "see whether the monitors that ceph.conf names run and can be reached from here ('ceph -s')"
            return [error(_CHECK, str(failure), advice)]
        case exceptions.PermissionDenied() | exceptions.InsufficientSpace() | exceptions.Unsupported() as failure:
            return [error(_CHECK, str(failure), "do what it says, then run this again")]
        case failure:
            return [error(_CHECK, str(failure), "see 'ceph health detail', and 'rbd pool init' if the pool is new")]
    message = f"{found.name} of cluster {found.fsid}, librbd {found.librbd}; an image was made and removed"
    findings = [fine(_CHECK, message)]
    if found.monitors == 1:
        advice = "add monitors; a cluster in production has three or more"
        findings.append(warning("Ceph monitors", "there is one; while it is away, snapshots cannot be made", advice))
    if found.free < _LITTLE * found.size:
        message = f"{found.free >> 30} of {found.size >> 30} GiB of the cluster are free"
        findings.append(warning("Ceph space", message, "add OSDs, or remove disks: a full cluster stops every guest"))
    return findings


def look_at_driver() -> bool:
    """Return whether QEMU can open disks in Ceph; its driver is a package of its own."""
    # Without a cluster in sight, the driver fails at once, and says something else than that it is not there.
    command = ["qemu-img", "info", "--image-opts", "driver=rbd,pool=none,image=none,conf=/dev/null"]
    try:
        return "Unknown driver" not in process.run(command, timeout=_TIMEOUT, success=(0, 1)).stderr
    except exceptions.ToolFailed:
        return False


def judge_driver(*, is_there: bool) -> Finding:
    """Return what is to be said of QEMU's driver."""
    if is_there:
        return fine("QEMU's rbd driver", "there")
    advice = "install the package qemu-block-extra"
    return error("QEMU's rbd driver", "it is missing, so that no guest can have a disk in Ceph", advice)


def look_at_secret(conf: cfg.ConfigOpts, uri: str) -> str | None:
    """Return why libvirt cannot give guests the key that they need; None: it can, or they need none."""
    uuid = conf.libvirt.rbd_secret_uuid
    if not uuid:
        return "rbd_user is set without it" if conf.libvirt.rbd_user else None
    import libvirt

    try:
        with hypervisor.connection(uri) as connection:
            secret = connection.secretLookupByUUIDString(uuid)
            if secret.usageType() != libvirt.VIR_SECRET_USAGE_TYPE_CEPH:
                return f"libvirt's secret {uuid} is not for Ceph"
            secret.value()
    except libvirt.libvirtError as failure:
        # A private one tells its value to nobody but QEMU.
        return None if failure.get_error_code() == libvirt.VIR_ERR_INVALID_SECRET else str(failure)
    except exceptions.ImageBackendError as failure:
        return str(failure)
    return None


def judge_secret(failure: str | None) -> list[Finding]:
    """Return what is to be said of the secret."""
    if failure is None:
        return []
    advice = "define a secret of type ceph with the key of rbd_user ('virsh secret-define', 'virsh secret-set-value')"
    return [error("[libvirt] rbd_secret_uuid", failure, advice)]
