# SPDX-License-Identifier: Apache-2.0
"""Thin pools that are full, of data and of metadata, and how space comes back to them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions, faults
from imagebackend.storage import device_mapper, lvm2
from imagebackend.storage.lvm2 import VolumeGroup
from tests.contract.conftest import MIB, TEMPLATE_SIZE, LvmStore, template_content
from tests.lvm.volume_groups import POOL, group_on, loop_device, run

GIB = 1 << 30


def pool_status(group: VolumeGroup, pool: str = POOL) -> device_mapper.PoolStatus:
    status = device_mapper.pool_status(f"{lvm2.device_name(group.name, pool)}-tpool")
    assert status is not None
    return status


def fill(device: str) -> None:
    """Write to a device until it takes no more."""
    command = ["dd", "if=/dev/zero", f"of={device}", "bs=4M", "oflag=direct"]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_pool_that_is_full_of_data_harms_nothing_and_serves_again_when_it_is_extended(
    opened: Callable[..., LvmStore], tmp_path: Path
) -> None:
    with loop_device(tmp_path / "device", 160 * MIB) as device, group_on("exhausted", device) as name:
        group = VolumeGroup(name, timeout=60)
        group.create_thin_pool("small", 32 * MIB)
        run("lvchange", "--errorwhenfull", "y", f"{name}/small")
        store = opened("lvm-thin", images_volume_group=name, images_thin_pool="small", images_thin_pool_data_limit=100)
        image = store.make()
        group.create_thin("small", "fat", 64 * MIB, ())
        before = {volume.name for volume in group.report()}

        faults.arm(lambda step: fill(group.device("fat")) if step == "template.copy.made" else None)
        try:
            with pytest.raises(exceptions.InsufficientSpace):
                store.image("other").cache(store.fetch, "another", 8 * MIB)
        finally:
            faults.arm(None)
        assert pool_status(group, "small").state.startswith("out_of_data_space")
        assert {volume.name for volume in group.report()} == before
        with pytest.raises(exceptions.InsufficientSpace, match=r"extend it \(lvextend\)"):
            store.make(disk_name="third")
        assert store.content(image)[:TEMPLATE_SIZE] == template_content()

        run("lvextend", "--size", "+64M", f"{name}/small")
        store.image("other").cache(store.fetch, "another", 8 * MIB)
        assert store.content(store.image("other"))[:TEMPLATE_SIZE] == template_content()
        image.remove()


@contextlib.contextmanager
def bottomless_device(path: Path, size: int) -> Iterator[str]:
    """Give a device that takes any data and keeps the first MiB of it, where LVM's label is."""
    kept = MIB // 512
    with loop_device(path, MIB) as device:
        table = f"0 {kept} linear {device} 0\n{kept} {size // 512 - kept} zero\n"
        subprocess.run(["dmsetup", "create", "bottomless"], input=table, text=True, check=True, capture_output=True)
        try:
            yield "/dev/mapper/bottomless"
        finally:
            run("dmsetup", "remove", "--retry", "bottomless")


def test_a_pool_that_is_full_of_metadata_takes_no_disk_and_loses_none(
    opened: Callable[..., LvmStore], tmp_path: Path
) -> None:
    with (
        loop_device(tmp_path / "device", 64 * MIB) as device,
        bottomless_device(tmp_path / "label", 8 * GIB) as bottomless,
        group_on("exhausted", device, bottomless) as name,
    ):
        group = VolumeGroup(name, timeout=60)
        # As small as LVM makes it: enough for about 100000 chunks.
        run("lvcreate", "--yes", "-qq", "--size", "2M", "--name", "metadata", name, device)
        run("lvcreate", "--yes", "-qq", "--size", "7G", "--name", "small", "--zero", "n", name, bottomless)
        words = ["--type", "thin-pool", "--poolmetadata", "metadata", "--chunksize", "64k", "--zero", "n"]
        run("lvconvert", "--yes", "-qq", *words, "--poolmetadataspare", "n", f"{name}/small")
        store = opened("lvm-thin", images_volume_group=name, images_thin_pool="small")
        image = store.image()
        image.create_from_func(lambda target: None, 4 * MIB)
        group.create_thin("small", "fat", 6 * GIB, ())
        group.create_thin("small", "fatter", GIB, ())
        fill(group.device("fat"))
        with pytest.raises(exceptions.InsufficientSpace, match=r"metadata space are used.*poolmetadatasize"):
            store.make(disk_name="second")

        before = {volume.name for volume in group.report()}
        fill(group.device("fatter"))
        with pytest.raises(exceptions.StorageError, match=r"state is .*Fail.*lvconvert --repair"):
            store.make(disk_name="second")
        with pytest.raises(exceptions.StorageError):
            image.create_snap("one")
        assert {volume.name for volume in group.report()} == before
        assert image.exists()


@pytest.mark.parametrize("encrypted", [False, True])
def test_what_a_guest_discards_comes_back_to_the_pool(
    opened: Callable[..., LvmStore], session_device: str, encrypted: bool
) -> None:
    store = opened("lvm-thin", hw_disk_discard="unmap")
    store.conf.set_override("enabled", encrypted, group="ephemeral_storage_encryption")
    image = store.image()
    image.create_from_func(lambda target: Path(target).write_bytes(b"x" * (8 * MIB)) and None, 8 * MIB)
    full, before = pool_status(store.group).data_used, discarded(session_device)

    run("blkdiscard", "--offset", MIB, "--length", 4 * MIB, store.qemu(image)[1])

    assert full - pool_status(store.group).data_used == 4 * MIB
    # And the pool passes them on to what it is on.
    assert discarded(session_device) - before == 4 * MIB


def discarded(device: str) -> int:
    """Return how many bytes of a device were discarded, by the kernel's own counter."""
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[13]) * 512
