# SPDX-License-Identifier: Apache-2.0
"""Images in the expanded format of ploop, which QEMU calls parallels, of both versions, and disks made of several."""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from collections.abc import Iterator

from imagebackend import exceptions
from imagebackend.storage import ploop, publish
from imagebackend.storage.run import Run
from imagebackend.templates.inspection.subject import Subject, Verdict, upper_bound

__all__ = ["inspect", "opened_disk"]

_LARGEST_DESCRIPTOR = 1 << 20
#: Of all block tables of a disk together: 256 MiB in memory.
_MOST_ENTRIES = 1 << 26
#: The kernel's clock for files goes in steps of up to this: what comes later may seem older than a time that was set.
_TICK = 10_000_000


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins like an image of ploop.

    :raises ImageUnacceptable: it was not closed cleanly, or has a header or a table that breaks the format's rules.
    """
    header = _header(subject)
    subject.check_virtual_size(header.virtual_size)
    clusters = ploop.allocated_clusters(ploop.read_table(subject.descriptor, header, subject.name))
    allocated_size = upper_bound(clusters * header.cluster_size, header.virtual_size)
    return Verdict("parallels", header.virtual_size, allocated_size)


@contextlib.contextmanager
def opened_disk(folder: str, name: str) -> Iterator[tuple[ploop.Header, list[tuple[int, list[Run]]]]]:
    """Give what a disk in a folder holds, once its descriptor and each of its images were accepted.

    Nothing is opened but the descriptor and the images that it names, and no link is followed.

    :param folder: nobody changes it meanwhile, which is looked at after the block.
    :param name: what to call it in errors.
    :returns: the header of the image that is written to; and each image below it, open for reading, the lowest first,
        with what in it is not hidden by those above.
    :raises ImageUnacceptable: there is no descriptor; it, or an image, breaks the format's rules or is not there; an
        image that is below another one was written to; or one was written to meanwhile.
    :raises StorageError: the operating system does not let one of them be read.
    """
    with contextlib.ExitStack() as stack:
        path = f"{name}/{ploop.NAME}"
        described = stack.enter_context(_opened(folder, ploop.NAME, path))
        disk = ploop.parse_descriptor(described.read_up_to(0, _LARGEST_DESCRIPTOR), path)
        images = {
            delta.guid: stack.enter_context(_opened(folder, delta.file, f"{name}/{delta.file}"))
            for delta in disk.deltas
        }
        before = {guid: _state(image) for guid, image in images.items()}
        headers = {guid: _header(image) for guid, image in images.items()}
        _check(disk, headers, images, described)
        chain = [delta.guid for delta in disk.chain(ploop.TOP)]
        tables: dict[str, array[int]] = {}
        for guid, image in images.items():
            table = ploop.read_table(image.descriptor, headers[guid], image.name)
            if guid in chain:
                tables[guid] = table
        top = headers[ploop.TOP]
        runs = ploop.data_runs([tables[guid] for guid in chain], top)
        yield top, [(images[guid].descriptor, here) for guid, here in zip(chain, runs, strict=True)]
        for guid, image in images.items():
            if _state(image) != before[guid]:
                raise image.refusal("it was written to while it was read")


def _check(
    disk: ploop.Descriptor, headers: dict[str, ploop.Header], images: dict[str, Subject], described: Subject
) -> None:
    """Make sure that images are as their descriptor says."""
    changed = os.fstat(described.descriptor).st_mtime_ns + _TICK
    below = {delta.guid for delta in disk.chain(ploop.TOP)} - {ploop.TOP}
    if sum(header.entries for header in headers.values()) > _MOST_ENTRIES:
        raise described.refusal(f"the block tables of its images have more than {_MOST_ENTRIES} entries")
    for guid, header in headers.items():
        image = images[guid]
        if header.cluster_size != disk.cluster_size:
            reason = f"its clusters have {header.cluster_size} bytes, {disk.cluster_size} are described"
            raise image.refusal(reason)
        if guid in below and os.fstat(image.descriptor).st_mtime_ns > changed:
            reason = (
                f"it was written to after another image was put on top of it; if what it holds is right, "
                f"'touch {ploop.NAME}'"
            )
            raise image.refusal(reason)
    size = headers[ploop.TOP].virtual_size
    if size != disk.virtual_size:
        reason = f"it has {size} bytes, {disk.virtual_size} are described; 'ploop grow' sets that right"
        raise images[ploop.TOP].refusal(reason)


def _state(image: Subject) -> tuple[int, int]:
    found = os.fstat(image.descriptor)
    return found.st_size, found.st_mtime_ns


def _header(image: Subject) -> ploop.Header:
    header = ploop.read_header(image.descriptor, image.name)
    if header.in_use:
        raise image.refusal(
            "it is marked in use: it was not closed; run 'qemu-img check -f parallels -r all' on it, or copy it again"
        )
    return header


@contextlib.contextmanager
def _opened(folder: str, file: str, name: str) -> Iterator[Subject]:
    try:
        descriptor = os.open(f"{folder}/{file}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise exceptions.ImageUnacceptable(name, "it is missing") from error
        if error.errno == errno.ELOOP:
            raise exceptions.ImageUnacceptable(name, "it is a link; the file itself is needed") from error
        raise exceptions.storage_error(error, name) from error
    try:
        yield Subject(descriptor, name)
    finally:
        publish.close_quietly(descriptor)
