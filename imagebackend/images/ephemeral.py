# SPDX-License-Identifier: Apache-2.0
"""Ephemeral and swap disks: formatted by the host, empty for the guest."""

from __future__ import annotations

import os
from collections.abc import Callable

from imagebackend import exceptions, names
from imagebackend.images.base import Image
from imagebackend.storage import mkfs
from imagebackend.templates.sources import Fetched

__all__ = ["create_ephemeral", "create_swap"]


def create_ephemeral(
    image: Image,
    size: int,
    *,
    os_type: str | None = None,
    specified_fs: str | None = None,
    fs_label: str | None = None,
) -> None:
    """Make a disk with an empty file system; do nothing if it exists.

    Overlays share a template, whose name has the size, the file system and the label in it; other disks are
    formatted in place. ``[DEFAULT] virt_mkfs`` and ``default_ephemeral_format`` have their say, in Nova's order.

    :param size: bytes.
    :param os_type: the guest's: ``linux``, ``windows`` or another word.
    :param specified_fs: the file system that the user asked for: ext2, ext3, ext4, xfs, vfat or ntfs.
    :param fs_label: the file system's label.
    :raises InvalidArgument: no such file system, or a label that it cannot have.
    :raises DiskTooSmall: the file system does not fit into ``size``.
    :raises InvalidConfiguration: one of the two options cannot be used.
    :raises ToolMissing, ToolFailed: the file system could not be made; neither was the disk.
    """
    names.check_size(size)
    conf = image.conf
    commands = mkfs.parse_commands(conf.virt_mkfs)
    default = conf.default_ephemeral_format
    filesystem = mkfs.filesystem_for(os_type, specified=specified_fs, default=default, commands=commands)
    timeout = conf.libvirt.images_tool_timeout

    def make(target: str) -> None:
        mkfs.make_filesystem(target, filesystem, label=fs_label, timeout=timeout)

    _create(image, make, mkfs.ephemeral_template_name(size, filesystem, fs_label), size)


def create_swap(image: Image, size: int, *, label: str | None = None) -> None:
    """Make a swap disk; do nothing if it exists.

    :param size: bytes.
    :param label: the swap area's label.
    :raises InvalidArgument: the label is too long.
    :raises DiskTooSmall: a swap area does not fit into ``size``.
    :raises ToolMissing, ToolFailed: the swap area could not be made; neither was the disk.
    """
    names.check_size(size)
    timeout = image.conf.libvirt.images_tool_timeout

    def make(target: str) -> None:
        mkfs.make_swap(target, label=label, timeout=timeout)

    _create(image, make, f"swap_{size}" if label is None else f"swap_{size}_{label}", size)


def _create(image: Image, make: Callable[[str], None], template: str, size: int) -> None:
    if not image.capabilities.flatten:
        image.create_from_func(make, size)
        return

    def fetch(target: str) -> Fetched:
        try:
            os.truncate(target, size)
        except OSError as error:
            raise exceptions.storage_error(error, target) from error
        make(target)
        # Nobody publishes a checksum of it, and its zeros need not be read.
        return Fetched(source="generated", size=size, sha256="", disk_format="raw")

    image.cache(fetch, template, size)
