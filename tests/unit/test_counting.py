# SPDX-License-Identifier: Apache-2.0
"""The counter counts right: scripts whose cost is known beforehand."""

from __future__ import annotations

import subprocess

import pytest

from tests import counting


def test_an_empty_script_costs_nothing():
    assert counting.count("") == counting.Counts({}, 0, 0, 0, 0, 0, 0)


def test_only_the_script_counts_not_its_setup():
    counts = counting.count("os.getppid()", setup="import os, subprocess\nsubprocess.run(['true'])\nos.sync()")
    assert counts.by_name == {"getppid": 1}
    assert counts.total == 1


def test_every_call_counts_by_its_name():
    counts = counting.count("for _ in range(1000): getppid()", setup="from os import getppid")
    assert counts.by_name["getppid"] == 1000
    assert counts.total == sum(counts.by_name.values())


def test_bytes_are_what_the_kernel_accepted(tmp_path):
    setup = f"import os\nfile = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR)"
    script = """
os.write(file, b"12345")
os.pwrite(file, b"123", 100)
os.writev(file, [b"12", b"3456"])
os.copy_file_range(file, file, 10, 0, 1000)
try:
    os.write(-1, b"not written")
except OSError:
    pass
"""
    counts = counting.count(script, setup=setup)
    assert counts.bytes_written == 5 + 3 + 6 + 10
    assert counts.by_name == {"write": 2, "pwrite64": 1, "writev": 1, "copy_file_range": 1}


def test_every_kind_of_sync_counts(tmp_path):
    setup = f"import os, mmap\nfile = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_RDWR)\n"
    setup += "os.ftruncate(file, 4096)\narea = mmap.mmap(file, 4096)"
    counts = counting.count("os.fsync(file); os.fdatasync(file); area.flush(); os.sync()", setup=setup)
    assert counts.syncs == 4
    assert counts.total == 4


def test_processes_and_programs_count_apart():
    setup = "import os, subprocess"
    script = """
subprocess.run(["/bin/true"])
subprocess.run(["true"], env={"PATH": "/nonexistent:/nowhere:/bin"})
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
"""
    counts = counting.count(script, setup=setup)
    assert (counts.processes, counts.execs, counts.threads) == (3, 2, 0)


def test_calls_of_child_processes_and_threads_count(tmp_path):
    setup = "import os, subprocess, threading"
    script = f"""
def work():
    os.getppid()
threads = [threading.Thread(target=work) for _ in range(5)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
subprocess.run(["dd", "if=/dev/zero", "of={tmp_path}/file", "bs=1000", "count=3", "conv=fsync", "status=none"])
"""
    counts = counting.count(script, setup=setup)
    assert counts.by_name["getppid"] == 5
    assert (counts.processes, counts.threads, counts.execs) == (1, 5, 1)
    assert (counts.bytes_written, counts.syncs) == (3000, 1)


def test_a_lock_held_by_another_counts_as_blocked(tmp_path):
    setup = f"""
import fcntl, os, struct
path = {str(tmp_path / "lock")!r}
first, second = (os.open(path, os.O_CREAT | os.O_RDWR) for _ in range(2))
def lock(descriptor, kind):
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, 0, 0, 0, 0))
    except BlockingIOError:
        pass
"""
    free = counting.count("lock(first, fcntl.F_WRLCK); lock(first, fcntl.F_RDLCK)", setup=setup)
    assert (free.by_name, free.blocked_locks) == ({"fcntl": 2}, 0)
    held = counting.count("lock(first, fcntl.F_WRLCK); lock(second, fcntl.F_RDLCK)", setup=setup)
    assert (held.by_name, held.blocked_locks) == ({"fcntl": 2}, 1)


def test_a_lock_request_that_may_wait_counts_as_blocked(tmp_path):
    setup = f"import fcntl\nfile = open({str(tmp_path / 'lock')!r}, 'w')"
    script = "fcntl.lockf(file, fcntl.LOCK_EX); fcntl.flock(file, fcntl.LOCK_SH)"
    assert counting.count(script, setup=setup).blocked_locks == 2
    script = "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)"
    assert counting.count(script, setup=setup).blocked_locks == 0


def test_two_runs_count_alike(tmp_path):
    setup = f"import json, os\nos.chdir({str(tmp_path)!r})"
    script = "open('a', 'w').write(json.dumps(dict.fromkeys('abcdefgh'))); os.listdir('.')"
    assert counting.count(script, setup=setup) == counting.count(script, setup=setup)


def test_a_call_cut_in_two_by_another_thread_counts_once():
    lines = [
        '7  write(1, ""..., 5 <unfinished ...>',
        '7  access("/imagebackend-counting/begin", F_OK) = -1 ENOENT (No such file or directory)',
        "7  <... write resumed>)  = 5",
        "8  fdatasync(4 <unfinished ...>",
        '9  pwrite64(3, ""..., 7, 0 <unfinished ...>',
        "8  <... fdatasync resumed>)            = 0",
        "9  <... pwrite64 resumed>)             = 7",
        "8  read(5,  <unfinished ...>",
        '7  access("/imagebackend-counting/end", F_OK) = -1 ENOENT (No such file or directory)',
        "9  fsync(3)                            = 0",
    ]
    counts = counting.parse(lines)
    assert counts.by_name == {"fdatasync": 1, "pwrite64": 1, "read": 1}
    assert (counts.syncs, counts.bytes_written) == (1, 7)


def test_a_script_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        counting.count("1 / 0")


def test_a_script_that_hangs_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        counting.count("signal.pause()", setup="import signal", timeout=3)
