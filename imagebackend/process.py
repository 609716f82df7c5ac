# SPDX-License-Identifier: Apache-2.0
"""The only module that starts a process.

An argument list, never a shell; C locale; a named environment; stdin closed unless given; a deadline; the whole
process group killed and reaped whatever happens; limits on CPU and memory set by prlimit(1), which costs no second
interpreter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imagebackend import exceptions

__all__ = ["PATH", "Limits", "Result", "find", "run"]

LOG = logging.getLogger(__name__)

#: Where commands are looked for. The environment's own PATH is not trusted.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# glibc reserves address space for malloc by the number of cores, which a limit on it would have to follow.
_ENVIRONMENT = {"PATH": PATH, "LC_ALL": "C", "HOME": "/", "MALLOC_ARENA_MAX": "2"}
_OUTPUT_LIMIT = 16 << 20
_STDERR_SHOWN = 4096
_HEARTBEAT = 0.5


@dataclass(frozen=True)
class Limits:
    """What a command that reads untrusted bytes may use.

    :ivar cpu_time: seconds of CPU.
    :ivar address_space: bytes of memory.
    """

    cpu_time: int
    address_space: int


@dataclass(frozen=True)
class Result:
    """What a command that succeeded wrote."""

    stdout: str
    stderr: str


def find(command: str) -> str | None:
    """Return the absolute path of a command, or None."""
    return shutil.which(command, path=PATH)


def run(
    command: Sequence[str],
    *,
    timeout: float,
    limits: Limits | None = None,
    input: bytes = b"",
    pass_fds: Sequence[int] = (),
    secrets: Sequence[str] = (),
    package: str = "",
    silent: bool = False,
    success: Sequence[int] = (0,),
    on_output: Callable[[str], None] | None = None,
) -> Result:
    """Run a command to its end and return its output.

    :param command: the argument list; the first is looked up in :data:`PATH`.
    :param timeout: seconds of wall clock, after which the whole process group is killed.
    :param limits: limits on CPU and memory, for commands that read untrusted bytes.
    :param input: what to feed on stdin; stdin is ``/dev/null`` otherwise.
    :param pass_fds: open descriptors that the command inherits.
    :param secrets: strings that are masked in logs and errors.
    :param package: the Debian package to name when the command is missing.
    :param silent: any output on stderr is a failure, whatever the exit status.
    :param success: the exit statuses that are no failure.
    :param on_output: called with each piece of stdout, and with an empty string at least every half second; an
        exception raised there kills the command and propagates.
    :raises ToolMissing: the command is not installed.
    :raises ToolTimeout: it ran past its deadline.
    :raises ToolFailed: it failed, was killed, or wrote more than 16 MiB.
    """
    shown = [_mask(word, secrets) for word in command]
    executable = find(command[0])
    if executable is None:
        raise exceptions.ToolMissing(shown, package)
    # A file name need not be UTF-8, but what is logged is.
    LOG.debug("running %s", shlex.join(shown).encode(errors="backslashreplace").decode())
    started = time.monotonic()
    child = subprocess.Popen(
        [*_wrapper(limits), executable, *command[1:]],
        env=_ENVIRONMENT,
        stdin=subprocess.PIPE if input else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
        cwd="/",
        start_new_session=True,
    )
    try:
        with child:
            try:
                stdout, stderr = _talk(child, shown, input, started + timeout, timeout, on_output)
                exit_code = child.wait(timeout=max(0.0, started + timeout - time.monotonic()))
            finally:
                _kill(child)
    except subprocess.TimeoutExpired as error:
        raise exceptions.ToolTimeout(shown, timeout) from error
    LOG.debug("%s ended with %d after %.3f s", shown[0], exit_code, time.monotonic() - started)
    said = _mask(stderr, secrets)[:_STDERR_SHOWN]
    if exit_code not in success:
        raise exceptions.ToolFailed(shown, exit_code, said)
    if silent and said.strip():
        raise exceptions.ToolFailed(shown, exit_code, said, reason="it reported a problem")
    return Result(stdout, stderr)


def _wrapper(limits: Limits | None) -> list[str]:
    # The child must not outlive a parent that is killed: it would go on writing to a file that nobody owns.
    wrapper = ["/usr/bin/setpriv", "--pdeathsig", "KILL"]
    if limits is not None:
        wrapper += ["/usr/bin/prlimit", f"--cpu={limits.cpu_time}", f"--as={limits.address_space}"]
    return wrapper


def _talk(
    child: subprocess.Popen[bytes],
    shown: list[str],
    input: bytes,
    deadline: float,
    timeout: float,
    on_output: Callable[[str], None] | None,
) -> tuple[str, str]:
    assert child.stdout is not None
    assert child.stderr is not None
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(input)
            child.stdin.close()
    pieces: dict[int, list[bytes]] = {child.stdout.fileno(): [], child.stderr.fileno(): []}
    length = 0
    with selectors.DefaultSelector() as selector:
        for stream in pieces:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise exceptions.ToolTimeout(shown, timeout, _text(pieces[child.stderr.fileno()])[:_STDERR_SHOWN])
            ready = selector.select(min(left, _HEARTBEAT))
            if on_output is not None and not ready:
                on_output("")
            for key, _ in ready:
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fd)
                    continue
                length += len(piece)
                if length > _OUTPUT_LIMIT:
                    raise exceptions.ToolFailed(shown, None, "", reason=f"more than {_OUTPUT_LIMIT} bytes of output")
                pieces[key.fd].append(piece)
                if on_output is not None and key.fd == child.stdout.fileno():
                    on_output(piece.decode("utf-8", "replace"))
    return _text(pieces[child.stdout.fileno()]), _text(pieces[child.stderr.fileno()])


def _kill(child: subprocess.Popen[bytes]) -> None:
    # Also after success: a grandchild that kept running in the group would outlive the call.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _text(pieces: list[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")


def _mask(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
