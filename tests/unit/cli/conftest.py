# SPDX-License-Identifier: Apache-2.0
"""The command, run in this process on a configuration of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from imagebackend.cli.application import application

MIB = 1 << 20


class Command:
    """Runs ``imagebackend`` with everything in one folder.

    :ivar folder: a folder for the test's own files.
    :ivar instances: ``instances_path``.
    :ivar ini: the configuration file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.instances = folder / "instances"
        self.ini = folder / "imagebackend.conf"
        self.configure()

    def configure(self, *lines: str) -> None:
        """Write the configuration: where disks are, and lines after ``[DEFAULT]``."""
        self.ini.write_text("\n".join(["[DEFAULT]", f"instances_path = {self.instances}", *lines, ""]))

    def run(self, *words: object) -> Result:
        arguments = ["--config-file", str(self.ini), *map(str, words)]
        return CliRunner().invoke(application, arguments, catch_exceptions=False)

    def done(self, *words: object) -> str:
        """Run a command that succeeds; return what it prints."""
        result = self.run(*words)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: object) -> Any:
        """Run a command with ``--json`` that says nothing on stderr; return the document."""
        result = self.run("--json", *words)
        assert result.stderr == ""
        return json.loads(result.stdout)

    def raw_image(self, name: str = "image.raw", size: int = MIB) -> Path:
        path = self.folder / name
        path.write_bytes(b"data" * (size // 8) + bytes(size // 2))
        return path

    def files(self) -> set[str]:
        """Everything under ``instances_path`` but lock files."""
        found = (path.relative_to(self.instances) for path in self.instances.rglob("*") if path.is_file())
        return {str(path) for path in found if path.parts[0] != "locks"}


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)
