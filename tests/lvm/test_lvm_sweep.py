# SPDX-License-Identifier: Apache-2.0
"""Sweeping up what killed processes left in a volume group that others with locks of their own use, too."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import faults, locks
from imagebackend.storage.lvm2 import VolumeGroup
from imagebackend.templates import native
from tests.contract.conftest import STORES, LvmStore
from tests.functional.cli_command import Command
from tests.lvm import volume_groups

Agents = Callable[[str], tuple[LvmStore, LvmStore]]


@pytest.fixture
def agents(group: VolumeGroup, tmp_path: Path) -> Agents:
    """Return what gives two agents of one host that share nothing but the volume group."""

    def give(name: str) -> tuple[LvmStore, LvmStore]:
        folders = [tmp_path / "one", tmp_path / "other"]
        for folder in folders:
            folder.mkdir()
        one, other = (LvmStore(folder, STORES[name][2], group) for folder in folders)
        return one, other

    return give


def killed_at(step: str, act: Callable[[], object]) -> None:
    """Do ``act`` in a process that is killed at a step."""

    def kill(passed: str) -> None:
        if passed == step:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        faults.arm(kill)
        try:
            act()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def volumes(store: LvmStore) -> set[str]:
    return {volume.name for volume in store.group.report()} - {volume_groups.POOL}


def remove(store: LvmStore) -> None:
    store.make()
    store.image().remove()


@pytest.mark.parametrize(
    ("name", "act", "step"),
    [
        ("lvm-thick", LvmStore.make, "disk.create.made"),
        ("lvm-thick", remove, "disk.remove.volume"),
        ("lvm-sparse", LvmStore.make, "disk.create.made"),
        ("lvm-thin", LvmStore.make, "template.copy.made"),
    ],
)
def test_what_killed_processes_left_is_swept_up_under_the_locks_it_was_made_under(
    agents: Agents, name: str, act: Callable[[LvmStore], object], step: str
) -> None:
    one, other = agents(name)
    killed_at(step, lambda: act(one))
    left = volumes(one)
    assert left

    assert other.backend.templates.prune().swept == []
    one.conf.set_override("host", "another")
    assert one.backend.templates.prune().swept == []
    one.conf.clear_override("host")
    assert volumes(one) == left
    image = one.image()
    with contextlib.ExitStack() as at_it:
        folder = locks.folder(str(one.folder))
        at_it.enter_context(locks.hold(locks.disk_lock(folder, image.instance, "disk"), timeout=0, transient=True))
        at_it.enter_context(native.lock(one.conf, "lvm", "template"))
        assert one.backend.templates.prune().swept == []
        assert volumes(one) == left

    report = one.backend.templates.prune()
    # A pool goes with the last of its volumes.
    named = sorted(f"lvm:{each}" for each in left if "+pool+" not in each)
    assert (sorted(report.swept), report.failed) == (named, [])
    assert volumes(one) == set()


def test_who_removes_what_another_made_is_the_one_to_sweep_it_up(agents: Agents, tmp_path: Path) -> None:
    one, other = agents("lvm-thick")
    one.make()
    killed_at("disk.remove.volume", other.image().remove)
    (left,) = volumes(one)
    assert one.backend.templates.prune().swept == []

    command = Command(tmp_path, instances=other.folder)
    command.configure("[libvirt]", "images_type = lvm", f"images_volume_group = {other.group.name}")
    assert command.json("template", "native", "sweep") == {"removed": [left]}
    assert volumes(one) == set()


def test_what_lives_is_not_swept_up(agents: Agents) -> None:
    one, _ = agents("lvm-thin")
    image = one.make()
    image.create_snap("before")
    killed_at("disk.rollback.complete", lambda: image.rollback_to_snap("before"))
    there = volumes(one)

    assert one.backend.templates.prune().swept == []
    assert volumes(one) == there
    image.libvirt_info("virtio", "vda", "disk", "none", {})
    assert image.exists()
