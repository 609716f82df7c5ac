# SPDX-License-Identifier: Apache-2.0
"""Kill the process after each step of each operation: what is left is absent or whole, and the same call mends it.

A new backend adds its stores, a new operation adds a row to OPERATIONS; steps name themselves (imagebackend.faults).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from imagebackend import exceptions, faults
from imagebackend.images.qcow2 import Qcow2
from imagebackend.templates.precaching import Wanted
from imagebackend.templates.sources import open_source
from tests.contract.conftest import MIB, STORES, RbdStore, Store, open_store

SWEPT = (
    *("raw-ext4", "raw-xfs", "raw-of-qcow2", "qcow2", "qcow2-options", "qcow2-on-qcow2"),
    *("ploop-ext4", "ploop-xfs", "rbd-v1", "rbd-v2"),
)


def fetch_qcow2(store: Store) -> Callable[..., None]:
    def fetch(target: str) -> None:
        shutil.copyfile(store.qcow2_template, target)

    return fetch


def make(store: Store) -> None:
    store.make()


def make_cold_converted(store: Store) -> None:
    store.image().cache(fetch_qcow2(store), "converted", 8 * MIB)


def make_filled(store: Store) -> None:
    def fill(target: str) -> None:
        with open(target, "r+b") as file:
            file.write(b"filled" * 1000)

    store.image().create_from_func(fill, 4 * MIB)


def make_and_write(store: Store) -> None:
    store.write(store.make(), 6 * MIB, MIB, 5)


def snapshotted(store: Store) -> None:
    make_and_write(store)
    store.image().create_snap("one")
    store.write(store.image(), 0, MIB, 6)


def local_file(store: Store) -> str:
    path = store.sources / "local"
    path.write_bytes(b"local" * 1024 * 1024)
    return str(path)


def another_template(store: Store) -> None:
    make_and_write(store)
    store.backend.templates.fetch("other", store.fetch)


def rebase(store: Store) -> None:
    image = store.image()
    assert isinstance(image, Qcow2)
    image.rebase("other")


@dataclass(frozen=True)
class Operation:
    """What is there before, what is done, and where it makes sense."""

    before: Callable[[Store], None]
    act: Callable[[Store], object]
    only: str = ""
    #: What the call says if it is repeated after it was done.
    done: tuple[type[Exception], ...] = ()


def nothing(store: Store) -> None:
    pass


def template(store: Store) -> None:
    store.backend.templates.fetch("template", store.fetch)


def remove_template(store: Store) -> None:
    store.backend.templates.remove("template")


def another_image(store: Store) -> None:
    """A disk that depends on a template, in whose place another image comes."""
    make_and_write(store)
    (store.sources / "image").write_bytes(b"another" * MIB)


def pull(store: Store) -> None:
    source = open_source(str(store.sources / "image"), store.conf)
    store.backend.templates.pull("template", source, "always")


def pull_back(store: Store) -> None:
    """What comes is what had the name before."""
    source = open_source(str(store.source), store.conf)
    store.backend.templates.pull("template", source, "always")


def pulled(store: Store) -> None:
    another_image(store)
    pull(store)


def image_in_store(store: Store) -> None:
    store.make().direct_snapshot(None, "snap", "raw", "an-image", "")


def clone(store: Store) -> None:
    assert isinstance(store, RbdStore)
    location = f"rbd://{store.cluster.fsid}/{store.pool}/an-image/snap"
    store.backend.image("cloned", "disk").clone(None, location)


def once_used(store: Store) -> None:
    """A template, also in the store's own form, whose only disk is gone, and what was left of another one."""
    store.make().remove()
    (store.folder / "_base" / ".other.download").write_bytes(b"left")


def rebuild_leases(store: Store) -> None:
    for _, error in store.backend.rebuild_leases().failed:
        raise error


def prune(store: Store) -> None:
    templates = store.backend.templates
    report = templates.prune(templates.policy(minimum_age=0, native_minimum_age=0))
    for _, error in report.failed:
        raise error


def without_leases(store: Store) -> None:
    make_and_write(store)
    store.make(disk_name="disk.two")
    shutil.rmtree(store.folder / "_base" / ".leases")


def precache(store: Store) -> None:
    wanted = Wanted("template", open_source(str(store.source), store.conf))
    (result,) = store.backend.templates.precache([wanted], store.backend.native_templates())
    assert result.error is None


OPERATIONS = {
    "create, cold": Operation(nothing, make),
    "create, cold, from qcow2": Operation(nothing, make_cold_converted),
    "create, warm": Operation(template, make),
    "create, filled": Operation(nothing, make_filled),
    "resize": Operation(make_and_write, lambda store: store.image().resize_image(64 * MIB)),
    "snapshot": Operation(
        make_and_write, lambda store: store.image().create_snap("one"), done=(exceptions.SnapshotExists,)
    ),
    "roll back": Operation(snapshotted, lambda store: store.image().rollback_to_snap("one")),
    "remove snapshot": Operation(
        snapshotted, lambda store: store.image().remove_snap("one"), done=(exceptions.SnapshotNotFound,)
    ),
    "flatten": Operation(make_and_write, lambda store: store.image().flatten()),
    "rebase": Operation(another_template, rebase, only="qcow2"),
    "extract": Operation(
        make_and_write, lambda store: store.image().snapshot_extract(str(store.sources / "extract"), "qcow2")
    ),
    "import": Operation(nothing, lambda store: store.image().import_file("i", local_file(store), "disk.config")),
    "import over a disk": Operation(
        make_and_write, lambda store: store.image().import_file(store.image().instance, local_file(store), "disk")
    ),
    "clone": Operation(image_in_store, clone, only="rbd"),
    "direct snapshot": Operation(make_and_write, image_in_store, only="rbd", done=(exceptions.DiskExists,)),
    "remove": Operation(snapshotted, lambda store: store.image().remove()),
    "pull": Operation(another_image, pull),
    "pull back": Operation(pulled, pull_back),
    "remove template": Operation(template, remove_template, done=(exceptions.TemplateNotFound,)),
    "prune": Operation(once_used, prune),
    "precache": Operation(nothing, precache, only="rbd"),
    "rebuild leases": Operation(without_leases, rebuild_leases, only="qcow2"),
}


@dataclass(frozen=True)
class State:
    """What can be seen of a store from outside."""

    contents: dict[str, bytes]
    snapshots: dict[str, list[str]]
    templates: list[str]
    leases: list[str]
    extracts: list[str]


def state_of(store: Store) -> State:
    """Look at everything that is offered for use, and make sure that it is whole."""
    contents, snapshots = {}, {}
    for image in store.backend.disks():
        image.libvirt_info("virtio", "vda", "disk", "none", {})
        store.check(image)
        contents[image.path] = store.content(image)
        snapshots[image.path] = [snapshot.name for snapshot in image.list_snaps()]
        for name in snapshots[image.path]:
            contents[f"{image.path}@{name}"] = store.snapshot_content(image, name)
    templates = store.backend.templates
    names = templates.names(former=True)
    for name in names:
        templates.verify(name)
    # A template that two records name, since a process was killed between them, is leased once.
    leases = sorted(
        {f"{templates.get(name).file} {lease.owner.path}" for name in names for lease in templates.leases(name)}
    )
    extracts = [path.name for path in store.sources.glob("extract*")]
    for name in extracts:
        disk_format, path = store.qemu(store.image())
        store.run("qemu-img", "compare", "-f", "qcow2", "-F", disk_format, store.sources / name, path)
    return State(contents, snapshots, list(names), leases, extracts)


def run(step: int, act: Callable[[], object]) -> int:
    """Do ``act`` in a child process that is killed when it passes its step number ``step``; return how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = step

    def kill(name: str) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    faults.arm(kill)
    code = 1
    try:
        act()
        code = 0
    finally:
        os._exit(code)


def steps_of(act: Callable[[], object]) -> list[str]:
    """Do ``act`` and return the steps that it passed."""
    passed: list[str] = []
    faults.arm(passed.append)
    try:
        act()
    finally:
        faults.arm(None)
    return passed


def again(operation: Operation, store: Store) -> None:
    """Repeat a call that was killed; one that had done its work already may say so."""
    with contextlib.suppress(operation.done):
        operation.act(store)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", SWEPT)
def test_killed_after_any_step_nothing_is_half_made_or_lost(
    name: str, operation: str, request: pytest.FixtureRequest
) -> None:
    image_type, fixture, _ = STORES[name]
    chosen = OPERATIONS[operation]
    if chosen.only not in ("", image_type):
        return
    folder: Path = request.getfixturevalue(fixture)

    def fresh() -> Store:
        shutil.rmtree(folder)
        folder.mkdir()
        store = open_store(name, request)
        if isinstance(store, RbdStore):
            store.empty()
        store.conf.set_override("lock_timeout", 5.0)
        chosen.before(store)
        return store

    store = fresh()
    before = state_of(store)
    steps = steps_of(lambda: chosen.act(store))
    after, files = state_of(store), store.files()

    for number, step in enumerate(steps):
        store = fresh()
        assert run(number, lambda store=store: chosen.act(store)) == -signal.SIGKILL, step
        store.fence()
        check_left(before, after, state_of(store), step)
        again(chosen, store)
        assert state_of(store) == after, f"repeated after {step}"
        assert store.files() == files, f"left over after {step}"
    shutil.rmtree(folder)


def check_left(before: State, after: State, found: State, step: str) -> None:
    """Make sure that every disk is as it was, as it was to be, or, if it was not on one side, absent."""
    for path, content in found.contents.items():
        assert content in (before.contents.get(path), after.contents.get(path)), f"{path} after {step}"
    for path in before.contents.keys() & after.contents.keys():
        assert path in found.contents, f"{path} lost after {step}"
        if "@" not in path:
            assert found.snapshots[path] in (before.snapshots[path], after.snapshots[path]), f"{path} after {step}"
    assert (
        set(before.templates) & set(after.templates) <= set(found.templates) <= {*before.templates, *after.templates}
    )
    assert set(before.leases) & set(after.leases) <= set(found.leases), f"leases after {step}"
