# SPDX-License-Identifier: Apache-2.0
"""What the options say about the Ceph cluster. No I/O."""

from __future__ import annotations

from oslo_config import cfg

from imagebackend.storage import ceph

__all__ = ["settings"]


def settings(conf: cfg.ConfigOpts) -> ceph.Settings:
    """Return how to reach the cluster."""
    libvirt = conf.libvirt
    return ceph.Settings(
        libvirt.images_rbd_ceph_conf,
        libvirt.rbd_user or None,
        libvirt.rbd_connect_timeout,
        libvirt.rbd_operation_timeout,
        libvirt.images_rbd_clone_format,
    )
