# SPDX-License-Identifier: Apache-2.0
"""What a whole pull takes of memory: fetching, inspecting, converting and publishing, in this process and in tools."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.conftest import MIB

# Not ru_maxrss for this process, which also counts what it was before it became this interpreter.
PULL = """
import resource, sys
from imagebackend import Backend, load_config, open_source
conf = load_config([])
conf.set_override("instances_path", sys.argv[1])
template = Backend(conf).templates.pull("template", open_source(sys.argv[2], conf))
with open("/proc/self/status") as status:
    own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
print(template.format, template.virtual_size, own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def make_raw(path: Path, size: int) -> None:
    """Write an image of which all but the first block is a hole."""
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(size)


def make_full(path: Path, size: int, disk_format: str) -> None:
    raw = path.with_suffix(".data")
    with raw.open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(4, "big") * (MIB // 4))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", disk_format, raw, path], check=True, timeout=120)


def make_qcow2(path: Path, size: int) -> None:
    """Write an image that is full of data, and that is converted in the process itself."""
    make_full(path, size, "qcow2")


def make_vmdk(path: Path, size: int) -> None:
    """Write an image that is full of data, and that a tool converts."""
    make_full(path, size, "vmdk")


@pytest.mark.parametrize(("make", "large"), [(make_raw, 1024 * MIB), (make_qcow2, 128 * MIB), (make_vmdk, 128 * MIB)])
def test_the_memory_of_a_pull_does_not_grow_with_the_image(
    tmp_path: Path, make: Callable[[Path, int], None], large: int
) -> None:
    peaks: list[list[int]] = []
    for size in (8 * MIB, large):
        source = tmp_path / f"{size}.image"
        make(source, size)
        command = [sys.executable, "-c", PULL, str(tmp_path / f"{size}"), str(source)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        disk_format, virtual_size, *peak = done.stdout.split()
        assert (disk_format, int(virtual_size)) == ("raw", size)
        peaks.append([int(each) << 10 for each in peak])
    for few, many in zip(*peaks, strict=True):
        assert many - few < 16 * MIB, peaks
