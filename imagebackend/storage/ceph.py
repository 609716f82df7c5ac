# SPDX-License-Identifier: Apache-2.0
"""A pool of a Ceph cluster, through librados and librbd, with typed errors.

Sources: https://docs.ceph.com/en/latest/rados/api/python/ and https://docs.ceph.com/en/latest/rbd/api/librbdpy/; for
:meth:`Pool.image_id`, :meth:`Pool.metadata` and :meth:`Pool.size` the methods ``get_id``, ``metadata_get`` and
``get_size`` of the object class rbd (src/cls/rbd/cls_rbd.cc), which librbd itself calls when it opens an image.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import ceph_connection
from imagebackend.storage.ceph_connection import Settings, import_rados, import_rbd

__all__ = ["Layout", "Pool", "Settings", "Watcher"]

LOG = logging.getLogger(__name__)

_INTENTS = "imagebackend.intents"
_INTENTS_AT_ONCE = 1000
_LARGEST = 64 << 10
# CEPH_NOSNAP: the image itself.
_NO_SNAPSHOT = struct.pack("<q", -2)
# Monitors come and go over days, and a client that knows one of them finds the others.
_MONITORS_VALID = 30.0
_REQUESTS_TO_CLOSE = 4


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
            fsid: str = ceph_connection.cluster(self.settings).rados.get_fsid()
            return fsid

    def monitors(self) -> tuple[tuple[str, int], ...]:
        """Return address and port of every monitor, IPv6 without brackets.

        They are asked for at most every 30 seconds, and looked at again only if their map has another epoch.
        """
        with self.errors("monitors"):
            cluster = ceph_connection.cluster(self.settings)
            now = time.monotonic()
            if not cluster.monitors or now - cluster.asked > _MONITORS_VALID:
                asked = json.dumps({"prefix": "mon dump", "format": "json"})
                result, answer, reason = cluster.rados.mon_command(asked, b"")
                if result:
                    failure = OSError(-result, reason)
                    raise ceph_connection.translated(failure, "monitors", self.settings) from failure
                found = json.loads(answer)
                if found["epoch"] != cluster.epoch:
                    cluster.monitors = tuple(_address(monitor) for monitor in found["mons"])
                    cluster.epoch = found["epoch"]
                cluster.asked = now
            return cluster.monitors

    def cluster_space(self) -> tuple[int, int]:
        """Return how many bytes of the cluster's storage are free, and how many there are; copies count."""
        with self.errors(self.name):
            found = ceph_connection.cluster(self.settings).rados.get_cluster_stats()
            return found["kb_avail"] << 10, found["kb"] << 10

    def image_id(self, image: str) -> str | None:
        """Return the id of an image, None if there is none of that name: one request."""
        answer = self._ask(image, f"rbd_id.{image}", "get_id", b"")
        return None if answer is None else _string(answer)

    def image_id_and_intent(self, image: str) -> tuple[str | None, str | None]:
        """Return :meth:`image_id` and :meth:`intent`, asked for at the same time: one request's time."""
        answers: list[bytes] = []
        with self.errors(image):
            asked = self._context().aio_execute(
                f"rbd_id.{image}", "rbd", "get_id", b"", _LARGEST, lambda _completion, answer: answers.append(answer)
            )
            intent = self.intent(image)
            asked.wait_for_complete_and_cb()
            result = asked.get_return_value()
            if result == -errno.ENOENT:
                return None, intent
            if result < 0:
                raise import_rados().OSError("request to an OSD failed", errno=-result)
        return _string(answers[0]), intent

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
            return sorted(import_rbd().RBD().list(self._context()))

    @contextlib.contextmanager
    def open(self, image: str, *, read_only: bool = False, snapshot: str | None = None) -> Iterator[Any]:
        """Give an open ``rbd.Image``; what it raises in the block is translated.

        :raises DiskNotFound: there is none of that name.
        :raises DiskInUse: another client holds it.
        """
        with self.errors(image):
            opened = import_rbd().Image(self._context(), image, snapshot=snapshot, read_only=read_only)
            with contextlib.ExitStack() as undo:
                undo.callback(self._close_quietly, opened, image)
                yield opened
                undo.pop_all()
            self._close(opened, image)

    def create(self, image: str, size: int, layout: Layout) -> None:
        """Make an empty image.

        :param size: bytes.
        :raises DiskExists: there is one of that name.
        """
        with self.errors(image):
            import_rbd().RBD().create(self._context(), image, size, old_format=False, **_options(layout))

    def clone(self, parent: Pool, image: str, snapshot: str, clone: str, layout: Layout) -> None:
        """Make an image from a snapshot; it has the snapshot's size and the parent's metadata.

        The metadata are copied last: a clone that has them is whole.

        :param parent: the pool of the image that has the snapshot.
        :raises DiskNotFound: there is no such image or snapshot.
        :raises DiskExists: there is an image ``clone``.
        """
        with self.errors(clone):
            source = parent._context()
            import_rbd().RBD().clone(source, image, snapshot, self._context(), clone, **_options(layout))

    def rename(self, image: str, name: str) -> None:
        """Rename an image in one step.

        :raises DiskNotFound: there is none of that name.
        :raises DiskExists: there is one of the other.
        """
        with self.errors(image):
            import_rbd().RBD().rename(self._context(), image, name)

    def remove(self, image: str, *, trash_delay: int | None = None) -> None:
        """Remove an image that has no snapshots; do nothing if it is not there.

        :param trash_delay: move it to the trash instead, and protect it there for that many seconds.
        :raises DiskInUse: a client has it open, or it has clones.
        """
        try:
            with self.errors(image):
                if trash_delay is None:
                    import_rbd().RBD().remove(self._context(), image)
                else:
                    import_rbd().RBD().trash_move(self._context(), image, trash_delay)
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
        rados = import_rados()
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
        rados = import_rados()
        with self.errors(_INTENTS), rados.ReadOpCtx() as operation:
            found, _ = self._context().get_omap_vals_by_keys(operation, (image,))
            return self._read_intents(operation, found).get(image)

    def swap_intent(self, image: str, before: str, after: str) -> None:
        """Record what is about to be done to an image, or that it was done: one request.

        Intents are what hosts agree by: whoever is first has begun.

        :param before: what is on record; empty: nothing.
        :param after: what is to be; empty: nothing.
        :raises DiskInUse: something else is on record: another host is working on the image. Nothing was changed.
        """
        rados = import_rados()
        with self.errors(_INTENTS), rados.WriteOpCtx() as operation:
            context = self._context()
            operation.new(rados.LIBRADOS_CREATE_IDEMPOTENT)
            operation.omap_cmp(image, before)
            if after:
                context.set_omap(operation, (image,), (after.encode(),))
            else:
                context.remove_omap_keys(operation, (image,))
            try:
                context.operate_write_op(operation, _INTENTS)
            except rados.Error as error:
                if abs(error.errno or 0) != errno.ECANCELED:
                    raise
                reason = "another host has begun to work on it; try again when it is done"
                raise exceptions.DiskInUse(self.spec(image), reason) from error

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
            raise ceph_connection.translated(error, self.spec(image), self.settings) from error

    def _close(self, opened: Any, image: str) -> None:
        """Close an image, but do not wait for ever for OSDs that do not answer, as librbd does."""
        done = threading.Event()
        completion = opened.aio_close(lambda _completion: done.set())
        # It takes several requests, each of which may take its time.
        seconds = _REQUESTS_TO_CLOSE * self.settings.operation_timeout
        if not done.wait(seconds or None):
            ceph_connection.abandon(self.settings, opened)
            raise exceptions.StorageTimeout(self.spec(image), seconds)
        ceph_connection.finish(completion)

    def _close_quietly(self, opened: Any, image: str) -> None:
        # The error that led here matters more.
        try:
            with self.errors(image):
                self._close(opened, image)
        except exceptions.ImageBackendError as error:
            LOG.debug("closing after an error: %s", error)

    def _ask(self, image: str, target: str, method: str, argument: bytes) -> bytes | None:
        """Call a method of the object class rbd; None: there is no such thing."""
        with self.errors(image):
            try:
                _, answer = self._context().execute(target, "rbd", method, argument, _LARGEST)
            except import_rados().ObjectNotFound:
                return None
        encoded: bytes = answer
        return encoded

    def _read_intents(self, operation: Any, found: Any) -> dict[str, str]:
        try:
            self._context().operate_read_op(operation, _INTENTS)
        except import_rados().ObjectNotFound:
            return {}
        return {key: value.decode("utf-8", "replace") for key, value in found}

    def _context(self) -> Any:
        cluster = ceph_connection.cluster(self.settings)
        key = (self.name, self.namespace)
        context = cluster.contexts.get(key)
        if context is None:
            try:
                context = cluster.rados.open_ioctx(self.name)
            except import_rados().ObjectNotFound as error:
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


def _options(layout: Layout) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if layout.features:
        options["features"] = import_rbd().RBD().features_from_string(",".join(layout.features))
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
