# SPDX-License-Identifier: Apache-2.0
"""The sides of the comparison: two worker processes, and the bare tools."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tests.bench.worker import Clock, Timing

__all__ = ["ROOT", "Worker", "interpreter", "run_tool", "write_configuration"]

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_CONFIGURATION = """
[DEFAULT]
state_path = {folder}
instances_path = {folder}/instances
durable_writes = {durable}
[libvirt]
images_type = {images_type}
virt_type = qemu
{libvirt}
[glance]
api_servers = {image_service}
"""


def interpreter(side: str) -> str:
    """Return the Python in which a side, ``own`` or ``nova``, runs."""
    return f"{ROOT}/.cache/nova/bin/python" if side == "nova" else sys.executable


def write_configuration(
    folder: str,
    images_type: str,
    *,
    image_service: str = "",
    durable: bool = True,
    libvirt: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write the ini file of one side, the same for both, and return its path.

    :param durable: whether this project waits for stable storage; Nova has no such option.
    :param libvirt: more options of that group.
    """
    os.makedirs(f"{folder}/instances", exist_ok=True)
    path = f"{folder}/bench.conf"
    with open(path, "w") as file:
        options = {"images_type": images_type, "image_service": image_service, "durable": durable}
        more = "\n".join(f"{name} = {value}" for name, value in libvirt.items())
        file.write(_CONFIGURATION.format(folder=folder, libvirt=more, **options))
    return path


class Worker:
    """One side, running; see :mod:`tests.bench.worker`.

    :param side: ``own`` or ``nova``.
    :param configuration: the path of its ini file.
    """

    def __init__(self, side: str, configuration: str) -> None:
        self.side = side
        self._log = open(f"{configuration}.log", "w+")  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [interpreter(side), "-W", "ignore", "-m", f"tests.bench.{side}_peer", configuration],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def call(self, operation: str, **arguments: Any) -> Any:
        """Have an operation done and return its result.

        :raises RuntimeError: it failed; the text holds the traceback.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([operation, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended; why is in its log
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.side} ended:\n{self._log.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.side}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process and what it started; nothing that it may be doing is wanted any more."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # Popen closes the pipes; what was not sent need not be.
        with contextlib.suppress(BrokenPipeError), self._process:
            pass
        self._log.close()


def run_tool(commands: Sequence[Sequence[str]], after: Callable[[int], object] = lambda number: None) -> Timing:
    """Run commands one after another and time them.

    :param after: called with the number of each command when it is done, within its time.
    """
    each = []
    clock = Clock()
    for number, command in enumerate(commands):
        begun = time.perf_counter_ns()
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        after(number)
        each.append((time.perf_counter_ns() - begun) / 1e9)
    return clock.timing(len(each), each)
