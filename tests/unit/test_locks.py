# SPDX-License-Identifier: Apache-2.0
"""Locks between threads, between processes, and between this library and oslo.concurrency."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions, locks

#: Says that it holds a lock, and holds it until its stdin ends. fasteners is what oslo.concurrency locks with.
HOLDERS = {
    "ours": """
import sys
from imagebackend import locks
with locks.hold(sys.argv[1], timeout=0, shared=sys.argv[2] == "shared", transient=sys.argv[2] == "transient"):
    print("held", flush=True)
    sys.stdin.read()
""",
    "oslo.concurrency": """
import os, sys
from oslo_concurrency import lockutils
with lockutils.external_lock(os.path.basename(sys.argv[1]), lock_path=os.path.dirname(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
""",
}


@contextlib.contextmanager
def holder(path: Path, mode: str = "exclusive", whose: str = "ours") -> Iterator[subprocess.Popen[bytes]]:
    """Give another process that holds the lock in the block."""
    command = [sys.executable, "-c", HOLDERS[whose], str(path), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def is_free(path: Path, *, shared: bool = False) -> bool:
    try:
        with locks.hold(str(path), timeout=0, shared=shared):
            return True
    except exceptions.LockTimeout:
        return False


def run(script: str, *arguments: object, command: tuple[str, ...] = ()) -> str:
    """Run Python in a process of its own and return what it printed."""
    words = [*command, sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_exclusive_lock_keeps_everybody_out_and_is_given_back(tmp_path):
    path = tmp_path / "lock"
    with locks.hold(str(path), timeout=0):
        assert not is_free(path)
        assert not is_free(path, shared=True)
        assert (
            run(
                "from imagebackend import locks; import sys; print(locks.is_range_locked("
                "__import__('os').open(sys.argv[1], 2), 0, 0))",
                path,
            )
            == "True\n"
        )
    assert is_free(path)


def test_a_shared_lock_lets_other_shared_holders_in(tmp_path):
    path = tmp_path / "lock"
    with locks.hold(str(path), timeout=0, shared=True), locks.hold(str(path), timeout=0, shared=True):
        assert is_free(path, shared=True)
        assert not is_free(path)
    assert is_free(path)


def test_threads_keep_each_other_out(tmp_path):
    path = tmp_path / "lock"
    found: list[bool] = []
    with locks.hold(str(path), timeout=0):
        thread = threading.Thread(target=lambda: found.append(is_free(path)))
        thread.start()
        thread.join()
    assert found == [False]


@pytest.mark.parametrize("whose", HOLDERS)
def test_another_process_keeps_this_one_out(tmp_path, whose):
    path = tmp_path / "lock"
    with holder(path, whose=whose):
        assert not is_free(path)
        assert not is_free(path, shared=True)
    assert is_free(path)


def test_another_process_shares(tmp_path):
    path = tmp_path / "lock"
    with holder(path, "shared"):
        assert is_free(path, shared=True)
        assert not is_free(path)


@pytest.mark.parametrize("shared", [False, True])
def test_oslo_concurrency_waits_for_our_locks(tmp_path, shared):
    script = """
import sys, fasteners
lock = fasteners.InterProcessLock(sys.argv[1])
print(lock.acquire(blocking=False))
"""
    path = tmp_path / "lock"
    with locks.hold(str(path), timeout=0, shared=shared):
        assert run(script, path) == "False\n"
    assert run(script, path) == "True\n"


def test_the_kernel_releases_what_a_killed_process_held(tmp_path):
    for mode in ("exclusive", "shared", "transient"):
        path = tmp_path / mode
        with holder(path, mode) as process:
            assert not is_free(path)
            process.kill()
            process.wait()
            assert path.exists()
            assert is_free(path)


def test_a_process_that_was_forked_meanwhile_holds_nothing_up(tmp_path):
    run(
        """
import os, sys
from imagebackend import locks
reading, writing = os.pipe()
with locks.hold(sys.argv[1], timeout=0, shared=True):
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)  # ends with its parent
        os._exit(0)
with locks.hold(sys.argv[1], timeout=0):
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
""",
        tmp_path / "lock",
    )


def test_reading_or_copying_the_lock_file_does_not_unlock_it(tmp_path):
    # As it would with the POSIX locks that fcntl.lockf takes.
    path = tmp_path / "lock"
    with locks.hold(str(path), timeout=0):
        path.read_bytes()
        shutil.copy(path, tmp_path / "copy")
        assert not is_free(path)


def test_whoever_waits_gets_the_lock_when_it_is_given_back(tmp_path):
    path = str(tmp_path / "lock")
    order: list[str] = []

    def wait() -> None:
        with locks.hold(path, timeout=60):
            order.append("second")

    thread = threading.Thread(target=wait)
    with locks.hold(path, timeout=0):
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_timeout_says_which_lock_and_how_long(tmp_path):
    path = str(tmp_path / "lock")
    too_late = locks.hold(path, timeout=0.25)
    with locks.hold(path, timeout=0), pytest.raises(exceptions.LockTimeout, match=r"after 0\.25 s") as caught:
        too_late.__enter__()
    assert (caught.value.name, caught.value.seconds, caught.value.reason) == (path, 0.25, "locked")
    assert isinstance(caught.value, exceptions.Busy)


def test_the_lock_is_given_back_when_the_block_fails(tmp_path):
    for transient in (False, True):
        path = tmp_path / "lock"
        with pytest.raises(KeyError), locks.hold(str(path), timeout=0, transient=transient):
            raise KeyError
        assert is_free(path)


def test_a_transient_lock_leaves_no_file(tmp_path):
    path = tmp_path / "folder" / "lock"
    with locks.hold(str(path), timeout=0, transient=True):
        assert path.exists()
        assert not is_free(path)
    assert list(tmp_path.rglob("lock")) == []


def test_a_transient_lock_whose_file_was_removed_hides_no_error(tmp_path):
    descriptors = os.listdir("/proc/self/fd")
    path = tmp_path / "folder" / "lock"

    def work() -> None:
        with locks.hold(str(path), timeout=0, transient=True):
            shutil.rmtree(path.parent)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert os.listdir("/proc/self/fd") == descriptors


def test_the_file_that_was_locked_is_the_one_that_has_the_name(tmp_path):
    """Whoever opened the file of a transient lock before it was removed must not think that it holds the lock."""
    path = tmp_path / "lock"
    path.touch()
    entered = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with locks.hold(str(path), timeout=60):
            entered.set()
            leave.wait(60)

    with locks.hold(str(path), timeout=0, transient=True):
        thread = threading.Thread(target=hold)
        thread.start()
    assert entered.wait(60)
    # Whether the thread had opened the old file or not: it holds the one that is there.
    assert path.exists()
    assert not is_free(path)
    leave.set()
    thread.join()


HAMMER = """
import os, sys, threading
from imagebackend import locks
folder, lock, threads, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
failures = []
def hammer():
    try:
        for _ in range(rounds):
            with locks.hold(lock, timeout=90, transient=True):
                os.close(os.open(folder + "/inside", os.O_CREAT | os.O_EXCL))
                with open(folder + "/count", "r+") as file:
                    count = int(file.read())
                    file.seek(0)
                    file.write(str(count + 1))
                os.unlink(folder + "/inside")
    except BaseException as error:
        failures.append(error)
workers = [threading.Thread(target=hammer) for _ in range(threads)]
for worker in workers: worker.start()
for worker in workers: worker.join()
sys.exit(repr(failures) if failures else 0)
"""


def test_a_transient_lock_that_many_fight_for_has_one_holder_at_a_time(tmp_path):
    processes, threads, rounds = 4, 4, 50
    (tmp_path / "count").write_text("0")
    lock = tmp_path / "locks" / "lock"
    command = [sys.executable, "-c", HAMMER, str(tmp_path), str(lock), str(threads), str(rounds)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(processes)]
    said = [process.communicate(timeout=100)[1] for process in running]
    assert said == [""] * processes
    assert (tmp_path / "count").read_text() == str(processes * threads * rounds)
    assert list(lock.parent.iterdir()) == []


def test_an_exclusive_holder_that_removes_the_file_and_shared_ones_keep_each_other_out(tmp_path):
    """As templates are locked: shared to use one, exclusive and transient to change it."""
    path = str(tmp_path / "lock")
    inside = {True: 0, False: 0}
    guard = threading.Lock()
    errors: list[object] = []

    def work(shared: bool) -> None:
        try:
            for _ in range(25):
                with locks.hold(path, timeout=90, shared=shared, transient=not shared):
                    with guard:
                        inside[shared] += 1
                        if inside[False] > 1 or (inside[False] and inside[True]):
                            errors.append(dict(inside))
                    with guard:
                        inside[shared] -= 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(shared,)) for shared in (True, True, True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_folder_that_is_not_there_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "lock"
    with locks.hold(str(path), timeout=0):
        assert path.stat().st_mode & 0o777 == 0o644
    assert is_free(path)


def test_no_right_to_make_the_lock_file_is_permission_denied():
    folder = tempfile.mkdtemp(prefix="locks-", dir="/tmp")
    try:
        os.chmod(folder, 0o555)
        said = run(
            """
import os, sys
from imagebackend import exceptions, locks
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for name in "lock", "folder/lock":
    path = sys.argv[1] + "/" + name
    try:
        with locks.hold(path, timeout=60):
            print("held")
    except exceptions.PermissionDenied as error:
        print(os.path.relpath(error.path, sys.argv[1]))
""",
            folder,
        )
        assert said == "lock\nfolder\n"
        assert os.listdir(folder) == []
    finally:
        os.rmdir(folder)


@pytest.mark.parametrize(
    "make", [lambda path: path.symlink_to("elsewhere"), lambda path: path.mkdir()], ids=["link", "folder"]
)
def test_only_a_file_is_locked(tmp_path, make):
    make(tmp_path / "lock")
    with pytest.raises(exceptions.StorageError), locks.hold(str(tmp_path / "lock"), timeout=0):
        pytest.fail("held")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_storage_that_knows_no_locks_is_an_error_and_no_wait(tmp_path):
    """As NFS says where its lock server does not run."""
    script = """
import sys
from imagebackend import exceptions, locks
try:
    with locks.hold(sys.argv[1], timeout=60):
        print("held")
except exceptions.StorageError as error:
    print(error)
"""
    path = tmp_path / "lock"
    strace = ("strace", "-f", "-o", "/dev/null", "-P", str(path), "-e", "inject=fcntl:error=ENOLCK")
    assert run(script, path, command=strace) == f"{path}: No locks available\n"


def test_ranges_of_a_file_are_locked_one_by_one(tmp_path):
    path = tmp_path / "image"
    one, other = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        assert locks.lock_range(one, 100, 1, shared=True)
        assert locks.lock_range(other, 100, 1, shared=True)
        assert not locks.lock_range(other, 100, 1, shared=False)
        assert locks.lock_range(other, 200, 1, shared=False)
        assert not locks.lock_range(one, 200, 1, shared=True)
        assert locks.is_range_locked(one, 200, 1)
        assert not locks.is_range_locked(one, 201, 100)
        assert not locks.is_range_locked(other, 200, 1)
        os.close(other)
        assert not locks.is_range_locked(one, 0, 0)
        assert locks.lock_range(one, 200, 1, shared=False)
    finally:
        os.close(one)
