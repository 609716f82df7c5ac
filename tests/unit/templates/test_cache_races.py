# SPDX-License-Identifier: Apache-2.0
"""Many want one template: threads, processes, hosts, and some of them are killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import imagebackend
from imagebackend import exceptions, faults
from imagebackend.templates.cache import TemplateCache
from tests.contract.conftest import configured
from tests.functional.image_building import converted, make_disk

#: argv: the shared folder, the image, a file that gets a line for each fetch, how many threads, what to do midway.
FETCHER = """
import os, shutil, sys, threading
import imagebackend
folder, source, log, threads, midway = sys.argv[1:]
conf = imagebackend.load_config()
conf.set_override("instances_path", folder)
conf.set_override("lock_timeout", 60.0)
cache = imagebackend.TemplateCache(conf)
def fetch(target):
    line = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(line, f"{os.uname().nodename} {os.getpid()}\\n".encode())
    with open(source, "rb") as image, open(target, "wb") as file:
        file.write(image.read(1 << 20))
        file.flush()
        if midway == "wait":
            print("fetching", flush=True)
            sys.stdin.read()
        shutil.copyfileobj(image, file)
failures, found = [], set()
def run():
    try:
        found.add(cache.fetch("template", fetch))
    except BaseException as error:
        failures.append(error)
workers = [threading.Thread(target=run) for _ in range(int(threads))]
for worker in workers: worker.start()
for worker in workers: worker.join()
sys.exit(repr(failures) if failures or len(found) != 1 else 0)
"""


class Shared:
    """A folder that several fetch into, and what they fetch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "instances"
        self.source = folder / "disk.qcow2"
        self.log = folder / "log"
        converted("qcow2")(self.source)
        self.content = folder / "disk.raw"
        make_disk(self.content)
        self.cache = TemplateCache(configured(self.folder, "raw"))

    def command(self, *, threads: int = 1, midway: str = "", folder: Path | None = None) -> list[str]:
        words = [folder or self.folder, self.source, self.log, threads, midway]
        return [sys.executable, "-c", FETCHER, *map(str, words)]

    def check(self, fetches: int) -> None:
        """Make sure that the template is there and whole, that nothing else is, and how often it was fetched."""
        template = self.cache.verify("template")
        assert Path(template.path).read_bytes() == self.content.read_bytes()
        assert len(self.log.read_text().splitlines()) == fetches
        files = [path for path in self.folder.rglob("*") if not path.is_dir() and "locks" not in path.parts]
        assert sorted(path.name for path in files) == ["template", "template.json"]


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path)


@contextlib.contextmanager
def fetching(shared: Shared) -> Iterator[subprocess.Popen[str]]:
    """Give a process that is in the middle of its fetch, until its stdin ends."""
    with subprocess.Popen(
        shared.command(midway="wait"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "fetching\n"
            yield process
        finally:
            process.kill()


def run_together(*calls: Callable[[], Any]) -> list[Any]:
    """Return what each call returned or raised; they run in threads of their own."""
    results: list[Any] = [None] * len(calls)

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_and_threads_that_race_fetch_once(shared):
    running = [subprocess.Popen(shared.command(threads=4), stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=100)[1] for process in running] == [""] * 4
    shared.check(fetches=1)


def test_threads_that_race_get_the_same_template(shared):
    calls = 0

    def fetch(target: str) -> None:
        nonlocal calls
        calls += 1
        shutil.copyfile(shared.source, target)

    found = run_together(*[lambda: shared.cache.fetch("template", fetch)] * 16)
    assert calls == 1
    assert set(found) == {shared.cache.get("template")}


@pytest.mark.parametrize("waiting", [0, 2])
def test_when_a_fetching_process_is_killed_another_takes_over(shared, waiting):
    with fetching(shared) as killed:
        others = [subprocess.Popen(shared.command(), stderr=subprocess.PIPE, text=True) for _ in range(waiting)]
        killed.kill()
        killed.wait()
        if not waiting:
            # What it left is no template, and matches no name that one can have.
            assert list(shared.cache.names()) == []
            assert not os.path.lexists(shared.cache.path("template"))
            others = [subprocess.Popen(shared.command(), stderr=subprocess.PIPE, text=True)]
        assert [process.communicate(timeout=100)[1] for process in others] == [""] * len(others)
    shared.check(fetches=2)


def test_nobody_sees_a_template_that_is_being_fetched(shared):
    with fetching(shared) as process:
        assert list(shared.cache.names()) == []
        with pytest.raises(exceptions.TemplateNotFound):
            shared.cache.get("template")
        assert not os.path.lexists(shared.cache.path("template"))
        # Whoever may not wait hears who is in the way.
        impatient = TemplateCache(configured(shared.folder, "raw", lock_timeout=0.0))
        with pytest.raises(exceptions.LockTimeout, match="template-template"):
            impatient.fetch("template", lambda target: pytest.fail("fetched twice"))
        assert process.communicate(timeout=60) == ("", None)
        assert process.returncode == 0
    shared.check(fetches=1)


def test_hosts_that_share_a_folder_fetch_once(shared, tmp_path):
    """Each in a mount namespace of its own, where the folder is mounted elsewhere, and with a name of its own."""
    shared.folder.mkdir()
    script = 'hostname=$1; place=$2; mount --bind "$3" "$place" && echo "$hostname" >/proc/sys/kernel/hostname'
    script += ' && shift 3 && exec "$@"'
    running = []
    for name in ("one", "two", "three"):
        place = tmp_path / name
        place.mkdir()
        host = ["unshare", "--mount", "--uts", "sh", "-c", script, "sh", name, str(place), str(shared.folder)]
        command = [*host, *shared.command(threads=2, folder=place)]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    assert [process.communicate(timeout=100)[1] for process in running] == [""] * 3
    assert shared.log.read_text().split()[0] in ("one", "two", "three")
    shared.check(fetches=1)


def test_a_fetch_that_fails_is_not_remembered_and_the_next_one_tries(shared):
    calls: list[str] = []

    class Refused(Exception):
        pass

    def fetch(target: str) -> None:
        calls.append(target)
        if len(calls) == 1:
            raise Refused
        shutil.copyfile(shared.source, target)

    found = run_together(*[lambda: shared.cache.fetch("template", fetch)] * 6)
    assert len(calls) == 2
    assert sorted(type(result).__name__ for result in found) == ["Refused"] + ["Template"] * 5


def test_one_template_does_not_wait_for_another(shared):
    started, finish = threading.Event(), threading.Event()

    def slow(target: str) -> None:
        started.set()
        assert finish.wait(60)
        shutil.copyfile(shared.source, target)

    def quick() -> str:
        assert started.wait(60)
        try:
            return shared.cache.fetch("quick", lambda target: shutil.copyfile(shared.source, target)).name
        finally:
            finish.set()

    slow_one, quick_one = run_together(lambda: shared.cache.fetch("slow", slow).name, quick)
    assert (slow_one, quick_one) == ("slow", "quick")


def test_a_template_in_use_is_not_removed_under_its_user(shared):
    shared.cache.fetch("template", lambda target: shutil.copyfile(shared.source, target))
    impatient = TemplateCache(configured(shared.folder, "raw", lock_timeout=0.0))
    with shared.cache.use("template") as template, impatient.use("template") as again:
        assert template == again
        with pytest.raises(exceptions.LockTimeout):
            impatient.remove("template")
        assert os.path.exists(template.path)
    impatient.remove("template")
    with pytest.raises(exceptions.TemplateNotFound):
        shared.cache.use("template").__enter__()


def test_users_and_removers_that_race_leave_a_template_or_none(shared):
    """Whoever uses it finds it whole for as long as the block runs."""

    def fetch(target: str) -> None:
        shutil.copyfile(shared.content, target)

    def use() -> None:
        for _ in range(15):
            with shared.cache.use("template", fetch) as template:
                assert os.stat(template.path).st_size == template.size
                assert shared.cache.get("template") == template

    def remove() -> None:
        for _ in range(15):
            with contextlib.suppress(exceptions.TemplateNotFound):
                shared.cache.remove("template")

    assert run_together(use, use, remove, remove) == [None] * 4
    with contextlib.suppress(exceptions.TemplateNotFound):
        shared.cache.remove("template")
    assert [path for path in shared.folder.rglob("*") if not path.is_dir()] == []


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
@pytest.mark.parametrize("vanish", [os.unlink, lambda path: os.truncate(path, 4096)], ids=["gone", "shorter"])
def test_a_template_that_vanishes_makes_no_disk(shared, image_type, vanish):
    backend = imagebackend.Backend(configured(shared.folder, image_type))

    def fetch(target: str) -> None:
        shutil.copyfile(shared.source, target)

    image = backend.image("instance", "disk")
    path = backend.templates.fetch("template", fetch).path
    vanish(path)
    with pytest.raises(exceptions.CorruptRecord):
        image.cache(fetch, "template", 16 << 20)
    assert not image.exists()
    assert list(backend.templates.leases("template")) == []
    backend.templates.remove("template")
    image.cache(fetch, "template", 16 << 20)
    assert image.exists()


def test_a_copy_of_a_template_that_vanishes_midway_is_whole(shared, tmp_path):
    """An operator deletes the file at each step in turn, which no lock can keep anybody from."""

    def fetch(target: str) -> None:
        shutil.copyfile(shared.content, target)

    def make_without(number: int) -> int:
        """Make a disk, delete the template at a step of it, and return how many steps there are."""
        backend = imagebackend.Backend(configured(tmp_path / f"step{number}", "raw", reflink="never"))
        path = backend.templates.fetch("template", fetch).path
        image = backend.image("instance", "disk")
        passed: list[str] = []

        def delete(step: str) -> None:
            if len(passed) == number:
                os.unlink(path)
            passed.append(step)

        faults.arm(delete)
        try:
            image.cache(fetch, "template", 8 << 20)
        finally:
            faults.arm(None)
        assert Path(image.path).read_bytes() == shared.content.read_bytes()
        assert not os.path.exists(path)
        return len(passed)

    steps = make_without(0)
    assert steps >= 4
    for number in range(1, steps):
        make_without(number)
