# SPDX-License-Identifier: Apache-2.0
"""A source that another package adds: the one of docs/backends.md, installed by pip, used by the executable."""

from __future__ import annotations

import configparser
import hashlib
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.functional.cli_command import MIB, Command

DOCUMENT = Path(__file__).parents[2] / "docs" / "backends.md"
CONTENT = random.Random(6).randbytes(MIB) + bytes(2 * MIB)


def wheel(folder: Path) -> Path:
    """What a build of the documented package would leave."""
    text = DOCUMENT.read_text().partition("## Adding a source")[2]
    [options, module] = re.findall(r"```(?:ini|python)\n(.*?)```", text, re.DOTALL)
    configuration = configparser.ConfigParser()
    configuration.read_string(options)
    [(group, points)] = configuration["options.entry_points"].items()
    path = folder / "zip_source-1-py3-none-any.whl"
    files = {
        "zip_source.py": module,
        "zip_source-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: zip-source\nVersion: 1\n",
        "zip_source-1.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "zip_source-1.dist-info/entry_points.txt": f"[{group}]{points}\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr("zip_source-1.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", folder / "site", wheel(folder)], check=True, timeout=120)
    return folder / "site"


@pytest.fixture
def command(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    return Command(tmp_path)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("debian.raw", CONTENT)
    return path


def test_is_used_by_the_executable(command: Command, archive: Path) -> None:
    url = f"zip:{archive}!debian.raw"
    digest = hashlib.sha256(CONTENT).hexdigest()
    command.done("template", "pull", "--name", "debian", "--checksum", f"sha256:{digest}", url)
    shown = command.json("template", "show", "debian")
    assert (shown["source"], shown["sha256"], shown["size"]) == (url, digest, len(CONTENT))
    assert Path(shown["path"]).stat().st_blocks * 512 < 2 * MIB
    command.done("disk", "create", "guest", "disk", "--template", "debian")
    assert "is up to date" in command.done("template", "pull", "--name", "debian", "--policy", "newer", url)


@pytest.mark.parametrize(
    ("url", "checksum", "status", "reason"),
    [
        ("zip:{}!absent", None, 1, "the archive has no such member"),
        ("zip:{}.gone!debian.raw", None, 1, "No such file"),
        ("zip:{}!debian.raw", "sha256:" + "0" * 64, 1, "sha256 is"),
        ("zip:{}", None, 2, "is needed"),
        ("zap:{}!debian.raw", None, 2, "known are file, glance, http, https, rbd, zip"),
    ],
)
def test_its_errors_are_those_of_any_source(
    command: Command, archive: Path, url: str, checksum: str | None, status: int, reason: str
) -> None:
    options = ["--checksum", checksum] if checksum else []
    finished = command.run("template", "pull", "--name", "debian", *options, url.format(archive))
    assert finished.returncode == status
    assert reason in finished.stderr
    assert "Traceback" not in finished.stderr
    assert command.files() == set()


def test_a_damaged_archive(command: Command, archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    content[MIB // 2] ^= 1
    archive.write_bytes(content)
    finished = command.run("template", "pull", "--name", "debian", f"zip:{archive}!debian.raw")
    assert finished.returncode == 1
    assert "CRC" in finished.stderr
    assert command.files() == set()
