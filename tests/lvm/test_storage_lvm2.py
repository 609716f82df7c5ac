# SPDX-License-Identifier: Apache-2.0
"""LVM's commands as the library runs them, on a real device-mapper."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.storage import device_mapper, lvm2
from imagebackend.storage.lvm2 import Layout, VolumeGroup
from tests.lvm.volume_groups import MIB, POOL, group_on, loop_device, run, with_lvm_conf

TAGS = {"imagebackend.kind=disk", "imagebackend.made=2026-01-02T03:04:05.678901Z", "a_b+c/d!e:f&g#h"}


def only(group: VolumeGroup, name: str) -> lvm2.Volume:
    (volume,) = group.report(name)
    return volume


def test_a_volume_is_made_found_changed_and_removed(group: VolumeGroup) -> None:
    group.create("one", 3 * MIB + 512, TAGS, Layout())

    volume = only(group, "one")
    assert (volume.size, volume.kind, volume.tags) == (4 * MIB, "linear", TAGS)
    assert (volume.active, volume.open, volume.read_only, volume.pool) == (True, False, False, "")
    assert volume.extent_size == MIB
    assert os.stat(group.device("one")).st_rdev

    group.publish("one", drop_tags=["imagebackend.kind=disk"])
    group.publish("one", add_tags=["done"], read_only=True)
    group.deactivate("one")
    volume = only(group, "one")
    assert volume.tags == (TAGS | {"done"}) - {"imagebackend.kind=disk"}
    assert (volume.active, volume.read_only) == (False, True)
    assert not os.path.lexists(group.device("one"))
    group.activate("one")
    assert only(group, "one").active

    group.rename("one", "two")
    group.resize("two", 8 * MIB)
    group.resize("two", 8 * MIB - 512)
    assert only(group, "two").size == 8 * MIB
    with pytest.raises(exceptions.DiskExists):
        group.create("two", MIB, (), Layout())
    group.remove("two")
    assert [each.name for each in group.report()] == [POOL]


def test_a_report_selects_by_name_and_by_tag(group: VolumeGroup) -> None:
    group.create("a", MIB, {"x=1"}, Layout())
    group.create("b", MIB, {"x=2"}, Layout())
    group.create("c", MIB, (), Layout())

    assert [each.name for each in group.report()] == ["a", "b", "c", POOL]
    assert [each.name for each in group.report("c", "nosuch", tags=["x=1"])] == ["a", "c"]
    assert group.report("nosuch") == []


def test_thin_volumes_share_what_they_are_snapshots_of(group: VolumeGroup) -> None:
    group.create_thin_pool("another", 64 * MIB)
    group.create_thin("another", "template", 16 * MIB, {"t"})
    run("dd", "if=/dev/urandom", f"of={group.device('template')}", "bs=1M", "count=4", "oflag=direct")
    group.publish("template", add_tags={"whole"}, read_only=True)
    group.deactivate("template")

    group.snapshot("template", "disk", {"d"})
    group.snapshot("template", "kept", (), read_only=True, activate=False)
    disk, kept, template, pool = (only(group, name) for name in ("disk", "kept", "template", "another"))
    assert (disk.kind, disk.pool, disk.origin, disk.active, disk.read_only) == (
        "thin",
        "another",
        "template",
        True,
        False,
    )
    assert (kept.active, kept.read_only, kept.origin) == (False, True, "template")
    assert (template.active, template.read_only, template.tags) == (False, True, {"t", "whole"})
    assert (disk.data_percent, template.data_percent) == (25.0, None)
    assert pool.kind == "thin-pool"
    assert pool.data_percent == 6.25
    status = device_mapper.pool_status(f"{lvm2.device_name(group.name, 'another')}-tpool")
    assert status is not None
    assert (status.data_used, status.data_size) == (4 * MIB, 64 * MIB)
    assert 0 < status.metadata_used < status.metadata_size
    assert status.state.startswith("rw")

    group.resize("kept", 32 * MIB)
    group.resize("kept", 20 * MIB, shrink=True)
    assert only(group, "kept").size == 20 * MIB
    group.remove("template")
    assert Path(group.device("disk")).read_bytes()[: 4 * MIB].strip(b"\0")
    for origin, name, error in (("nosuch", "x", exceptions.DiskNotFound), ("disk", "kept", exceptions.DiskExists)):
        with pytest.raises(error):
            group.snapshot(origin, name, ())


def test_what_is_open_is_neither_deactivated_nor_removed(group: VolumeGroup) -> None:
    group.create("one", MIB, (), Layout())
    device = lvm2.device_name(group.name, "one")
    with open(group.device("one"), "rb"):
        assert only(group, "one").open
        assert device_mapper.open_count(device) == 1
        for change in (lambda: group.deactivate("one"), lambda: group.remove("one")):
            with pytest.raises(exceptions.DiskInUse):
                change()
    assert device_mapper.open_count(device) == 0
    assert device_mapper.open_count(f"{device}-none") is None
    assert device_mapper.pool_status(f"{device}-none") is None
    group.remove("one")


def test_what_was_reported_is_removed_and_not_what_has_its_name_by_now(group: VolumeGroup) -> None:
    group.create("one", MIB, (), Layout())
    group.create("two", MIB, (), Layout())
    reported = only(group, "one"), only(group, "two")
    group.remove("one")
    group.create("one", MIB, (), Layout())

    group.remove_reported(*reported)

    assert {volume.name for volume in group.report()} == {"one", POOL}
    assert only(group, "one").uuid != reported[0].uuid
    with pytest.raises(exceptions.DiskNotFound):
        group.remove_reported(reported[1])


def test_every_refusal_is_told_apart(group: VolumeGroup) -> None:
    group.create("one", MIB, (), Layout())
    for ask in (
        lambda: group.create("large", 1 << 40, (), Layout()),
        lambda: group.resize("one", 1 << 40),
        lambda: group.create_thin_pool("large", 1 << 40),
    ):
        with pytest.raises(exceptions.InsufficientSpace, match="free space"):
            ask()
    for ask in (
        lambda: group.publish("nosuch", add_tags={"x"}),
        lambda: group.activate("nosuch"),
        lambda: group.rename("nosuch", "other"),
        lambda: group.resize("nosuch", MIB),
        lambda: group.remove("nosuch"),
    ):
        with pytest.raises(exceptions.DiskNotFound):
            ask()
    group.create("two", MIB, (), Layout())
    with pytest.raises(exceptions.DiskExists):
        group.rename("two", "one")
    with pytest.raises(exceptions.StorageError, match="stripes"):
        group.create("three", MIB, (), Layout(stripes=7))
    elsewhere = VolumeGroup("nosuch", timeout=60)
    for ask in (elsewhere.report, lambda: elsewhere.create("x", MIB, (), Layout()), lambda: elsewhere.remove("x")):
        with pytest.raises(exceptions.InvalidConfiguration, match=r"images_volume_group.*no volume group nosuch"):
            ask()


def test_stripes_and_redundancy(group: VolumeGroup, tmp_path: Path) -> None:
    with (
        loop_device(tmp_path / "one", 64 * MIB) as one,
        loop_device(tmp_path / "two", 64 * MIB) as two,
        group_on("wide", one, two) as name,
    ):
        wide = VolumeGroup(name, timeout=60)
        wide.create("mirrored", 4 * MIB, (), Layout(raid_type="raid1"))
        wide.create("striped", 4 * MIB, (), Layout(stripes=2))
        assert [(each.name, each.kind) for each in wide.report()] == [("mirrored", "raid1"), ("striped", "striped")]


def test_a_group_that_lost_a_device_says_so(tmp_path: Path) -> None:
    with loop_device(tmp_path / "one", 64 * MIB) as one, loop_device(tmp_path / "two", 64 * MIB) as two:
        with group_on("broken", one, two) as name:
            broken = VolumeGroup(name, timeout=60)
            broken.create("whole", 4 * MIB, (), Layout())
            run("losetup", "--detach", two)
            assert [each.name for each in broken.report()] == ["whole"]
            with pytest.raises(exceptions.StorageError, match=r"PVs are missing.*restoremissing"):
                broken.create("other", 4 * MIB, (), Layout())
            run("losetup", two, tmp_path / "two")
        assert "broken" not in run("vgs")


def test_a_lock_that_another_command_holds_is_tried_again(group: VolumeGroup, tmp_path: Path) -> None:
    helper = with_lvm_conf(tmp_path / "lvm", "global { wait_for_locks = 0 }")
    impatient = VolumeGroup(group.name, timeout=60, root_helper=helper)
    said: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        if len(said) == 4:
            fcntl.flock(lock, fcntl.LOCK_UN)
        return True

    lvm2.LOG.addFilter(note)
    try:
        with open(f"/run/lock/lvm/V_{group.name}", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(exceptions.StorageError, match="Resource temporarily unavailable"):
                impatient.create("one", MIB, (), Layout())
            impatient.create("two", MIB, (), Layout())
    finally:
        lvm2.LOG.removeFilter(note)

    assert len(said) == 4
    assert all("lvcreate failed for a reason that may pass" in each for each in said)
    assert [each.name for each in group.report()] == [POOL, "two"]


def test_who_is_not_root_needs_a_helper(group: VolumeGroup) -> None:
    script = (
        "from imagebackend.storage import device_mapper, lvm2\n"
        f"group = lvm2.VolumeGroup({group.name!r}, timeout=60, root_helper={{helper}})\n"
        "print(len(group.report()))"
    )
    group.create("one", MIB, (), Layout())
    command = ["setpriv", "--reuid=nobody", "--clear-groups", sys.executable, "-c"]
    refused = subprocess.run([*command, script.format(helper=())], capture_output=True, text=True, timeout=120)
    assert "PermissionDenied" in refused.stderr
    assert "root_helper" in refused.stderr
