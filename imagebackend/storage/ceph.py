# SPDX-License-Identifier: Apache-2.0
"""A pool of a Ceph cluster, through librados and librbd: one connection a process, and typed errors.

The distribution's modules ``rados`` and ``rbd`` (Debian: python3-rados, python3-rbd) are imported when the first
connection is made. librados does not survive a fork: a child makes a connection of its own.

Sources: https://docs.ceph.com/en/latest/rados/api/python/ and https://docs.ceph.com/en/latest/rbd/api/librbdpy/; for
:meth:`Pool.image_id`, :meth:`Pool.metadata` and :meth:`Pool.size` the methods ``get_id``, ``metadata_get`` and
``get_size`` of the object class rbd (src/cls/rbd/cls_rbd.cc), which librbd itself calls when it opens an image.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import errno
import json
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from imagebackend import exceptions

__all__ = ["Layout", "Pool", "Settings", "Watcher"]

LOG = logging.getLogger(__name__)

_INTENTS = "imagebackend.intents"
_INTENTS_AT_ONCE = 1000
_LARGEST = 64 << 10
# CEPH_NOSNAP: the image itself.
_NO_SNAPSHOT = struct.pack("<q", -2)
# Monitors come and go over days, and a client that knows one of them finds the others.
_MONITORS_VALID = 30.0
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


@dataclass(frozen=True)
class Layout:
    """How new images are laid out.

    :ivar features: names as ``rbd_default_features`` has them; empty: the cluster's default.
    :ivar object_size: bytes, a power of two; 0: the cluster's default.
    :ivar data_pool: where the data go, if not into the image's pool.
    """

    features: tuple[str, ...] = ()
    object_size: int = 0
    data_pool: str | None = None


@dataclass(frozen=True)
class Watcher:
    """A client that has an image open for writing.

    :ivar address: as the OSD knows it.
    :ivar client: its number in the cluster.
    """

    address: str
    client: int


@dataclass
class _Cluster:
    """A connection and what was asked over it."""

    rados: Any
    contexts: dict[tuple[str, str], Any] = field(default_factory=dict)
    monitors: tuple[tuple[str, int], ...] = ()
    epoch: int = 0
    asked: float = 0.0


_lock = threading.Lock()
_clusters: dict[Settings, _Cluster] = {}


class Pool:
    """A pool, or a namespace in one. Making the object does no I/O; threads may share it.

    Every method raises, besides what it names, :class:`~imagebackend.exceptions.StorageTimeout` when the cluster does
    not answer, :class:`~imagebackend.exceptions.PermissionDenied`,
    :class:`~imagebackend.exceptions.InsufficientSpace` when the pool is full or over its quota,
    :class:`~imagebackend.exceptions.InvalidConfiguration` when the options lead to no cluster or pool, and
    :class:`~imagebackend.exceptions.StorageError`.

    :param settings: the cluster.
    :param name: the pool.
    :param namespace: empty: the default one.
    """

    def __init__(self, settings: Settings, name: str, namespace: str = "") -> None:
        self.settings = settings
        self.name = name
        self.namespace = namespace

    def spec(self, image: str) -> str:
        """Return ``pool/image`` or ``pool/namespace/image``."""
        return f"{self.name}/{self.namespace}/{image}" if self.namespace else f"{self.name}/{image}"

    def fsid(self) -> str:
        """Return the cluster's id."""
        with self.errors(self.name):
            fsid: str = self._cluster().rados.get_fsid()
            return fsid

    def monitors(self) -> tuple[tuple[str, int], ...]:
        """Return address and port of every monitor, IPv6 without brackets.

        They are asked for at most every 30 seconds, and looked at again only if their map has another epoch.
        """
        with self.errors("monitors"):
            cluster = self._cluster()
            now = time.monotonic()
            if not cluster.monitors or now - cluster.asked > _MONITORS_VALID:
                asked = json.dumps({"prefix": "mon dump", "format": "json"})
                result, answer, reason = cluster.rados.mon_command(asked, b"")
                if result:
                    self._fail(OSError(-result, reason), "mon dump")
                found = json.loads(answer)
                if found["epoch"] != cluster.epoch:
                    cluster.monitors = tuple(_address(monitor) for monitor in found["mons"])
                    cluster.epoch = found["epoch"]
                cluster.asked = now
            return cluster.monitors

    def image_id(self, image: str) -> str | None:
        """Return the id of an image, None if there is none of that name: one request."""
        answer = self._ask(image, f"rbd_id.{image}", "get_id", b"")
        return None if answer is None else _string(answer)

    def metadata(self, image_id: str, key: str) -> str | None:
        """Return what an image's metadata say under ``key``, None if nothing: one request."""
        encoded = key.encode()
        asked = struct.pack("<I", len(encoded)) + encoded
        answer = self._ask(image_id, f"rbd_header.{image_id}", "metadata_get", asked)
        return None if answer is None else _string(answer)

    def size(self, image_id: str) -> int:
        """Return the size of an image in bytes: one request; opening it would take some twenty.

        :raises DiskNotFound: there is none of that id.
        """
        answer = self._ask(image_id, f"rbd_header.{image_id}", "get_size", _NO_SNAPSHOT)
        if answer is None:
            raise exceptions.DiskNotFound(self.spec(image_id))
        _order, size = struct.unpack("<BQ", answer)
        return int(size)

    def images(self) -> list[str]:
        """Return the names of all images, sorted."""
        with self.errors(self.name):
            return sorted(_rbd().RBD().list(self._context()))

    @contextlib.contextmanager
    def open(self, image: str, *, read_only: bool = False, snapshot: str | None = None) -> Iterator[Any]:
        """Give an open ``rbd.Image``; what it raises in the block is translated.

        :raises DiskNotFound: there is none of that name.
        :raises DiskInUse: another client holds it.
        """
        with self.errors(image):
            opened = _rbd().Image(self._context(), image, snapshot=snapshot, read_only=read_only)
            try:
                yield opened
            finally:
                opened.close()

    def create(self, image: str, size: int, layout: Layout) -> None:
        """Make an empty image.

        :param size: bytes.
        :raises DiskExists: there is one of that name.
        """
        with self.errors(image):
            _rbd().RBD().create(self._context(), image, size, old_format=False, **_options(layout))

    def clone(self, parent: Pool, image: str, snapshot: str, clone: str, layout: Layout) -> None:
        """Make an image from a snapshot; it has the snapshot's size and the parent's metadata.

        The metadata are copied last: a clone that has them is whole.

        :param parent: the pool of the image that has the snapshot.
        :raises DiskNotFound: there is no such image or snapshot.
        :raises DiskExists: there is an image ``clone``.
        """
        with self.errors(clone):
            source = parent._context()
            _rbd().RBD().clone(source, image, snapshot, self._context(), clone, **_options(layout))

    def rename(self, image: str, name: str) -> None:
        """Rename an image in one step.

        :raises DiskNotFound: there is none of that name.
        :raises DiskExists: there is one of the other.
        """
        with self.errors(image):
            _rbd().RBD().rename(self._context(), image, name)

    def remove(self, image: str, *, trash_delay: int | None = None) -> None:
        """Remove an image that has no snapshots; do nothing if it is not there.

        :param trash_delay: move it to the trash instead, and protect it there for that many seconds.
        :raises DiskInUse: a client has it open, or it has clones.
        """
        try:
            with self.errors(image):
                if trash_delay is None:
                    _rbd().RBD().remove(self._context(), image)
                else:
                    _rbd().RBD().trash_move(self._context(), image, trash_delay)
        except exceptions.DiskNotFound as error:
            # librbd moves an image to the trash first, and says so too when a full pool has no room for that.
            if self.image_id(image) is not None:
                reason = "the pool has no room for removing it; raise its quota, or add OSDs, and try again"
                raise exceptions.InsufficientSpace(self.spec(image), reason=reason) from error

    def watchers(self, image: str) -> list[Watcher]:
        """Return the clients that have an image open for writing, this process included.

        :raises DiskNotFound: there is none of that name.
        """
        with self.open(image, read_only=True) as opened:
            return [Watcher(each["addr"], each["id"]) for each in opened.watchers_list()]

    def intents(self) -> dict[str, str]:
        """Return every intent on record, by image."""
        rados = _rados()
        intents: dict[str, str] = {}
        last = ""
        with self.errors(_INTENTS):
            while True:
                with rados.ReadOpCtx() as operation:
                    found, _ = self._context().get_omap_vals(operation, last, "", _INTENTS_AT_ONCE)
                    more = self._read_intents(operation, found)
                if not more:
                    return intents
                intents |= more
                last = max(more)

    def intent(self, image: str) -> str | None:
        """Return what is being done to an image, None if nothing: one request."""
        rados = _rados()
        with self.errors(_INTENTS), rados.ReadOpCtx() as operation:
            found, _ = self._context().get_omap_vals_by_keys(operation, (image,))
            return self._read_intents(operation, found).get(image)

    def set_intent(self, image: str, intent: str) -> None:
        """Record what is about to be done to an image, for whoever finds it half done."""
        rados = _rados()
        with self.errors(_INTENTS), rados.WriteOpCtx() as operation:
            context = self._context()
            context.set_omap(operation, (image,), (intent.encode(),))
            context.operate_write_op(operation, _INTENTS)

    def clear_intent(self, image: str) -> None:
        """Drop the intent on an image: it was carried out, or undone."""
        rados = _rados()
        with self.errors(_INTENTS), rados.WriteOpCtx() as operation:
            context = self._context()
            context.remove_omap_keys(operation, (image,))
            context.operate_write_op(operation, _INTENTS)

    @contextlib.contextmanager
    def errors(self, image: str) -> Iterator[None]:
        """Translate what librados and librbd raise in the block into errors of this library.

        :param image: what is worked on.
        """
        try:
            yield
        except Exception as error:
            if type(error).__module__ not in ("rados", "rbd"):
                raise
            self._fail(error, self.spec(image))

    def _fail(self, error: Exception, name: str) -> NoReturn:
        number = abs(getattr(error, "errno", None) or 0)
        if number in _BROKEN:
            with _lock:
                _clusters.pop(self.settings, None)
        raise _translated(error, number, name, self.settings) from error

    def _ask(self, image: str, target: str, method: str, argument: bytes) -> bytes | None:
        """Call a method of the object class rbd; None: there is no such thing."""
        with self.errors(image):
            try:
                _, answer = self._context().execute(target, "rbd", method, argument, _LARGEST)
            except _rados().ObjectNotFound:
                return None
        encoded: bytes = answer
        return encoded

    def _read_intents(self, operation: Any, found: Any) -> dict[str, str]:
        try:
            self._context().operate_read_op(operation, _INTENTS)
        except _rados().ObjectNotFound:
            return {}
        return {key: value.decode("utf-8", "replace") for key, value in found}

    def _context(self) -> Any:
        cluster = self._cluster()
        key = (self.name, self.namespace)
        context = cluster.contexts.get(key)
        if context is None:
            try:
                context = cluster.rados.open_ioctx(self.name)
            except _rados().ObjectNotFound as error:
                reason = (
                    f"the cluster has no pool {self.name!r}; make it with 'ceph osd pool create' and 'rbd pool init'"
                )
                raise exceptions.InvalidConfiguration("[libvirt] images_rbd_pool", reason) from error
            if self.namespace:
                context.set_namespace(self.namespace)
            # A full pool is an error at once, not a wait for somebody to make room.
            context.set_osdmap_full_try()
            cluster.contexts[key] = context
        return context

    def _cluster(self) -> _Cluster:
        cluster = _clusters.get(self.settings)
        if cluster is None:
            with _lock:
                cluster = _clusters.get(self.settings)
                if cluster is None:
                    cluster = _clusters[self.settings] = _Cluster(_connect(self.settings))
        return cluster


def _connect(settings: Settings) -> Any:
    rados = _rados()
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


def _options(layout: Layout) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if layout.features:
        options["features"] = _rbd().RBD().features_from_string(",".join(layout.features))
    if layout.object_size:
        options["order"] = layout.object_size.bit_length() - 1
    if layout.data_pool:
        options["data_pool"] = layout.data_pool
    return options


def _address(monitor: dict[str, Any]) -> tuple[str, int]:
    # Every client speaks to the older protocol's port; only clusters that have switched it off lack it.
    offered = {each["type"]: each["addr"] for each in monitor["public_addrs"]["addrvec"]}
    host, _, port = (offered.get("v1") or offered["v2"]).rpartition(":")
    return host.strip("[]"), int(port)


def _string(answer: bytes) -> str:
    (length,) = struct.unpack_from("<I", answer)
    return answer[4 : 4 + length].decode("utf-8", "replace")


def _rados() -> Any:
    try:
        import rados
    except ImportError as error:
        raise _missing("rados") from error
    return rados


def _rbd() -> Any:
    try:
        import rbd
    except ImportError as error:
        raise _missing("rbd") from error
    return rbd


def _missing(module: str) -> exceptions.Unsupported:
    reason = f"Python's module {module!r} is missing; install the distribution's package python3-{module}"
    return exceptions.Unsupported("a disk in Ceph", reason)


def _abandon() -> None:
    """In a child, leave the parent's connections alone: taking them down would wait for threads that are not there."""
    global _lock, _clusters
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_clusters))
    _lock, _clusters = threading.Lock(), {}


def _disconnect() -> None:
    """Take the connections down while Python can still answer their threads."""
    for cluster in list(_clusters.values()):
        for context in cluster.contexts.values():
            context.close()
        cluster.rados.shutdown()
    _clusters.clear()


os.register_at_fork(after_in_child=_abandon)
atexit.register(_disconnect)
