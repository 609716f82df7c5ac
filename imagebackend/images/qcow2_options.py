# SPDX-License-Identifier: Apache-2.0
"""How new qcow2 files are made: the options of the ini file, as qemu-img takes them."""

from __future__ import annotations

from oslo_config import cfg

from imagebackend import exceptions

__all__ = ["creation_options", "is_plain"]

_PLAIN_COMPRESSION = "zlib"
_SMALLEST_EXTENDED = 16384


def creation_options(conf: cfg.ConfigOpts, *, backed: bool) -> dict[str, str]:
    """Return what qemu-img is told of a new qcow2 file, as the ini file says.

    :param backed: it will be an overlay.
    :raises InvalidConfiguration: the cluster size is too small for what else is asked for.
    """
    libvirt = conf.libvirt
    options = {"cluster_size": str(libvirt.images_qcow2_cluster_size)}
    preallocate = conf.preallocate_images == "space"
    if libvirt.images_qcow2_lazy_refcounts:
        options["lazy_refcounts"] = "on"
    if libvirt.images_qcow2_compression_type != _PLAIN_COMPRESSION:
        options["compression_type"] = libvirt.images_qcow2_compression_type
    if preallocate:
        options["preallocation"] = "falloc"
    # With a template, allocating a cluster must not hide what is below: only subclusters can tell the two apart.
    if libvirt.images_qcow2_extended_l2 or (backed and preallocate):
        if libvirt.images_qcow2_cluster_size < _SMALLEST_EXTENDED:
            raise exceptions.InvalidConfiguration(
                "[libvirt] images_qcow2_cluster_size",
                f"{libvirt.images_qcow2_cluster_size} is too small for extended L2 entries, which "
                f"images_qcow2_extended_l2 and the preallocation of disks with templates need; "
                f"set {_SMALLEST_EXTENDED} or more",
            )
        options["extended_l2"] = "on"
    return options


def is_plain(options: dict[str, str]) -> bool:
    """Return whether options ask for nothing but a cluster size."""
    return options.keys() == {"cluster_size"}
