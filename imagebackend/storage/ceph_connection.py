# SPDX-License-Identifier: Apache-2.0
"""Connections to Ceph clusters: one a cluster, user and process, shared by threads, made again after it broke.

The distribution's modules ``rados`` and ``rbd`` (Debian: python3-rados, python3-rbd) are imported when the first
connection is made. librados does not survive a fork: a child makes a connection of its own.

Source: https://docs.ceph.com/en/latest/rados/api/python/.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import errno
import importlib
import logging
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from imagebackend import exceptions

__all__ = [
    "Cluster",
    "Settings",
    "abandon",
    "cluster",
    "finish",
    "import_rados",
    "import_rbd",
    "librbd_version",
    "translated",
]

LOG = logging.getLogger(__name__)

_BROKEN = (errno.ESHUTDOWN, errno.ENOTCONN)


@dataclass(frozen=True)
class Settings:
    """How to reach a cluster.

    :ivar conf_file: path of ceph.conf; empty: Ceph's own places.
    :ivar user: without ``client.``; None: ``admin``, as Ceph has it.
    :ivar connect_timeout: seconds.
    :ivar operation_timeout: seconds that one request to a monitor or OSD may take; 0: no limit.
    :ivar clone_format: ``auto``, ``1`` or ``2``.
    """

    conf_file: str
    user: str | None
    connect_timeout: int
    operation_timeout: int
    clone_format: str


@dataclass
class Cluster:
    """A connection and what was asked over it."""

    rados: Any
    contexts: dict[tuple[str, str], Any] = field(default_factory=dict)
    monitors: tuple[tuple[str, int], ...] = ()
    epoch: int = 0
    asked: float = 0.0


_lock = threading.Lock()
_clusters: dict[Settings, Cluster] = {}


def cluster(settings: Settings) -> Cluster:
    """Return the connection of this process to a cluster.

    :raises StorageTimeout: no monitor answers.
    :raises InvalidConfiguration: the options lead to no cluster, or to no user of it.
    """
    found = _clusters.get(settings)
    if found is None:
        with _lock:
            found = _clusters.get(settings)
            if found is None:
                found = _clusters[settings] = Cluster(_connect(settings))
    return found


def translated(error: Exception, name: str, settings: Settings) -> exceptions.ImageBackendError:
    """Return this library's error for one of librados or librbd; a connection that is broken is not used again.

    :param name: what was worked on.
    """
    number = abs(getattr(error, "errno", None) or 0)
    if number in _BROKEN:
        with _lock:
            _clusters.pop(settings, None)
    return _translated(error, number, name, settings)


def abandon(settings: Settings, image: Any) -> None:
    """Leave alone an open image that cannot be closed, and its connection; the next call makes another.

    What librbd still does with it ends when the OSDs are back, or with the process.
    """
    with _lock:
        left = _clusters.pop(settings, None)
    # Python would close them when nothing refers to them any more, and wait for that.
    _keep_for_ever(image)
    _keep_for_ever(left)
    LOG.warning("a connection to Ceph is given up: an image could not be closed, its OSDs do not answer")


def finish(completion: Any) -> None:
    """Wait for a request of librbd, and raise what went wrong with it."""
    completion.wait_for_complete_and_cb()
    result = completion.get_return_value()
    if result < 0:
        raise import_rbd().OSError("request to an OSD failed", errno=-result)


def _connect(settings: Settings) -> Any:
    rados = import_rados()
    timeout = settings.operation_timeout
    options = {"rados_mon_op_timeout": str(timeout), "rados_osd_op_timeout": str(timeout)}
    if settings.connect_timeout > 0:
        # The binding's connect() ignores its argument of that name.
        options["client_mount_timeout"] = str(settings.connect_timeout)
    if settings.clone_format != "auto":
        options["rbd_default_clone_format"] = settings.clone_format
    where = settings.conf_file or rados.Rados.DEFAULT_CONF_FILES
    try:
        connection = rados.Rados(rados_id=settings.user, conffile=where, conf=options)
    except rados.Error as error:
        reason = f"{settings.conf_file or '/etc/ceph/ceph.conf'} cannot be read: {error}"
        raise exceptions.InvalidConfiguration("[libvirt] images_rbd_ceph_conf", reason) from error
    try:
        # A client's address in the cluster is a random number, of a generator that each thread seeds by itself:
        # processes that are forked from one would all draw the same, and be cut off together with one of them.
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(connection.connect).result()
    except rados.ObjectNotFound as error:
        reason = f"no key of client.{settings.user or 'admin'} is in the keyrings that ceph.conf names"
        raise exceptions.InvalidConfiguration("[libvirt] rbd_user", reason) from error
    except rados.TimedOut as error:
        raise exceptions.StorageTimeout("connecting to the monitors", settings.connect_timeout) from error
    except rados.Error as error:
        number = abs(getattr(error, "errno", None) or 0)
        raise _translated(error, number, f"client.{settings.user or 'admin'}", settings) from error
    LOG.debug("connected to Ceph cluster %s", connection.get_fsid())
    return connection


def _translated(error: Exception, number: int, name: str, settings: Settings) -> exceptions.ImageBackendError:
    match number:
        case errno.ENOENT:
            return exceptions.DiskNotFound(name)
        case errno.EEXIST:
            return exceptions.DiskExists(name)
        case errno.EBUSY | errno.EROFS:
            return exceptions.DiskInUse(name, "another client has it open, or holds its lock; stop the guest first")
        case errno.EPERM | errno.EACCES:
            reason = "the cluster denies it; give the user 'profile rbd' on this pool ('ceph auth caps')"
            return exceptions.PermissionDenied(name, number, reason)
        case errno.ENOSPC | errno.EDQUOT:
            return exceptions.InsufficientSpace(name, reason="the pool is full, or over its quota")
        case errno.ETIMEDOUT:
            return exceptions.StorageTimeout(name, settings.operation_timeout)
    return exceptions.StorageError(name, str(error), number or None)


def import_rados() -> Any:
    """Return the module ``rados``.

    :raises Unsupported: it is not installed; says which package has it.
    """
    return _imported("rados")


def import_rbd() -> Any:
    """Return the module ``rbd``.

    :raises Unsupported: it is not installed; says which package has it.
    """
    return _imported("rbd")


def librbd_version() -> str:
    """Return the version of librbd, as in ``1.16.0``, which comes with Ceph 16.

    :raises Unsupported: as :func:`import_rbd` does.
    """
    return ".".join(str(part) for part in import_rbd().RBD().version())


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"Python's module {module!r} is missing; install the distribution's package python3-{module}"
        raise exceptions.Unsupported("a disk in Ceph", reason) from error


def _abandon() -> None:
    """In a child, leave the parent's connections alone: taking them down would wait for threads that are not there."""
    global _lock, _clusters
    _keep_for_ever(_clusters)
    _lock, _clusters = threading.Lock(), {}


def _keep_for_ever(object_: object) -> None:
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(object_))


def _disconnect() -> None:
    """Take the connections down while Python can still answer their threads."""
    for cluster in list(_clusters.values()):
        for context in cluster.contexts.values():
            context.close()
        cluster.rados.shutdown()
    _clusters.clear()


os.register_at_fork(after_in_child=_abandon)
atexit.register(_disconnect)
