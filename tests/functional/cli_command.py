# SPDX-License-Identifier: Apache-2.0
"""The installed executable ``imagebackend``, on a configuration of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["EXECUTABLE", "MIB", "Command"]

EXECUTABLE = Path(sys.executable).with_name("imagebackend")
MIB = 1 << 20
_TIMEOUT = 120


class Command:
    """Runs the executable with everything in one folder.

    :ivar folder: a folder for the test's own files.
    :ivar instances: ``instances_path``.
    """

    def __init__(self, folder: Path, instances: Path | None = None) -> None:
        self.folder = folder
        self.instances = instances or folder / "instances"
        self.ini = folder / "imagebackend.conf"
        self.configure()

    def configure(self, *lines: str) -> None:
        """Write the configuration: where disks are, and lines after ``[DEFAULT]``."""
        self.ini.write_text("\n".join(["[DEFAULT]", f"instances_path = {self.instances}", *lines, ""]))

    def arguments(self, *words: object) -> list[str | bytes]:
        return [
            str(EXECUTABLE),
            "--config-file",
            str(self.ini),
            *(w if isinstance(w, bytes) else str(w) for w in words),
        ]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(*words), capture_output=True, text=True, timeout=_TIMEOUT, check=False, cwd=self.folder
        )

    def done(self, *words: object) -> str:
        """Run a command that succeeds; return what it prints."""
        finished = self.run(*words)
        assert finished.returncode == 0, finished
        return finished.stdout

    def json(self, *words: object) -> Any:
        """Run a command with ``--json`` that says nothing on stderr; return the document."""
        finished = self.run("--json", *words)
        assert finished.stderr == ""
        return json.loads(finished.stdout)

    @contextlib.contextmanager
    def started(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """Have a command run in the block, with pipes as its streams."""
        with subprocess.Popen(
            self.arguments(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def files(self) -> set[str]:
        """Everything under ``instances_path`` but lock files."""
        found = (path.relative_to(self.instances) for path in self.instances.rglob("*") if not path.is_dir())
        return {str(path) for path in found if path.parts[0] != "locks"}

    def image(self, name: str = "image.raw", size: int = 8 * MIB) -> Path:
        """A raw image, half of it data."""
        path = self.folder / name
        with path.open("wb") as file:
            file.write(os.urandom(size // 2))
            file.truncate(size)
        return path
