# SPDX-License-Identifier: Apache-2.0
"""Let one system call fail: in a process of our own, or in qemu-img, as strace(1) injects it.

The error is what the kernel would answer, whoever asked it: Python, a library, a tool. The call itself is not done.
For close(2) that is another thing than a close that fails, which closes: it is not injected.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Call", "Fault", "Outcome", "Tool", "run"]

_LINE = re.compile(r"(?:\d+ +)?(\w+)\((.*)")
_OPTIONS = ("-y", "-s", "0", "-e", "signal=none")
_TIMEOUT = 60


@dataclass(frozen=True)
class Fault:
    """The failure of one call.

    :ivar call: the name of the system call.
    :ivar error: what it fails with, as errno(3) names it.
    :ivar number: which of the calls of that name fails, from 1.
    :ivar lasting: all later ones fail, too.
    """

    call: str
    error: str
    number: int
    lasting: bool = False

    @property
    def option(self) -> str:
        """What strace is told."""
        return f"inject={self.call}:error={self.error}:when={self.number}{'+' if self.lasting else ''}"


@dataclass(frozen=True)
class Call:
    """A system call.

    :ivar name: its name.
    :ivar text: its arguments, descriptors with their paths, and its result.
    """

    name: str
    text: str

    @property
    def injected(self) -> bool:
        """Whether it failed on purpose."""
        return self.text.endswith("(INJECTED)")

    @property
    def file(self) -> str:
        """The first argument: of calls that work on a descriptor, its number and path."""
        return re.split(r"[,)] ", self.text, maxsplit=1)[0]

    def __str__(self) -> str:
        return f"{self.name}({self.text}"


@dataclass(frozen=True)
class Outcome:
    """How it went.

    :ivar error: what was raised, or None.
    :ivar told: its traceback.
    :ivar calls: the system calls that were watched, in order.
    :ivar descriptors: what was open afterwards and not before.
    """

    error: BaseException | None
    told: str
    calls: Sequence[Call]
    descriptors: Sequence[str]


def run(act: Callable[[], object], watched: Sequence[str], fault: Fault | None, trace: Path) -> Outcome:
    """Do ``act`` in a child process in which ``fault`` happens.

    :param watched: the names of the system calls that are reported.
    :param trace: a file to write them to.
    """
    options = [*_OPTIONS, "-e", f"trace={','.join(watched)}", "-o", str(trace)]
    if fault is not None:
        options += ["-e", fault.option]
    with _child(act) as (process, connection):
        connection.recv(16)
        before = _descriptors(process)
        command = ["strace", *options, "-p", str(process)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as tracer:
            assert tracer.stderr is not None
            attached = tracer.stderr.readline()
            assert "attached" in attached, attached
            connection.send(b"act")
            error, told = pickle.loads(connection.recv(1 << 20))
            left = sorted(_descriptors(process) - before)
            connection.send(b"end")
    return Outcome(error, told, _read(trace), left)


class Tool:
    """A qemu-img in which a call fails, for a PATH that begins with ``folder``.

    The first qemu-img that is started meets the fault; with one that lasts, every one does.
    """

    def __init__(self, folder: Path, watched: Sequence[str]) -> None:
        self.folder = folder / "tool"
        self._trace = folder / "tool.trace"
        self._used = folder / "tool.used"
        self._watched = watched
        self.folder.mkdir()

    def arm(self, fault: Fault) -> None:
        """Let ``fault`` happen from now on, and forget what happened."""
        self._trace.unlink(missing_ok=True)
        self._used.unlink(missing_ok=True)
        options = [*_OPTIONS, "-f", "-qq", "-A", "-e", f"trace={','.join(self._watched)}", "-e", fault.option]
        words = ["/usr/bin/strace", *options, "-o", str(self._trace), "/usr/bin/qemu-img"]
        first = "" if fault.lasting else f'(set -C; : >"{self._used}") 2>/dev/null || exec /usr/bin/qemu-img "$@"\n'
        script = self.folder / "qemu-img"
        script.write_text(f'#!/bin/sh\n{first}exec {" ".join(words)} "$@"\n')
        script.chmod(0o755)

    @property
    def injected(self) -> Sequence[Call]:
        """The calls that failed on purpose."""
        return [call for call in _read(self._trace) if call.injected] if self._trace.exists() else []


def _read(trace: Path) -> list[Call]:
    found = (_LINE.fullmatch(line) for line in trace.read_text(errors="replace").splitlines())
    return [Call(match[1], match[2]) for match in found if match]


@contextlib.contextmanager
def _child(act: Callable[[], object]) -> Iterator[tuple[int, socket.socket]]:
    # Messages of a socket: sending and receiving are no calls that a test lets fail.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(_TIMEOUT)
        process = os.fork()
        if process == 0:
            ours.close()
            _follow(act, theirs)
        theirs.close()
        try:
            yield process, ours
        finally:
            ours.close()  # a child that still waits ends
            os.waitpid(process, 0)


def _follow(act: Callable[[], object], connection: socket.socket) -> None:
    try:
        error: BaseException | None = None
        told = ""
        connection.send(b"ready")
        if connection.recv(16):
            try:
                act()
            except BaseException as raised:
                error, told = raised, "".join(traceback.format_exception(raised))
            connection.send(pickle.dumps((error, told)))
            connection.recv(16)
    finally:
        os._exit(0)


def _descriptors(process: int) -> set[str]:
    folder = f"/proc/{process}/fd"
    return {f"{number} {os.readlink(f'{folder}/{number}')}" for number in os.listdir(folder)}
