# SPDX-License-Identifier: Apache-2.0
"""The limits of the ini file are those that qemu-img runs under, whatever it is run for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imagebackend import process
from tests.contract.conftest import MIB, Store

CPU_TIME, ADDRESS_SPACE, TIMEOUT = 21, 3, 600

EXTENDED = {"libvirt.images_qcow2_extended_l2": True}
PREALLOCATED = {"preallocate_images": "space"}


def grow_dirty(store: Store) -> None:
    """Grow a disk whose guest was killed while it had reference counts to write."""
    image = store.image()
    with open(image.path, "r+b") as file:
        file.seek(79)
        file.write(b"\x01")
    image.resize_image(16 * MIB)


def convert(store: Store) -> None:
    def fetch(target: str) -> None:
        store.run("qemu-img", "convert", "-f", "raw", "-O", "vdi", store.raw_template, target)

    store.backend.templates.fetch("converted", fetch)


@pytest.mark.parametrize(
    ("options", "act", "seconds"),
    [
        # What the image is, and none of its data.
        (EXTENDED, lambda store: store.make(disk_name="other"), [CPU_TIME]),
        ({}, lambda store: store.image().resize_image(16 * MIB), [CPU_TIME]),
        # As much work as there is data, or room to allocate.
        (PREALLOCATED, lambda store: store.make(disk_name="other"), [TIMEOUT]),
        (PREALLOCATED, lambda store: store.image().resize_image(16 * MIB), [TIMEOUT]),
        ({}, grow_dirty, [TIMEOUT]),
        ({}, lambda store: store.image().create_snap("one"), [TIMEOUT]),
        ({}, lambda store: store.image().flatten(), [TIMEOUT]),
        ({}, lambda store: store.image().snapshot_extract(str(store.sources / "out"), "vmdk"), [TIMEOUT] * 2),
        ({}, convert, [TIMEOUT] * 2),
    ],
    ids=[
        "create",
        "grow",
        "create allocated",
        "grow allocated",
        "grow dirty",
        "snapshot",
        "flatten",
        "extract",
        "convert",
    ],
)
def test_qemu_img_runs_within_the_limits_of_the_operator(
    options: dict[str, object],
    act: Callable[[Store], object],
    seconds: list[int],
    ext4_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = {
        "libvirt.images_cpu_time_limit": CPU_TIME,
        "libvirt.images_address_space_limit": ADDRESS_SPACE,
        "libvirt.images_tool_timeout": TIMEOUT,
    }
    store = Store(ext4_folder, "qcow2", {**options, **limits})
    store.make()
    told = tmp_path / "told"
    tool = tmp_path / "tools" / "qemu-img"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$(ulimit -t) $(ulimit -v)" >>"{told}"\nexec /usr/bin/qemu-img "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(process, "PATH", f"{tool.parent}:{process.PATH}")

    act(store)

    assert told.read_text().splitlines() == [f"{each} {ADDRESS_SPACE << 20}" for each in seconds]
