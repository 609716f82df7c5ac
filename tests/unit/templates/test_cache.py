# SPDX-License-Identifier: Apache-2.0
"""The template cache: what comes in, what is kept, and what is refused without a trace."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions, faults
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.leases import Owner
from imagebackend.templates.sources import open_source
from tests.contract.conftest import configured
from tests.functional import filesystems
from tests.functional.image_building import make_disk
from tests.unit.templates.conftest import MIB, OWNER, Cache


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class TestFetching:
    def test_a_template_is_fetched_once_and_recorded(self, cache):
        template = cache.fetch()
        assert cache.fetch() == cache.cache.get("template") == template
        assert cache.fetches == 1
        assert Path(template.path).read_bytes() == cache.disk.read_bytes()
        assert (template.name, template.format, template.source_format) == ("template", "raw", "raw")
        assert (template.virtual_size, template.size) == (8 * MIB, 8 * MIB)
        assert template.digest == f"sha256:{template.sha256}" == f"sha256:{sha256(cache.disk)}"
        assert template.fetched.endswith("+00:00")
        assert template.source.endswith("Cache.fetcher.<locals>.fetch")
        assert cache.files() == ["_base/.records/template.json", "_base/template"]
        assert os.stat(template.path).st_mode & 0o777 == 0o600

    def test_making_the_object_touches_nothing(self, tmp_path):
        folder = tmp_path / "missing"
        cache = TemplateCache(configured(folder, "raw"))
        assert (list(cache.names()), list(cache.list())) == ([], [])
        assert cache.folder == str(folder / "_base")
        with pytest.raises(exceptions.TemplateNotFound, match="template add"):
            cache.get("template")
        assert not folder.exists()

    def test_arguments_and_progress_reach_the_function(self, cache):
        seen: list[Any] = []

        def fetch(*args: Any, target: str, **kwargs: Any) -> None:
            seen.append((args, kwargs))
            cache.fetcher()(target)

        def progress(done: int, total: int) -> None:
            pass

        cache.cache.fetch("one", fetch, 1, "two", context=3, progress=progress)
        cache.cache.fetch("two", fetch)
        assert seen == [((1, "two"), {"context": 3, "progress": progress}), ((), {})]

    def test_what_a_source_found_out_is_not_read_again(self, cache):
        source = open_source(str(cache.disk), cache.conf)
        template = cache.cache.fetch("template", source.fetch)
        assert template.source == cache.disk.as_uri()
        assert template.sha256 == sha256(cache.disk)

    def test_a_claim_that_is_not_kept_is_refused(self, cache):
        source = open_source(str(cache.disk), cache.conf, disk_format="qcow2")
        with pytest.raises(exceptions.ImageUnacceptable, match="claimed to be qcow2, but it is raw"):
            cache.cache.fetch("template", source.fetch)
        assert cache.files() == []

    @pytest.mark.parametrize("name", ["", "../x", ".records", "-x", "a/b", "a\n", "x" * 129, "\udcff"])
    def test_hostile_names_are_refused_everywhere(self, cache, name):
        for act in (
            lambda: cache.fetch(name),
            lambda: cache.cache.get(name),
            lambda: cache.cache.path(name),
            lambda: cache.cache.leases(name),
            lambda: cache.cache.verify(name),
            lambda: cache.cache.remove(name),
            lambda: cache.cache.use(name).__enter__(),
        ):
            with pytest.raises(exceptions.InvalidName):
                act()
        assert (cache.fetches, cache.folder.exists()) == (0, False)

    def test_a_base_is_a_name_or_a_path_in_the_cache(self, cache):
        assert cache.cache.name_of("template") == "template"
        assert cache.cache.name_of(cache.cache.path("template")) == "template"
        for base in (f"{cache.folder}/template", "/template", "x/template", f"{cache.cache.folder}/../template"):
            with pytest.raises(exceptions.InvalidName):
                cache.cache.name_of(base)


def replaced_by_rename(cache: Cache, target: str) -> None:
    shutil.copyfile(cache.disk, target + ".tool")
    os.chmod(target + ".tool", 0o644)
    os.rename(target + ".tool", target)


def removed_and_made_anew(cache: Cache, target: str) -> None:
    os.unlink(target)
    shutil.copyfile(cache.disk, target)


class TestWhatFunctionsLeave:
    @pytest.mark.parametrize("fill", [replaced_by_rename, removed_and_made_anew])
    def test_a_function_may_replace_the_file(self, cache, fill):
        template = cache.cache.fetch("template", lambda target: fill(cache, target))
        assert template.sha256 == sha256(template.path) == sha256(cache.disk)
        assert os.stat(template.path).st_mode & 0o777 == 0o600
        assert cache.files() == ["_base/.records/template.json", "_base/template"]
        cache.cache.verify("template")

    @pytest.mark.parametrize(
        "leave",
        [
            lambda target: os.symlink("/etc/hostname", target),
            lambda target: os.symlink("/dev/zero", target),
            lambda target: os.makedirs(target + "/a/b"),
            os.mkfifo,
            lambda target: os.mknod(target, 0o60600, os.makedev(7, 0)),
            lambda target: None,
            lambda target: Path(target).touch(),
        ],
        ids=["link", "link to a device", "folder", "FIFO", "block device", "nothing", "empty file"],
    )
    def test_anything_but_an_image_is_refused_and_leaves_nothing(self, cache, leave):
        hostname = os.stat("/etc/hostname")

        def fetch(target: str) -> None:
            os.unlink(target)
            leave(target)

        with pytest.raises((exceptions.ImageUnacceptable, exceptions.StorageError)):
            cache.cache.fetch("template", fetch)
        assert cache.files() == []
        assert os.stat("/etc/hostname") == hostname
        cache.fetch()
        assert cache.cache.list() == [cache.cache.get("template")]

    @pytest.mark.parametrize(
        "error", [RuntimeError(), OSError(5, "said"), exceptions.Cancelled(), KeyboardInterrupt()]
    )
    def test_what_a_function_raises_propagates_and_leaves_nothing(self, cache, error):
        def fetch(target: str) -> None:
            Path(target).write_bytes(b"half")
            raise error

        with pytest.raises(type(error)) as caught:
            cache.cache.fetch("template", fetch)
        assert caught.value is error
        assert cache.files() == []
        cache.fetch()

    def test_what_a_killed_fetch_left_is_thrown_away(self, cache):
        base = Path(cache.cache.folder)
        base.mkdir(parents=True)
        for name in (".template.download", ".template.partial"):
            (base / name).write_bytes(b"half")
        cache.fetch(source=cache.image("vmdk"))
        assert cache.files() == ["_base/.records/template.json", "_base/template"]

    def test_a_file_without_a_record_is_not_a_template(self, cache):
        path = Path(cache.cache.path("template"))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"published, and killed before it was recorded")
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.get("template")
        assert cache.fetch().sha256 == sha256(path) == sha256(cache.disk)

    def test_a_file_that_disks_depend_on_is_not_overwritten_when_its_record_is_gone(self, cache):
        template = cache.fetch()
        cache.cache.lease("template", OWNER)
        (Path(cache.cache.folder) / ".records" / "template.json").unlink()
        inode = os.stat(template.path).st_ino
        with pytest.raises(exceptions.CorruptRecord, match="restore the record"):
            cache.fetch()
        assert os.stat(template.path).st_ino == inode


FORMATS = ["qcow2", "vmdk", "vdi", "vhdx", "vpc"]


class TestConversion:
    @pytest.mark.parametrize("image_format", FORMATS)
    @pytest.mark.parametrize("force", [True, False])
    def test_every_format_but_a_kept_one_becomes_raw(self, tmp_path, image_format, force):
        cache = Cache(tmp_path, force_raw_images=force)
        options = {"vpc": ["-o", "force_size"], "vmdk": ["-o", "subformat=streamOptimized"]}
        image = cache.image(image_format, *options.get(image_format, []))
        template = cache.fetch(source=image)
        kept = image_format == "qcow2" and not force
        assert template.format == ("qcow2" if kept else "raw")
        assert (template.source_format, template.virtual_size) == (image_format, 8 * MIB)
        assert template.sha256 == sha256(image)
        assert sha256(template.path) == sha256(image if kept else cache.disk)
        assert template.digest.startswith("sha256:" if kept else "sha256-1m:")
        assert cache.files() == ["_base/.records/template.json", "_base/template"]
        assert os.stat(template.path).st_mode & 0o777 == 0o600
        assert cache.cache.verify("template") == template

    @pytest.mark.parametrize("image_format", ["qcow2", "vmdk"])
    def test_progress_is_told_and_may_cancel(self, cache, image_format):
        image = cache.image(image_format)
        told: list[tuple[int, int]] = []
        cache.fetch("whole", image, progress=lambda *seen: told.append(seen))
        assert told
        assert told[-1][0] == told[-1][1]

        def cancel(done: int, total: int) -> None:
            raise exceptions.Cancelled

        before = cache.files()
        with pytest.raises(exceptions.Cancelled):
            cache.fetch("cancelled", image, progress=cancel)
        assert cache.files() == before
        cache.fetch("cancelled", image)

    @pytest.mark.parametrize("subformat", ["zlib", "streamOptimized"])
    def test_no_space_is_found_before_the_conversion_starts(self, small_tmpfs, tmp_path, subformat):
        large, image = tmp_path / "large", tmp_path / "image"
        large.write_bytes(b"compressible" * (32 * MIB // 12) + bytes(8))
        option = ["-c"] if subformat == "zlib" else ["-o", f"subformat={subformat}"]
        image_format = "qcow2" if subformat == "zlib" else "vmdk"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, *option, large, image], check=True)
        cache = TemplateCache(configured(small_tmpfs / "instances", "raw"))
        steps: list[str] = []
        faults.arm(steps.append)
        try:
            with pytest.raises(exceptions.InsufficientSpace) as caught:
                cache.fetch("template", lambda target: shutil.copyfile(image, target))
        finally:
            faults.arm(None)
        assert caught.value.required >= 32 * MIB > 8 * MIB >= caught.value.available > 0
        assert steps[-1] == "template.fetch.inspected"
        assert [path for path in (small_tmpfs / "instances").rglob("*") if not path.is_dir()] == []

    def test_a_download_that_does_not_fit_is_undone(self, small_tmpfs, tmp_path):
        large = tmp_path / "large"
        large.write_bytes(b"x" * 9 * MIB)
        conf = configured(small_tmpfs / "instances", "raw")
        cache = TemplateCache(conf)
        free = os.statvfs(small_tmpfs).f_bavail
        with pytest.raises(exceptions.InsufficientSpace):
            cache.fetch("template", open_source(str(large), conf).fetch)
        assert [path for path in (small_tmpfs / "instances").rglob("*") if not path.is_dir()] == []
        assert os.statvfs(small_tmpfs).f_bavail >= free - 8  # a block for each folder
        make_disk(large)
        assert cache.fetch("template", open_source(str(large), conf).fetch).size == 8 * MIB

    @pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
    def test_the_largest_virtual_size_is_an_option(self, tmp_path, image_format):
        cache = Cache(tmp_path, **{"image_cache.max_virtual_size": 8 * MIB - 512})
        image = cache.image(image_format)
        with pytest.raises(
            exceptions.ImageUnacceptable, match=f"is {8 * MIB} bytes.*max_virtual_size is {8 * MIB - 512}"
        ):
            cache.fetch(source=image)
        assert cache.files() == []
        cache.conf.set_override("max_virtual_size", 8 * MIB, group="image_cache")
        assert cache.fetch(source=image).virtual_size == 8 * MIB

    @pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
    def test_an_image_larger_than_the_disk_is_not_kept(self, cache, image_format):
        image = cache.image(image_format)
        with pytest.raises(exceptions.DiskTooSmall) as caught:
            cache.fetch(source=image, size=8 * MIB - 512)
        assert (caught.value.size, caught.value.required) == (8 * MIB - 512, 8 * MIB)
        assert cache.files() == []
        cache.fetch(source=image, size=8 * MIB)


class TestVerifying:
    @pytest.mark.parametrize("image_format", ["raw", "qcow2"])
    @pytest.mark.parametrize("offset", [0, 4096, 3 * MIB + 77, 8 * MIB - 1])
    def test_a_flipped_bit_is_found_though_nothing_else_shows_it(self, cache, image_format, offset):
        template = cache.fetch(source=cache.image(image_format))
        with open(template.path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0x10]))
        os.utime(template.path, ns=(0, template.modified))
        assert cache.cache.get("template") == template
        with pytest.raises(exceptions.CorruptRecord, match="the template is damaged"):
            cache.cache.verify("template")
        with pytest.raises(exceptions.CorruptRecord):
            cache.cache.verify("template")

    def test_a_file_that_was_touched_is_accepted_again(self, cache):
        template = cache.fetch()
        copy = f"{template.path}.copy"
        shutil.copyfile(template.path, copy)
        os.rename(copy, template.path)
        os.utime(template.path, ns=(0, 12345))
        with pytest.raises(exceptions.CorruptRecord, match="'template verify' tells"):
            cache.cache.get("template")
        verified = cache.cache.verify("template")
        assert verified.modified == 12345
        assert cache.cache.get("template") == cache.fetch() == verified
        assert cache.fetches == 1

    def test_a_template_that_is_removed_while_it_is_accepted_again_stays_removed(self, cache):
        template = cache.fetch()
        os.utime(template.path, ns=(0, 12345))
        faults.arm(lambda step: step == "template.rewrite" and cache.cache.remove("template"))
        try:
            cache.cache.verify("template")
        finally:
            faults.arm(None)
        assert list(cache.cache.names()) == []
        assert cache.files() == []

    def test_a_change_behind_the_reader_is_not_taken_for_a_touch(self, cache):
        template = cache.fetch()
        os.utime(template.path, ns=(0, 12345))

        def write_behind(done: int, total: int) -> None:
            with open(template.path, "r+b") as file:
                file.write(b"changed")

        verified = cache.cache.verify("template", write_behind)
        assert verified.modified == 12345
        with pytest.raises(exceptions.CorruptRecord):
            cache.cache.get("template")

    def test_verifying_tells_progress_and_may_be_cancelled(self, cache):
        template = cache.fetch()
        told: list[tuple[int, int]] = []
        assert cache.cache.verify("template", lambda *seen: told.append(seen)) == template
        assert told[-1] == (8 * MIB, 8 * MIB)

        def cancel(done: int, total: int) -> None:
            raise exceptions.Cancelled

        with pytest.raises(exceptions.Cancelled):
            cache.cache.verify("template", cancel)
        assert cache.cache.verify("template") == template

    def test_what_is_not_there_cannot_be_verified(self, cache):
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.verify("template")
        template = cache.fetch()
        os.unlink(template.path)
        with pytest.raises(exceptions.StorageError, match="No such file"):
            cache.cache.verify("template")


class TestListingAndRemoving:
    def test_templates_are_listed_by_name_and_damaged_ones_left_out(self, cache, caplog):
        for name in ("b", "a", "damaged"):
            cache.fetch(name)
        (Path(cache.cache.folder) / ".records" / "damaged.json").write_text("{")
        (Path(cache.cache.folder) / ".records" / ".c.json.partial").write_text("{")
        caplog.set_level(logging.WARNING, "imagebackend")
        assert [template.name for template in cache.cache.list()] == ["a", "b"]
        assert list(cache.cache.names()) == ["a", "b", "damaged"]
        assert "template damaged is left out" in caplog.text

    def test_removing_leaves_nothing(self, cache):
        cache.fetch("stays")
        before = cache.files()
        cache.fetch()
        cache.cache.lease("template", OWNER)
        cache.cache.release("template", OWNER)
        cache.cache.remove("template")
        assert cache.files() == before
        assert os.listdir(Path(cache.cache.folder) / ".leases") == []
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.remove("template")
        assert cache.fetch().name == "template"

    def test_a_template_that_disks_depend_on_stays(self, cache):
        template = cache.fetch()
        cache.cache.lease("template", OWNER)
        with pytest.raises(exceptions.TemplateInUse, match="host:/srv/instance/disk") as caught:
            cache.cache.remove("template")
        assert caught.value.users == ["host:/srv/instance/disk"]
        assert cache.cache.get("template") == template
        cache.cache.release_all(OWNER)
        cache.cache.remove("template")

    def test_leases_are_listed(self, cache):
        other = Owner("another", "disk", "::1", "/srv/another/disk")
        cache.cache.lease("template", OWNER)
        cache.cache.lease("template", other)
        cache.cache.lease("second", OWNER)
        assert [lease.owner for lease in cache.cache.leases("template")] == [other, OWNER]
        assert [lease.template for lease in cache.cache.leases("second")] == ["second"]
        cache.cache.release_all(OWNER)
        assert [lease.owner for lease in cache.cache.leases("template")] == [other]
        assert list(cache.cache.leases("second")) == []
        assert list(cache.cache.leases("none")) == []

    @pytest.mark.parametrize("content", ["", "{", '{"version": 0}'])
    def test_a_template_with_a_damaged_record_can_be_removed_and_added_again(self, cache, content):
        cache.fetch()
        (Path(cache.cache.folder) / ".records" / "template.json").write_text(content)
        with pytest.raises(exceptions.CorruptRecord):
            cache.fetch()
        cache.cache.remove("template")
        assert cache.fetch() == cache.cache.get("template")
        assert cache.fetches == 2

    def test_a_template_of_a_newer_release_is_left_alone(self, cache):
        template = cache.fetch()
        record = Path(cache.cache.folder) / ".records" / "template.json"
        content = record.read_text().replace('"version": 2', '"version": 3')
        record.write_text(content)
        for act in (
            cache.fetch,
            lambda: cache.cache.get("template"),
            lambda: cache.cache.verify("template"),
            lambda: cache.cache.remove("template"),
            lambda: cache.cache.use("template").__enter__(),
        ):
            with pytest.raises(exceptions.CorruptRecord, match="newer release"):
                act()
        assert record.read_text() == content
        assert sha256(template.path) == template.sha256
        assert cache.fetches == 1

    def test_a_damaged_record_does_not_hide_who_depends_on_the_file(self, cache):
        cache.fetch()
        cache.cache.lease("template", OWNER)
        (Path(cache.cache.folder) / ".records" / "template.json").write_text("{")
        assert [lease.owner for lease in cache.cache.leases("template")] == [OWNER]
        with pytest.raises(exceptions.TemplateInUse):
            cache.cache.remove("template")
        cache.cache.release("template", OWNER)
        cache.cache.remove("template")
        assert cache.files() == []


class TestUse:
    def test_the_last_use_is_when_a_disk_was_made_or_dropped(self, cache):
        template = cache.fetch()
        folder = Path(cache.cache.folder) / ".leases" / "template"
        published = datetime.datetime.fromisoformat(template.fetched).timestamp()
        assert cache.cache.last_used(template) == published
        for act in (
            lambda: cache.cache.lease("template", OWNER),
            lambda: cache.cache.release("template", OWNER),
        ):
            cache.cache.lease("template", dataclasses.replace(OWNER, disk="other"))
            os.utime(folder, (0, 0))
            assert cache.cache.last_used(template) == published
            act()
            assert cache.cache.last_used(template) == folder.stat().st_mtime >= published

    def test_a_use_without_a_lease_is_noted_and_not_each_time(self, cache):
        template = cache.fetch()
        folder = Path(cache.cache.folder) / ".leases" / "template"
        with cache.cache.use("template"):
            pass
        assert cache.cache.last_used(template) == folder.stat().st_mtime
        os.utime(folder, (0, 0))
        with cache.cache.use("template"):
            pass
        assert folder.stat().st_mtime == 0
        another = TemplateCache(cache.conf)
        with another.use("template"):
            pass
        assert folder.stat().st_mtime > 0

    def test_a_template_is_found_by_its_file(self, cache):
        template = cache.fetch()
        assert cache.cache.by_file("template") == template
        with pytest.raises(exceptions.TemplateNotFound):
            cache.cache.by_file("template@0123456789abcdef")


class TestRights:
    def test_a_read_only_file_system_gives_what_it_has_and_takes_nothing(self, small_tmpfs, tmp_path):
        tiny = tmp_path / "tiny"
        tiny.write_bytes(b"x" * 512)
        cache = TemplateCache(configured(small_tmpfs / "instances", "raw"))
        template = cache.fetch("template", lambda target: shutil.copyfile(tiny, target))
        subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
        assert cache.get("template") == template
        assert cache.list() == [template]
        assert cache.fetch("template", lambda target: pytest.fail("fetched")) == template
        for act in (
            lambda: cache.fetch("other", lambda target: pytest.fail("fetched")),
            lambda: cache.lease("template", OWNER),
            lambda: cache.remove("template"),
        ):
            with pytest.raises(exceptions.PermissionDenied):
                act()
        assert cache.get("template") == template

    @pytest.mark.parametrize("part", [".", "_base"])
    def test_a_read_only_folder_keeps_its_tags(self, cache, part):
        cache.fetch()
        cache.fetch("other")
        cache.cache.catalogue.tag("template", "stable")
        before = cache.files()
        with filesystems.read_only(cache.folder / part):
            for act in (
                lambda: cache.cache.catalogue.tag("template", "new"),
                lambda: cache.cache.catalogue.tag("other", "stable"),
                lambda: cache.cache.catalogue.untag("stable"),
            ):
                with pytest.raises(exceptions.PermissionDenied):
                    act()
            assert cache.cache.catalogue.tags() == {"stable": "template"}
        assert cache.files() == before

    def test_no_right_to_the_folder_is_permission_denied(self, cache):
        cache.fetch()
        os.chmod(cache.cache.folder, 0o700)
        script = """
import os, sys
import imagebackend
from imagebackend import exceptions
from imagebackend.templates import cache, inspection
conf = imagebackend.load_config()
conf.set_override("instances_path", sys.argv[1])
templates = cache.TemplateCache(conf)
# As root the folders of the test are passed; from here on only what others may.
os.chdir(sys.argv[1])
conf.set_override("instances_path", sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for act in (lambda: templates.get("template"), templates.list, templates.names,
            lambda: templates.fetch("other", print), lambda: templates.remove("template")):
    try:
        print(act())
    except exceptions.PermissionDenied as error:
        print(type(error).__name__)
"""
        command = [sys.executable, "-c", script, str(cache.folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.stdout.split(), done.stderr) == (["PermissionDenied"] * 5, "")
