# SPDX-License-Identifier: Apache-2.0
"""What the figures look like: a table for people, dictionaries for JSON."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from tests.bench import peers
from tests.counting import Counts

__all__ = ["OWN", "CountRow", "Row", "count_table", "machine_facts", "progress", "table", "target_table"]

#: How this side is called in the results.
OWN = "imagebackend"


@dataclass(frozen=True)
class Row:
    """A figure: one value a round for each side.

    :ivar figure: the name by which ``--only`` chooses it.
    :ivar title: what was done.
    :ivar unit: of the values.
    :ivar values: by side; the values of one place in the lists are from the same round.
    :ivar targets: by side: how many times our value its value must be at least.
    :ivar limit: what our value must not exceed.
    :ivar commands: by side: what ran.
    :ivar cpu: by side: processor time, its child processes' too, in the same unit; noise bends it less.
    """

    figure: str
    title: str
    unit: str
    values: dict[str, list[float]]
    targets: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    commands: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, side: str) -> list[float]:
        """Return, for each round, how many times our value a side's value is."""
        return _ratios(self.values[OWN], self.values[side])

    def cpu_ratios(self, side: str) -> list[float]:
        """Return, for each round, how many times our processor time a side's is; none where it is not known."""
        return _ratios(self.cpu[OWN], self.cpu[side]) if self.cpu else []

    def is_met(self, side: str) -> bool | None:
        """Return whether a target against a side, or our own limit, is met; None if there is none."""
        if side == OWN:
            return None if self.limit is None else statistics.median(self.values[OWN]) <= self.limit
        target = self.targets.get(side)
        return None if target is None else statistics.median(self.ratios(side)) >= target

    def as_dict(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it."""
        sides = {}
        for side, values in self.values.items():
            sides[side] = {
                "values": values,
                "median": statistics.median(values),
                "ratios": None if side == OWN else self.ratios(side),
                "target": self.limit if side == OWN else self.targets.get(side),
                "met": self.is_met(side),
                "command": self.commands.get(side),
                "cpu": self.cpu.get(side),
                "cpu_ratios": None if side == OWN else self.cpu_ratios(side),
            }
        return {"figure": self.figure, "title": self.title, "unit": self.unit, "sides": sides}


@dataclass(frozen=True)
class CountRow:
    """What one operation of one side costs, whatever the clock says."""

    figure: str
    title: str
    side: str
    counts: Counts

    def as_dict(self) -> dict[str, Any]:
        """Return everything, as JSON can hold it."""
        counts = {**dataclasses.asdict(self.counts), "total": self.counts.total}
        return {"figure": self.figure, "title": self.title, "side": self.side, "counts": counts}


def table(rows: list[Row]) -> str:
    """Return the rows as a table: median (min..max) over the rounds."""
    lines = [("", "median (min..max)", "times ours", "target", "", "CPU", "times ours")]
    for row in rows:
        lines.append((f"{row.title} [{row.unit}]", "", "", "", "", "", ""))
        for side, values in row.values.items():
            ratio = "" if side == OWN else _spread(row.ratios(side))
            verdict = _VERDICTS[row.is_met(side)]
            cpu = _number(statistics.median(row.cpu[side])) if row.cpu else ""
            cpu_ratio = _number(statistics.median(row.cpu_ratios(side))) if row.cpu and side != OWN else ""
            lines.append((f"  {side}", _spread(values), ratio, _target(row, side), verdict, cpu, cpu_ratio))
    return _align(lines)


def count_table(rows: list[CountRow]) -> str:
    """Return the counts as a table."""
    lines: list[tuple[str, ...]] = [
        ("", "processes", "programs", "threads", "syncs", "system calls", "bytes written", "blocked locks")
    ]
    for row in rows:
        c = row.counts
        numbers = (c.processes, c.execs, c.threads, c.syncs, c.total, c.bytes_written, c.blocked_locks)
        lines.append((f"{row.title}, {row.side}", *map(str, numbers)))
    return _align(lines)


def target_table(rows: list[Row]) -> str:
    """Return every target with what was measured, one a line, and how many are met."""
    lines: list[tuple[str, ...]] = [("target", "against", "wanted", "measured", "")]
    for row in rows:
        for side in row.values:
            if row.is_met(side) is None:
                continue
            unit = row.unit.partition(" ")[0]
            wanted, measured = f"{_target(row, side)} {unit}", f"{_number(statistics.median(row.values[OWN]))} {unit}"
            if side != OWN:
                wanted, measured = _target(row, side), f"{_number(statistics.median(row.ratios(side)))}x"
            against = "" if side == OWN else side
            lines.append((row.title, against, wanted, measured, _VERDICTS[row.is_met(side)]))
    met = sum(line[-1] == _VERDICTS[True] for line in lines)
    return f"{_align(lines)}\n{met} of {len(lines) - 1} targets are met"


def machine_facts(folder: str, xfs: str | None) -> dict[str, str]:
    """Return what the figures depend on: the machine, the versions, the file systems."""
    uname = os.uname()
    facts = {
        "processor": f"{os.cpu_count()} x {_first_field('/proc/cpuinfo', 'model name')}",
        "memory": _first_field("/proc/meminfo", "MemTotal"),
        "kernel": f"{uname.sysname} {uname.release}",
        "file system": _file_system(folder),
        "reflink file system": _output("findmnt", "-no", "FSTYPE,OPTIONS", "-T", xfs) if xfs else "none",
        "qemu-img": _output("qemu-img", "--version").partition("\n")[0],
        "cp": _output("cp", "--version").partition("\n")[0],
        "nginx": _output("nginx", "-v"),
        "python": _output(peers.interpreter("own"), "-VV"),
        OWN: f"{metadata.version(OWN)} at {_output('git', '-C', peers.ROOT, 'describe', '--always', '--dirty')}",
    }
    nova = peers.interpreter("nova")
    if os.path.exists(nova):
        script = "import importlib.metadata, sys; print(importlib.metadata.version('nova'), 'on python', sys.version)"
        facts["nova"] = _output(nova, "-c", script)
    return facts


def progress(text: str) -> None:
    """Show on a terminal what is being done, over what was shown before; an empty text clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


_VERDICTS = {None: "", True: "met", False: "MISSED"}


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    # The clock of processor time ticks coarsely; what took less than a tick is not a ratio.
    return [their / our if our else float("nan") for our, their in zip(ours, theirs, strict=True)]


def _target(row: Row, side: str) -> str:
    if side == OWN:
        return "" if row.limit is None else f"<= {row.limit:g}"
    return f">= {row.targets[side]:g}x" if side in row.targets else ""


def _spread(values: list[float]) -> str:
    return f"{_number(statistics.median(values))} ({_number(min(values))}..{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _align(lines: Sequence[tuple[str, ...]]) -> str:
    # A title spans the columns that it leaves empty.
    widths = [max(len(line[column]) for line in lines if any(line[1:])) for column in range(len(lines[0]))]
    text = []
    for first, *others in lines:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(text)


def _file_system(folder: str) -> str:
    facts = _output("findmnt", "-no", "FSTYPE,SOURCE,OPTIONS", "-T", folder)
    kind, source, *_ = facts.split()
    journals = os.listdir("/proc/fs/jbd2") if os.path.exists("/proc/fs/jbd2") else []
    device = source.rpartition("/")[2]
    if kind == "ext4" and not any(journal.startswith(f"{device}-") for journal in journals):
        # Measured: creating a file takes 6 µs at first and 150 µs after a few hundred folders were made and removed;
        # with a journal, 6 µs always.
        facts += "; WITHOUT A JOURNAL: making files gets slower from round to round; choose another --folder"
    return facts


def _first_field(path: str, name: str) -> str:
    with open(path) as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith(name)), "unknown")


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip()
