# SPDX-License-Identifier: Apache-2.0
"""Making a template's file: fetched under a temporary name, inspected, converted if need be, published."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults
from imagebackend.storage import digest, publish
from imagebackend.templates import conversion, download, inspection, record
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Happening, Template
from imagebackend.templates.sources import Fetched, Source

__all__ = ["Arrival", "FetchFunction", "Progress", "Request", "arriving", "check_size"]

#: Called as ``fetch_func(target=path)``; writes the image to ``path``, an empty file. The ``fetch`` method of a
#: source is one, and what it returns saves reading the image once more; any other result is ignored.
FetchFunction = Callable[..., object]
Progress = Callable[[int, int], None]


# What is told of a fetch that succeeded.
_TOLD = ("source", "format", "size", "seconds")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be fetched, and how.

    :ivar name: what the template is to be called.
    :ivar fetch_func: called as ``fetch_func(*args, target=path, **kwargs)``, and with ``progress=`` if one is given.
    :ivar size: refuse an image that does not fit into a disk of this many bytes; None: no check.
    :ivar progress: called with the bytes done and in all, while fetching and while converting.
    """

    name: str
    fetch_func: FetchFunction
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    size: int | None = None
    progress: Progress | None = None

    def fetch(self, target: str) -> object:
        """Write the image to the file ``target``."""
        more: dict[str, Any] = {} if self.progress is None else {"progress": self.progress}
        if self.is_resumable:
            more["resume"] = True
        return self.fetch_func(*self.args, target=target, **self.kwargs, **more)

    @property
    def is_resumable(self) -> bool:
        """Whether the target may hold a part that an earlier fetch left."""
        return download.is_resumable(self.fetch_func)


class Arrival:
    """An image that was fetched, found acceptable and converted, and has no final name yet.

    :ivar template: what is known of it; its file is the temporary one.
    """

    def __init__(self, folder: TemplateFolder, template: Template, descriptor: int, target: str) -> None:
        self.template = template
        self._folder = folder
        self._descriptor = descriptor
        self._target = target
        self._path: str | None = None
        self._mends = False

    @property
    def size(self) -> int:
        """The length of the file, in bytes."""
        return os.fstat(self._descriptor).st_size

    def named(self, file: str, *, mends: bool = False) -> Template:
        """Return the image as it is to be recorded once :meth:`publish` has given its file a name in the folder.

        :param mends: a damaged file has that name, which should hold the same. Whoever has it open keeps it, and the
            new one is not taken back: nothing is better off without it.
        """
        self._path, self._mends = self._folder.file(file), mends
        found = os.stat(self.template.path, follow_symlinks=False)
        return dataclasses.replace(
            self.template, file=file, path=self._path, size=found.st_size, modified=found.st_mtime_ns
        )

    def publish(self) -> None:
        """Give the image the name that was chosen, if one was.

        :raises InsufficientSpace, PermissionDenied, StorageError: it has not got the name.
        """
        if self._path is None:
            return
        durable = self._folder.conf.durable_writes
        publish.commit(self._descriptor, self.template.path, self._path, durable=durable, replace=self._mends)
        if self._target != self.template.path:
            # Before the record: once the template is there, nobody looks for leftovers of its fetch.
            publish.remove_file(self._target)
        faults.point("template.fetch.published")

    def discard(self) -> None:
        """Remove the image: one that is there already will do.

        :raises PermissionDenied, StorageError: it is still there.
        """
        for path in {self.template.path, self._target}:
            publish.remove_file(path)

    def take_back_quietly(self) -> None:
        """Remove the file as an undo step, if it was published: the error that led here matters more."""
        if self._path is not None and not self._mends:
            publish.remove_quietly(self._path)


@contextlib.contextmanager
def arriving(folder: TemplateFolder, request: Request, temporary: str) -> Iterator[Arrival]:
    """Give an image that was just fetched, to be published and recorded in the block.

    What is not published is gone after the block, and if the block fails, what was published is, too.

    :param temporary: what the temporary files are called after; nobody else uses that name meanwhile.
    :raises ImageUnacceptable: what was fetched must not be used.
    :raises DiskTooSmall: it does not fit into ``request.size``.
    :raises InsufficientSpace: it does not fit into the file system.

    An exception of the request's function propagates.
    """
    target = folder.download(temporary)
    with _told(folder, request) as (request, facts), contextlib.ExitStack() as undo:
        undo.enter_context(download.opened(target, resume=request.is_resumable))
        faults.point("template.fetch.start")
        fetched = request.fetch(target)
        faults.point("template.fetch.fetched")
        image = undo.enter_context(publish.opened(target, os.O_RDWR))
        arrival = _accepted(folder, request, temporary, fetched, image, undo)
        facts.update(source=arrival.template.source, format=arrival.template.format, size=arrival.size)
        with contextlib.ExitStack() as discard:
            discard.callback(arrival.take_back_quietly)
            yield arrival
            discard.pop_all()


@contextlib.contextmanager
def _told(folder: TemplateFolder, request: Request) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Tell of the fetch in the block, and of its progress; give the request to do it with, and facts to be filled in.

    They are ``source``, ``format`` and ``size``.
    """
    events, name, report = folder.events, request.name, request.progress

    def tell_progress(done: int, total: int) -> None:
        events.tell("fetch.progress", name, done=done, total=total)
        if report is not None:
            report(done, total)

    # A function of an agent's may not take progress= unless the agent asks for it.
    if events.observers and (report is not None or isinstance(getattr(request.fetch_func, "__self__", None), Source)):
        request = dataclasses.replace(request, progress=tell_progress)
    facts: dict[str, Any] = {}
    began = time.monotonic()
    events.tell("fetch.started", name, "is being fetched")
    try:
        yield request, facts
    except BaseException as error:
        kind, seconds = type(error).__name__, time.monotonic() - began
        # What an agent's function raises may say anything, a password included; its caller gets it.
        reason = error if isinstance(error, exceptions.ImageBackendError) else kind
        events.tell("fetch.failed", name, "is not fetched: %s", reason, error=kind, seconds=seconds)
        raise
    facts["seconds"] = time.monotonic() - began
    told = "fetched from %s: %s, %d bytes in %.1f s"
    events.tell("fetch.finished", name, told, *(facts[each] for each in _TOLD), **facts)


def check_size(conf: cfg.ConfigOpts, name: str, virtual_size: int, min_disk: int, size: int | None) -> None:
    """Refuse a template that is too large.

    :param virtual_size, min_disk: its own, in bytes.
    :param size: that of the disk to be made from it, in bytes; None: no check.
    :raises ImageUnacceptable: it exceeds ``[image_cache] max_virtual_size``.
    :raises DiskTooSmall: it does not fit into ``size``.
    """
    limit = conf.image_cache.max_virtual_size
    if limit and virtual_size > limit:
        reason = f"its virtual size is {virtual_size} bytes, [image_cache] max_virtual_size is {limit}"
        raise exceptions.ImageUnacceptable(name, reason)
    if size and virtual_size > size:
        raise exceptions.DiskTooSmall(name, size, virtual_size, "the template's virtual size")
    if size and min_disk > size:
        raise exceptions.DiskTooSmall(name, size, min_disk, "the smallest disk that the image is meant for")


def _accepted(
    folder: TemplateFolder,
    request: Request,
    temporary: str,
    fetched: object,
    image: int,
    undo: contextlib.ExitStack,
) -> Arrival:
    """Return what was fetched once it was inspected, and converted if need be."""
    target = folder.download(temporary)
    known = fetched if isinstance(fetched, Fetched) else Fetched(_name_of(request.fetch_func), 0, "")
    verdict = inspection.inspect(image, request.name, known.disk_format)
    check_size(folder.conf, request.name, verdict.virtual_size, known.min_disk, request.size)
    sha256 = known.sha256
    if known is not fetched:
        sha256 = digest.compute(image, digest.SHA256, request.name, request.progress).partition(":")[2]
    faults.point("template.fetch.inspected")
    if verdict.format == "raw" or (verdict.format == "qcow2" and not folder.conf.force_raw_images):
        content = known.content_sha256 or sha256
        path, descriptor, kept_as = target, image, verdict.format
        value = f"{digest.SHA256}:{content}" if content else ""
        value = value or digest.compute(image, digest.BLOCKS, request.name, request.progress)
    else:
        kept_as = "raw"
        path, descriptor, value = _converted(folder, request, temporary, image, verdict, undo)
    now = record.now()
    template = Template(
        name=request.name,
        path=path,
        format=kept_as,
        virtual_size=verdict.virtual_size,
        size=0,
        modified=0,
        sha256=sha256,
        digest=value,
        source=known.source,
        source_format=verdict.format,
        inspector=inspection.INSPECTOR_VERSION,
        notes=verdict.notes,
        fetched=now,
        file="",
        etag=known.etag or "",
        last_modified=known.last_modified or "",
        compression=known.compression or "",
        content_sha256=known.content_sha256 or "",
        min_disk=known.min_disk,
        history=(Happening("fetched", now, known.source),),
    )
    return Arrival(folder, template, descriptor, target)


def _converted(
    folder: TemplateFolder,
    request: Request,
    temporary: str,
    image: int,
    verdict: inspection.Verdict,
    undo: contextlib.ExitStack,
) -> tuple[str, int, str]:
    """Convert an image; return the path of the result, its descriptor, and its digest."""
    target = folder.download(temporary)
    value = conversion.in_place(image, target, verdict, folder.conf, request.progress)
    if value is not None:
        faults.point("template.fetch.converted")
        return target, image, value
    conversion.check_space(folder.path, verdict.allocated_size)
    partial = publish.partial_path(folder.file(temporary))
    try:
        descriptor = publish.create(partial)
    except OSError as error:
        raise exceptions.storage_error(error, partial) from error
    undo.callback(publish.close_quietly, descriptor)
    undo.callback(publish.remove_quietly, partial)
    value = conversion.to_raw(image, target, verdict, descriptor, partial, folder.conf, request.progress)
    faults.point("template.fetch.converted")
    return partial, descriptor, value


def _name_of(function: FetchFunction) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', '?')}"
