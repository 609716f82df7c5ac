# SPDX-License-Identifier: Apache-2.0
"""A ploop disk: a folder with its images and the descriptor that says how they hang together.

Which images the disk is made of changes in one step, with its descriptor: what is new is complete by then, and what is
no longer needed goes afterwards. The header of the image on top decides how large the disk is.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from imagebackend import exceptions, faults
from imagebackend.images import ploop_content, ploop_tree, transfer
from imagebackend.images.base import Progress, Snapshot
from imagebackend.images.disk_file import DiskFile
from imagebackend.images.ploop_tree import Tree
from imagebackend.storage import image_lock, ploop, publish, qemu_img, reflink
from imagebackend.templates import inspection

__all__ = ["PloopFolder"]

#: Writes an image into an open, empty file.
Write = Callable[[int], object]

_LARGEST = 1 << 20
#: What an image of this disk may be called, in an intent.
_IMAGE = re.compile(rf"{re.escape(ploop.ROOT_IMAGE)}([@.][A-Za-z0-9._@{{}}-]{{1,190}})?\Z", re.ASCII)


class PloopFolder:
    """A ploop disk. Its images are the host's, and no guest can write their headers and tables."""

    disk_format = "ploop"
    #: QEMU does not change the size of such an image.
    grows_running = False

    def __init__(self, disk: DiskFile) -> None:
        self._disk = disk
        self._conf = disk.conf

    def create(self, write: Callable[[int], ploop.Header]) -> None:
        """Make the disk, of one image."""
        durable = self._conf.durable_writes
        with self._disk.create_folder(self.disk_format) as folder:
            path = f"{folder}/{ploop.ROOT_IMAGE}"
            with publish.opened_new(path) as image:
                header = write(image)
                if durable:
                    transfer.sync(image, path)
            content = ploop.format_descriptor(self._single(ploop.ROOT_IMAGE, header.virtual_size))
            publish.write_file(f"{folder}/{ploop.NAME}", content, durable=durable)

    def check(self) -> None:
        """Make sure that the disk is what its descriptor says.

        :raises ImageUnacceptable: its descriptor or an image breaks the format's rules.
        :raises CorruptDisk: an image is gone, or one that is below another was written to.
        """
        tree = self._read()
        described = os.stat(self._disk.descriptor)
        chain = tree.layers(ploop.TOP)
        for delta in chain:
            header, changed = self._look(delta)
            if header.cluster_size != tree.descriptor.cluster_size:
                reason = f"its clusters have {header.cluster_size} bytes, {tree.descriptor.cluster_size} are described"
                raise exceptions.ImageUnacceptable(self._path(delta.file), reason)
            # The descriptor got its name when all of this was as it should stay.
            if delta is not chain[-1] and changed > described.st_ctime_ns:
                reason = (
                    f"{delta.file} was written to after {chain[-1].file} was put on top of it; restore it, "
                    f"or, if what it holds is right, 'touch {self._disk.descriptor}'"
                )
                raise exceptions.CorruptDisk(self._disk.path, reason)

    def is_settled(self) -> bool:
        """Return whether nothing remains to be done before QEMU can open the disk, or somebody has it open."""
        tree = self._read()
        top = tree.descriptor.top
        settled = tree.tidied() == tree.descriptor and not self._look(top)[0].in_use
        return settled or image_lock.is_in_use(self._path(top.file))

    def is_closed(self) -> bool:
        """Return whether the header of the image on top says that nobody writes to it."""
        return not self._look(self._top())[0].in_use

    def settle(self) -> None:
        """Finish, or undo, a change that was cut short, and mend what a killed guest left; under the disk's lock.

        :raises ImageUnacceptable, CorruptDisk: as :meth:`check`.
        """
        self.check()
        intent = self._disk.intent()
        idle = not image_lock.is_in_use(self._path(self._top().file))
        if idle and self._look(self._top())[0].in_use:
            self._mend(intent)
        if intent is not None:
            if intent["operation"] == "resize":
                self._cut()
            self._clear(intent)
        self._follow_header()
        if idle:
            self._tidy()

    def source_path(self) -> str:
        """Return the path of the image for QEMU.

        :raises Unsupported: the disk is in several images, and QEMU reads single ones.
        """
        if self.depends():
            raise exceptions.Unsupported(
                f"a guest of QEMU on {self._disk.path}",
                "'ploop snapshot' has divided the disk, and libvirt gives QEMU one image; flatten the disk first",
            )
        return self._path(self._top().file)

    def virtual_size(self) -> int:
        """Return the disk's size in bytes."""
        return self._look(self._top())[0].virtual_size

    def new_size(self, size: int) -> int:
        """Return the size that a disk gets that is asked to have this one.

        :raises InvalidSize: it cannot be as large.
        """
        return ploop.round_size(size)

    def grow(self, size: int) -> None:
        """Make the disk ``size`` bytes large; allocated, if that is wanted.

        :raises Unsupported: it has snapshots, and would need a later version of the format.
        """
        header, _ = self._look(self._top())
        if header.version < ploop.version_for(size):
            self._copy_larger(size)
            return
        path = self._path(self._top().file)
        with image_lock.hold(path), transfer.open_file(path, writable=True) as image:
            self._disk.intend("resize", files=[])
            with contextlib.ExitStack() as undo:
                undo.callback(self._settle_quietly)
                ploop.grow(image, size, path, durable=self._conf.durable_writes)
                if self._conf.preallocate_images == "space":
                    ploop.allocate(image, path, durable=self._conf.durable_writes)
                undo.pop_all()
            faults.point("disk.resize.changed")
            self._follow_header()
            faults.point("disk.resize.described")
            self._disk.settle()

    def depends(self) -> bool:
        """Return whether a part of what the disk holds is below the image that is written to."""
        return len(self._read().layers(ploop.TOP)) > 1

    def template_file(self) -> str | None:
        """Return None: the disk shares blocks with its template at most, and the file system counts those."""
        return None

    def can_snapshot(self) -> bool:
        """Return whether snapshots can be made as the ini file wants it."""
        return self._conf.reflink != "always" or transfer.shares_blocks(self._disk.folder)

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots, oldest first; those that ``ploop`` made go by their GUID."""
        found = []
        for delta in self._read().snapshots:
            header, changed = self._look(delta)
            created = datetime.datetime.fromtimestamp(changed / 1e9, datetime.UTC).isoformat(timespec="seconds")
            found.append((changed, Snapshot(ploop_tree.snapshot_name(delta), created, header.virtual_size)))
        return [snapshot for _, snapshot in sorted(found, key=lambda each: each[0])]

    def create_snapshot(self, name: str) -> None:
        """Copy the disk, or clone it where the file system shares blocks, and put that beside it.

        :raises Unsupported: blocks must be shared, and cannot be here.
        """
        tree, image = self._read(), ploop_tree.snapshot_image(name)
        new = tree.rearranged(whole={ploop_tree.new_guid(): image})
        with self._kept_from_writers(tree):
            self._commit("snapshot", tree, new, {image: self._copier(tree, ploop.TOP)})

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot that is there; what is on top of it gets a copy of its own."""
        tree = self._read()
        snapshot = self._snapshot(tree, name)
        whole, contents = {}, {}
        for delta in tree.children(snapshot.guid):
            image = whole[delta.guid] = ploop_tree.new_image(delta)
            contents[image] = self._copier(tree, delta.guid)
        with self._kept_from_writers(tree):
            new = tree.rearranged(whole=whole, drop=[snapshot.guid])
            self._commit("snapshot-remove", tree, new, contents)

    def roll_back(self, name: str) -> None:
        """Put a copy of a snapshot that is there in the disk's place."""
        tree, image = self._read(), ploop_tree.new_image()
        snapshot = self._snapshot(tree, name)
        new = tree.rearranged(whole={ploop.TOP: image}, size=self._look(snapshot)[0].virtual_size)
        with self._kept_from_writers(tree):
            self._commit("rollback", tree, new, {image: self._copier(tree, snapshot.guid)})

    def flatten(self, progress: Progress | None) -> None:
        """Put all that can be read of the disk into one image."""
        tree, image = self._read(), ploop_tree.new_image()
        new = tree.rearranged(whole={ploop.TOP: image})
        with self._kept_from_writers(tree):
            self._commit("flatten", tree, new, {image: self._copier(tree, ploop.TOP, progress)})

    def import_file(self, path: str) -> None:
        """Make the disk of a local file, in place of what is there.

        :raises ImageUnacceptable: the file must not be used.
        """
        with transfer.open_file(path) as source:
            verdict = inspection.inspect(source, path)

            def write(image: int) -> ploop.Header:
                size, scratch = verdict.virtual_size, self._disk.scratch
                return ploop_content.write_from_image(self._conf, image, size, source, path, verdict, scratch=scratch)

            if not self._disk.exists():
                self.create(write)
                return
            self._disk.refuse_in_use()
            intent = self._disk.intent()
            if intent is not None:
                self._clear(intent)
            tree, image = self._read(), ploop_tree.new_image()
            with self._kept_from_writers(tree):
                new = self._single(image, ploop.round_size(verdict.virtual_size))
                self._commit("import", tree, new, {image: write})
            self._disk.forget_damage()

    def extract(self, target: str, out_format: str | None, progress: Progress | None) -> None:
        """Write a standalone copy of the disk, which the caller has locked, to ``target``.

        :raises InvalidArgument: such a format is not written, or the target is among disks and templates.
        """
        target, out_format = transfer.extract_target(self._conf, target, out_format, "raw")
        layers = [self._path(delta.file) for delta in self._read().layers(ploop.TOP)]
        with transfer.extracting(self._disk, layers[-1], target) as (copy, partial):
            if out_format == "raw":
                ploop_content.write_raw(copy, layers, progress=progress)
                return
            # Not QEMU's driver of the disk's own format, which gets lost in images of a tebibyte.
            with publish.new_scratch(self._disk.scratch) as scratch:
                ploop_content.write_raw(scratch, layers, progress=progress)
                compress = out_format == "qcow2" and self._conf.libvirt.snapshot_compression
                path = self._disk.scratch
                transfer.convert(self._disk, path, "raw", partial, out_format, compress=compress, progress=progress)

    def paths(self) -> list[str]:
        """Return the images that what can be read of the disk is in, the uppermost first."""
        return [self._path(delta.file) for delta in reversed(self._read().layers(ploop.TOP))]

    def _single(self, image: str, size: int) -> ploop.Descriptor:
        """Return what describes a disk of one image."""
        delta = ploop.Delta(ploop.TOP, None, image)
        preallocated = self._conf.preallocate_images == "space"
        return ploop.Descriptor(size, ploop.CLUSTER_SIZE, (delta,), preallocated)

    def _copier(self, tree: Tree, guid: str, progress: Progress | None = None) -> Write:
        layers = [self._path(delta.file) for delta in tree.layers(guid)]
        return lambda image: ploop_content.write_from_layers(self._conf, image, layers, progress=progress)

    def _copy_larger(self, size: int) -> None:
        """Put a copy in the disk's place that is of the version of the format that a size needs."""
        tree, image = self._read(), ploop_tree.new_image()
        found = [ploop_tree.snapshot_name(each) for each in tree.snapshots]
        if found:
            raise exceptions.Unsupported(
                f"growing {self._disk.path} to {size} bytes",
                f"this needs a later version of the format, for {', '.join(found)} too; remove the snapshots first",
            )
        path = self._path(tree.descriptor.top.file)

        def write(target: int) -> None:
            ploop_content.write_from_layers(self._conf, target, [path], size=size)

        with self._kept_from_writers(tree):
            self._commit("resize", tree, tree.rearranged(whole={ploop.TOP: image}, size=size), {image: write})

    def _commit(self, operation: str, tree: Tree, new: ploop.Descriptor, contents: Mapping[str, Write]) -> None:
        """Change the images that the disk is made of.

        :param contents: what writes the ones that are new, by name.
        """
        old = tree.descriptor
        images = {delta.file for delta in old.deltas} ^ {delta.file for delta in new.deltas}
        self._disk.intend(operation, files=sorted(images))
        with contextlib.ExitStack() as undo:
            undo.callback(self._settle_quietly)
            for image in (images & {delta.file for delta in new.deltas}) - contents.keys():
                self._write_image(image, lambda target: _write_empty(target, min(old.virtual_size, new.virtual_size)))
            for image, write in contents.items():
                self._write_image(image, write)
            faults.point(f"disk.{operation}.copied")
            self._describe(new)
            undo.pop_all()
        faults.point(f"disk.{operation}.changed")
        self._clear({"operation": operation, "files": sorted(images)})
        self._tidy()

    def _write_image(self, image: str, write: Write) -> None:
        path = self._path(image)
        with publish.new_file(path, durable=self._conf.durable_writes, replace=True) as (file, _):
            write(file)
            transfer.set_time(file, path)

    def _describe(self, descriptor: ploop.Descriptor) -> None:
        durable = self._conf.durable_writes
        publish.write_file(self._disk.descriptor, ploop.format_descriptor(descriptor), durable=durable)
        if durable:
            publish.sync_folder(self._disk.path)

    def _clear(self, intent: dict[str, Any]) -> None:
        """Remove what a change made, or left over, that the disk is not made of, and drop the intent."""
        used = {delta.file for delta in self._read().descriptor.deltas}
        for image in intent["files"]:
            if image not in used and _IMAGE.match(image):
                publish.remove_file(self._path(image))
                publish.remove_partial(self._path(image))
        faults.point(f"disk.{intent['operation']}.cleared")
        self._disk.settle()

    def _tidy(self) -> None:
        """Give the image on top its usual name, and drop a root that is of no use any more."""
        tree = self._read()
        old, new = tree.descriptor, tree.tidied()
        if new == old:
            return
        images = {delta.file for delta in old.deltas} ^ {delta.file for delta in new.deltas}
        self._disk.intend("tidy", files=sorted(images))
        try:
            if new.top.file != old.top.file:
                os.link(self._path(old.top.file), self._path(new.top.file))
        except OSError as error:
            self._disk.settle()
            if error.errno == errno.EEXIST:
                return  # it is nothing of this disk
            raise exceptions.storage_error(error, self._disk.path) from error
        faults.point("disk.tidy.linked")
        self._describe(new)
        faults.point("disk.tidy.described")
        self._clear({"operation": "tidy", "files": sorted(images)})

    def _mend(self, intent: dict[str, Any] | None) -> None:
        """Mend the image on top after its writer was killed, as QEMU does it: what it had not flushed is not there."""
        path = self._path(self._top().file)
        result = qemu_img.check(path, "parallels", repair="all", **self._disk.tool_options())
        with transfer.open_file(path) as image:
            try:
                header = ploop.read_header(image, path)
                ploop.read_table(image, header, path)
            except exceptions.ImageUnacceptable as error:
                self._disk.mark_broken(intent or {"operation": "write"})
                raise exceptions.CorruptDisk(self._disk.path, f"{error.reason}; restore or remove it") from error
        if result.corruptions or header.in_use:
            raise exceptions.StorageError(path, "its writer was killed, and it could not be mended")

    def _cut(self) -> None:
        path = self._path(self._top().file)
        with transfer.open_file(path, writable=True) as image:
            ploop.cut(image, path)

    def _follow_header(self) -> None:
        """Let the descriptor say of the disk's size what the header of the image on top says."""
        tree = self._read()
        size = self._look(tree.descriptor.top)[0].virtual_size
        if tree.descriptor.virtual_size != size:
            self._describe(tree.resized(size))

    def _settle_quietly(self) -> None:
        # An undo step: the error that led here matters more, and the next access to the disk tries again.
        with contextlib.suppress(exceptions.ImageBackendError):
            self.settle()

    @contextlib.contextmanager
    def _kept_from_writers(self, tree: Tree) -> Iterator[None]:
        with image_lock.hold(self._path(tree.descriptor.top.file)):
            yield

    def _snapshot(self, tree: Tree, name: str) -> ploop.Delta:
        found = tree.find_snapshot(name)
        if found is None:
            raise exceptions.SnapshotNotFound(name, f"disk {self._disk.path} has no such snapshot")
        return found

    def _top(self) -> ploop.Delta:
        return self._described().top

    def _read(self) -> Tree:
        descriptor = self._described()
        for delta in descriptor.deltas:
            if ploop_tree.may_be_empty(delta):
                header, _ = self._look(delta)
                if header.file_size == header.first_block:
                    return Tree(descriptor, delta.guid)
        return Tree(descriptor)

    def _described(self) -> ploop.Descriptor:
        path = self._disk.descriptor
        content = publish.read_file(path, _LARGEST)
        if content is None:
            if not self._disk.exists():
                raise exceptions.DiskNotFound(self._disk.path)
            raise exceptions.CorruptDisk(self._disk.path, f"it has no {ploop.NAME}; restore it")
        return ploop.parse_descriptor(content, path)

    def _look(self, delta: ploop.Delta) -> tuple[ploop.Header, int]:
        """Return the header of an image, and when it was changed last, in nanoseconds."""
        path = self._path(delta.file)
        try:
            with transfer.open_file(path) as image:
                return ploop.read_header(image, path), os.fstat(image).st_mtime_ns
        except exceptions.DiskNotFound as error:
            if not self._disk.exists():
                raise exceptions.DiskNotFound(self._disk.path) from error
            reason = f"{delta.file}, which a part of it is in, is gone; restore it"
            raise exceptions.CorruptDisk(self._disk.path, reason) from error

    def _path(self, image: str) -> str:
        return f"{self._disk.path}/{image}"


def _write_empty(target: int, size: int) -> None:
    header = ploop.write_image(target, size, [])
    # On ext4, ploop's kernel takes no holes in an image that is only read.
    try:
        os.pwrite(target, bytes(header.first_block - 4096), 4096)
    except OSError as error:
        raise exceptions.storage_error(error, reflink.file_path(target)) from error
