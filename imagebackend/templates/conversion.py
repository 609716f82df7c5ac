# SPDX-License-Identifier: Apache-2.0
"""Turning an accepted image into the raw form that the cache keeps."""

from __future__ import annotations

import os
from collections.abc import Callable

from oslo_config import cfg

from imagebackend import exceptions, process
from imagebackend.storage import digest, qcow2, qemu_img, sparse_copy
from imagebackend.templates import inspection

__all__ = ["check_space", "to_raw"]


def check_space(folder: str, required: int) -> None:
    """Refuse work that will not fit.

    :param folder: where it would be written.
    :param required: bytes.
    :raises InsufficientSpace: the file system has fewer bytes free.
    """
    found = os.statvfs(folder)
    available = found.f_bavail * found.f_frsize
    if required > available:
        raise exceptions.InsufficientSpace(folder, required, available)


def to_raw(
    source: int,
    source_path: str,
    verdict: inspection.Verdict,
    target: int,
    target_path: str,
    conf: cfg.ConfigOpts,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write the disk that an accepted image holds into an empty file, as raw.

    The clusters of a plain qcow2 image are copied, or shared, here; every other kind goes through qemu-img.

    :param source, source_path: the image.
    :param verdict: what the inspector said of it.
    :param target, target_path: the file.
    :param progress: called for each of the steps in turn.
    :returns: the digest of the result, see :data:`imagebackend.storage.digest.BLOCKS`.
    :raises ImageUnacceptable: the image's tables lie.
    :raises ToolFailed, ToolTimeout: qemu-img could not.
    :raises InsufficientSpace, StorageError: the file system could not.
    """
    if verdict.format == "qcow2":
        try:
            runs = list(qcow2.data_runs(source, qcow2.read_header(source, source_path), source_path))
        except exceptions.Unsupported:
            pass
        else:
            try:
                os.ftruncate(target, verdict.virtual_size)
            except OSError as error:
                raise exceptions.storage_error(error, target_path) from error
            return sparse_copy.copy_runs_with_digest(source, target, runs, progress=progress)
    timeout = conf.libvirt.images_tool_timeout
    # The time limit is for reading facts; a conversion's CPU time grows with the image and is bounded by the timeout.
    limits = process.Limits(cpu_time=timeout, address_space=conf.libvirt.images_address_space_limit << 30)
    qemu_img.convert(
        source_path, verdict.format, target_path, "raw", progress=progress, timeout=timeout, limits=limits
    )
    # A conversion can report success although its last writes failed.
    qemu_img.compare(
        source_path, verdict.format, target_path, "raw", progress=progress, timeout=timeout, limits=limits
    )
    return digest.compute(target, digest.BLOCKS, target_path, progress)
