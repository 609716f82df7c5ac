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
import select
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
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
    environment: Mapping[str, str] | None = None,
    completes: bool = False,
) -> Result:
    """Run a command to its end and return its output.

    :param command: the argument list; the first is looked up in :data:`PATH`.
    :param timeout: seconds of wall clock, after which the whole process group is killed.
    :param limits: limits on CPU and memory, for commands that read untrusted bytes.
    :param input: what stdin gives; it is ``/dev/null`` otherwise.
    :param pass_fds: open descriptors that the command inherits.
    :param secrets: strings that are masked in logs and errors.
    :param package: the Debian package to name when the command is missing.
    :param silent: any output on stderr is a failure, whatever the exit status.
    :param success: the exit statuses that are no failure.
    :param on_output: called with each piece of stdout, and with an empty string at least every half second; an
        exception raised there kills the command and propagates.
    :param environment: variables beside those that every command gets.
    :param completes: when this process is killed, the command is not: one that ends soon by itself, and must not be
        cut short. It starts sooner, too.
    :raises ToolMissing: the command is not installed.
    :raises ToolTimeout: it ran past its deadline.
    :raises ToolFailed: it cannot be started, failed, was killed, or wrote more than 16 MiB.
    """
    shown = [_mask(word, secrets) for word in command]
    executable = find(command[0])
    if executable is None:
        raise exceptions.ToolMissing(shown, package)
    # A file name need not be UTF-8, but what is logged is.
    LOG.debug("running %s", shlex.join(shown).encode(errors="backslashreplace").decode())
    started = time.monotonic()
    stdout: list[bytes] = []
    stderr: list[bytes] = []
    try:
        with _start(
            [*_wrapper(limits, completes), executable, *command[1:]],
            shown,
            input,
            pass_fds,
            environment or {},
            completes,
        ) as child:
            try:
                _talk(child, stdout, stderr, shown, started + timeout, on_output)
                _await_exit(child, shown, started + timeout)
            finally:
                exit_code = _kill(child)
    except subprocess.TimeoutExpired:
        # Without its cause, which would show the secrets.
        raise exceptions.ToolTimeout(shown, timeout, _mask(_text(stderr), secrets)[:_STDERR_SHOWN]) from None
    LOG.debug("%s ended with %d after %.3f s", shown[0], exit_code, time.monotonic() - started)
    said = _mask(_text(stderr), secrets)[:_STDERR_SHOWN]
    if exit_code not in success:
        raise exceptions.ToolFailed(shown, exit_code, said)
    if silent and said.strip():
        raise exceptions.ToolFailed(shown, exit_code, said, reason="it reported a problem")
    return Result(_text(stdout), _text(stderr))


def _wrapper(limits: Limits | None, completes: bool) -> list[str]:
    # The child must not outlive a parent that is killed: it would go on writing to a file that nobody owns.
    wrapper = [] if completes else ["/usr/bin/setpriv", "--pdeathsig", "KILL"]
    if limits is not None:
        wrapper += ["/usr/bin/prlimit", f"--cpu={limits.cpu_time}", f"--as={limits.address_space}"]
    return wrapper


def _start(
    command: list[str],
    shown: list[str],
    input: bytes,
    pass_fds: Sequence[int],
    environment: Mapping[str, str],
    completes: bool,
) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as stack:
        stdin = subprocess.DEVNULL
        if input:
            # Not a pipe: a command that does not read it would hold up its caller beyond every deadline.
            file = stack.enter_context(open(os.memfd_create("stdin"), "w+b", buffering=0))
            file.write(input)
            file.seek(0)
            stdin = file.fileno()
        try:
            return subprocess.Popen(
                command,
                env={**_ENVIRONMENT, **environment},
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=pass_fds,
                cwd="/",
                start_new_session=True,
                # Python ignores SIGPIPE: a command that completes must not die of an output that nobody reads.
                restore_signals=not completes,
            )
        except OSError as error:
            raise exceptions.ToolFailed(shown, None, "", reason=f"cannot be started: {error.strerror}") from error


def _talk(
    child: subprocess.Popen[bytes],
    stdout: list[bytes],
    stderr: list[bytes],
    shown: list[str],
    deadline: float,
    on_output: Callable[[str], None] | None,
) -> None:
    assert child.stdout is not None
    assert child.stderr is not None
    length = 0
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ, stdout)
        selector.register(child.stderr, selectors.EVENT_READ, stderr)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(shown, left)
            said = b""
            for key, _ in selector.select(min(left, _HEARTBEAT)):
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fileobj)
                    continue
                length += len(piece)
                if length > _OUTPUT_LIMIT:
                    raise exceptions.ToolFailed(shown, None, "", reason=f"more than {_OUTPUT_LIMIT} bytes of output")
                key.data.append(piece)
                if key.data is stdout:
                    said = piece
            if on_output is not None:
                on_output(said.decode("utf-8", "replace"))


def _await_exit(child: subprocess.Popen[bytes], shown: list[str], deadline: float) -> None:
    # Without reaping it: until that is done, no other process can get its number, which is also that of its group.
    descriptor = os.pidfd_open(child.pid)
    try:
        left = max(0.0, deadline - time.monotonic())
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(left * 1000):
            raise subprocess.TimeoutExpired(shown, left)
    finally:
        os.close(descriptor)


def _kill(child: subprocess.Popen[bytes]) -> int:
    # Also after success: a grandchild that kept running in the group would outlive the call.
    # One that a helper has made root is not ours to kill, even when it has ended; one that has not ends by itself.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _text(pieces: list[bytes]) -> str:
    return b"".join(pieces).decode("utf-8", "replace")


def _mask(text: str, secrets: Sequence[str]) -> str:
    # The longest first: one may be the beginning of another.
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
