# SPDX-License-Identifier: Apache-2.0
"""What ploop disks hold: copied in from images of any kind, and out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.images import transfer
from imagebackend.images.base import Progress
from imagebackend.storage import ploop, publish, qcow2, reflink, sparse_copy
from imagebackend.storage.run import Run
from imagebackend.templates import conversion, inspection

__all__ = ["open_layers", "write_from_image", "write_from_layers", "write_raw"]


def write_from_image(
    conf: cfg.ConfigOpts,
    target: int,
    size: int,
    source: int,
    path: str,
    verdict: inspection.Verdict,
    *,
    scratch: str,
    progress: Progress | None = None,
    allocate: bool = True,
) -> ploop.Header:
    """Write an image of ploop into an empty file that holds what another image holds.

    :param target: open for reading and writing.
    :param size: of the disk, in bytes; rounded up to whole clusters.
    :param source, path: an image that was accepted, open for reading.
    :param verdict: what the inspector said of it.
    :param scratch: the path of a raw copy, while this runs, of an image that cannot be read here.
    :param allocate: let ``preallocate_images`` have its say.
    :raises InvalidSize: a ploop disk cannot be as large.
    :raises Unsupported: blocks must be shared, and cannot be here.
    :raises InsufficientSpace, StorageError, ToolFailed: the file is of no use.
    """
    runs = _runs(source, path, verdict)
    if runs is not None:
        return _write(conf, target, size, [(source, runs)], progress, allocate)
    with _raw_copy(conf, source, path, verdict, scratch, progress) as (copy, runs):
        return _write(conf, target, size, [(copy, runs)], progress, allocate)


def write_from_layers(
    conf: cfg.ConfigOpts, target: int, layers: Sequence[str], *, progress: Progress | None = None, size: int = 0
) -> ploop.Header:
    """Write an image of ploop into an empty file that holds what others hold, each on top of the one before it.

    :param layers: their paths, the lowest first.
    :param size: of the disk, in bytes; 0: as large as the uppermost.
    :raises: as :func:`write_from_image`.
    """
    with open_layers(layers) as (header, sources):
        if len(layers) == 1 and not size:
            [(source, _)] = sources
            transfer.copy(conf, source, target, progress=progress, allocate=False)
            return header
        return _write(conf, target, size or header.virtual_size, sources, progress)


def write_raw(target: int, layers: Sequence[str], *, progress: Progress | None = None) -> None:
    """Write what images hold, each on top of the one before it, into an empty file.

    :param layers: their paths, the lowest first.
    :raises ImageUnacceptable: one of them is damaged.
    :raises InsufficientSpace, StorageError: the file is of no use.
    """
    with open_layers(layers) as (header, sources):
        transfer.set_length(target, header.virtual_size, reflink.file_path(target))
        for source, runs in sources:
            sparse_copy.copy_runs(source, target, runs, progress=progress)


@contextlib.contextmanager
def open_layers(layers: Sequence[str]) -> Iterator[tuple[ploop.Header, list[tuple[int, list[Run]]]]]:
    """Give images, each on top of the one before it: the uppermost one's header, and of each, what is not hidden.

    :param layers: their paths, the lowest first.
    :raises ImageUnacceptable: one of them is damaged.
    """
    with contextlib.ExitStack() as stack:
        descriptors = [stack.enter_context(transfer.open_file(path)) for path in layers]
        headers = [ploop.read_header(each, path) for each, path in zip(descriptors, layers, strict=True)]
        top = headers[-1]
        odd = [path for path, each in zip(layers, headers, strict=True) if each.cluster_size != top.cluster_size]
        if odd:
            raise exceptions.ImageUnacceptable(odd[0], f"its clusters are not those of {layers[-1]}")
        tables = [
            ploop.read_table(each, header, path)
            for each, header, path in zip(descriptors, headers, layers, strict=True)
        ]
        yield top, list(zip(descriptors, ploop.data_runs(tables, top), strict=True))


def _write(
    conf: cfg.ConfigOpts,
    target: int,
    size: int,
    sources: Sequence[tuple[int, Sequence[Run]]],
    progress: Progress | None,
    allocate: bool = True,
) -> ploop.Header:
    preallocate = allocate and conf.preallocate_images == "space"
    if conf.reflink == "always" and not preallocate:
        folder = os.path.dirname(reflink.file_path(target))
        for source, _ in sources:
            if os.fstat(source).st_dev != os.fstat(target).st_dev or not transfer.shares_blocks(folder):
                raise exceptions.Unsupported("[DEFAULT] reflink = always", f"{folder} does not share these blocks")
    share = conf.reflink != "never"
    return ploop.write_image(target, size, sources, progress=progress, share=share, preallocate=preallocate)


def _runs(source: int, path: str, verdict: inspection.Verdict) -> list[Run] | None:
    """Return where the data are in an image; None where they are not there as they are."""
    if verdict.format == "raw":
        return _data(source, path)
    if verdict.format == "parallels":
        header = ploop.read_header(source, path)
        return ploop.data_runs([ploop.read_table(source, header, path)], header)[0]
    if verdict.format == "qcow2":
        with contextlib.suppress(exceptions.Unsupported):
            runs = list(qcow2.data_runs(source, qcow2.read_header(source, path), path))
            return None if any(run.compressed_length for run in runs) else runs
    return None


def _data(descriptor: int, path: str) -> list[Run]:
    try:
        size = os.fstat(descriptor).st_size
        return [Run(start, start, end - start) for start, end in sparse_copy.data_ranges(descriptor, size)]
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


@contextlib.contextmanager
def _raw_copy(
    conf: cfg.ConfigOpts,
    source: int,
    path: str,
    verdict: inspection.Verdict,
    scratch: str,
    progress: Progress | None,
) -> Iterator[tuple[int, list[Run]]]:
    with publish.new_scratch(scratch) as descriptor:
        conversion.to_raw(source, path, verdict, descriptor, scratch, conf, progress)
        yield descriptor, _data(descriptor, scratch)
