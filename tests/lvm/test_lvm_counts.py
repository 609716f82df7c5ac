# SPDX-License-Identifier: Apache-2.0
"""What a disk in a volume group costs, in commands and in what is written to the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagebackend import process
from tests.contract.conftest import MIB, TEMPLATE_SIZE, LvmStore, open_store, template_content
from tests.lvm.volume_groups import group_on, loop_device

# What the template of the contract suite holds, in whole blocks.
DATA = MIB + 2 * 4096
# LVM's own: a change of the group's metadata, and of the pool's.
METADATA = MIB


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that this process runs."""
    ran: list[str] = []
    run = process.run

    def noted(command: list[str], **options: Any) -> process.Result:
        ran.append(command[0])
        return run(command, **options)

    monkeypatch.setattr(process, "run", noted)
    return ran


def written(device: str) -> int:
    """Return how many bytes were written to a device, by the kernel's own counter."""
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[6]) * 512


def opened(name: str, request: pytest.FixtureRequest, **options: Any) -> LvmStore:
    store = open_store(name, request)
    assert isinstance(store, LvmStore)
    for option, value in options.items():
        store.conf.set_override(option, value, group="libvirt")
    return store


def test_a_warm_thin_disk_takes_two_commands_and_no_data(
    request: pytest.FixtureRequest, commands: list[str], session_device: str
) -> None:
    store = opened("lvm-thin", request)
    store.make()
    commands.clear()
    before = written(session_device)

    store.make(disk_name="second")

    assert commands == ["dmsetup", "lvcreate"]
    assert written(session_device) - before <= METADATA


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda image: image.exists(), ["lvs"]),
        (lambda image: image.libvirt_info("virtio", "vda", "disk", "none", {}), ["lvs"]),
        (lambda image: image.get_disk_size(image.path), ["lvs"]),
        (lambda image: image.create_snap("one"), ["lvs", "lvcreate"]),
        (lambda image: image.resize_image(16 * MIB), ["lvs", "lvresize"]),
    ],
    ids=["exists", "describe", "size", "snapshot", "grow"],
)
def test_one_report_tells_everything(
    request: pytest.FixtureRequest, commands: list[str], act: Callable[..., object], expected: list[str]
) -> None:
    image = opened("lvm-thin", request).make()
    commands.clear()

    act(image)

    assert commands == expected


def test_filling_a_volume_moves_only_the_templates_data(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with loop_device(tmp_path / "device", 128 * MIB) as device, group_on("zeroed", device) as group:
        store = opened("lvm-thick", request, images_volume_group=group, images_volume_group_zeroed=True)
        before = written(device)
        image = store.image()
        image.cache(lambda target: store.run("cp", "--sparse=always", store.raw_template, target), "sparse", 64 * MIB)
        assert written(device) - before <= DATA + METADATA
        assert store.content(image)[-MIB:] == bytes(MIB)


def test_a_sparse_volume_has_a_pool_of_its_own_that_goes_with_it(request: pytest.FixtureRequest) -> None:
    store = opened("lvm-sparse", request)
    before = store.files()
    image = store.make(size=1 << 30)

    (pool,) = (volume for volume in store.group.report() if "+pool+" in volume.name)
    assert pool.size <= 80 * MIB
    assert DATA <= image.usage().used <= 2 * TEMPLATE_SIZE
    assert image.usage().provisioned == 1 << 30
    image.create_snap("one")
    store.write(image, 0, MIB, 7)
    image.rollback_to_snap("one")
    with Path(image.path).open("rb") as file:
        assert file.read(MIB) == template_content()[:MIB]

    image.remove()
    assert {name for name in store.files() - before if "+" in name or "disk" in name} == set()
