# SPDX-License-Identifier: Apache-2.0
"""Templates in a thin pool: copied there once, and snapshotted for each disk.

A snapshot has its origin's size, so that a template has a volume for each size that disks have asked for, all of them
snapshots of the first: making a disk is then one command. They are read-only and not active, and are filled as
``…+new`` and renamed when they are whole. A volume's name has a digest of the template's name and content in it, so
that a template that was replaced is noticed by the command that makes the disk.

Disks do not depend on them: the pool keeps the data that several volumes share until the last of them is gone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from oslo_config import cfg

from imagebackend import exceptions, faults, names
from imagebackend.images import lvm_content, lvm_naming, lvm_options
from imagebackend.images.lvm_naming import COMPLETE
from imagebackend.images.lvm_pool import ThinPool
from imagebackend.storage.lvm2 import Volume, VolumeGroup
from imagebackend.templates import native
from imagebackend.templates.native import NativeTemplate, NativeTemplates
from imagebackend.templates.record import Template

__all__ = ["LvmTemplate", "LvmTemplates", "templates"]

LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LvmTemplate:
    """A template in a thin pool.

    :ivar key: which content it has; see :func:`imagebackend.images.lvm_naming.template_key`.
    :ivar virtual_size: bytes.
    """

    name: str
    key: str
    virtual_size: int

    @classmethod
    def of(cls, template: Template) -> LvmTemplate:
        """Return what a template of the cache is called in the pool, whether it is there or not."""
        key = lvm_naming.template_key(template.name, template.sha256 or template.digest)
        return cls(template.name, key, template.virtual_size)

    def volume(self, size: int) -> str:
        """Return the name of the volume that disks of ``size`` bytes are snapshots of."""
        return lvm_naming.template_volume(self.name, self.key, size)


class LvmTemplates(NativeTemplates):
    """The templates in a thin pool.

    :param conf: options of this library.
    :param group: the volume group that the pool is in.
    :param pool: the pool.
    """

    image_type: ClassVar[str] = "lvm"

    def __init__(self, conf: cfg.ConfigOpts, group: VolumeGroup, pool: ThinPool) -> None:
        self._conf = conf
        self._group = group
        self._pool = pool
        self._maker = lvm_options.maker_tag(conf)

    def list(self) -> Sequence[NativeTemplate]:
        found: dict[str, Volume] = {}
        for volume in self._group.report(tags=lvm_naming.tags({"kind": "template"})):
            name = lvm_naming.facts(volume.tags)["template"]
            if volume.pool == self._pool.name and _is_whole(volume):
                # The first that was made, which has all the data.
                found[name] = min(volume, found.get(name, volume), key=_made)
        return [_native(name, volume) for name, volume in sorted(found.items())]

    def prepare(self, template: Template, progress: Progress | None = None) -> None:
        self.ensure(template, template.virtual_size, progress)

    def remove(self, name: str) -> None:
        with self._lock(name):
            volumes = self._volumes(name)
            if not volumes:
                raise exceptions.TemplateNotFound(name, f"not in pool {self._group.name}/{self._pool.name}")
            self._group.remove(*(volume.name for volume in volumes))
        LOG.info("template %s removed from pool %s/%s", name, self._group.name, self._pool.name)

    def sweep(self) -> Sequence[str]:
        swept: Sequence[str] = []
        tagged = self._group.report(tags=lvm_naming.tags({"kind": "template"}))
        for name in sorted({lvm_naming.facts(volume.tags)["template"] for volume in tagged}):
            # Whoever is still at it holds the lock.
            with contextlib.suppress(exceptions.LockTimeout), self._lock(name, timeout=0):
                made_here = [volume for volume in self._volumes(name) if self._maker in volume.tags]
                swept = [*swept, *self._discard_parts(made_here)]
        return swept

    def find(self, name: str) -> LvmTemplate | None:
        """Return a template that is in the pool, or None: one command."""
        volumes = [volume for volume in self._volumes(name) if _is_whole(volume)]
        if not volumes:
            return None
        facts = max((lvm_naming.facts(volume.tags) for volume in volumes), key=lambda facts: facts["made"])
        return LvmTemplate(name, facts["key"], int(facts["virtual_size"]))

    def ensure(self, template: Template, size: int, progress: Progress | None = None) -> None:
        """Make sure that a template of the cache is in the pool, with a volume for disks of ``size`` bytes.

        It is copied there if it is not: once, however many threads and processes ask.

        :param template: not removed meanwhile.
        :param progress: called with the bytes done and in all while it is copied.
        :raises InsufficientSpace: the pool has no room for it.
        :raises CorruptDisk: what arrived is not what was written.
        """
        wanted = LvmTemplate.of(template)
        with self._lock(template.name):
            volumes = self._volumes(template.name)
            self._discard_parts(volumes)
            whole = [volume for volume in volumes if _is_whole(volume)]
            same = [volume for volume in whole if lvm_naming.facts(volume.tags)["key"] == wanted.key]
            if not same:
                # Of the pool's own first: the data of the old content may be what keeps the new one out.
                if whole:
                    LOG.warning("template %s has other content in %s; it is replaced", template.name, self._pool.name)
                    self._group.remove(*(volume.name for volume in whole))
                self._copy(template, wanted, size, progress)
            elif wanted.volume(size) not in [volume.name for volume in same]:
                self._add_size(wanted, size, same[0])

    def add_size(self, template: LvmTemplate, size: int) -> None:
        """Make sure that a template of the pool has a volume for disks of ``size`` bytes.

        :raises DiskNotFound: the template is not there any more.
        """
        with self._lock(template.name):
            volumes = self._volumes(template.name)
            self._discard_parts(volumes)
            same = [each for each in volumes if _is_whole(each) and lvm_naming.facts(each.tags)["key"] == template.key]
            if not same:
                raise exceptions.DiskNotFound(template.volume(size), "the template was removed meanwhile")
            if template.volume(size) not in [volume.name for volume in same]:
                self._add_size(template, size, same[0])

    def _lock(self, name: str, timeout: float | None = None) -> contextlib.AbstractContextManager[None]:
        return native.lock(self._conf, self.image_type, names.check_name("template", name), timeout)

    def _volumes(self, name: str) -> Sequence[Volume]:
        """Return the volumes of a template, and what killed makers left of some."""
        tagged = self._group.report(tags=lvm_naming.tags({"template": names.check_name("template", name)}))
        return [volume for volume in tagged if lvm_naming.facts(volume.tags)["kind"] == "template"]

    def _discard_parts(self, volumes: Iterable[Volume]) -> Sequence[str]:
        parts = [volume for volume in volumes if not _is_whole(volume)]
        if parts:
            self._group.remove_reported(*parts)
        return [volume.name for volume in parts]

    def _copy(self, template: Template, wanted: LvmTemplate, size: int, progress: Progress | None) -> None:
        final = wanted.volume(size)
        partial = f"{final}+new"
        data = lvm_content.data_size(template.path)
        facts: dict[str, str | int] = {
            "kind": "template",
            "template": template.name,
            "key": wanted.key,
            "virtual_size": template.virtual_size,
            "sha256": template.sha256,
            "data": data,
            "made": lvm_naming.now(),
        }
        tags = {self._maker, *lvm_naming.tags(facts), *self._conf.libvirt.images_volume_tags}
        with contextlib.ExitStack() as undo:
            # What is made may have succeeded although its command failed.
            undo.callback(self._remove_quietly, partial)
            self._pool.create(partial, size, data, tags)
            faults.point("template.copy.made")
            device = self._group.device(partial)
            lvm_content.write(self._conf, template.path, template.format, device, zeroed=True, progress=progress)
            faults.point("template.copy.filled")
            lvm_content.compare(self._conf, template.path, template.format, device, progress=progress)
            self._group.publish(partial, add_tags=[COMPLETE], read_only=True)
            self._group.deactivate(partial)
            faults.point("template.copy.complete")
            self._group.rename(partial, final)
            undo.pop_all()
        faults.point("template.copy.renamed")
        LOG.info("template %s copied to pool %s/%s: %d bytes", template.name, self._group.name, self._pool.name, data)

    def _add_size(self, template: LvmTemplate, size: int, origin: Volume) -> None:
        if size < template.virtual_size:
            reason = "the template's virtual size"
            raise exceptions.DiskTooSmall(template.name, size, template.virtual_size, reason)
        final = template.volume(size)
        partial = f"{final}+new"
        facts = lvm_naming.facts(origin.tags).items()
        kept = {key: value for key, value in facts if key not in ("complete", "made", "maker")}
        own = {self._maker, COMPLETE, *self._conf.libvirt.images_volume_tags}
        tags = {*lvm_naming.tags({**kept, "made": lvm_naming.now()}), *own}
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_quietly, partial)
            self._pool.refuse_full()
            self._group.snapshot(origin.name, partial, tags, read_only=True, activate=False)
            faults.point("template.size.made")
            # What lies beyond its virtual size is empty.
            self._group.resize(partial, size, shrink=True)
            faults.point("template.size.resized")
            self._group.rename(partial, final)
            undo.pop_all()
        faults.point("template.size.renamed")

    def _remove_quietly(self, volume: str) -> None:
        # An undo step: the error that led here matters more; the next attempt removes it.
        try:
            self._group.remove(volume)
        except exceptions.DiskNotFound:
            pass
        except exceptions.ImageBackendError as error:
            LOG.warning("a part of a template is left in %s: %s", volume, error)


def templates(conf: cfg.ConfigOpts) -> LvmTemplates | None:
    """Return the templates of the thin pool that stores disks; None if none does."""
    pool = lvm_options.thin_pool(conf)
    if pool is None:
        return None
    group = lvm_options.group(conf)
    return LvmTemplates(conf, group, ThinPool(conf, group, pool))


def _is_whole(volume: Volume) -> bool:
    return COMPLETE in volume.tags and not volume.name.endswith("+new")


def _made(volume: Volume) -> str:
    return lvm_naming.facts(volume.tags)["made"]


def _native(name: str, volume: Volume) -> NativeTemplate:
    facts = lvm_naming.facts(volume.tags)
    size, data = int(facts["virtual_size"]), int(facts["data"])
    return NativeTemplate(name, facts["sha256"], size, data, facts["made"], users=())
