# SPDX-License-Identifier: Apache-2.0
"""The content of RBD images: streamed in and out in big pieces, many at a time, holes left out.

The images are open ``rbd.Image`` objects of :meth:`imagebackend.storage.ceph.Pool.open`, which translates what is
raised here.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import reflink, sparse_copy
from imagebackend.storage.ceph_connection import finish

__all__ = ["Progress", "allocated", "flatten", "read", "read_into", "write_from"]

Progress = Callable[[int, int], None]

# The default size of an object: a piece goes to one object, and so to one OSD.
_PIECE = 4 << 20
_DEPTH = 16
_ZEROS = bytes(_PIECE)


def write_from(source: int, image: Any, *, progress: Progress | None = None) -> None:
    """Copy a file into an image that reads as zeros, and flush it; pieces that are zeros are left out as holes are.

    :param source: descriptor of a regular file no longer than the image; nobody writes to it meanwhile.
    :param progress: called with the bytes done and in all; holes count.
    :raises StorageError: the source became shorter.
    """
    size = os.fstat(source).st_size
    _tell(progress, 0, size)
    with _in_flight() as pieces:
        ends: deque[int] = deque()

        def finish_oldest() -> None:
            finish(pieces.popleft())
            _tell(progress, ends.popleft(), size)

        for start, length in _pieces(sparse_copy.data_ranges(source, size)):
            with _file_errors(source):
                data = os.pread(source, length, start)
            if len(data) != length:
                raise exceptions.StorageError(f"descriptor {source}", "became shorter while it was read")
            if data == _ZEROS[:length]:
                continue
            pieces.append(image.aio_write(data, start, _ignore))
            ends.append(start + length)
            if len(pieces) == _DEPTH:
                finish_oldest()
        while pieces:
            finish_oldest()
    image.flush()
    _tell(progress, size, size)


def read_into(image: Any, target: int, *, progress: Progress | None = None) -> None:
    """Copy an image into an empty file, which gets its size and its holes.

    :param target: descriptor of a regular file, open for writing.
    :param progress: called with the bytes done and in all; holes count.
    :raises InsufficientSpace, StorageError: as the operating system says of the file.
    """
    size = image.size()
    _tell(progress, 0, size)
    with _file_errors(target):
        os.ftruncate(target, size)
    with contextlib.closing(read(image)) as pieces:
        for start, data in pieces:
            with _file_errors(target):
                _write(data, start, target)
            _tell(progress, start, size)
    _tell(progress, size, size)


def read(image: Any) -> Generator[tuple[int, bytes]]:
    """Yield the data of an image in order, as offset and content; what lies between reads as zeros.

    Whoever does not come to the end closes the generator, before the image.
    """
    found: list[tuple[int, int]] = []

    def note(start: int, length: int, exists: bool) -> None:
        if exists:
            found.append((start, start + length))

    image.diff_iterate(0, image.size(), None, note)
    with _in_flight() as pieces:
        arrived: dict[int, bytes] = {}
        starts: deque[int] = deque()
        for start, length in _pieces(found):
            pieces.append(image.aio_read(start, length, _keep(arrived, start)))
            starts.append(start)
            if len(pieces) == _DEPTH:
                finish(pieces.popleft())
                yield starts[0], arrived.pop(starts.popleft())
        while pieces:
            finish(pieces.popleft())
            yield starts[0], arrived.pop(starts.popleft())


def flatten(image: Any, progress: Progress | None = None) -> None:
    """Copy into an image all that it has from its parent, and cut the tie.

    librbd cannot be stopped at it: if the callback raises ``Cancelled``, it is done all the same, and no error.

    :param progress: called with the objects done and in all.
    """
    failures: list[BaseException] = []

    def report(done: int, total: int) -> int:
        # What passes through librbd is lost on the way.
        try:
            if not failures:
                _tell(progress, done, total)
        except BaseException as error:
            failures.append(error)
        return 0

    image.flatten(on_progress=report)
    if failures and not isinstance(failures[0], exceptions.Cancelled):
        raise failures[0]


def allocated(image: Any) -> int:
    """Return how many bytes of storage an image's own data take, to whole objects; its parent's are not counted."""
    total = 0

    def count(start: int, length: int, exists: bool) -> None:
        nonlocal total
        if exists:
            total += length

    # By whole objects: the object map answers then, and no object is read.
    image.diff_iterate(0, image.size(), None, count, include_parent=False, whole_object=True)
    return total


def _pieces(ranges: Any) -> Iterator[tuple[int, int]]:
    for start, end in ranges:
        while start < end:
            stop = min(end, start - start % _PIECE + _PIECE)
            yield start, stop - start
            start = stop  # noqa: PLW2901 - the rest of the range


@contextlib.contextmanager
def _in_flight() -> Iterator[deque[Any]]:
    """Give a queue of requests that is empty again when the block is left, however that happens."""
    pieces: deque[Any] = deque()
    try:
        yield pieces
    finally:
        for piece in pieces:
            piece.wait_for_complete_and_cb()


def _ignore(completion: Any) -> None:
    pass


def _keep(arrived: dict[int, bytes], start: int) -> Callable[[Any, bytes | None], None]:
    def keep(completion: Any, data: bytes | None) -> None:
        if data is not None:
            arrived[start] = data

    return keep


@contextlib.contextmanager
def _file_errors(descriptor: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(descriptor)) from error


def _write(data: bytes, start: int, target: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(target, rest, start)
        rest, start = rest[written:], start + written


def _tell(progress: Progress | None, done: int, size: int) -> None:
    if progress is not None:
        progress(done, size)
