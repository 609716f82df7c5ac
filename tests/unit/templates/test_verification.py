# SPDX-License-Identifier: Apache-2.0
"""Templates are read again where they lie; damaged ones stay for their disks, and are used for no other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.storage import digest
from imagebackend.templates import rereading
from imagebackend.templates.cache import Template, TemplateCache
from tests import counting
from tests.contract.conftest import configured
from tests.unit.templates.conftest import MIB, OWNER, Cache
from tests.unit.templates.test_pull import damage


@pytest.fixture
def converted(cache: Cache) -> Template:
    """A template whose digest can be taken in parts."""
    return cache.fetch(source=cache.image("qcow2"))


@pytest.fixture
def checkpoint(cache: Cache) -> Path:
    return cache.folder / "_base" / ".template.verify"


def cancel_at(share: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= total * share:
            raise exceptions.Cancelled

    return progress


class TestQuarantine:
    def test_a_damaged_template_stays_and_is_used_no_more(self, cache, caplog):
        template = cache.fetch()
        cache.cache.lease("template", OWNER)
        damage(template.path)
        content = Path(template.path).read_bytes()
        with pytest.raises(
            exceptions.CorruptTemplate, match="depend on it: host:/srv/instance/disk; pull it"
        ) as caught:
            cache.cache.verify("template")
        assert caught.value.users == ["host:/srv/instance/disk"]
        assert "template template is damaged, and quarantined" in caplog.text
        assert caplog.records[-1].facts["users"] == caught.value.users
        for act in (
            cache.fetch,
            lambda: cache.cache.get("template"),
            lambda: cache.cache.use("template").__enter__(),
            lambda: cache.cache.use("template", cache.fetcher()).__enter__(),
        ):
            with pytest.raises(exceptions.CorruptTemplate, match="the template is damaged: quarantined 20"):
                act()
        assert Path(template.path).read_bytes() == content
        assert [lease.owner for lease in cache.cache.leases("template")] == [OWNER]
        recorded = json.loads((cache.folder / "_base/.records/template.json").read_text())
        assert [each["event"] for each in recorded["history"]] == ["fetched", "damaged"]

    def test_one_that_is_restored_and_verified_is_used_again(self, cache):
        template = cache.fetch()
        damage(template.path)
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.verify("template")
        shutil.copyfile(cache.disk, template.path)
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.get("template")
        verified = cache.cache.verify("template")
        assert verified == cache.cache.get("template")
        assert [each.event for each in verified.history] == ["fetched", "damaged", "verified"]

    def test_one_that_is_pulled_again_is_used_again(self, cache):
        template = cache.cache.pull("template", cache.source("disk.raw"))
        damage(template.path)
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.verify("template")
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.pull("template", cache.source("disk.raw"))
        pulled = cache.cache.pull("template", cache.source("disk.raw"), "newer")
        assert cache.cache.verify("template") == pulled
        assert pulled.quarantined == ""

    def test_one_that_cannot_be_quarantined_is_damaged_all_the_same(self, cache, monkeypatch, caplog):
        template = cache.fetch()
        damage(template.path)

        def refuse(*arguments: object) -> None:
            raise exceptions.PermissionDenied("record")

        monkeypatch.setattr(cache.cache._folder, "write", refuse)
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.verify("template")
        assert "cannot be quarantined" in caplog.text

    def test_what_is_replaced_behind_our_back_is_found_by_the_next_disk(self, cache):
        template = cache.fetch()
        cache.cache.lease("template", OWNER)
        Path(template.path).unlink()
        Path(template.path).write_bytes(b"x" * template.size)
        with pytest.raises(exceptions.CorruptTemplate) as caught:
            cache.cache.use("template", cache.fetcher()).__enter__()
        assert caught.value.users == ["host:/srv/instance/disk"]
        with pytest.raises(exceptions.CorruptTemplate):
            cache.fetch()


class TestHistory:
    def test_what_was_verified_says_when(self, cache):
        template = cache.fetch()
        for _ in range(2):
            verified = cache.cache.verify("template")
        assert verified == template
        assert [each.event for each in cache.cache.get("template").history] == ["fetched", "verified", "verified"]

    def test_it_is_not_noted_while_disks_are_made(self, cache, monkeypatch):
        template = cache.fetch()
        monkeypatch.setattr("imagebackend.templates.verification._PATIENCE", 0.0)
        with cache.cache.use("template"):
            assert cache.cache.verify("template") == template
        assert len(cache.cache.get("template").history) == 1


class TestResuming:
    def test_a_verification_goes_on_where_another_broke_off(self, cache, converted, checkpoint):
        with pytest.raises(exceptions.Cancelled):
            cache.cache.verify("template", cancel_at(0.5))
        assert checkpoint.stat().st_mode & 0o777 == 0o600
        told: list[tuple[int, int]] = []
        again = TemplateCache(cache.conf)
        assert again.verify("template", lambda *seen: told.append(seen)) == converted
        assert told[0][0] > 4 * MIB
        assert told[-1] == (8 * MIB, 8 * MIB)
        assert not checkpoint.exists()

    def test_damage_before_and_behind_the_break_is_found(self, cache, converted, checkpoint):
        for offset in (0, 3 * MIB + 5):
            with pytest.raises(exceptions.Cancelled):
                cache.cache.verify("template", cancel_at(0.3))
            with open(converted.path, "r+b") as file:
                file.seek(offset)
                file.write(b"X")
            os.utime(converted.path, ns=(0, converted.modified))
            with pytest.raises(exceptions.CorruptTemplate):
                cache.cache.verify("template")
            cache.cache.pull("template", cache.source("disk.qcow2"), "always")

    def test_a_killed_verification_is_taken_up(self, cache, converted, checkpoint):
        script = """
import os, signal, sys
import imagebackend
from imagebackend import faults
from imagebackend.templates import rereading
rereading._NOTE_EVERY = 1
conf = imagebackend.load_config()
conf.set_override("instances_path", sys.argv[1])
cache = imagebackend.TemplateCache(conf)
seen = []
def kill(done, total):
    if done > 3 << 20:
        os.kill(os.getpid(), signal.SIGKILL)
cache.verify("template", kill)
"""
        done = subprocess.run([sys.executable, "-c", script, cache.folder], timeout=60)
        assert done.returncode == -9
        told: list[int] = []
        cache.cache.verify("template", lambda done, total: told.append(done))
        assert told[0] > 3 * MIB

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"X"),
            lambda path: path.write_bytes(path.read_bytes()[:-40] + bytes(40)),
            lambda path: path.write_bytes(path.read_bytes()[:-40] + b"\xff" * 40),
            lambda path: path.write_bytes(path.read_bytes() * 3),
            lambda path: path.write_bytes(b"[]\n" + path.read_bytes().partition(b"\n")[2]),
            lambda path: path.write_bytes(b"x" * 100_000),
            lambda path: os.utime(path, (0, 0)),
            lambda path: (path.unlink(), path.mkdir()),
            lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
        ],
        ids=range(11),
    )
    def test_a_spoilt_note_does_no_harm(self, cache, converted, checkpoint, spoil):
        with pytest.raises(exceptions.Cancelled):
            cache.cache.verify("template", cancel_at(0.5))
        hostname = Path("/etc/hostname").read_bytes()
        spoil(checkpoint)
        assert cache.cache.verify("template") == converted
        assert Path("/etc/hostname").read_bytes() == hostname

    def test_the_note_of_another_file_does_not_count(self, cache, converted, checkpoint):
        with pytest.raises(exceptions.Cancelled):
            cache.cache.verify("template", cancel_at(0.5))
        shutil.copy2(converted.path, cache.sources / "copy")
        os.replace(cache.sources / "copy", converted.path)
        told: list[int] = []
        cache.cache.verify("template", lambda done, total: told.append(done))
        assert told[0] <= MIB

    def test_an_image_that_is_kept_as_it_was_fetched_is_resumed_from_the_second_time_on(self, cache, checkpoint):
        template = cache.fetch()
        assert (template.digest.partition(":")[0], template.block_digest) == ("sha256", "")
        with pytest.raises(exceptions.Cancelled):
            cache.cache.verify("template", cancel_at(0.5))
        assert not checkpoint.exists()
        verified = cache.cache.verify("template")
        assert verified.digest == template.digest
        with open(template.path, "rb") as file:
            assert verified.block_digest == digest.compute(file.fileno(), digest.BLOCKS, "template")
        with pytest.raises(exceptions.Cancelled):
            cache.cache.verify("template", cancel_at(0.5))
        assert checkpoint.exists()
        damage(template.path)
        with pytest.raises(exceptions.CorruptTemplate):
            cache.cache.verify("template")


class TestReading:
    def test_it_is_read_from_the_storage_and_leaves_the_page_cache_alone(self, ext4_folder, tmp_path):
        cache = Cache(ext4_folder)
        template = cache.fetch(source=cache.image("qcow2"))
        setup = f"""
import imagebackend
conf = imagebackend.load_config()
conf.set_override("instances_path", {str(cache.folder)!r})
cache = imagebackend.TemplateCache(conf)
cache.verify("template")
"""
        counts = counting.count("cache.verify('template')", setup=setup)
        reads = sum(number for name, number in counts.by_name.items() if name.startswith("pread"))
        assert reads == 3  # a block to try, and the two blocks that have data
        assert counts.processes == 0
        with open(template.path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cache.cache.verify("template")
        command = ["fincore", "--noheadings", "--bytes", "--output", "RES", template.path]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == ["0"]

    def test_holes_are_not_read(self, ext4_folder):
        cache = Cache(ext4_folder)
        image = cache.sources / "large.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1T"], check=True)
        cache.conf.set_override("durable_writes", False)
        template = cache.fetch(source=image)
        assert template.virtual_size == 1 << 40
        assert cache.cache.verify("template") == template

    @pytest.mark.parametrize(
        ("rate", "blocks", "elapsed", "waits"),
        [(0, 1000, 0.0, 0.0), (MIB, 3, 0.0, 3.0), (MIB, 3, 2.5, 0.5), (MIB, 3, 4.0, 0.0), (10 * MIB, 5, 0.1, 0.4)],
    )
    def test_the_pace(self, monkeypatch, rate, blocks, elapsed, waits):
        now, slept = [100.0], [0.0]
        monkeypatch.setattr(rereading.time, "monotonic", lambda: now[0])

        def sleep(seconds: float) -> None:
            slept[0] += seconds
            now[0] += seconds

        monkeypatch.setattr(rereading.time, "sleep", sleep)
        pace = rereading.Pace(rate)
        now[0] += elapsed
        for _ in range(blocks):
            pace.wait(MIB)
        assert slept[0] == pytest.approx(waits)

    def test_a_rate_is_kept(self, cache, converted, monkeypatch):
        slept: list[float] = []
        monkeypatch.setattr(rereading.time, "sleep", slept.append)
        cache.cache.verify("template", rate=MIB)
        assert max(slept) > 1.0  # two blocks of data, at one a second
        assert hashlib.sha256(Path(converted.path).read_bytes()).digest()


def test_many_that_need_a_touched_template_read_it_once(tmp_path):
    cache = Cache(tmp_path)
    template = cache.fetch()
    os.utime(template.path, ns=(0, 12345))
    script = """
import sys, threading
import imagebackend
conf = imagebackend.load_config()
conf.set_override("instances_path", sys.argv[1])
conf.set_override("lock_timeout", 60.0)
cache = imagebackend.TemplateCache(conf)
def use():
    with cache.use("template"):
        pass
threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    subprocess.run([sys.executable, "-c", script, cache.folder], check=True, timeout=60)
    history = TemplateCache(configured(cache.folder, "raw")).get("template").history
    assert [each.event for each in history] == ["fetched", "verified"]
