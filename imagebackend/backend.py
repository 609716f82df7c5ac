# SPDX-License-Identifier: Apache-2.0
"""Which Image for which disk."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, names
from imagebackend.images import dependents, disk_info
from imagebackend.images.base import Image
from imagebackend.keys import Keys
from imagebackend.storage import publish
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.lease_book import Evidence, Rebuilt
from imagebackend.templates.leases import Owner
from imagebackend.templates.native import NativeTemplates

__all__ = ["Backend"]

#: The group of entry points by which other packages add image types.
ENTRY_POINTS = "imagebackend.backends"

LOG = logging.getLogger(__name__)

# The types of the disks in files, by the format that they are recorded in.
_FILE_TYPES = {"raw": "raw", "luks": "raw", "qcow2": "qcow2", "ploop": "ploop"}
_BUILT_IN = {
    "raw": ("imagebackend.images.raw", "Raw"),
    "flat": ("imagebackend.images.raw", "Raw"),
    "qcow2": ("imagebackend.images.qcow2", "Qcow2"),
    "lvm": ("imagebackend.images.lvm", "Lvm"),
    "ploop": ("imagebackend.images.ploop", "Ploop"),
    "rbd": ("imagebackend.images.rbd", "Rbd"),
}


class Backend:
    """The disks and templates that one configuration describes. Making the object does no I/O.

    :param conf: options of this library: from :func:`imagebackend.load_config`, or an agent's own configuration
        object with :func:`imagebackend.register_opts` called on it.
    :param keys: gives the keys of disks that ``[ephemeral_storage_encryption]`` encrypts.
    :ivar templates: the template cache.
    """

    def __init__(self, conf: cfg.ConfigOpts, keys: Keys | None = None) -> None:
        self.conf = conf
        self.keys = keys
        self.templates = TemplateCache(conf, self.native_templates, self._is_gone, self._sweep_disks)

    def backend(self, image_type: str | None = None) -> type[Image]:
        """Return the class of images of a type.

        :param image_type: ``raw``, ``flat`` (the same), ``qcow2``, ``lvm``, ``ploop``, ``rbd``, a type that another
            package adds, or ``default``; None: what ``[libvirt] images_type`` says.
        :raises InvalidConfiguration: there is no such type, or the package that adds it is broken.
        """
        wanted = image_type or self.conf.libvirt.images_type
        if wanted == "default":
            wanted = "qcow2" if self.conf.use_cow_images else "raw"
        if wanted in _BUILT_IN:
            module, name = _BUILT_IN[wanted]
            built_in: type[Image] = getattr(importlib.import_module(module), name)
            return built_in
        added = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
        if wanted in added:
            return _load(added[wanted])
        known = ", ".join(sorted({*_BUILT_IN, *added, "default"}))
        raise exceptions.InvalidConfiguration("[libvirt] images_type", f"{wanted!r} is not one of {known}")

    def native_templates(self, *image_types: str) -> list[NativeTemplates]:
        """Return the stores that keep templates of their own, of these types, or of the configured one.

        :param image_types: as for :meth:`backend`.
        :raises InvalidConfiguration: there is no such type, or the package that adds it is broken.
        """
        kinds = dict.fromkeys(self.backend(each) for each in image_types or (None,))
        stores = [kind.native_templates(self.conf) for kind in kinds]
        return [store for store in stores if store is not None]

    def image(self, instance: Any, disk_name: str, image_type: str | None = None) -> Image:
        """Return the image for a disk of an instance, whether the disk exists or not.

        :param instance: anything with a ``uuid``, or a string.
        :param disk_name: the disk's name in the instance: ``disk``, ``disk.local``, ``disk.swap``.
        :param image_type: as for :meth:`backend`.
        :raises InvalidName: one of the names is not safe.
        :raises InvalidConfiguration: there is no such type.
        """
        return self._image(self.backend(image_type), instance, disk_name)

    by_name = image

    def snapshot(self, path: str, image_type: str | None = None) -> Image:
        """Return the image for an existing disk by its libvirt path: ``…/instance/disk``, ``pool/instance_disk``.

        :param path: the path, or the source's name, that the domain's XML has.
        :raises InvalidName: the path does not end in the names of an instance and a disk.
        """
        return self.by_libvirt_path(self.backend(image_type).names_of_path(path)[0], path, image_type)

    def by_libvirt_path(self, instance: Any, path: str, image_type: str | None = None) -> Image:
        """Return the image for an existing disk of an instance by its libvirt path.

        :param instance: anything with a ``uuid``, or a string.
        :param path: the path, absolute, or the source's name, that the domain's XML has.
        :raises InvalidName: the last part of the path is not the name of a disk, or the path is not absolute.
        """
        kind = self.backend(image_type)
        disk_name = kind.names_of_path(path)[1]
        return self._image(kind, instance, disk_name, path)

    def disks(self, instance: Any = None) -> Iterator[Image]:
        """Yield the disks in files that are on record under ``instances_path``, and those of the configured type in
        a store of its own, by instance and name.

        :param instance: anything with a ``uuid``, or a string; None: all, where an instance whose record cannot be
            read is logged and left out.
        :raises PermissionDenied, StorageError: the folder cannot be read.
        :raises CorruptRecord: the record of ``instance`` cannot be read.
        """
        owner = None if instance is None else names.instance_id(instance)
        for stored_owner, disk_name in sorted(self.backend().stored(self.conf)):
            if owner in (None, stored_owner):
                image = self.image(stored_owner, disk_name)
                if image.exists():
                    yield image
        if owner is not None:
            yield from self._disks_of(owner)
            return
        for entry in publish.list_folder(os.path.abspath(self.conf.instances_path)):
            try:
                yield from self._disks_of(entry)
            except (exceptions.CorruptRecord, exceptions.InvalidName) as error:
                LOG.warning("the disks of %s are left out: %s", entry, error)

    def rebuild_leases(self, domains: Iterable[str] = (), *image_types: str) -> Rebuilt:
        """Make the leases that disks need and do not have, and drop those of this host that nothing needs.

        The disks themselves are asked: headers of files under ``instances_path``, and what the stores know of clones.

        :param domains: the XML of libvirt's domains, whose disks may be elsewhere.
        :param image_types: the stores to ask, too; none: that of the configured type.
        :raises PermissionDenied, StorageError: the folder of the disks, or the leases, cannot be read.
        """
        evidence = Evidence()
        dependents.look_at_folder(self.conf, evidence)
        for xml in domains:
            dependents.look_at_domain(self.conf, xml, evidence)
        for store in self.native_templates(*image_types):
            try:
                evidence.natives += store.list()
            except exceptions.ImageBackendError as error:
                evidence.failed.append((store.image_type, error))
        return self.templates.lease_book.rebuild(evidence, functools.partial(dependents.needs, self.conf))

    def _image(self, kind: type[Image], instance: Any, disk_name: str, path: str | None = None) -> Image:
        image = kind(self.conf, self.templates, names.instance_id(instance), disk_name, path)
        image.keys = self.keys
        return image

    def _is_gone(self, owner: Owner) -> bool:
        """Return whether a disk of this host, which nobody makes or changes meanwhile, is provably not there."""
        if not owner.path.startswith("rbd:"):
            return self.templates.is_file_gone(owner)
        try:
            return not self.by_libvirt_path(owner.instance, owner.path, "rbd").exists()
        except exceptions.ImageBackendError as error:
            LOG.info("whether %s is there cannot be known: %s", owner.path, error)
            return False

    def _sweep_disks(self) -> list[str]:
        """Remove what killed processes left of disks in a store of the configured type; return what that was."""
        return [f"{self.conf.libvirt.images_type}:{name}" for name in self.backend().sweep_disks(self.conf)]

    def _disks_of(self, instance: str) -> Iterator[Image]:
        folder = f"{os.path.abspath(self.conf.instances_path)}/{instance}"
        found = {}
        for path, disk_format in disk_info.read_all(folder).items():
            # The record may come from a host that keeps its instances elsewhere, or from one that means no good: what
            # counts is the disk's name, and nothing outside the instance's folder is meant by it.
            parent, _, disk_name = path.rpartition("/")
            if parent.rpartition("/")[2] == instance and disk_format in _FILE_TYPES:
                found[disk_name] = _FILE_TYPES[disk_format]
        for disk_name, image_type in sorted(found.items()):
            image = self.image(instance, disk_name, image_type)
            if image.exists():
                yield image


def _load(entry: importlib.metadata.EntryPoint) -> type[Image]:
    try:
        loaded = entry.load()
        if not issubclass(loaded, Image):
            raise TypeError("it is not an Image")
    except (ImportError, AttributeError, TypeError) as error:
        raise exceptions.InvalidConfiguration(
            f"entry point {entry.name} of {ENTRY_POINTS}", f"{entry.value} cannot be used: {error}"
        ) from error
    image_class: type[Image] = loaded
    return image_class
