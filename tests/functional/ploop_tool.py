# SPDX-License-Identifier: Apache-2.0
"""The real ploop(8), and QEMU's driver for its images, on disks without the kernel of OpenVZ."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

__all__ = ["check", "image_chain", "init", "ploop", "qemu_img", "qemu_io", "read"]

# 'ploop init' reads 4096 bytes from its first argument on, and needs as many on its stack.
_ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PLOOP_PAD": "0" * 4200}


def ploop(*arguments: object, success: tuple[int, ...] = (0,)) -> str:
    """Run ploop, and return what it said."""
    return _run("ploop", *arguments, success=success)


def init(folder: Path, size: int) -> Path:
    """Let ploop make a disk in a new folder, and return its image."""
    folder.mkdir()
    image = folder / "root.hds"
    ploop("init", "-v", "1", "-s", f"{size >> 10}K", "-t", "none", image)
    return image


def check(image: Path) -> None:
    """Let ploop and QEMU make sure that an image is sound; neither mends it."""
    before = image.stat().st_size
    said = ploop("check", "-f", image)
    assert "Hole at block" not in said, said
    assert image.stat().st_size == before, said
    qemu_img("check", "-f", "parallels", image)


def qemu_img(*arguments: object, success: tuple[int, ...] = (0,)) -> str:
    return _run("qemu-img", *arguments, success=success)


def qemu_io(image: Path, *commands: str) -> None:
    """Let QEMU write to an image as a guest would."""
    _run("qemu-io", "-f", "parallels", *(word for command in commands for word in ("-c", command)), image)


def image_chain(*images: Path) -> str:
    """Return how to name a disk of several deltas, the lowest first, to QEMU."""
    node: dict[str, object] = {}
    for image in images:
        node = {"driver": "parallels", "file": {"driver": "file", "filename": str(image)}} | (
            {"backing": node} if node else {}
        )
    return f"json:{json.dumps(node)}"


def read(target: Path, *images: Path) -> bytes:
    """Return what QEMU reads of a disk of one or several deltas, the lowest first."""
    qemu_img("convert", "-O", "raw", image_chain(*images), target)
    return target.read_bytes()


def _run(*command: object, success: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60, env=_ENVIRONMENT
    )
    assert done.returncode in success, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr
