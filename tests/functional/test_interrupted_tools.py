# SPDX-License-Identifier: Apache-2.0
"""Kill qemu-img at each of its writes: the next use of the disk finds the old state or the new one, and mends it.

What test_faults.py does between the steps of an operation, this does inside of those that a tool takes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagebackend import exceptions, process
from imagebackend.images.qcow2 import Qcow2
from tests.contract.conftest import MIB, Store
from tests.functional.test_faults import State, check_left, state_of

#: What qemu-img changes an image with, and what it waits for.
CALLS = ("pwrite64", "pwritev", "fallocate", "ftruncate", "fdatasync")
TOLD = 3


def written(store: Store) -> None:
    """A disk in whose clusters there is something of the template, of its guest, and of both."""
    image = store.make()
    store.write(image, 512, 4096, 1)
    store.write(image, 6 * MIB, 65536, 2)


def with_snapshots(store: Store) -> None:
    """A disk that has changed, size and all, since each of its snapshots."""
    written(store)
    image = store.image()
    image.create_snap("one")
    store.write(image, 0, 131072, 3)
    image.resize_image(12 * MIB)
    store.write(image, 11 * MIB, 65536, 4)
    image.create_snap("two")
    store.write(image, 65536, 131072, 5)


def rolled_back(store: Store) -> None:
    """The smaller of two states that a disk had."""
    with_snapshots(store)
    store.image().rollback_to_snap("one")


def with_another_template(store: Store) -> None:
    """A disk, and a template that holds other data than the disk's own."""
    written(store)

    def fetch(target: str) -> None:
        Path(target).write_bytes(bytes(MIB) + b"other" * (MIB // 5))

    store.backend.templates.fetch("other", fetch)


def rebase(store: Store) -> None:
    image = store.image()
    assert isinstance(image, Qcow2)
    image.rebase("other")


@dataclass(frozen=True)
class Operation:
    """What is there before, what is done, and what the call says if it is repeated after it was done."""

    before: Callable[[Store], None]
    act: Callable[[Store], object]
    done: tuple[type[Exception], ...] = ()


OPERATIONS = {
    "resize": Operation(with_snapshots, lambda store: store.image().resize_image(64 * MIB)),
    "snapshot": Operation(
        with_snapshots, lambda store: store.image().create_snap("three"), (exceptions.SnapshotExists,)
    ),
    "remove snapshot": Operation(
        with_snapshots, lambda store: store.image().remove_snap("one"), (exceptions.SnapshotNotFound,)
    ),
    "roll back": Operation(with_snapshots, lambda store: store.image().rollback_to_snap("one")),
    "roll forward": Operation(rolled_back, lambda store: store.image().rollback_to_snap("two")),
    "flatten": Operation(written, lambda store: store.image().flatten()),
    "rebase": Operation(with_another_template, rebase),
}


def make_and_remove_a_snapshot(store: Store) -> None:
    store.image().create_snap("next")
    store.check(store.image())
    store.image().remove_snap("next")


#: How the disk is used next, one after the other. What was called may also be called again.
USES: tuple[Callable[[Store], object], ...] = (
    lambda store: store.image().libvirt_info("virtio", "vda", "disk", "none", {}),
    lambda store: store.image().cache(store.fetch, "template", 8 * MIB),
    make_and_remove_a_snapshot,
)


class Interrupted:
    """A store whose qemu-img is killed, and that is put back as it was before the operation."""

    def __init__(self, folder: Path, operation: Operation) -> None:
        # Small clusters, so that tables of clusters grow, and are freed, on small disks.
        self.store = Store(folder, "qcow2", {"libvirt.images_qcow2_cluster_size": 4096})
        self.store.conf.set_override("lock_timeout", 5.0)
        self._operation = operation
        self._kept = folder / "kept"
        self._tool = folder / "tool"
        self._used = folder / "used"
        self._tool.mkdir()
        operation.before(self.store)
        self._copy(self.store.folder, self._kept)
        self.before = state_of(self.store)
        operation.act(self.store)
        self.after, self.files = state_of(self.store), self.store.files()

    def run(self, call: str, number: int, *, with_its_caller: bool) -> bool:
        """Put everything back and do the operation, in which the first qemu-img is killed when it calls ``call``.

        :param number: at which of its calls.
        :param with_its_caller: kill the process that started qemu-img, too.
        :returns: whether that happened.
        """
        shutil.rmtree(self.store.folder)
        self._copy(self._kept, self.store.folder)
        self._used.unlink(missing_ok=True)
        words = ["/usr/bin/strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}"]
        words += ["-e", f"inject={call}:signal=KILL:when={number}", "/usr/bin/qemu-img"]
        also = "kill -KILL $PPID" if with_its_caller else "kill -KILL $$"
        script = f'(set -C; : >"{self._used}") 2>/dev/null || exec /usr/bin/qemu-img "$@"\n{" ".join(words)} "$@"\n'
        script += f"status=$?\n[ $status -ne 137 ] || {also}\nexit $status\n"
        (self._tool / "qemu-img").write_text(f"#!/bin/sh\n{script}")
        (self._tool / "qemu-img").chmod(0o755)
        ended = self._in_child()
        assert ended in (0, -signal.SIGKILL if with_its_caller else TOLD)
        return ended != 0

    def check(self, use: Callable[[Store], object], what: str) -> None:
        """Make sure that the disk can be used, is what it was or what it was to be, and gets there when asked."""
        with contextlib.suppress(self._operation.done):
            use(self.store)
        found = state_of(self.store)
        check_left(self.before, self.after, found, what)
        check_whole(self.before, self.after, found, what)
        self._check_leases(what)
        with contextlib.suppress(self._operation.done):
            self._operation.act(self.store)
        assert state_of(self.store) == self.after, f"repeated after {what}"
        assert self.store.files() == self.files, f"left over after {what}"

    def _check_leases(self, what: str) -> None:
        chain = [each.path for each in self.store.image().backing_chain()]
        templates = self.store.backend.templates
        leased = [name for name in templates.names() if templates.leases(name)]
        assert chain[1:] == [templates.path(name) for name in leased], f"leases after {what}"

    def _in_child(self) -> int:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 1
        try:
            process.PATH = f"{self._tool}:{process.PATH}"
            self._operation.act(self.store)
            code = 0
        except exceptions.ToolFailed as error:
            code = TOLD if error.exit_code == -signal.SIGKILL else 1
        finally:
            os._exit(code)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        subprocess.run(["cp", "-a", "--reflink=auto", source, target], check=True)


def check_whole(before: State, after: State, found: State, what: str) -> None:
    """Make sure that content and snapshots are of one state, not some of the old and some of the new."""
    for state in (before, after):
        if found.contents == state.contents and found.snapshots == state.snapshots:
            return
    raise AssertionError(f"neither the old state nor the new one after {what}")


def kills(interrupted: Interrupted, *, with_its_caller: bool) -> Iterator[tuple[int, str]]:
    """Kill qemu-img at each of its calls in turn; yield how many times it was done, and where."""
    done = 0
    for call in CALLS:
        number = 1
        while interrupted.run(call, number, with_its_caller=with_its_caller):
            yield done, f"{call} number {number}"
            number += 1
            done += 1


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("with_its_caller", [False, True], ids=["tool", "all"])
def test_wherever_qemu_img_is_killed_the_disk_is_old_or_new(
    operation: str, with_its_caller: bool, xfs_folder: Path
) -> None:
    interrupted = Interrupted(xfs_folder, OPERATIONS[operation])
    uses = (*USES, OPERATIONS[operation].act)
    number_of_kills = 0

    for number, what in kills(interrupted, with_its_caller=with_its_caller):
        interrupted.check(uses[number % len(uses)], what)
        number_of_kills += 1

    assert number_of_kills > 1
    shutil.rmtree(xfs_folder)
