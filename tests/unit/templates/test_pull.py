# SPDX-License-Identifier: Apache-2.0
"""Pulling: when a source is asked, and what becomes of the template that had the name before."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions, faults
from imagebackend.templates.cache import POLICIES, TemplateCache
from imagebackend.templates.sources import Source
from tests.contract.conftest import configured
from tests.unit.templates.conftest import MIB, OWNER, Cache

ONE, TWO = b"one!" * (MIB // 4), b"two!" * (MIB // 4)


def content(cache: Cache, name: str = "template") -> bytes:
    return Path(cache.cache.get(name).path).read_bytes()


def damage(path: str) -> None:
    """Change a file and nothing that shows it."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class TestPolicies:
    @pytest.mark.parametrize("policy", ["always", "missing", "newer"])
    def test_an_absent_template_is_fetched(self, cache, policy):
        template = cache.cache.pull("template", cache.source("image", ONE), policy)
        assert template == cache.cache.get("template")
        assert content(cache) == ONE
        assert cache.files() == ["_base/.records/template.json", "_base/template"]

    def test_never_does_not_ask(self, cache):
        source = cache.source("image", ONE)
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.pull("template", source, "never")
        template = cache.cache.pull("template", source)
        cache.source("image", TWO)
        assert cache.cache.pull("template", source, "never") == template

    def test_missing_is_the_default_and_asks_no_more(self, cache):
        template = cache.cache.pull("template", cache.source("image", ONE))
        assert cache.cache.pull("template", cache.source("nowhere")) == template

    def test_newer_fetches_what_changed_and_nothing_else(self, cache):
        source = cache.source("image", ONE)
        first = cache.cache.pull("template", source)
        assert cache.cache.pull("template", source, "newer") == first
        assert len(cache.cache.get("template").history) == 1
        cache.source("image", TWO)
        assert cache.cache.pull("template", source, "newer") != first
        assert content(cache) == TWO

    def test_newer_says_so_and_goes_on_if_the_source_is_gone(self, cache, caplog):
        source = cache.source("image", ONE)
        template = cache.cache.pull("template", source)
        (cache.sources / "image").unlink()
        assert cache.cache.pull("template", source, "newer") == template
        assert "template template stays as it is: cannot fetch file://" in caplog.text
        for name, policy in (("template", "always"), ("other", "newer")):
            with pytest.raises(exceptions.FetchFailed):
                cache.cache.pull(name, source, policy)
        assert content(cache) == ONE

    def test_the_wrong_image_is_an_error_though_another_is_there(self, cache):
        cache.cache.pull("template", cache.source("image", ONE))
        with pytest.raises(exceptions.ChecksumMismatch):
            cache.cache.pull("template", cache.source("image", TWO, checksum="sha256:" + "0" * 64), "newer")
        assert content(cache) == ONE

    @pytest.mark.parametrize("policy", ["", "Always", "sometimes", None])
    def test_other_policies_are_refused(self, cache, policy):
        with pytest.raises(exceptions.InvalidArgument, match="always, missing, newer, never are known"):
            cache.cache.pull("template", cache.source("image", ONE), policy)

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("name", ["", "../x", "template@0123456789abcdef", "a/b"])
    def test_hostile_names_are_refused(self, cache, policy, name):
        with pytest.raises((exceptions.InvalidName, exceptions.TemplateNotFound)):
            cache.cache.pull(name, cache.source("image", ONE), policy)

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_damaged_record_is_an_error(self, cache, policy):
        cache.cache.pull("template", cache.source("image", ONE))
        (cache.folder / "_base/.records/template.json").write_text("{")
        with pytest.raises(exceptions.CorruptRecord):
            cache.cache.pull("template", cache.source("image", ONE), policy)


class TestReplacing:
    def pulled(self, cache: Cache) -> tuple[Any, Any]:
        """Pull two images under one name, the first of which a disk depends on."""
        first = cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.lease(first.file, OWNER)
        return first, cache.cache.pull("template", cache.source("image", TWO), "always")

    def test_the_file_that_disks_depend_on_stays(self, cache):
        first, second = self.pulled(cache)
        assert (Path(first.path).read_bytes(), content(cache)) == (ONE, TWO)
        assert first.file == "template"
        assert second.file == f"template@{second.sha256[:16]}"
        assert cache.cache.get("template") == second
        assert list(cache.cache.names()) == ["template"]
        assert list(cache.cache.leases("template")) == []

    def test_what_had_the_name_is_there_under_another(self, cache):
        first, second = self.pulled(cache)
        (name,) = cache.generations()
        former = cache.cache.get(name)
        assert name == f"template@{first.sha256[:16]}"
        assert former == dataclasses.replace(first, name=name, superseded=former.superseded)
        assert [each.event for each in former.history] == ["fetched", "superseded"]
        assert [lease.owner for lease in cache.cache.leases(name)] == [OWNER]
        assert cache.cache.verify(name) == former
        assert cache.cache.by_file("template") == former
        assert cache.cache.by_file(second.file) == cache.cache.get(second.file) == second
        with pytest.raises(exceptions.TemplateInUse, match="host:/srv/instance/disk"):
            cache.cache.remove(name)
        cache.cache.release("template", OWNER)
        cache.cache.remove(name)
        assert cache.files() == ["_base/.records/template.json", f"_base/{second.file}"]

    def test_a_template_without_users_gives_way_to_another_of_its_name(self, cache):
        self.pulled(cache)
        cache.cache.remove("template")
        assert list(cache.cache.names()) == []
        third = cache.fetch()
        assert third.file == f"template@{third.sha256[:16]}"
        assert len(cache.generations()) == 1
        assert [lease.owner for lease in cache.cache.leases(cache.generations()[0])] == [OWNER]

    def test_the_same_image_is_not_kept_twice(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        inode = os.stat(first.path).st_ino
        os.utime(cache.sources / "image", (0, 0))
        again = cache.cache.pull("template", cache.source("image"), "always")
        assert (again.file, os.stat(again.path).st_ino) == ("template", inode)
        assert again.etag != first.etag
        assert [each.event for each in again.history] == ["fetched", "refetched"]
        assert cache.cache.get("template") == again
        assert cache.files() == ["_base/.records/template.json", "_base/template"]

    def test_the_same_disk_in_another_format_is_not_kept_twice(self, cache):
        first = cache.cache.pull("template", cache.source("one.qcow2", cache.image("qcow2").read_bytes()))
        again = cache.cache.pull("template", cache.source("two.vdi", cache.image("vdi").read_bytes()), "always")
        assert (again.source_format, again.file, again.digest) == ("vdi", "template", first.digest)
        assert cache.generations() == []

    def test_an_image_that_had_the_name_once_gets_it_back(self, cache):
        first, second = self.pulled(cache)
        inode = os.stat(first.path).st_ino
        third = cache.cache.pull("template", cache.source("image", ONE), "always")
        assert (third.file, os.stat(third.path).st_ino, third.superseded) == ("template", inode, "")
        assert cache.generations() == [f"template@{second.sha256[:16]}"]
        assert [lease.owner for lease in cache.cache.leases("template")] == [OWNER]
        fourth = cache.cache.pull("template", cache.source("image", TWO), "always")
        assert fourth.file == second.file
        assert cache.generations() == [f"template@{first.sha256[:16]}"]

    def test_what_is_of_the_name_stays_with_the_name(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        cache.cache._folder.write(dataclasses.replace(first, labels={"os": "debian"}, pinned=True))
        second = cache.cache.pull("template", cache.source("image", TWO), "always")
        former = cache.cache.get(cache.generations()[0])
        assert (second.labels, second.pinned) == ({"os": "debian"}, True)
        assert (former.labels, former.pinned) == ({"os": "debian"}, False)

    def test_a_damaged_file_is_mended_by_the_same_image(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.lease("template", OWNER)
        with open(first.path, "r+b") as running:
            os.truncate(first.path, 4096)
            mended = cache.cache.pull("template", cache.source("image"), "newer")
            assert os.fstat(running.fileno()).st_size == 4096  # what a running guest has open
        assert (mended.file, content(cache)) == ("template", ONE)
        assert mended.history[-1].detail == "the same image, in place of a damaged file"
        assert cache.generations() == []

    def test_a_damaged_file_is_left_to_its_disks_if_another_image_comes(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.lease("template", OWNER)
        os.truncate(first.path, 4096)
        cache.cache.pull("template", cache.source("image", TWO), "newer")
        assert content(cache) == TWO
        assert os.stat(first.path).st_size == 4096
        assert [lease.owner for lease in cache.cache.leases(cache.generations()[0])] == [OWNER]

    def test_a_file_whose_record_is_gone_is_left_to_its_disks(self, cache):
        _, second = self.pulled(cache)
        cache.cache.lease(second.file, OWNER)
        cache.cache.pull("template", cache.source("image", ONE), "always")
        (cache.folder / "_base/.records" / f"{second.file}.json").unlink()
        with pytest.raises(exceptions.CorruptRecord, match="restore the record"):
            cache.cache.pull("template", cache.source("image", TWO), "always")
        assert content(cache) == ONE
        cache.cache.release(second.file, OWNER)
        cache.cache.pull("template", cache.source("image", TWO), "always")
        assert content(cache) == TWO

    def test_disks_are_made_while_another_image_is_fetched(self, cache):
        first = cache.cache.pull("template", cache.source("image", ONE))
        impatient = TemplateCache(configured(cache.folder, "raw", lock_timeout=0.0))
        used = []

        def use(done: int, total: int) -> None:
            with impatient.use("template") as template:
                used.append(template)
            with pytest.raises(exceptions.LockTimeout):
                impatient.pull("template", cache.source("image"), "always")

        cache.cache.pull("template", cache.source("image", TWO), "always", progress=use)
        assert set(used) == {first}
        assert content(cache) == TWO

    def test_many_that_pull_at_a_time_fetch_once(self, cache):
        cache.cache.pull("template", cache.source("image", ONE))
        source = Counting(cache.source("image", TWO), threading.Barrier(4))
        threads = [threading.Thread(target=cache.cache.pull, args=("template", source, "newer")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert source.fetches == 1
        assert content(cache) == TWO
        assert len(cache.generations()) == 1

    @pytest.mark.parametrize("failing", ["fetch", "template.fetch.published", "template.pull.superseded"])
    def test_what_fails_leaves_everything_as_it_was(self, cache, failing):
        first = cache.cache.pull("template", cache.source("image", ONE))
        before = cache.files()
        record = (cache.folder / "_base/.records/template.json").read_bytes()

        def fail(step: str) -> None:
            if step == failing:
                raise exceptions.StorageError(step, "said no")

        source = cache.source("image", TWO) if failing != "fetch" else cache.source("nowhere")
        faults.arm(fail)
        try:
            with pytest.raises((exceptions.StorageError, exceptions.FetchFailed)):
                cache.cache.pull("template", source, "always")
        finally:
            faults.arm(None)
        assert cache.files() == before
        assert (cache.folder / "_base/.records/template.json").read_bytes() == record
        assert cache.cache.get("template") == first

    def test_what_cannot_be_recorded_leaves_everything_as_it_was(self, cache, monkeypatch):
        first = cache.cache.pull("template", cache.source("image", ONE))
        before = cache.files()
        publish = cache.cache._folder.publish_prepared

        def fail(name: str) -> None:
            publish(name)
            raise exceptions.StorageError("template.json", "may not last")

        monkeypatch.setattr(cache.cache._folder, "publish_prepared", fail)
        with pytest.raises(exceptions.StorageError, match="may not last"):
            cache.cache.pull("template", cache.source("image", TWO), "always")
        assert cache.files() == before
        assert cache.cache.get("template") == first

    def test_a_template_that_is_removed_meanwhile_is_replaced(self, cache):
        cache.cache.pull("template", cache.source("image", ONE))
        removed = []

        def remove(done: int, total: int) -> None:
            if not removed:
                removed.append(cache.cache.remove("template"))

        second = cache.cache.pull("template", cache.source("image", TWO), "always", progress=remove)
        assert cache.cache.get("template") == second
        assert (second.file, content(cache)) == ("template", TWO)
        assert cache.files() == ["_base/.records/template.json", "_base/template"]

    def test_what_a_process_left_that_was_killed_just_before_the_end_is_no_template(self, cache):
        """Both records name one file; removing one of them must not take it from the other."""
        first = cache.cache.pull("template", cache.source("image", ONE))
        former = f"template@{first.sha256[:16]}"
        cache.cache._folder.write(dataclasses.replace(first, name=former, superseded=first.fetched))
        cache.cache.remove(former)
        assert content(cache) == ONE
        cache.cache._folder.write(dataclasses.replace(first, name=former, superseded=first.fetched))
        cache.cache.remove("template")
        assert cache.files() == []


class Counting(Source):
    """A source that counts how often it delivers, which it does once as many have asked as the barrier is for."""

    def __init__(self, source: Source, barrier: threading.Barrier) -> None:
        self._source = source
        self._barrier = barrier
        self.fetches = 0

    def metadata(self):
        self._barrier.wait(60)
        return self._source.metadata()

    def fetch(self, target, progress=None):
        self.fetches += 1
        return self._source.fetch(target, progress)


class TestTags:
    def test_a_tag_is_another_name(self, cache):
        template = cache.fetch("debian-12.5")
        cache.cache.catalogue.tag("debian-12.5", "stable")
        assert cache.cache.catalogue.tags() == {"stable": "debian-12.5"}
        assert cache.cache.get("stable") == template
        assert cache.fetch("stable") == template
        with cache.cache.use("stable") as used, cache.cache.use("stable", cache.fetcher()) as again:
            assert used == again == template
        assert cache.cache.verify("stable") == template
        assert cache.fetches == 1
        assert os.readlink(cache.folder / "_base/.tags/stable") == "debian-12.5"

    def test_a_tag_is_moved_and_taken_away(self, cache):
        cache.fetch("one")
        two = cache.fetch("two")
        cache.cache.catalogue.tag("one", "stable")
        cache.cache.catalogue.tag("two", "stable")
        assert cache.cache.get("stable") == two
        cache.cache.catalogue.untag("stable")
        assert cache.cache.catalogue.tags() == {}
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.get("stable")
        with pytest.raises(exceptions.TemplateNotFound, match="there is no such tag"):
            cache.cache.catalogue.untag("stable")
        assert cache.cache.get("two") == two

    def test_a_tag_of_a_tag_is_one_of_the_template(self, cache):
        cache.fetch("one")
        cache.cache.catalogue.tag("one", "stable")
        cache.cache.catalogue.tag("stable", "newest")
        assert cache.cache.catalogue.tags() == {"newest": "one", "stable": "one"}

    def test_tags_follow_the_name_and_go_with_it(self, cache):
        cache.cache.pull("template", cache.source("image", ONE))
        cache.cache.catalogue.tag("template", "stable")
        second = cache.cache.pull("template", cache.source("image", TWO), "always")
        assert cache.cache.get("stable") == second
        cache.cache.remove(cache.generations()[0])
        assert cache.cache.get("stable") == second
        cache.cache.remove("template")
        assert cache.cache.catalogue.tags() == {}

    def test_names_and_tags_do_not_take_each_others_place(self, cache):
        cache.fetch("one")
        cache.fetch("two")
        with pytest.raises(exceptions.TemplateExists, match="a template has that name"):
            cache.cache.catalogue.tag("one", "two")
        cache.cache.catalogue.tag("one", "stable")
        with pytest.raises(exceptions.TemplateExists, match="it is a tag of one"):
            cache.cache.pull("stable", cache.source("image", TWO), "always")
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.remove("stable")
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.catalogue.tag("none", "newest")

    def test_a_tag_of_what_is_gone_means_nothing(self, cache):
        cache.fetch("one")
        cache.cache.catalogue.tag("one", "stable")
        os.unlink(cache.folder / "_base/.records/one.json")
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.get("stable")
        assert cache.fetch("stable").name == "stable"

    @pytest.mark.parametrize("name", ["", "../x", ".x", "a@0123456789abcdef"])
    def test_hostile_tags_are_refused(self, cache, name):
        cache.fetch("one")
        for act in (lambda: cache.cache.catalogue.tag("one", name), lambda: cache.cache.catalogue.untag(name)):
            with pytest.raises(exceptions.InvalidName):
                act()
