# SPDX-License-Identifier: Apache-2.0
"""Templates as ploop images: made once from the template in the cache, cloned for each disk.

::

    .ploop/FILE/root.hds              the image; FILE is what the template's file is called in the cache
    .ploop/FILE/DiskDescriptor.xml    so that it is a ploop disk like any other
    .ploop/FILE/template.json         its record

They exist only where files share blocks, and share theirs with the template. Disks made from them depend on neither.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from oslo_config import cfg

from imagebackend import exceptions, faults
from imagebackend.images import ploop_content, transfer
from imagebackend.images.base import Progress
from imagebackend.storage import ploop, publish
from imagebackend.templates import inspection, native, record
from imagebackend.templates.native import NativeTemplate, NativeTemplates
from imagebackend.templates.record import Template, check_reference

__all__ = ["PloopTemplates"]

LOG = logging.getLogger(__name__)

_RECORD = "template.json"
_LARGEST = 4096
_FACTS = {"name": str, "sha256": str, "digest": str, "virtual_size": int, "made": str, "size": int, "modified": int}


class PloopTemplates(NativeTemplates):
    """The templates that are ploop images. Making the object does no I/O.

    :param conf: options of this library.
    """

    image_type: ClassVar[str] = "ploop"

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        instances = os.path.abspath(conf.instances_path)
        self._conf = conf
        self._folder = f"{instances}/{conf.image_cache.subdirectory_name}/.ploop"

    def serve(self, folder: str) -> bool:
        """Return whether a disk in ``folder``, which may be still to be made, can be cloned from them."""
        if self._conf.reflink == "never" or self._conf.preallocate_images == "space":
            return False
        here, there = transfer.existing(os.path.dirname(self._folder)), transfer.existing(folder)
        return transfer.shares_blocks(there) and os.stat(here).st_dev == os.stat(there).st_dev

    @contextlib.contextmanager
    def open(self, template: Template, progress: Progress | None = None) -> Iterator[int]:
        """Give the image of a template of the cache, open for reading; it is made if it is not there.

        :param template: not removed meanwhile.
        :param progress: called with the bytes done and in all while it is made.
        """
        path = f"{self._folder}/{template.file}/{ploop.ROOT_IMAGE}"
        while True:
            with contextlib.ExitStack() as stack:
                if self._is_there(template):
                    with contextlib.suppress(exceptions.DiskNotFound):  # removed since
                        yield stack.enter_context(transfer.open_file(path))
                        return
            self._ensure(template, progress)

    def list(self) -> Sequence[NativeTemplate]:
        found = []
        for file in self._files():
            try:
                facts = self._facts(file)
            except exceptions.CorruptRecord as error:
                LOG.warning("the ploop image of template %s is left out: %s", file, error)
                continue
            if facts is not None:
                # Its data are in blocks of the template's file: what it takes by itself is its table.
                used = ploop.CLUSTER_SIZE
                name, sha256, virtual_size, made = (facts[each] for each in ("name", "sha256", "virtual_size", "made"))
                found.append(NativeTemplate(name, sha256, virtual_size, used, made, users=()))
        return sorted(found, key=lambda each: each.name)

    def prepare(self, template: Template, progress: Progress | None = None) -> None:
        # Elsewhere disks are copied from the template itself, and an image would only take space.
        if self.serve(os.path.dirname(self._folder)):
            self._ensure(template, progress)

    def remove(self, name: str) -> None:
        there = False
        # Only what has or had the name is read, however many others there are.
        base = record.base_name(name)
        for file in [each for each in self._files() if record.base_name(each) == base]:
            facts = self._facts(file)
            if facts is not None and facts["name"] == name:
                with self._lock(file):
                    there |= publish.remove_folder(f"{self._folder}/{file}")
        if not there:
            raise exceptions.TemplateNotFound(name, "there is no ploop image of it")
        LOG.info("ploop image of template %s removed", name)

    def sweep(self) -> Sequence[str]:
        swept = []
        for entry in publish.list_folder(self._folder):
            file = entry.removeprefix(".").removesuffix(".partial")
            if entry.startswith("."):
                with contextlib.suppress(exceptions.LockTimeout), self._lock(file, timeout=0):
                    publish.remove_partial(f"{self._folder}/{file}")
                    swept.append(entry)
        return swept

    def _ensure(self, template: Template, progress: Progress | None) -> None:
        with self._lock(template.file):
            if not self._is_there(template):
                publish.remove_folder(f"{self._folder}/{template.file}")
                self._make(template, progress)

    def _make(self, template: Template, progress: Progress | None) -> None:
        durable = self._conf.durable_writes
        final = f"{self._folder}/{template.file}"
        verdict = inspection.Verdict(template.format, template.virtual_size, 0)
        with publish.new_folder(final, durable=durable) as folder, contextlib.ExitStack() as stack:
            path = f"{folder}/{ploop.ROOT_IMAGE}"
            source = stack.enter_context(transfer.open_file(template.path))
            image = stack.enter_context(publish.opened_new(path))
            header = ploop_content.write_from_image(
                self._conf,
                image,
                template.virtual_size,
                source,
                template.path,
                verdict,
                scratch=f"{folder}/.scratch",
                progress=progress,
                allocate=False,
            )
            faults.point("ploop.template.filled")
            if durable:
                transfer.sync(image, path)
            delta = ploop.Delta(ploop.TOP, None, ploop.ROOT_IMAGE)
            descriptor = ploop.Descriptor(header.virtual_size, header.cluster_size, (delta,))
            publish.write_file(f"{folder}/{ploop.NAME}", ploop.format_descriptor(descriptor), durable=durable)
            found = os.fstat(image)
            facts = {
                "version": 1,
                **{name: getattr(template, name) for name in ("name", "sha256", "digest", "virtual_size")},
                "made": record.now(),
                "size": found.st_size,
                "modified": found.st_mtime_ns,
            }
            publish.write_file(f"{folder}/{_RECORD}", json.dumps(facts).encode(), durable=durable)
            faults.point("ploop.template.recorded")
        LOG.info("ploop image of template %s made", template.name)

    def _is_there(self, template: Template) -> bool:
        """Return whether there is an image of this very template, as it was when it was made."""
        try:
            facts = self._facts(template.file)
            found = os.stat(f"{self._folder}/{template.file}/{ploop.ROOT_IMAGE}")
        except (exceptions.CorruptRecord, OSError):
            return False
        wanted = (template.digest, found.st_size, found.st_mtime_ns)
        return facts is not None and wanted == (facts["digest"], facts["size"], facts["modified"])

    def _facts(self, file: str) -> dict[str, Any] | None:
        """Return what the record of an image says, or None if there is none.

        :raises CorruptRecord: it cannot be understood.
        """
        path = f"{self._folder}/{check_reference(file)}/{_RECORD}"
        content = publish.read_file(path, _LARGEST)
        if content is None:
            return None
        try:
            facts: dict[str, Any] = json.loads(content)
            if all(type(facts[name]) is kind for name, kind in _FACTS.items()):
                return facts
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise exceptions.CorruptRecord(path, "not the record of a ploop image; remove its folder")

    def _files(self) -> Sequence[str]:
        return [entry for entry in publish.list_folder(self._folder) if not entry.startswith(".")]

    def _lock(self, file: str, timeout: float | None = None) -> contextlib.AbstractContextManager[None]:
        return native.lock(self._conf, self.image_type, file, timeout)
