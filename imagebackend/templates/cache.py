# SPDX-License-Identifier: Apache-2.0
"""The template cache: fetched once, inspected before anything opens it, recorded, leased."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, faults, locks, names
from imagebackend.storage import digest, publish
from imagebackend.templates import conversion, download, inspection, leases, record
from imagebackend.templates.leases import Lease, Owner
from imagebackend.templates.record import Template
from imagebackend.templates.sources import Fetched

__all__ = ["FetchFunction", "Template", "TemplateCache"]

LOG = logging.getLogger(__name__)

#: Called as ``fetch_func(target=path)``; writes the image to ``path``, an empty file. The ``fetch`` method of a
#: source is one, and what it returns saves reading the image once more; any other result is ignored.
FetchFunction = Callable[..., object]
Progress = Callable[[int, int], None]


class TemplateCache:
    """The templates in one folder, which other hosts may share.

    A template is there when its record is. Making the object does no I/O.

    :param conf: options of this library.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._conf = conf
        instances = os.path.abspath(conf.instances_path)
        self._folder: str = os.path.join(instances, conf.image_cache.subdirectory_name)
        self._locks = f"{instances}/locks"

    @property
    def folder(self) -> str:
        """The folder that holds the templates."""
        return self._folder

    def path(self, name: str) -> str:
        """Return the path that the template has, or would have.

        :raises InvalidName: no template can be called that.
        """
        return f"{self._folder}/{names.check_name('template', name)}"

    def name_of(self, base: str) -> str:
        """Return the name of the template that ``base`` means: a name, or a path in this cache.

        :raises InvalidName: it is neither.
        """
        folder, slash, name = base.rpartition("/")
        if slash and folder != self._folder:
            raise exceptions.InvalidName("template", base, f"neither a name nor a path in {self._folder}")
        return names.check_name("template", name)

    def get(self, name: str) -> Template:
        """Return a template that is in the cache.

        :raises TemplateNotFound: it is not.
        :raises CorruptRecord: its record or its file is damaged.
        """
        template = record.read(self._record(name), self.path(name))
        if template is None:
            raise exceptions.TemplateNotFound(name, "add it with 'imagebackend template add'")
        return template

    def list(self) -> Sequence[Template]:
        """Return every template, sorted by name; one whose record is damaged is logged and left out.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        found = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except exceptions.TemplateNotFound:
                continue  # removed since it was listed
            except exceptions.CorruptRecord as error:
                LOG.warning("template %s is left out: %s", name, error)
        return found

    def names(self) -> Sequence[str]:
        """Return the names of all templates, sorted, whether their records are sound or not.

        :raises PermissionDenied, StorageError: the folder cannot be read.
        """
        folder = f"{self._folder}/.records"
        try:
            entries = os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise exceptions.storage_error(error, folder) from error
        return sorted(name.removesuffix(".json") for name in entries if not name.startswith("."))

    def fetch(
        self,
        name: str,
        fetch_func: FetchFunction,
        *args: Any,
        size: int | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> Template:
        """Return a template, fetching it if it is absent: once, however many threads, processes and hosts ask.

        :param name: the template.
        :param fetch_func: called as ``fetch_func(*args, target=path, **kwargs)`` if the template is absent, and with
            ``progress=`` too if one is given.
        :param size: refuse a template whose virtual size exceeds this many bytes, before it is converted.
        :param progress: called with the bytes done and in all, while fetching and while converting; an exception that
            it raises cancels the fetch and propagates.
        :raises InvalidName: no template can be called that.
        :raises ImageUnacceptable: what was fetched must not be used.
        :raises DiskTooSmall: its virtual size exceeds ``size``.
        :raises InsufficientSpace: it does not fit into the file system.
        :raises LockTimeout: someone else was at it for longer than ``[DEFAULT] lock_timeout``.

        An exception of ``fetch_func`` propagates. A failed fetch is not remembered, and leaves nothing but, for a day
        and under a temporary name, the part of an image that its source can go on with.
        """
        names.check_name("template", name)
        template = self._trusted(name, size)
        if template is None and os.path.lexists(self._record(name)):
            self._examine(name, progress)
        if template is not None:
            return template
        with self._lock(name):
            return self._fetch_locked(name, fetch_func, args, size, progress, kwargs)

    @contextlib.contextmanager
    def use(
        self,
        name: str,
        fetch_func: FetchFunction | None = None,
        *args: Any,
        size: int | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> Iterator[Template]:
        """Give a template, fetched as :meth:`fetch` does, that nobody removes while the block runs.

        Any number of threads, processes and hosts may use a template at a time. A disk that needs it for longer takes
        a :meth:`lease` in the block.

        :param fetch_func: None: the template must be in the cache.
        :raises TemplateNotFound: it is not, and there is nothing to fetch it with.
        """
        names.check_name("template", name)
        if fetch_func is None:
            self._require(name)
        while True:
            with self._lock(name, shared=True):
                template = self._trusted(name, size)
                if template is not None:
                    yield template
                    return
            if os.path.lexists(self._record(name)):
                self._examine(name, progress)
            elif fetch_func is None:
                self._require(name)
            else:
                with self._lock(name):
                    self._fetch_locked(name, fetch_func, args, size, progress, kwargs)

    def lease(self, name: str, owner: Owner) -> None:
        """Note that the disk ``owner`` depends on a template, within :meth:`use`.

        :raises InsufficientSpace, PermissionDenied, StorageError: it is not noted.
        """
        leases.take(self._leases(name), owner)

    def release(self, name: str, owner: Owner) -> None:
        """Drop the lease that ``owner`` has on a template, if it has one.

        :raises PermissionDenied, StorageError: it still has it.
        """
        leases.drop(self._leases(name), owner)

    def release_all(self, owner: Owner) -> None:
        """Drop every lease that ``owner`` has, when it is not known on which templates.

        :raises PermissionDenied, StorageError: it may still have some.
        """
        folder = f"{self._folder}/.leases"
        try:
            templates = os.listdir(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise exceptions.storage_error(error, folder) from error
        for name in templates:
            leases.drop(f"{folder}/{name}", owner)

    def leases(self, name: str) -> Sequence[Lease]:
        """Return the leases on a template, sorted by disk.

        :raises PermissionDenied, StorageError: they cannot be read.
        """
        names.check_name("template", name)
        return leases.read_all(self._leases(name), name)

    def verify(self, name: str, progress: Progress | None = None) -> Template:
        """Read a template again and compare it with its digest.

        :param progress: called with the bytes done and in all.
        :returns: the template.
        :raises TemplateNotFound: it is not in the cache.
        :raises CorruptRecord: the record or the file is damaged.
        """
        path = self.path(name)
        if not os.path.lexists(self._record(name)):
            raise exceptions.TemplateNotFound(name)
        with self._lock(name, shared=True):
            template = record.read(self._record(name), path, check_file=False)
            if template is None:
                raise exceptions.TemplateNotFound(name)
            expected = template.digest
            with _open_image(path) as descriptor:
                # Before it is read: what is changed while it is read, behind the reader, must show as changed later.
                found = os.fstat(descriptor)
                actual = digest.compute(descriptor, expected.partition(":")[0], path, progress)
        if actual != expected:
            raise exceptions.CorruptRecord(
                path, f"the template is damaged: its digest is {actual}, recorded as {expected}; restore or remove it"
            )
        # Same bytes, another time of change: a copy or a restore touched the file, not its content.
        return (
            template if found.st_mtime_ns == template.modified else self._rewrite(template, modified=found.st_mtime_ns)
        )

    def remove(self, name: str) -> None:
        """Remove a template that no disk depends on.

        :raises TemplateNotFound: it is not in the cache.
        :raises TemplateInUse: disks hold leases on it.
        :raises LockTimeout: someone else was at it for longer than ``[DEFAULT] lock_timeout``.
        """
        path = self.path(name)
        with self._lock(name):
            users = [f"{lease.owner.host}:{lease.owner.path}" for lease in self.leases(name)]
            if users:
                raise exceptions.TemplateInUse(name, users)
            # The record goes first: from then on nothing but a file without a meaning is left.
            there = publish.remove_file(self._record(name))
            faults.point("template.remove.record")
            there |= publish.remove_file(path)
            faults.point("template.remove.file")
            there |= download.remove(self._download(name))
            there |= publish.remove_file(publish.partial_path(path))
            with contextlib.suppress(OSError):
                os.rmdir(self._leases(name))
        if not there:
            raise exceptions.TemplateNotFound(name)
        LOG.info("template %s removed", name)

    def _record(self, name: str) -> str:
        return f"{self._folder}/.records/{name}.json"

    def _download(self, name: str) -> str:
        return f"{self._folder}/.{name}.download"

    def _leases(self, name: str) -> str:
        return f"{self._folder}/.leases/{name}"

    def _lock(self, name: str, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        # Exclusive holders remove the lock file, so that none is left for a template that could not be fetched.
        path = f"{self._locks}/template-{name}"
        return locks.hold(path, timeout=self._conf.lock_timeout, shared=shared, transient=not shared)

    def _fetch_locked(
        self,
        name: str,
        fetch_func: FetchFunction,
        args: tuple[Any, ...],
        size: int | None,
        progress: Progress | None,
        kwargs: dict[str, Any],
    ) -> Template:
        path = self.path(name)
        template = record.read(self._record(name), path)
        if template is not None:
            return template
        if os.path.lexists(path) and self.leases(name):
            raise exceptions.CorruptRecord(
                self._record(name), "the template's record is gone while disks depend on its file; restore the record"
            )
        if progress is not None:
            kwargs = {**kwargs, "progress": progress}
        partial = self._download(name)
        resume = download.is_resumable(fetch_func)
        if resume:
            kwargs = {**kwargs, "resume": True}
        with download.opened(partial, resume=resume):
            faults.point("template.fetch.start")
            fetched = fetch_func(*args, target=partial, **kwargs)
            faults.point("template.fetch.fetched")
            with contextlib.ExitStack() as discard:
                discard.callback(self._discard_quietly, name)
                template = self._publish(name, partial, fetched, fetch_func, size, progress)
                discard.pop_all()
        LOG.info("template %s fetched from %s: %s, %d bytes", name, template.source, template.format, template.size)
        return template

    def _publish(
        self,
        name: str,
        partial: str,
        fetched: object,
        fetch_func: FetchFunction,
        size: int | None,
        progress: Progress | None,
    ) -> Template:
        path = self.path(name)
        durable = self._conf.durable_writes
        with _open_image(partial) as image:
            known = fetched if isinstance(fetched, Fetched) else None
            verdict = inspection.inspect(image, name, known.disk_format if known else None)
            self._check_size(name, verdict.virtual_size, size)
            sha256 = known.sha256 if known else digest.compute(image, digest.SHA256, name, progress).partition(":")[2]
            keep = verdict.format == "raw" or (verdict.format == "qcow2" and not self._conf.force_raw_images)
            faults.point("template.fetch.inspected")
            if keep:
                value = f"{digest.SHA256}:{sha256}" if sha256 else digest.compute(image, digest.BLOCKS, name, progress)
                publish.commit(image, partial, path, durable=durable)
            else:
                value = self._convert(image, partial, verdict, path, progress)
                # Before the record: once the template is there, nobody looks for leftovers of its fetch.
                publish.remove_file(partial)
            faults.point("template.fetch.published")
            found = os.stat(path)
        template = Template(
            name=name,
            path=path,
            format=verdict.format if keep else "raw",
            virtual_size=verdict.virtual_size,
            size=found.st_size,
            modified=found.st_mtime_ns,
            sha256=sha256,
            digest=value,
            source=known.source if known else f"{fetch_func.__module__}.{getattr(fetch_func, '__qualname__', '?')}",
            source_format=verdict.format,
            inspector=inspection.INSPECTOR_VERSION,
            notes=verdict.notes,
            fetched=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        record.write(self._record(name), template, durable=durable)
        faults.point("template.fetch.recorded")
        return template

    def _convert(
        self, image: int, fetched: str, verdict: inspection.Verdict, path: str, progress: Progress | None
    ) -> str:
        conversion.check_space(self._folder, verdict.allocated_size)
        with publish.new_file(path, durable=self._conf.durable_writes) as (target, partial):
            value = conversion.to_raw(image, fetched, verdict, target, partial, self._conf, progress)
            faults.point("template.fetch.converted")
        return value

    def _discard_quietly(self, name: str) -> None:
        # An undo step: the error that led here matters more. The record goes first, as in remove().
        with contextlib.suppress(exceptions.ImageBackendError):
            publish.remove_file(self._record(name))
            publish.remove_file(self.path(name))

    def _check_size(self, name: str, virtual_size: int, size: int | None) -> None:
        limit = self._conf.image_cache.max_virtual_size
        if limit and virtual_size > limit:
            reason = f"its virtual size is {virtual_size} bytes, [image_cache] max_virtual_size is {limit}"
            raise exceptions.ImageUnacceptable(name, reason)
        if size and virtual_size > size:
            raise exceptions.DiskTooSmall(name, size, virtual_size, "the template's virtual size")

    def _require(self, name: str) -> None:
        if not os.path.lexists(self._record(name)):
            raise exceptions.TemplateNotFound(name, "add it with 'imagebackend template add'")

    def _trusted(self, name: str, size: int | None) -> Template | None:
        """Return the template if it may be used as it stands; None if it is absent, or to be examined first."""
        try:
            template = record.read(self._record(name), self.path(name))
        except record.TouchedTemplate:
            return None
        if template is None or template.inspector != inspection.INSPECTOR_VERSION:
            return None
        self._check_size(name, template.virtual_size, size)
        return template

    def _examine(self, name: str, progress: Progress | None) -> None:
        """Read a template that was touched again, and inspect anew one that an older inspector accepted.

        :raises CorruptRecord: its data have changed.
        :raises ImageUnacceptable: the inspector of today refuses it.
        """
        try:
            template = self.verify(name, progress)
        except exceptions.TemplateNotFound:
            return  # removed meanwhile
        if template.inspector == inspection.INSPECTOR_VERSION:
            return
        with _open_image(template.path) as image:
            verdict = inspection.inspect(image, name, template.format)
        self._rewrite(template, inspector=inspection.INSPECTOR_VERSION, notes=verdict.notes)

    def _rewrite(self, template: Template, **changes: Any) -> Template:
        refreshed = dataclasses.replace(template, **changes)
        faults.point("template.verify.touched")
        with self._lock(template.name):
            # It may have been removed, or fetched anew, since it was read.
            if record.read(self._record(template.name), template.path, check_file=False) == template:
                record.write(self._record(template.name), refreshed, durable=self._conf.durable_writes)
        return refreshed


@contextlib.contextmanager
def _open_image(path: str) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)
