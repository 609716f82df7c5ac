# SPDX-License-Identifier: Apache-2.0
"""Count what a piece of Python costs in system calls, as strace(1) sees them: the measure that no noise can bend.

::

    setup = "import os; f = os.open('/tmp/x', os.O_CREAT | os.O_WRONLY)"
    counts = counting.count("os.write(f, b'abc'); os.fdatasync(f)", setup=setup)
    assert (counts.bytes_written, counts.syncs, counts.processes) == (3, 1, 0)
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Counts", "count", "parse"]

_BEGIN, _END = "/imagebackend-counting/begin", "/imagebackend-counting/end"

# The sources are compiled before the first marker, so that only their execution lies between the two.
_RUNNER = f"""
import os, sys
setup, script = (compile(open(path).read(), path, "exec") for path in sys.argv[1:])
names = {{"__name__": "__main__"}}
exec(setup, names)
os.access({_BEGIN!r}, os.F_OK)
exec(script, names)
os.access({_END!r}, os.F_OK)
"""

# strace(1), with -f and -o: "PID call(arguments) = result", or cut in two where another thread came between.
_STARTED = re.compile(r"(\d+) +(\w+)\((.*)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
_RESULT = re.compile(r".*\)\s+= (-?\d+|\?|0x[0-9a-f]+)(?: (E[A-Z0-9]+))?")
_UNFINISHED = "<unfinished ...>"

_SYNCS = {"fsync", "fdatasync", "syncfs", "sync", "sync_file_range", "msync"}
_WRITES = {"write", "pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice"}
_STARTS = {"fork", "vfork", "clone", "clone3"}
_EXECS = {"execve", "execveat"}


@dataclass(frozen=True)
class Counts:
    """What a script cost, over all its threads and child processes.

    :ivar by_name: system calls by name.
    :ivar processes: processes started.
    :ivar threads: threads started.
    :ivar execs: programs executed; a name that was not found in a folder of PATH does not count.
    :ivar syncs: fsync, fdatasync, syncfs, sync, sync_file_range and msync.
    :ivar bytes_written: what write and its kin accepted, copy_file_range, sendfile and splice included.
    :ivar blocked_locks: locks that somebody else held, and every request that would have waited for one.
    """

    by_name: dict[str, int]
    processes: int
    threads: int
    execs: int
    syncs: int
    bytes_written: int
    blocked_locks: int

    @property
    def total(self) -> int:
        """All system calls."""
        return sum(self.by_name.values())


@dataclass
class _Call:
    name: str
    text: str
    result: int | None = None
    error: str | None = None


def count(script: str, *, setup: str = "", interpreter: str = sys.executable, timeout: float = 120) -> Counts:
    """Run ``setup`` and then ``script`` in one fresh interpreter and count the system calls of ``script``.

    Both are Python source and share their global names. What the script imports counts too: import it, and do
    once what only the first call does, in the setup. Threads and processes count while the script runs; one that
    it leaves behind does not count any more.

    :param interpreter: the Python to run.
    :param timeout: seconds, after which everything is killed.
    :raises RuntimeError: the source failed; the text says how.
    :raises subprocess.TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory(prefix="counting-") as folder:
        paths = [f"{folder}/{name}" for name in ("runner.py", "setup.py", "script.py")]
        for path, source in zip(paths, (_RUNNER, setup, script), strict=True):
            with open(path, "w") as file:
                file.write(source)
        trace = f"{folder}/trace"
        _run(["strace", "-f", "-qq", "-s", "0", "-e", "signal=none", "-o", trace, interpreter, *paths], timeout)
        with open(trace, errors="replace") as lines:
            return parse(lines)


def parse(lines: Iterable[str]) -> Counts:
    """Return the counts between the two markers of a trace in the format of ``strace -f -o``."""
    by_name: collections.Counter[str] = collections.Counter()
    processes = threads = execs = syncs = bytes_written = blocked_locks = 0
    for call in _calls_between_markers(lines):
        by_name[call.name] += 1
        result = call.result or 0
        if call.name in _STARTS and result > 0:
            if "CLONE_THREAD" in call.text:
                threads += 1
            else:
                processes += 1
        execs += call.name in _EXECS and call.result == 0
        syncs += call.name in _SYNCS
        bytes_written += max(0, result) if call.name in _WRITES else 0
        blocked_locks += _is_blocked_lock(call)
    return Counts(dict(by_name), processes, threads, execs, syncs, bytes_written, blocked_locks)


def _is_blocked_lock(call: _Call) -> bool:
    refused = call.error in ("EAGAIN", "EACCES", "EWOULDBLOCK")
    if call.name == "fcntl":
        return "SETLKW" in call.text or ("SETLK" in call.text and refused)
    if call.name == "flock":
        return refused or not ("LOCK_NB" in call.text or "LOCK_UN" in call.text)
    return False


def _calls_between_markers(lines: Iterable[str]) -> Iterator[_Call]:
    inside = False
    unfinished: dict[str, _Call] = {}
    for line in lines:
        if started := _STARTED.match(line):
            process, name, text = started.groups()
            if _END in text:
                inside = False
            elif _BEGIN in text:
                inside = True
            elif inside:
                call = _Call(name, text)
                if _UNFINISHED in text:
                    unfinished[process] = call
                else:
                    yield _finished(call, text)
        elif resumed := _RESUMED.match(line):
            process, name, text = resumed.groups()
            # One that began before the first marker is not among them.
            if process in unfinished and unfinished[process].name == name:
                yield _finished(unfinished.pop(process), text)
    yield from unfinished.values()


def _finished(call: _Call, text: str) -> _Call:
    if (found := _RESULT.match(text)) and found[1] != "?":
        call.result = int(found[1], 0)
        call.error = found[2]
    return call


def _run(command: list[str], timeout: float) -> None:
    # Strings hash alike in every run, so that two runs count alike.
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            _, said = child.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        raise RuntimeError(f"counting: exit status {child.returncode}:\n{said}")
