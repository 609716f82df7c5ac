# SPDX-License-Identifier: Apache-2.0
"""Make disk images, and spoil them: each function returns what makes or changes one at a path."""

from __future__ import annotations

import contextlib
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from imagebackend import process

MIB = 1 << 20
Build = Callable[[Path], None]


def qemu_img(*arguments: str | Path) -> None:
    process.run(["qemu-img", *map(str, arguments)], timeout=60)


def qemu_io(path: Path, *commands: str) -> None:
    """Read and write what a guest sees of a qcow2 image."""
    words = [word for command in commands for word in ("-c", command)]
    said = process.run(["qemu-io", "-f", "qcow2", *words, str(path)], timeout=60).stdout
    assert "rror" not in said
    assert "ailed" not in said


@contextlib.contextmanager
def held(disk_format: str, path: str) -> Iterator[None]:
    """Have another process hold a disk as a running guest's QEMU does."""
    command = ["qemu-io", "-f", disk_format, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write("length\n")
        guest.stdin.flush()
        guest.stdout.readline()  # it answers when the disk is open
        try:
            yield
        finally:
            guest.stdin.close()
            guest.wait(timeout=30)


def make_disk(path: Path) -> None:
    """Write a raw disk of 8 MiB with data at its start and in its middle."""
    with path.open("wb") as disk:
        disk.write(bytes(range(256)) * 512)
        disk.seek(3 * MIB)
        disk.write(b"\xa5" * 200_000)
        disk.truncate(8 * MIB)


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes; a negative offset counts from the end."""
    with path.open("r+b") as image:
        image.seek(offset, 2 if offset < 0 else 0)
        image.write(content)


def converted(image_format: str, *options: str) -> Build:
    """Return what converts the disk of :func:`make_disk` with qemu-img."""

    def build(path: Path) -> None:
        source = path.with_name(path.name + ".source")
        make_disk(source)
        qemu_img("convert", "-f", "raw", "-O", image_format, *options, source, path)
        source.unlink()

    return build


def then(build: Build, *steps: Build) -> Build:
    def build_all(path: Path) -> None:
        for step in (build, *steps):
            step(path)

    return build_all


def put(offset: int, content: bytes) -> Build:
    return lambda path: patch(path, offset, content)


def number(offset: int, form: str, value: int) -> Build:
    return put(offset, struct.pack(form, value))


def content(whole: bytes, size: int = MIB) -> Build:
    return lambda path: _write(path, whole, size)


def _write(path: Path, whole: bytes, size: int) -> None:
    path.write_bytes(whole.ljust(size, b"\x00"))


def truncated(size: int) -> Build:
    def cut(path: Path) -> None:
        with path.open("r+b") as image:
            image.truncate(size if size >= 0 else path.stat().st_size + size)

    return cut
