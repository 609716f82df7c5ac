# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark; see docs/benchmark.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from tests.bench import environment, fetch_figures, figures, peers, ploop_figures, rbd_figures, report

FIGURES = (*figures.FIGURES, *fetch_figures.FIGURES, *ploop_figures.FIGURES, *rbd_figures.FIGURES)

_LINES_OF_ERROR = 6


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, _stop)
    results = Results()
    load_before = os.getloadavg()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(environment.scratch_folder(options.folder))
        xfs = stack.enter_context(environment.xfs(folder, 8 << 30)) if os.geteuid() == 0 else None
        has_nova = os.path.exists(peers.interpreter("nova"))
        sides = ("own", "nova") if has_nova else ("own",)
        bench = figures.Bench(folder, xfs, options.rounds, options.quick, sides)
        facts = report.machine_facts(folder, xfs)
        wanted = [figure for figure in FIGURES if not options.only or figure.name in options.only]
        # What was measured is shown even if somebody has waited long enough.
        with contextlib.suppress(KeyboardInterrupt):
            results.measure(wanted, bench)
    facts["load"] = f"{_load(load_before)} before, {_load(os.getloadavg())} after; {options.rounds} rounds"
    sys.stdout.write(_text(facts, results))
    if options.json:
        content = {
            "facts": facts,
            "figures": [row.as_dict() for row in results.rows],
            "counts": [row.as_dict() for row in results.counted],
            "failures": results.failures,
        }
        with open(options.json, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
    return 1 if results.failures else 0


class Results:
    """What was measured.

    :ivar rows, counted: the figures.
    :ivar failures: by figure, what went wrong.
    """

    def __init__(self) -> None:
        self.rows: list[report.Row] = []
        self.counted: list[report.CountRow] = []
        self.failures: dict[str, str] = {}

    def measure(self, wanted: Sequence[figures.Figure], bench: figures.Bench) -> None:
        """Measure figures, one after another."""
        left = [figure.name for figure in wanted]
        try:
            for figure in wanted:
                sys.stderr.write(f"{figure.name}: {figure.about}\n")
                started = time.monotonic()
                self._measure(figure, bench)
                left.remove(figure.name)
                sys.stderr.write(f"{'':4}{time.monotonic() - started:.0f} s\n")
        except KeyboardInterrupt:
            self.failures |= dict.fromkeys(left, "stopped before it was measured")
            raise

    def _measure(self, figure: figures.Figure, bench: figures.Bench) -> None:
        try:
            found = figure.run(bench, figure.name)
        except Exception as error:  # the other figures are worth having
            self.failures[figure.name] = "\n".join(str(error).splitlines()[-_LINES_OF_ERROR:])
            return
        self.rows += [row for row in found if isinstance(row, report.Row)]
        self.counted += [row for row in found if isinstance(row, report.CountRow)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measure this project against Nova's own code and the bare tools, in the same rounds.",
        epilog="\n".join(f"{figure.name:20}{figure.about}" for figure in FIGURES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [figure.name for figure in FIGURES]
    parser.add_argument("--rounds", type=int, help="turns that each side has (default: 5; 2 with --quick)")
    parser.add_argument("--only", action="append", choices=names, metavar="FIGURE", help="can be given again")
    parser.add_argument("--quick", action="store_true", help="less of everything: only to see that it works")
    # Not /tmp, which may be in memory.
    parser.add_argument("--folder", default="/var/tmp", help="where the disks are made (default: /var/tmp)")
    parser.add_argument("--json", metavar="FILE", help="write every value of every round to a file as well")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


def _text(facts: dict[str, str], results: Results) -> str:
    lines = [f"{name + ':':22}{value}" for name, value in facts.items()]
    if "nova" not in facts:
        lines.append("Nova is not installed in .cache/nova: its figures are missing.")
    rows, counted = results.rows, results.counted
    if rows:
        lines += ["", report.table(rows)]
    commands = {f"{side}: {command}" for row in rows for side, command in row.commands.items()}
    lines += ["", *sorted(commands)] if commands else []
    if counted:
        lines += ["", report.count_table(counted)]
    if rows:
        lines += ["", report.target_table(rows)]
    lines += [f"\n{name} FAILED: {reason}" for name, reason in results.failures.items()]
    return "\n".join(lines) + "\n"


def _load(averages: tuple[float, float, float]) -> str:
    return " ".join(f"{average:.2f}" for average in averages)


def _stop(_signal: int, _frame: object) -> NoReturn:
    # As an exception, so that everything is removed on the way out.
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was made is removed")
