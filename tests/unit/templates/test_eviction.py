# SPDX-License-Identifier: Apache-2.0
"""Pruning a real cache, and sweeping up what killed processes left in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions, faults, locks
from imagebackend.templates import record
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.eviction import Report
from imagebackend.templates.leases import Owner
from imagebackend.templates.pruning import Policy
from tests.contract.conftest import configured
from tests.unit.templates.conftest import MIB, OWNER, Cache
from tests.unit.templates.test_pull import ONE, TWO

DAY = 86400.0


def aged(cache: Cache, name: str, age: float = 2 * DAY, content: bytes = ONE) -> None:
    """Have a template that was not used for so many seconds."""
    template = cache.cache.pull(name, cache.source(f"{name}.image", content))
    then = time.time() - age
    when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(then))
    cache.cache._folder.write(dataclasses.replace(template, fetched=when))
    leases = cache.folder / "_base/.leases" / name
    if leases.exists():
        os.utime(leases, (then, then))


def removed(report: Report) -> list[str]:
    return [each.name for each in report.removed]


def own(cache: Cache, name: str) -> int:
    return cache.cache.catalogue.entry(name).own


class TestPruning:
    def test_what_is_old_and_unused_goes_and_the_rest_stays(self, cache):
        for name in ("old", "older", "used", "pinned"):
            aged(cache, name, DAY * len(name))
        aged(cache, "new", 3600)
        cache.cache.lease("used", OWNER)
        cache.cache.catalogue.pin("pinned")
        size = own(cache, "old") + own(cache, "older")
        plan = cache.cache.prune(dry_run=True)
        assert (removed(plan), plan.reclaimed, len(cache.cache.names())) == ([], 0, 5)
        report = cache.cache.prune()
        assert report.decisions == plan.decisions
        assert removed(report) == ["older", "old"]
        assert (report.reclaimed, report.failed) == (size, [])
        assert list(cache.cache.names()) == ["new", "pinned", "used"]
        assert cache.cache.verify("used").name == "used"

    def test_an_empty_cache_and_none(self, cache):
        for _ in range(2):
            report = cache.cache.prune()
            assert report == Report()
            (cache.folder / "_base").mkdir(parents=True, exist_ok=True)

    def test_space_is_made(self, cache):
        for number, name in enumerate(("a", "b", "c")):
            aged(cache, name, 100 - number)
        used = sum(own(cache, name) for name in ("a", "b", "c"))
        report = cache.cache.prune(cache.cache.policy(total_size_limit=used - 1))
        assert removed(report) == ["a"]
        found = os.statvfs(cache.folder)
        report = cache.cache.prune(cache.cache.policy(free_space_target=found.f_blocks * found.f_frsize))
        assert removed(report) == ["b", "c"]

    def test_the_configuration_is_the_policy(self, cache):
        assert cache.cache.policy() == Policy()
        options = {
            "remove_unused_base_images": False,
            "remove_unused_original_minimum_age_seconds": 5,
            "remove_unused_resized_minimum_age_seconds": 6,
            "total_size_limit": 7,
            "free_space_target": 8,
        }
        for name, value in options.items():
            cache.conf.set_override(name, value, group="image_cache")
        assert cache.cache.policy() == Policy(False, 5, 6, 7, 8)
        assert cache.cache.policy(enabled=True, minimum_age=0) == Policy(True, 0, 6, 7, 8)

    @pytest.mark.parametrize("jump", [-10 * 365 * DAY, 10 * 365 * DAY])
    def test_a_clock_that_jumps_costs_nobody_a_template_that_is_used(self, cache, jump, monkeypatch):
        for name in ("used", "pinned", "unused"):
            aged(cache, name, 10)
        cache.cache.lease("used", OWNER)
        cache.cache.catalogue.pin("pinned")
        now = time.time()
        monkeypatch.setattr("imagebackend.templates.eviction.time.time", lambda: now + jump)
        cache.cache.prune(cache.cache.policy(total_size_limit=1, free_space_target=1))
        assert list(cache.cache.names()) == ["pinned", "used"]

    def test_what_somebody_is_at_stays(self, cache):
        aged(cache, "making")
        aged(cache, "fetching")
        with cache.cache.use("making"), cache.cache._folder.pull_lock("fetching"):
            os.utime(cache.folder / "_base/.leases/making", (0, 0))
            report = cache.cache.prune()
            assert removed(report) == []
            assert [each.reason for each in report.decisions] == ["being fetched, or made a disk from"] * 2
        assert sorted(removed(cache.cache.prune())) == ["fetching", "making"]

    @pytest.mark.parametrize(
        "use",
        [
            lambda cache: cache.lease("template", OWNER),
            lambda cache: cache.catalogue.pin("template"),
            lambda cache: TemplateCache(cache._conf).use("template").__enter__(),
            lambda cache: cache.remove("template"),
        ],
        ids=["leased", "pinned", "used", "removed"],
    )
    def test_what_is_used_between_decision_and_removal_stays(self, cache, use):
        aged(cache, "template")
        aged(cache, "atemplate", 3 * DAY)

        def act(step: str) -> None:
            if step == "template.prune.done":
                faults.arm(None)
                with contextlib.suppress(exceptions.TemplateNotFound):
                    use(cache.cache)

        faults.arm(act)
        try:
            report = cache.cache.prune()
        finally:
            faults.arm(None)
        assert removed(report) == ["atemplate"]
        assert report.failed == []

    def test_one_that_cannot_be_removed_does_not_keep_the_others(self, cache):
        for name in ("a", "b", "c"):
            aged(cache, name, DAY * 3)
        size = own(cache, "a")
        (cache.folder / "_base/b").unlink()
        (cache.folder / "_base/b").mkdir()
        report = cache.cache.prune()
        assert removed(report) == ["a", "c"]
        assert report.reclaimed == 2 * size
        # It is not in the list any more, and what is left of it is to be swept up.
        left = f"{cache.folder}/_base/.records/.b.json.partial"
        assert [(what, type(error)) for what, error in report.failed] == [
            ("b", exceptions.StorageError),
            (left, exceptions.StorageError),
        ]

    def test_a_template_whose_record_is_damaged_or_newer_is_left_alone(self, cache):
        aged(cache, "damaged")
        aged(cache, "newer")
        records = cache.folder / "_base/.records"
        (records / "damaged.json").write_text("{")
        (records / "newer.json").write_text(json.dumps({"version": 99}))
        before = cache.files()
        report = cache.cache.prune(cache.cache.policy(total_size_limit=1))
        assert removed(report) == []
        assert all(each.reason.startswith("its record cannot be understood") for each in report.decisions)
        assert cache.files() == before

    def test_what_had_a_name_goes_once_its_disks_are_gone(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.lease(first.file, OWNER)
        second = cache.cache.pull("template", cache.source("image", TWO), "always")
        (former,) = cache.generations()
        policy = cache.cache.policy(minimum_age=0)
        cache.cache.catalogue.pin("template")
        assert removed(cache.cache.prune(policy)) == []
        cache.cache.release(first.file, OWNER)
        assert removed(cache.cache.prune(policy)) == [former]
        assert cache.files() == ["_base/.records/template.json", f"_base/{second.file}"]

    def test_two_that_prune_at_a_time(self, cache):
        for number in range(20):
            aged(cache, f"template{number}", content=bytes([number]) * MIB)
        reports: list[Report] = []
        threads = [
            threading.Thread(target=lambda: reports.append(TemplateCache(cache.conf).prune())) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(name for report in reports for name in removed(report)) == sorted(
            f"template{number}" for number in range(20)
        )
        assert [report.failed for report in reports] == [[]] * 4
        assert cache.files() == []

    def test_a_read_only_cache_is_shown_and_nothing_else(self, small_tmpfs):
        cache = Cache(small_tmpfs)
        (cache.sources / "disk.raw").unlink()
        aged(cache, "template", content=b"x" * 4096)
        subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
        assert cache.cache.prune(dry_run=True).decisions[0].remove
        report = cache.cache.prune()
        assert (removed(report), len(report.failed)) == ([], 1)
        assert isinstance(report.failed[0][1], exceptions.PermissionDenied)

    def test_the_event_is_told(self, cache, caplog):
        caplog.set_level("INFO", "imagebackend")
        aged(cache, "template")
        cache.cache.prune()
        (told,) = [each for each in caplog.records if getattr(each, "event", "") == "evicted"]
        assert (told.template, told.facts["store"]) == ("template", "")
        assert told.facts["size"] > 0
        assert "template template removed: not used for 2 days" in told.getMessage()


class TestPeriodic:
    def test_it_runs_when_it_is_due(self, cache, monkeypatch):
        now = [0.0]
        monkeypatch.setattr("imagebackend.templates.cache.time.monotonic", lambda: now[0])
        assert cache.cache.periodic() == Report()
        for then, due in ((0.0, False), (2399.0, False), (2400.0, True), (2401.0, False), (4800.0, True)):
            now[0] = then
            assert (cache.cache.periodic() is not None) is due

    @pytest.mark.parametrize(("interval", "runs"), [(-1, []), (0, [0.0, 60.0, 120.0]), (100, [0.0, 100.0])])
    def test_the_interval(self, cache, monkeypatch, interval, runs):
        cache.conf.set_override("manager_interval", interval, group="image_cache")
        now = [0.0]
        monkeypatch.setattr("imagebackend.templates.cache.time.monotonic", lambda: now[0])
        ran = []
        for second in range(180):
            now[0] = float(second)
            if cache.cache.periodic() is not None:
                ran.append(now[0])
        assert ran == runs

    def test_after_an_error_it_is_due_again_later(self, cache):
        (cache.folder / "_base").mkdir(parents=True)
        (cache.folder / "_base/.records").write_text("no folder")
        with pytest.raises(exceptions.StorageError):
            cache.cache.periodic()
        assert cache.cache.periodic() is None


class TestSweeping:
    """Each thing that may be left; and what looks like it, and is not."""

    @pytest.fixture
    def base(self, cache: Cache) -> Path:
        cache.fetch()
        return cache.folder / "_base"

    def swept(self, cache: Cache) -> list[str]:
        report = cache.cache.prune()
        assert report.failed == []
        return [each.replace(f"{cache.folder}/", "") for each in report.swept]

    @pytest.mark.parametrize(
        ("name", "lock"),
        [
            (".template.download", "template-template"),
            (".template.partial", "template-template"),
            (".template@.download", "pull-template"),
            (".template@.partial", "pull-template"),
            (".other.download.part", "template-other"),
            ("..other.download.part.partial", "template-other"),
            (".records/.template.json.partial", "template-template"),
            (".records/.template@0123456789abcdef.json.partial", "template-template"),
            (".tags/.stable.partial", "template-stable"),
            ("template@0123456789abcdef", "template-template"),
        ],
    )
    def test_what_was_being_made_goes_unless_somebody_is_at_it(self, cache, base, name, lock):
        (base / ".tags").mkdir()
        (base / name).write_bytes(b"half")
        before = cache.files()
        with locks.hold(str(cache.folder / "locks" / lock), timeout=0):
            assert self.swept(cache) == []
        assert set(cache.files()) - {f"locks/{lock}"} == set(before)
        (cache.folder / "locks" / lock).unlink(missing_ok=True)
        assert self.swept(cache) == [f"_base/{name}"]
        assert cache.files() == ["_base/.records/template.json", "_base/template"]

    @pytest.mark.parametrize(
        "name",
        [
            "foreign",
            "da39a3ee5e6b4b0d3255bfef95601890afd80709",
            ".hidden",
            "foreign.download",
            "a@b",
            ".records/x.json",
        ],
    )
    def test_what_may_be_anothers_stays(self, cache, base, name):
        (base / name).write_bytes(b"of another program, such as Nova")
        assert self.swept(cache) == []
        assert (base / name).exists()

    def test_a_file_that_disks_depend_on_stays_without_its_record(self, cache, base):
        name = "template@0123456789abcdef"
        (base / name).write_bytes(b"x")
        cache.cache.lease(name, OWNER)
        assert self.swept(cache) == []
        cache.cache.release(name, OWNER)
        assert sorted(self.swept(cache)) == [f"_base/.leases/{name}", f"_base/{name}"]

    def test_the_part_of_an_image_stays_as_long_as_it_can_be_used(self, cache, base):
        (base / ".other.download").write_bytes(b"half")
        facts: dict[str, Any] = {
            **dict.fromkeys(("source", "checksum", "validator", "etag", "last_modified", "sha256"), ""),
            "version": 1,
            "size": 4,
            "total": 8,
            "written": int(time.time()),
        }
        path = base / ".other.download.part"
        path.write_text(json.dumps(facts))
        assert self.swept(cache) == []
        path.write_text(json.dumps({**facts, "written": int(time.time() - 2 * DAY)}))
        assert self.swept(cache) == ["_base/.other.download"]
        assert not path.exists()

    def test_a_verification_can_be_resumed_for_a_day(self, cache, base):
        path = base / ".template.verify"
        path.write_bytes(b"x")
        assert self.swept(cache) == []
        os.utime(path, (0, 0))
        assert self.swept(cache) == ["_base/.template.verify"]

    def test_a_record_of_a_pull_that_was_killed(self, cache, base):
        template = cache.cache.get("template")
        left = record.generation("template", template.digest)
        cache.cache._folder.write(dataclasses.replace(template, name=left, superseded=template.fetched))
        assert self.swept(cache) == [f"_base/.records/{left}.json"]
        assert cache.cache.verify("template") == template

    def test_tags_of_nothing(self, cache, base):
        cache.cache.catalogue.tag("template", "good")
        cache.cache.catalogue.tag("template", "bad")
        os.unlink(base / ".tags/bad")
        os.symlink("gone", base / ".tags/bad")
        assert self.swept(cache) == ["_base/.tags/bad"]
        assert cache.cache.catalogue.tags() == {"good": "template"}

    def test_old_locks(self, cache, base):
        folder = cache.folder / "locks"
        ours = ["template-gone", "pull-template", "verify-template", "disk-i_d", "record-i", "rbd-template-x"]
        ours += ["lvm-template-x", "ploop-template-x", "clearing-x", "extract-0"]
        others = ["nova-storage-registry-lock", "template-template", "replacing-i_d", "x"]
        for name in (*ours, *others):
            (folder / name).touch()
        assert self.swept(cache) == []
        for name in (*ours, *others):
            os.utime(folder / name, (0, 0))
        with locks.hold(str(folder / "disk-i_d"), timeout=0, shared=True):
            assert sorted(self.swept(cache)) == sorted(f"locks/{name}" for name in ours if name != "disk-i_d")
        assert sorted(os.listdir(folder)) == sorted(["disk-i_d", *others])

    def test_one_thing_that_cannot_be_removed_does_not_keep_the_others(self, cache, base):
        (base / ".a.partial").mkdir()
        (base / ".b.partial").write_bytes(b"x")
        report = cache.cache.prune()
        assert [each.rpartition("/")[2] for each in report.swept] == [".b.partial"]
        assert [what.rpartition("/")[2] for what, _ in report.failed] == [".a.partial"]

    def test_killed_at_any_step_the_next_one_does_the_rest(self, cache, base):
        (base / ".a.partial").write_bytes(b"x")
        (base / ".b.partial").write_bytes(b"x")
        aged(cache, "old")
        child = os.fork()
        if not child:
            faults.arm(lambda step: os._exit(9) if step == "template.sweep.done" else None)
            cache.cache.prune()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert self.swept(cache) == ["_base/.b.partial"]
        assert list(cache.cache.names()) == ["template"]


class TestOrphanLeases:
    @pytest.fixture
    def owner(self, cache: Cache) -> Owner:
        cache.fetch()
        return Owner("vm1", "disk", cache.conf.host, f"{cache.folder}/vm1/disk")

    def leases(self, cache: Cache) -> list[Owner]:
        return [lease.owner for lease in cache.cache.leases("template")]

    def test_a_lease_goes_if_its_disk_is_gone(self, cache, owner):
        cache.cache.lease("template", owner)
        Path(owner.path).parent.mkdir()
        Path(owner.path).touch()
        assert cache.cache.prune().swept == []
        Path(owner.path).unlink()
        assert cache.cache.prune().swept == [f"lease of {owner.host}:{owner.path} on template"]
        assert self.leases(cache) == []

    def test_a_lease_stays_while_its_disk_is_being_made(self, cache, owner):
        cache.cache.lease("template", owner)
        with locks.hold(f"{cache.folder}/locks/disk-vm1_disk", timeout=0):
            assert cache.cache.prune().swept == []
        assert self.leases(cache) == [owner]

    @pytest.mark.parametrize(
        "changes",
        [
            {"host": "another"},
            {"path": "/elsewhere/vm1/disk"},
            {"path": "rbd:pool/vm1_disk"},
            {"path": "/dev/vg/vm1_disk"},
            {"disk": "other"},
        ],
    )
    def test_a_lease_stays_if_nothing_proves_that_its_disk_is_gone(self, cache, owner, changes):
        kept = dataclasses.replace(owner, **changes)
        cache.cache.lease("template", kept)
        assert cache.cache.prune().swept == []
        assert self.leases(cache) == [kept]

    def test_a_lease_stays_if_the_file_system_of_the_disks_may_not_be_mounted(self, cache, owner, tmp_path):
        cache.cache.lease("template", owner)
        with tmpfs_on(cache.folder / "_base", tmp_path):
            assert cache.cache.prune().swept == []
            assert self.leases(cache) == [owner]


@contextlib.contextmanager
def tmpfs_on(folder: Path, temporary: Path) -> Iterator[None]:
    """Have the content of a folder on a file system of its own."""
    copy = temporary / "copy"
    subprocess.run(["cp", "-a", folder, copy], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        subprocess.run(["cp", "-a", f"{copy}/.", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_lock_is_held_or_not(tmp_path):
    path = str(tmp_path / "lock")
    assert not locks.is_held(path)
    for shared in (True, False):
        with locks.hold(path, timeout=0, shared=shared):
            assert locks.is_held(path)
        assert not locks.is_held(path)
    cache = TemplateCache(configured(tmp_path, "raw"))
    assert cache.prune().decisions == []
