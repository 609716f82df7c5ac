# SPDX-License-Identifier: Apache-2.0
"""Turning an accepted image into the raw form that the cache keeps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from oslo_config import cfg

from imagebackend import exceptions, process
from imagebackend.storage import digest, ploop, qcow2, qemu_img, rearranging, sparse_copy
from imagebackend.templates import inspection

__all__ = ["check_space", "in_place", "to_raw"]

Progress = Callable[[int, int], None]

# Each move of data touches the table of all that come after it. So many take a second at most.
_MOST_MOVES = 1 << 14


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


def in_place(
    image: int, path: str, verdict: inspection.Verdict, conf: cfg.ConfigOpts, progress: Progress | None = None
) -> str | None:
    """Make of an accepted image the raw disk that it holds, in the same file: its data are not written again.

    That goes for qcow2 images whose data lie uncompressed and in the order of the disk, as qemu-img convert writes
    them, on file systems that can move data within a file.

    :param image: descriptor, open for reading and writing. What the file holds after an error is of no use.
    :param path: the image.
    :param verdict: what the inspector said of it.
    :param progress: called while the digest is taken; what it raises propagates.
    :returns: the digest of the result, see :data:`imagebackend.storage.digest.BLOCKS`; None: the image is as before,
        and :func:`to_raw` can convert it.
    :raises ImageUnacceptable: the image's tables lie.
    :raises InsufficientSpace, StorageError: the file system could not.
    :raises TimedOut: it took longer than ``[libvirt] images_tool_timeout``.
    """
    content = _content(image, path, verdict, conf, progress)
    runs = _in_order(content.runs()) if content else None
    # By another name, the file is somebody's image and stays one.
    if not content or runs is None or os.fstat(image).st_nlink != 1:
        return None
    if not rearranging.is_supported(os.path.dirname(path), content.cluster_size):
        return None
    value = content.digest()
    rearranging.rearrange(image, runs, verdict.virtual_size)
    return value


def to_raw(
    source: int,
    source_path: str,
    verdict: inspection.Verdict,
    target: int,
    target_path: str,
    conf: cfg.ConfigOpts,
    progress: Progress | None = None,
) -> str:
    """Write the disk that an accepted image holds into an empty file, as raw.

    qcow2 images, plain and compressed, and those of ploop are read here; every other kind goes through qemu-img.

    :param source, source_path: the image.
    :param verdict: what the inspector said of it.
    :param target, target_path: the file.
    :param progress: called for each of the steps in turn.
    :returns: the digest of the result, see :data:`imagebackend.storage.digest.BLOCKS`.
    :raises ImageUnacceptable: the image's tables lie, or its compressed data are damaged.
    :raises ToolFailed: qemu-img could not.
    :raises InsufficientSpace, StorageError: the file system could not.
    :raises TimedOut: it took longer than ``[libvirt] images_tool_timeout``.
    """
    content = _content(source, source_path, verdict, conf, progress)
    if content is not None:
        return content.write(target)
    if verdict.format == "parallels":
        return _ploop_to_raw(source, source_path, verdict, target, target_path, progress)
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


def _ploop_to_raw(
    source: int,
    source_path: str,
    verdict: inspection.Verdict,
    target: int,
    target_path: str,
    progress: Progress | None,
) -> str:
    # Not by qemu-img, whose driver gets lost in images of a tebibyte.
    header = ploop.read_header(source, source_path)
    [runs] = ploop.data_runs([ploop.read_table(source, header, source_path)], header)
    try:
        os.ftruncate(target, verdict.virtual_size)
    except OSError as error:
        raise exceptions.storage_error(error, target_path) from error
    sparse_copy.copy_runs(source, target, runs, progress=progress)
    return digest.compute(target, digest.BLOCKS, target_path, progress)


def _content(
    image: int, path: str, verdict: inspection.Verdict, conf: cfg.ConfigOpts, progress: Progress | None
) -> qcow2.Content | None:
    """Return what can read the image in this process, or None."""
    if verdict.format != "qcow2":
        return None
    header = qcow2.read_header(image, path)
    try:
        return qcow2.Content(image, header, path, timeout=conf.libvirt.images_tool_timeout, progress=progress)
    except exceptions.Unsupported:
        return None


def _in_order(runs: Iterable[qcow2.Run]) -> list[qcow2.Run] | None:
    """Return the runs of an image if none is compressed, each comes after the one before it, and they are not many."""
    found: list[qcow2.Run] = []
    end = 0
    for run in runs:
        if run.compressed_length or run.host_offset < end or len(found) == _MOST_MOVES:
            return None
        found.append(run)
        end = run.host_offset + run.length
    return found
