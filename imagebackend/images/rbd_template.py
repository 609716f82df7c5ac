# SPDX-License-Identifier: Apache-2.0
"""Templates in a pool: imported once for all hosts, cloned for each disk.

A template's image is ``template:<name>``. It is filled as ``partial:template:<name>`` and renamed when it is whole,
with its record in its metadata. What is cloned are its snapshots, one for each size that disks have asked for: a
clone has its parent's size from the start, so that making a disk is one call. A snapshot's name begins with the
template's digest, so that a template that was replaced is noticed by the clone itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from imagebackend import exceptions, faults, names
from imagebackend.images import rbd_image, rbd_location, rbd_options, rbd_sweep
from imagebackend.images.base import Progress
from imagebackend.storage import ceph, rbd_data
from imagebackend.templates import native, record
from imagebackend.templates.leases import Owner
from imagebackend.templates.native import NativeTemplate, NativeTemplates
from imagebackend.templates.record import Template

__all__ = ["RbdTemplate", "RbdTemplates", "name_of"]

LOG = logging.getLogger(__name__)

_PREFIX = "template:"
_DIGEST_SHOWN = 32
# What librbd needs to lock the image and to know where its data are; clones have the same unless told otherwise.
_FEATURES = ("layering", "exclusive-lock", "object-map", "fast-diff", "deep-flatten")
_FIRST_DELAY, _LAST_DELAY = 0.05, 1.0
_DELAYS_TO_DISCARD = (0.05, 0.1, 0.2, 0.4)


def name_of(image: str) -> str | None:
    """Return the name of the template whose image has that name; None: it is no template's."""
    return image.removeprefix(_PREFIX) if image.startswith(_PREFIX) else None


@dataclasses.dataclass(frozen=True)
class RbdTemplate:
    """A template in a pool.

    :ivar name: its name.
    :ivar virtual_size: in bytes.
    :ivar sha256: the digest of the image as it was fetched.
    :ivar made: when it was imported, as ISO 8601 in UTC; empty: it may not be there yet.
    """

    name: str
    virtual_size: int
    sha256: str
    made: str = ""

    @property
    def image(self) -> str:
        """The name of its image."""
        return f"{_PREFIX}{self.name}"

    def snapshot(self, size: int) -> str:
        """Return the name of the snapshot that disks of ``size`` bytes are cloned from."""
        return f"{self.sha256[:_DIGEST_SHOWN]}.{size}"


class RbdTemplates(NativeTemplates):
    """The templates in a pool. Making the object does no I/O.

    :param conf: options of this library.
    :param pool: where they are.
    :param layout: how their images are laid out.
    """

    image_type: ClassVar[str] = "rbd"

    def __init__(self, conf: cfg.ConfigOpts, pool: ceph.Pool, layout: ceph.Layout) -> None:
        self._conf = conf
        self._pool = pool
        self._layout = dataclasses.replace(layout, features=_FEATURES)

    def find(self, name: str) -> RbdTemplate | None:
        """Return a template that is in the pool, or None: two requests.

        :raises CorruptRecord: its record is damaged.
        """
        image = f"{_PREFIX}{names.check_name('template', name)}"
        image_id = self._pool.image_id(image)
        if image_id is None:
            return None
        return self._recorded(name, image_id)

    def list(self) -> Sequence[NativeTemplate]:
        found = []
        for image in self._pool.images():
            if image.startswith(_PREFIX):
                try:
                    found.append(self._describe(image.removeprefix(_PREFIX)))
                except exceptions.DiskNotFound:
                    continue  # removed since it was listed
                except exceptions.CorruptRecord as error:
                    LOG.warning("template image %s is left out: %s", image, error)
        return found

    def prepare(self, template: Template, progress: Progress | None = None) -> None:
        self.ensure(template, template.virtual_size, progress)

    def ensure(self, template: Template, size: int, progress: Progress | None = None) -> RbdTemplate:
        """Return a template of the cache that is in the pool too, with a snapshot for disks of ``size`` bytes.

        It is imported if it is not there: once, however many threads, processes and hosts ask.

        :param template: not removed meanwhile.
        :param progress: called with the bytes done and in all while it is imported.
        :raises InvalidConfiguration: the cache keeps it in a format that disks in Ceph cannot have.
        :raises LockTimeout: another host was at it for longer than ``[DEFAULT] lock_timeout``.
        """
        rbd_options.require_raw(self._conf, template)
        with self._lock(template.name):
            found = self.find(template.name)
            if found is not None and found.sha256 != template.sha256:
                LOG.warning("template %s in pool %s has other content; it is replaced", found.name, self._pool.name)
                rbd_image.bury(self._pool, found.image)
                found = None
            if found is None:
                found = RbdTemplate(template.name, template.virtual_size, template.sha256)
                if self._import(template, found.snapshot(size), size, progress):
                    return found
            self._make_snapshot(found, size)
            return found

    def add_size(self, template: RbdTemplate, size: int) -> None:
        """Make sure that a template in the pool has a snapshot for disks of ``size`` bytes.

        :raises DiskNotFound: the template is not there any more.
        """
        with self._lock(template.name):
            self._make_snapshot(template, size)

    def remove(self, name: str) -> None:
        image = f"{_PREFIX}{names.check_name('template', name)}"
        with self._lock(name):
            try:
                gone = rbd_image.remove(self._pool, image)
                users = () if gone else self._describe(name).users
            except exceptions.DiskNotFound as error:
                raise exceptions.TemplateNotFound(name, f"not in pool {self._pool.name}") from error
        if not gone:
            raise exceptions.TemplateInUse(name, [user.path for user in users])
        LOG.info("template %s removed from pool %s", name, self._pool.name)

    def retire(self, name: str) -> None:
        """Take a template out of use though disks depend on it: it loses its name, and is removed with the last.

        :raises TemplateNotFound: it is not there.
        """
        image = f"{_PREFIX}{names.check_name('template', name)}"
        with self._lock(name):
            if self._pool.image_id(image) is None:
                raise exceptions.TemplateNotFound(name, f"not in pool {self._pool.name}")
            rbd_image.bury(self._pool, image)
        LOG.info("template %s retired from pool %s", name, self._pool.name)

    def sweep(self) -> Sequence[str]:
        settled = rbd_sweep.settle_disks(self._conf, self._pool)
        there = self._pool.images()
        for image in there:
            if image.startswith(f"partial:{_PREFIX}"):
                # Whoever is still at it has it open.
                with contextlib.suppress(exceptions.DiskInUse):
                    self._remove_part(image)
            elif rbd_image.is_zombie(image):
                rbd_image.bury_zombie(self._pool, image)
        return sorted({*settled, *(set(there) - set(self._pool.images()))})

    def _recorded(self, name: str, image_id: str) -> RbdTemplate:
        """Return what a template's record says.

        :raises CorruptRecord: it is damaged.
        """
        spec = self._pool.spec(f"{_PREFIX}{name}")
        facts = rbd_image.parse_record(spec, self._pool.metadata(image_id, rbd_image.RECORD))
        try:
            return RbdTemplate(name, int(facts["virtual_size"]), str(facts["sha256"]), str(facts["made"]))
        except (KeyError, ValueError, TypeError) as error:
            raise exceptions.CorruptRecord(spec, f"not a template's record ({error!r}); remove the image") from error

    def _describe(self, name: str) -> NativeTemplate:
        with self._pool.open(f"{_PREFIX}{name}", read_only=True) as image:
            found = self._recorded(name, image.id())
            users = tuple(self._owner(child) for child in image.list_children2())
            used = rbd_data.allocated(image)
            return NativeTemplate(name, found.sha256, found.virtual_size, used, found.made, users)

    def _owner(self, child: dict[str, Any]) -> Owner:
        """Return the disk that a clone is; one that is no disk of ours has no instance. A pool has no host."""
        image = child["image"]
        pool = ceph.Pool(self._pool.settings, child["pool"], child["pool_namespace"])
        instance, disk = rbd_location.disk_names(image) or ("", image)
        return Owner(instance, disk, host="", path=rbd_location.format_path(pool, image))

    def _lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        # The threads and processes of this host take turns here, and do not ask the cluster again and again.
        return native.lock(self._conf, self.image_type, names.check_name("template", name))

    def _import(self, template: Template, snapshot: str, size: int, progress: Progress | None) -> bool:
        """Fill the template's image and give it a snapshot; return False if another host made it meanwhile."""
        image = f"{_PREFIX}{template.name}"
        partial = f"partial:{image}"
        facts = {"version": 1, **template.as_dict(), "made": record.now()}
        del facts["path"]
        with self._claim(image, partial, template) as opened:
            if opened is None:
                return False
            source = os.open(template.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                rbd_data.write_from(source, opened, progress=progress)
            finally:
                os.close(source)
            faults.point("template.import.filled")
            opened.metadata_set(rbd_image.RECORD, json.dumps(facts))
            faults.point("template.import.recorded")
            # Before it is renamed, so that a template that is there can be cloned.
            _add_snapshot(opened, snapshot, size)
            self._pool.rename(partial, image)
            faults.point("template.import.renamed")
        LOG.info("template %s imported into pool %s: %d bytes", template.name, self._pool.name, template.virtual_size)
        return True

    @contextlib.contextmanager
    def _claim(self, image: str, partial: str, template: Template) -> Iterator[Any]:
        """Give the template's new image, open and locked; None if another host made the template meanwhile.

        The lock is librbd's exclusive lock: it is renewed by librbd itself, and the cluster breaks it half a minute
        after its holder died, so that the image of a killed one can then be removed.
        """
        waits = self._waits(partial)
        while self._pool.image_id(image) is None:
            with contextlib.ExitStack() as undo:
                try:
                    self._pool.create(partial, template.virtual_size, self._layout)
                    opened = undo.enter_context(self._locked(partial))
                except (exceptions.DiskExists, exceptions.DiskInUse, exceptions.DiskNotFound):
                    # Another host has it, or had it and was killed: then it can be removed.
                    with contextlib.suppress(exceptions.DiskInUse):
                        self._remove_part(partial)
                        continue
                else:
                    faults.point("template.import.locked")
                    with contextlib.ExitStack() as discard:
                        discard.callback(self._discard, undo, partial)
                        # The host that had the temporary name before may have made the template.
                        if self._pool.image_id(image) is None:
                            # It is closed before the part is removed, so that what fails does not pass by there.
                            with self._pool.errors(partial):
                                yield opened
                            discard.pop_all()
                            return
            next(waits)
        # Whoever had it may have found it open here, and left it.
        self._discard(contextlib.ExitStack(), partial)
        yield None

    def _waits(self, image: str) -> Iterator[None]:
        """Wait a little each time that the next item is asked for.

        :raises LockTimeout: another host has had the image for too long.
        """
        deadline = time.monotonic() + self._conf.lock_timeout
        delay = _FIRST_DELAY
        while time.monotonic() < deadline:
            time.sleep(delay)
            delay = min(delay * 2, _LAST_DELAY)
            yield
        raise exceptions.LockTimeout(self._pool.spec(image), self._conf.lock_timeout)

    @contextlib.contextmanager
    def _locked(self, image: str) -> Iterator[Any]:
        """Give an open image that no other client can write to or remove."""
        import rbd

        with self._pool.open(image) as opened:
            opened.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
            yield opened

    def _discard(self, opened: contextlib.ExitStack, partial: str) -> None:
        """Remove a part of a template that nobody needs any more; the sweep, or another import, removes what stays."""
        try:
            opened.close()
            for delay in _DELAYS_TO_DISCARD:
                with contextlib.suppress(exceptions.DiskInUse):
                    self._remove_part(partial)
                    return
                # Other hosts look at it for a moment, to find out whether its maker is alive.
                time.sleep(delay)
            self._remove_part(partial)
        except exceptions.ImageBackendError as error:
            LOG.warning("a part of a template is left in %s: %s", self._pool.spec(partial), error)

    def _remove_part(self, partial: str) -> None:
        """Remove a part of a template whose maker was killed.

        :raises DiskInUse: he was not; or another host has the same in mind.
        """
        with contextlib.suppress(exceptions.DiskNotFound):
            with self._locked(partial) as opened:
                # Until it was locked, its maker may have been alive, and have given it its name: then it is whole.
                if self._pool.image_id(partial) != opened.id():
                    return
                rbd_image.remove_snapshots(opened)
            self._pool.remove(partial)

    def _make_snapshot(self, template: RbdTemplate, size: int) -> None:
        if size < template.virtual_size:
            raise exceptions.DiskTooSmall(template.name, size, template.virtual_size, "the template's virtual size")
        waits = self._waits(template.image)
        while True:
            try:
                with self._locked(template.image) as image:
                    _add_snapshot(image, template.snapshot(size), size)
                return
            except exceptions.DiskInUse:
                # Another host has just imported it, or is making a snapshot of another size.
                next(waits)


def _add_snapshot(image: Any, name: str, size: int) -> None:
    """Give an open template a protected snapshot of ``size`` bytes, if it has none of that name."""
    if name not in {each["name"] for each in image.list_snaps()}:
        image.resize(size)
        image.create_snap(name)
        faults.point("template.import.snapshot")
    if not image.is_protected_snap(name):
        image.protect_snap(name)
        faults.point("template.import.protected")
