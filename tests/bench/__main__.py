# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark; see docs/benchmark.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from typing import NoReturn

from tests.bench import environment, figures, peers, rbd_figures, report

FIGURES = (*figures.FIGURES, *rbd_figures.FIGURES)

_LINES_OF_ERROR = 6


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, _stop)
    rows: list[report.Row] = []
    counted: list[report.CountRow] = []
    failures: dict[str, str] = {}
    load_before = os.getloadavg()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(environment.scratch_folder(options.folder))
        xfs = stack.enter_context(environment.xfs(folder, 8 << 30)) if os.geteuid() == 0 else None
        has_nova = os.path.exists(peers.interpreter("nova"))
        sides = ("own", "nova") if has_nova else ("own",)
        bench = figures.Bench(folder, xfs, options.rounds, options.quick, sides)
        facts = report.machine_facts(folder, xfs)
        for figure in FIGURES:
            if options.only and figure.name not in options.only:
                continue
            sys.stderr.write(f"{figure.name}: {figure.about}\n")
            try:
                found = figure.run(bench, figure.name)
                rows += [row for row in found if isinstance(row, report.Row)]
                counted += [row for row in found if isinstance(row, report.CountRow)]
            except Exception as error:  # the other figures are worth having
                failures[figure.name] = "\n".join(str(error).splitlines()[-_LINES_OF_ERROR:])
    facts["load"] = f"{_load(load_before)} before, {_load(os.getloadavg())} after; {options.rounds} rounds"
    sys.stdout.write(_text(facts, rows, counted, failures))
    if options.json:
        content = {
            "facts": facts,
            "figures": [row.as_dict() for row in rows],
            "counts": [row.as_dict() for row in counted],
            "failures": failures,
        }
        with open(options.json, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
    return 1 if failures else 0


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


def _text(
    facts: dict[str, str], rows: list[report.Row], counted: list[report.CountRow], failures: dict[str, str]
) -> str:
    lines = [f"{name + ':':22}{value}" for name, value in facts.items()]
    if "nova" not in facts:
        lines.append("Nova is not installed in .cache/nova: its figures are missing.")
    if rows:
        lines += ["", report.table(rows)]
    if counted:
        lines += ["", report.count_table(counted)]
    commands = {f"{side}: {command}" for row in rows for side, command in row.commands.items()}
    lines += ["", *sorted(commands)] if commands else []
    lines += [f"\n{name} FAILED: {reason}" for name, reason in failures.items()]
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
