# SPDX-License-Identifier: Apache-2.0
"""What is listed of the cache, and with which facts."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions
from imagebackend.storage import extents
from imagebackend.templates import entries, record
from imagebackend.templates.entries import Entry, Filter
from imagebackend.templates.leases import Owner
from tests.functional import filesystems
from tests.functional.image_building import make_disk
from tests.unit.templates.conftest import MIB, OWNER, Cache
from tests.unit.templates.test_pull import ONE, TWO, damage


class TestFilters:
    TEMPLATE = record.Template(
        name="a",
        path="/a",
        format="raw",
        virtual_size=1,
        size=1,
        modified=1,
        sha256="",
        digest="sha256:00",
        source="",
        source_format="raw",
        inspector=1,
        notes=(),
        fetched="2026-01-01T00:00:00+00:00",
        file="a",
        labels={"os": "debian", "empty": ""},
    )
    FETCHED = record.seconds(TEMPLATE.fetched)
    ENTRY = Entry("a", TEMPLATE, users=1)
    UNUSED = Entry("a", TEMPLATE)
    DANGLING = Entry("a@0123456789abcdef", TEMPLATE)
    DAMAGED = Entry("a", None, damage=exceptions.CorruptRecord("/a", "why"), users=2)

    @pytest.mark.parametrize(
        ("options", "takes"),
        [
            ({}, "ENTRY UNUSED DANGLING DAMAGED"),
            ({"in_use": True}, "ENTRY DAMAGED"),
            ({"in_use": False}, "UNUSED DANGLING"),
            ({"dangling": True}, "DANGLING"),
            ({"dangling": False}, "ENTRY UNUSED DAMAGED"),
            ({"labels": {"os": "debian"}}, "ENTRY UNUSED DANGLING"),
            ({"labels": {"os": None}}, "ENTRY UNUSED DANGLING"),
            ({"labels": {"os": "fedora"}}, ""),
            ({"labels": {"os": "debian", "empty": ""}}, "ENTRY UNUSED DANGLING"),
            ({"labels": {"os": "debian", "other": None}}, ""),
            ({"labels": {"os": ""}}, ""),
            ({"before": FETCHED}, ""),
            ({"before": FETCHED + 1}, "ENTRY UNUSED DANGLING"),
            ({"since": FETCHED}, "ENTRY UNUSED DANGLING"),
            ({"since": FETCHED + 1}, ""),
            ({"disk_format": "raw"}, "ENTRY UNUSED DANGLING"),
            ({"disk_format": "qcow2"}, ""),
            ({"names": {"a"}}, "ENTRY UNUSED DANGLING DAMAGED"),
            ({"names": set()}, ""),
            ({"in_use": True, "labels": {"os": "debian"}, "names": ["a", "b"], "since": 0.0}, "ENTRY"),
        ],
        ids=repr,
    )
    def test_what_a_filter_takes(self, options, takes):
        entries = ("ENTRY", "UNUSED", "DANGLING", "DAMAGED")
        assert [name for name in entries if Filter(**options).takes(getattr(self, name))] == takes.split()

    @pytest.mark.parametrize(("now", "age"), [(100.0, 0.0), (160.0, 60.0), (0.0, 0.0), (-1e9, 0.0)])
    def test_an_age_is_never_negative(self, now, age):
        assert dataclasses.replace(self.ENTRY, last_used=100.0).age(now) == age


class TestEntries:
    def entries(self, cache: Cache, **options: Any) -> dict[str, Entry]:
        return {entry.name: entry for entry in cache.cache.catalogue.entries(Filter(**options))}

    def test_an_empty_cache(self, cache):
        assert self.entries(cache) == {}
        usage = cache.cache.catalogue.usage()
        assert (usage.free, usage.total) == (0, 0)
        assert {kind: part.count for kind, part in usage.parts.items()} == {"templates": 0, "dangling": 0, "other": 0}

    def test_everything_is_listed_and_nothing_is_locked(self, cache):
        used = cache.fetch("used")
        cache.cache.lease("used", OWNER)
        cache.fetch("damaged")
        (cache.folder / "_base/.records/damaged.json").write_text("{")
        cache.fetch("short")
        os.truncate(cache.folder / "_base/short", 4096)
        cache.cache.catalogue.tag("used", "stable")
        locks = sorted(os.listdir(cache.folder / "locks"))
        found = self.entries(cache)
        assert list(found) == ["damaged", "short", "used"]
        assert (found["used"].template, found["used"].tags, found["used"].users) == (used, ("stable",), 1)
        assert found["used"].damage is None
        assert found["used"].allocated == os.stat(used.path).st_blocks * 512 == found["used"].own > 0
        assert found["used"].last_used == (cache.folder / "_base/.leases/used").stat().st_mtime
        assert isinstance(found["damaged"].damage, exceptions.CorruptRecord)
        assert (found["damaged"].template, found["short"].template is None) == (None, False)
        assert "4096 bytes, recorded are" in found["short"].damage.reason
        assert sorted(os.listdir(cache.folder / "locks")) == locks

    def test_what_had_a_name_is_dangling_and_what_is_left_of_a_killed_pull_is_not_listed(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.pull("template", cache.source("image", TWO), "always")
        former = f"template@{first.sha256[:16]}"
        assert list(self.entries(cache)) == ["template", former]
        assert list(self.entries(cache, dangling=True)) == [former]
        current = cache.cache.get("template")
        left = record.generation("template", current.digest)
        cache.cache._folder.write(dataclasses.replace(current, name=left, superseded=current.fetched))
        assert list(self.entries(cache)) == ["template", former]

    def test_users_of_a_damaged_record_are_counted(self, cache):
        cache.fetch()
        cache.cache.lease("template", OWNER)
        cache.cache.lease("template", Owner("other", "disk", "host", "/x"))
        (cache.folder / "_base/.records/template.json").write_text("{")
        assert self.entries(cache)["template"].users == 2

    def test_what_is_shared_with_disks_is_told(self, xfs_folder):
        cache = Cache(xfs_folder)
        template = cache.fetch()
        assert cache.cache.catalogue.entry("template").shared == 0
        disk = cache.folder / "disk"
        subprocess.run(["cp", "--reflink=always", template.path, disk], check=True)
        entry = cache.cache.catalogue.entry("template")
        assert entry.shared == filesystems.shared(Path(template.path)) > 0
        assert entry.own == entry.allocated - entry.shared
        shutil.rmtree(xfs_folder)

    def test_the_usage_is_that_of_the_storage(self, cache):
        cache.fetch("used")
        cache.cache.lease("used", OWNER)
        cache.fetch("pinned")
        cache.cache.catalogue.pin("pinned")
        cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.pull("template", cache.source("image", TWO), "always")
        (cache.folder / "_base/.gone.download").write_bytes(b"x" * MIB)
        usage = cache.cache.catalogue.usage()
        allocated = {name: part.allocated for name, part in usage.parts.items()}
        one = MIB  # of data without holes
        assert {name: part.count for name, part in usage.parts.items()} == {"templates": 3, "dangling": 1, "other": 1}
        assert (usage.parts["templates"].reclaimable, usage.parts["dangling"].reclaimable) == (one, one)
        files = [path for path in (cache.folder / "_base").iterdir() if path.is_file()]
        assert sum(allocated.values()) == sum(path.stat().st_blocks * 512 for path in files)
        found = os.statvfs(cache.folder)
        assert usage.total == found.f_blocks * found.f_frsize


class TestExtents:
    def test_many_extents(self, xfs_folder):
        """More than are asked for at a time, every other of them shared."""
        path, other = xfs_folder / "file", xfs_folder / "other"
        with path.open("wb") as file:
            for number in range(2100):
                file.seek(number * 8192)
                file.write(b"x" * 4096)
        os.sync()
        subprocess.run(["cp", "--reflink=always", path, other], check=True)
        assert extents.shared_size(str(path)) == filesystems.shared(path) == 2100 * 4096
        with other.open("r+b") as file:
            for number in range(0, 2100, 2):
                file.seek(number * 8192)
                file.write(b"y" * 4096)
        os.sync()
        assert extents.shared_size(str(path)) == filesystems.shared(path) == 1050 * 4096
        shutil.rmtree(xfs_folder)

    @pytest.mark.parametrize("fixture", ["ext4_folder", "small_tmpfs"])
    def test_where_nothing_is_shared(self, fixture, request):
        path = request.getfixturevalue(fixture) / "file"
        make_disk(path)
        assert extents.shared_size(str(path)) == 0
        path.unlink()

    def test_an_empty_file_and_none(self, tmp_path):
        (tmp_path / "file").touch()
        assert extents.shared_size(str(tmp_path / "file")) == 0
        (tmp_path / "link").symlink_to("file")
        for path in ("none", "link"):
            with pytest.raises(exceptions.StorageError):
                extents.shared_size(str(tmp_path / path))


class TestChanges:
    def test_labels_are_given_and_taken_away(self, cache):
        template = cache.fetch()
        labelled = cache.cache.catalogue.label("template", {"os": "debian", "org.example/x": "1"})
        assert labelled == cache.cache.get("template") == dataclasses.replace(template, labels=labelled.labels)
        assert labelled.labels == {"os": "debian", "org.example/x": "1"}
        assert cache.cache.catalogue.label("template", {"os": None, "none": None, "x": ""}).labels == {
            "org.example/x": "1",
            "x": "",
        }

    @pytest.mark.parametrize(
        "labels",
        [{"": "x"}, {"x y": "x"}, {"x" * 129: "x"}, {"x": "a\nb"}, {"x": "x" * 1025}, {"-x": None}, {"é": "x"}],
    )
    def test_labels_that_nothing_can_have_are_refused(self, cache, labels):
        template = cache.fetch()
        with pytest.raises(exceptions.InvalidArgument):
            cache.cache.catalogue.label("template", {"good": "x", **labels})
        assert cache.cache.get("template") == template

    def test_too_many_labels_are_refused(self, cache):
        template = cache.fetch()
        with pytest.raises(exceptions.InvalidArgument, match="labels and notes take too much"):
            cache.cache.catalogue.label("template", {f"label{number}": "x" * 1000 for number in range(70)})
        assert cache.cache.get("template") == template

    def test_a_pin_is_set_and_taken_out(self, cache):
        cache.fetch()
        for pinned in (True, True, False, False):
            assert cache.cache.catalogue.pin("template", pinned=pinned).pinned is pinned
        assert [each.event for each in cache.cache.get("template").history] == ["fetched", "pinned", "unpinned"]

    def test_a_damaged_file_can_be_labelled_and_what_is_absent_cannot(self, cache):
        template = cache.fetch()
        damage(template.path)
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.verify("template")
        assert cache.cache.catalogue.label("template", {"ticket": "7"}).quarantined
        for act in (
            lambda: cache.cache.catalogue.label("none", {"a": "b"}),
            lambda: cache.cache.catalogue.pin("none"),
        ):
            with pytest.raises(exceptions.TemplateNotFound):
                act()


class TestInspecting:
    def test_a_kept_qcow2_template_says_what_its_header_does(self, tmp_path):
        cache = Cache(tmp_path, force_raw_images=False)
        cache.fetch(source=cache.image("qcow2", "-o", "cluster_size=131072,compression_type=zstd"))
        found = cache.cache.catalogue.inspect("template")
        assert found["format_details"] == {
            "version": 3,
            "cluster_size": 131072,
            "compression_type": "zstd",
            "extended_l2": False,
            "snapshots": 0,
        }

    def test_everything_is_there(self, cache):
        template = cache.fetch()
        cache.cache.lease("template", OWNER)
        cache.cache.catalogue.tag("template", "stable")
        found = cache.cache.catalogue.inspect("stable")
        assert found | template.as_dict() == found
        assert found["users"] == [dataclasses.asdict(OWNER)]
        assert (found["tags"], found["user_count"], found["damage"]) == (["stable"], 1, None)
        assert found["age"] >= 0
        damage(template.path)
        os.truncate(template.path, 0)
        assert "0 bytes, recorded are" in cache.cache.catalogue.inspect("template")["damage"]
        (cache.folder / "_base/.records/template.json").write_text("{")
        with pytest.raises(exceptions.CorruptRecord):
            cache.cache.catalogue.inspect("template")

    def test_an_entry_of_nothing(self, cache):
        assert entries.entry_of(cache.cache._folder, "none", ()) is None
        for act in (cache.cache.catalogue.entry, cache.cache.catalogue.inspect):
            with pytest.raises(exceptions.TemplateNotFound):
                act("none")
