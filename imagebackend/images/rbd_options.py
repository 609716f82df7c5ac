# SPDX-License-Identifier: Apache-2.0
"""What the options say about disks in Ceph. No I/O."""

from __future__ import annotations

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images import rbd_location
from imagebackend.storage import ceph, ceph_options
from imagebackend.templates.record import Template

__all__ = ["layout", "pool", "require_raw"]


def pool(conf: cfg.ConfigOpts) -> ceph.Pool:
    """Return the pool that stores disks.

    :raises InvalidConfiguration: no pool can be called that.
    """
    name = rbd_location.pool_name("[libvirt] images_rbd_pool", conf.libvirt.images_rbd_pool)
    namespace: str = conf.libvirt.images_rbd_namespace
    if namespace:
        rbd_location.pool_name("[libvirt] images_rbd_namespace", namespace)
    return ceph.Pool(ceph_options.settings(conf), name, namespace)


def layout(conf: cfg.ConfigOpts) -> ceph.Layout:
    """Return how new disks are laid out.

    :raises InvalidConfiguration: objects cannot have that size.
    """
    size = conf.libvirt.images_rbd_object_size
    if size and (size & (size - 1) or size < 4096):
        raise exceptions.InvalidConfiguration(
            "[libvirt] images_rbd_object_size", f"{size} is not a power of two from 4096 on"
        )
    return ceph.Layout(tuple(conf.libvirt.images_rbd_features), size, conf.libvirt.images_rbd_data_pool)


def require_raw(conf: cfg.ConfigOpts, template: Template | None = None) -> None:
    """Make sure that templates, or this one, have the format that disks in Ceph have.

    :raises InvalidConfiguration: they have not.
    """
    is_raw = conf.force_raw_images if template is None else template.format == "raw"
    if not is_raw:
        reason = "disks in Ceph are raw, and so must be their templates: set it to true"
        if template is not None:
            reason += f", and remove template {template.name} from the cache: it was kept as {template.format}"
        raise exceptions.InvalidConfiguration("[DEFAULT] force_raw_images", reason)
