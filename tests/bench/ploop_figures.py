# SPDX-License-Identifier: Apache-2.0
"""The figures of ploop disks: where files share blocks, and where they are copied."""

from __future__ import annotations

import functools
import shutil
import subprocess
import uuid

from tests.bench import peers
from tests.bench.figures import Bench, Contender, CountRow, Figure, Row, copy, creators, row, sync_file
from tests.bench.worker import Timing

__all__ = ["FIGURES"]

_MIB = 1 << 20
_SPARSE, _REFLINK = "cp --sparse=always, fdatasync", "cp --reflink=always, fdatasync"
_NO_REFLINK = "cp --reflink=never --sparse=always, fdatasync"
_TOOLS = "ploop init, qemu-img convert, fdatasync"
# 'ploop init' reads 4096 bytes from its first argument on, and needs as many on its stack.
_SCRIPT = """
export PLOOP_PAD=$(printf %04200d 0)
mkdir "$2"
ploop init -v 1 -s "$3" -t none "$2/root.hds" >/dev/null
qemu-img convert -n --target-is-zero -f raw -O parallels "$1" "$2/root.hds"
"""
_COMMANDS = {
    _SPARSE: "cp --sparse=always TEMPLATE DISK, then fdatasync(2): a raw disk; on XFS it shares blocks by itself",
    _NO_REFLINK: "cp --reflink=never --sparse=always TEMPLATE DISK, then fdatasync(2): a raw disk",
    _REFLINK: "cp --reflink=always TEMPLATE DISK, then fdatasync(2): a raw disk",
    _TOOLS: "ploop init DISK; qemu-img convert -n --target-is-zero -O parallels TEMPLATE DISK; then fdatasync(2)",
}


def disks(bench: Bench, figure: str) -> list[Row | CountRow]:
    rows: list[Row | CountRow] = []
    for place, count in ((bench.folder, 1), (bench.xfs, 2 if bench.quick else 5)):
        if place is None:
            continue
        kind = subprocess.check_output(["findmnt", "-no", "FSTYPE", "-T", place], text=True).strip()
        source = f"{place}/source.raw"
        subprocess.run(["cp", "--sparse=always", bench.template, source], check=True)
        contenders: dict[str, Contender] = {
            _SPARSE: functools.partial(copy, source, count, ["cp", "--sparse=always"], sync_file),
            _TOOLS: functools.partial(_by_tools, source, count, bench.virtual_size),
        }
        if place == bench.xfs:
            contenders[_REFLINK] = functools.partial(copy, source, count, ["cp", "--reflink=always"], sync_file)
            never = ["cp", "--reflink=never", "--sparse=always"]
            contenders[_NO_REFLINK] = functools.partial(copy, source, count, never, sync_file)
        with bench.workers("ploop", place) as workers:
            own = {"own": workers["own"]}  # Nova's ploop disks need the kernel of OpenVZ
            bench.adopt(workers["own"], bench.template)
            contenders = {**creators(bench, own, count), **contenders}
            title = f"warm ploop disk on {kind}, {bench.data_size // _MIB} MiB of data, {count} in turn"
            results = bench.interleave(title, contenders)
        subprocess.run(["rm", source], check=True)
        commands = {name: text for name, text in _COMMANDS.items() if name in contenders}
        targets = {_NO_REFLINK: 3.0} if place == bench.xfs else {_SPARSE: 0.8}
        rows.append(row(figure, title, "ms a disk", results, targets, commands=commands))
    return rows


FIGURES = (
    Figure("ploop", "ploop disks from a cached template, on the scratch folder's file system and on XFS", disks),
)


def _by_tools(source: str, count: int, size: int) -> Timing:
    folders = [f"{source}.ploop-{uuid.uuid4()}" for _ in range(count)]
    commands = [["sh", "-euc", _SCRIPT, "sh", source, folder, f"{size >> 10}K"] for folder in folders]
    timing = peers.run_tool(commands, lambda number: sync_file(f"{folders[number]}/root.hds"))
    for folder in folders:
        shutil.rmtree(folder)
    return timing
