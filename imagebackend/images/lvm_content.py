# SPDX-License-Identifier: Apache-2.0
"""The content of volumes: written from image files, compared with them, written to image files."""

from __future__ import annotations

import os

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images import disk_file, transfer
from imagebackend.images.base import Progress
from imagebackend.storage import block_device, publish, qemu_img

__all__ = ["clear", "compare", "data_size", "extract", "sync", "write"]


def data_size(path: str) -> int:
    """Return how many bytes of storage a file takes: what copying it writes, at most."""
    try:
        return os.stat(path).st_blocks * 512
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def write(
    conf: cfg.ConfigOpts,
    path: str,
    disk_format: str,
    device: str,
    *,
    zeroed: bool,
    progress: Progress | None = None,
) -> None:
    """Copy the disk that an image file holds to the beginning of a device, whose rest becomes zeros. It is durable.

    :param disk_format: of the file, which an inspector has accepted.
    :param zeroed: the device reads as zeros.
    """
    if disk_format == "raw":
        with transfer.open_file(path) as source:
            block_device.fill(source, device, reads_as_zeros=zeroed, progress=progress)
        return
    if not zeroed:
        clear(device)
    limits = disk_file.tool_options(conf)
    qemu_img.convert(path, disk_format, device, "raw", target_is_zero=True, progress=progress, **limits)
    block_device.sync(device)
    qemu_img.compare(path, disk_format, device, "raw", progress=progress, **limits)


def compare(
    conf: cfg.ConfigOpts, path: str, disk_format: str, device: str, *, progress: Progress | None = None
) -> None:
    """Make sure that a device holds what was written to it; what is not raw was compared then.

    :raises CorruptDisk: it does not.
    """
    if disk_format == "raw":
        with transfer.open_file(path) as source:
            block_device.compare(source, device, progress)


def clear(device: str) -> None:
    """Make a device read as zeros. It is durable."""
    block_device.zero(device, 0, block_device.size(device))


def sync(device: str) -> None:
    """Have everything that was written to a device reach stable storage."""
    block_device.sync(device)


def extract(conf: cfg.ConfigOpts, device: str, target: str, out_format: str | None, progress: Progress | None) -> None:
    """Write a standalone copy of a device, which the caller has locked, to a file, which appears when it is whole.

    :raises InvalidArgument: such a format is not written, or the target is among disks and templates.
    """
    target, out_format = transfer.extract_target(conf, target, out_format, "raw")
    compress = out_format == "qcow2" and conf.libvirt.snapshot_compression
    limits = disk_file.tool_options(conf)
    with publish.new_file(target, durable=conf.durable_writes, replace=True) as (_, partial):
        qemu_img.convert(device, "raw", partial, out_format, compress=compress, progress=progress, **limits)
        qemu_img.compare(device, "raw", partial, out_format, progress=progress, **limits)
