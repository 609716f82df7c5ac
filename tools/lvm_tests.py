# SPDX-License-Identifier: Apache-2.0
"""Run the tests that need device-mapper: here, or, where this kernel has none, in guests that do.

The tests are divided among as many guests as run side by side; each has one CPU. The JUnit reports are in .tox/lvm.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import linux_guest

__all__ = ["has_device_mapper", "main"]

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / ".tox" / "lvm"

_KILLED = "tests/lvm/test_lvm_killed.py"
_BOOT = "tests/lvm/boot"

#: What each guest runs, so that none takes much longer than the others; "boot" runs guests itself.
SHARES: dict[str, list[str]] = {
    "one": [_KILLED, "tests/contract", "--stores", "lvm-thin"],
    "two": [
        "tests/lvm",
        f"--ignore={_KILLED}",
        f"--ignore={_BOOT}",
        "tests/contract",
        "--stores",
        "lvm-thick,lvm-encrypted",
    ],
    "boot": [_BOOT],
}
_TIMEOUT = 2400.0
_NOTHING_SELECTED = 5


def main() -> int:
    """Run the tests with the arguments of this command, which are pytest's; return the exit status."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    for old in REPORTS.glob("*.xml"):
        old.unlink()
    guests = not has_device_mapper()
    with ThreadPoolExecutor(len(SHARES)) as threads:
        started = [threads.submit(_run, share, guests=guests) for share in SHARES]
        statuses = [each.result() for each in started]
    failed = [status for status in statuses if status not in (0, _NOTHING_SELECTED)]
    return failed[0] if failed else min(statuses)


def _run(share: str, *, guests: bool) -> int:
    report = REPORTS / f"{share}.xml"
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}"]
    command = [*pytest, *SHARES[share], *sys.argv[1:]]
    if not guests:
        return subprocess.run(command, check=False, cwd=ROOT, stdin=subprocess.DEVNULL).returncode
    runs_guests = share == "boot"
    memory = 2048 if runs_guests else 1024
    show = _prefixed(share)
    return linux_guest.run(
        command, shared=[REPORTS], memory=memory, nested=runs_guests, on_line=show, timeout=_TIMEOUT
    )


def _prefixed(share: str) -> Callable[[str], None]:
    def show(line: str) -> None:
        print(f"[{share}] {line}", flush=True)

    return show


def has_device_mapper() -> bool:
    """Return whether this kernel has device-mapper, and this process may use it."""
    try:
        command = ["dmsetup", "version"]
        asked = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except FileNotFoundError:
        return False
    return asked.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
