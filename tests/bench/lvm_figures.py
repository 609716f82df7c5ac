# SPDX-License-Identifier: Apache-2.0
"""The figures of disks in logical volumes, beside the bare commands: ``python -m tests.bench.lvm_figures``.

Apart from the other figures, since they need device-mapper: where this kernel has none, they are taken in a guest,
which may be emulated. Only what was measured in one run can be compared.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import imagebackend
from imagebackend.backend import Backend
from imagebackend.storage import block_device
from imagebackend.storage.lvm2 import Layout, VolumeGroup
from tests.lvm.volume_groups import MIB, POOL, group_on, loop_device, run
from tools import linux_guest, lvm_tests

__all__ = ["main"]

_ROUNDS = 15
_DATA, _SIZE = 48 * MIB, 256 * MIB
_PIECE = 1 * MIB


def main() -> int:
    if not lvm_tests.has_device_mapper():
        command = [sys.executable, "-m", "tests.bench.lvm_figures"]
        return linux_guest.run(command, memory=2048, timeout=1500.0)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        loop_device(Path(folder) / "device", 2 << 30) as device,
    ):
        template = Path(folder) / "template"
        _write_template(template)
        with group_on("figures", device) as name:
            group = VolumeGroup(name, timeout=60)
            group.create_thin_pool(POOL, 1 << 30)
            _thin(group, template, Path(folder))
            _thick(group, template, device)
    return 0


def _write_template(path: Path) -> None:
    """Write data and holes in turn."""
    with path.open("wb") as file:
        file.truncate(_SIZE)
        for number in range(_DATA // _PIECE):
            file.seek(number * (_SIZE // (_DATA // _PIECE)))
            file.write(os.urandom(_PIECE))


def _thin(group: VolumeGroup, template: Path, folder: Path) -> None:
    conf = imagebackend.load_config()
    conf.set_override("instances_path", str(folder / "instances"))
    for option, value in {"type": "lvm", "volume_group": group.name, "thin_pool": POOL}.items():
        conf.set_override(f"images_{option}", value, group="libvirt")
    backend = Backend(conf)

    def fetch(target: str) -> None:
        run("cp", "--sparse=always", template, target)

    def make(number: int) -> None:
        backend.image(f"own{number}", "disk").cache(fetch, "template", _SIZE)

    make(_ROUNDS)
    (origin,) = (volume.name for volume in group.report() if volume.name.startswith("template+"))
    bare = ["lvcreate", "--yes", "--quiet", "--snapshot", "--setactivationskip", "n", f"{group.name}/{origin}"]
    _compare(
        "warm thin disk",
        {
            "image.cache()": make,
            "lvcreate --snapshot": lambda number: _run([*bare, "--name", f"bare{number}"]),
        },
    )


def _thick(group: VolumeGroup, template: Path, device: str) -> None:
    group.create("target", _SIZE, (), Layout())
    target = group.device("target")

    def fill(number: int) -> None:
        with template.open("rb") as source:
            block_device.fill(source.fileno(), target, reads_as_zeros=True)

    options = ["-n", "-W", "-t", "none", "--target-is-zero", "-f", "raw", "-O", "raw"]
    _compare(
        f"filling a volume of {_SIZE // MIB} MiB with {_DATA // MIB} MiB of data",
        {
            "block_device.fill()": fill,
            "qemu-img convert": lambda number: _run(["qemu-img", "convert", *options, str(template), target]),
        },
        device,
    )


def _compare(title: str, sides: dict[str, Callable[[int], object]], device: str | None = None) -> None:
    """Give each side its turn in each round; show medians, and what was written to the device."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    written: dict[str, list[int]] = {name: [] for name in sides}
    for number in range(_ROUNDS):
        for name in sorted(sides, reverse=bool(number % 2)):
            os.sync()
            before, started = _written(device), time.monotonic()
            sides[name](number)
            seconds[name].append(time.monotonic() - started)
            written[name].append(_written(device) - before)
    lines = [f"{title}, median of {_ROUNDS} rounds (least, most)"]
    first = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        data = f", {statistics.median(written[name]) / MIB:.1f} MiB written" if device else ""
        spread = f"({min(values) * 1000:.0f}, {max(values) * 1000:.0f})"
        lines.append(f"  {name:22} {median * 1000:7.0f} ms {spread:16} {median / first:.2f} times ours{data}")
    sys.stdout.write("\n".join([*lines, "", ""]))


def _written(device: str | None) -> int:
    if device is None:
        return 0
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[6]) * 512


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
