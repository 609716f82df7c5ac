# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with volumes: full pools, bad devices, groups that are gone, names and tags that are not ours."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagebackend import exceptions, faults
from imagebackend.images.base import Image
from imagebackend.images.lvm import Lvm
from imagebackend.storage.lvm2 import Layout, VolumeGroup
from tests.contract.conftest import MIB, TEMPLATE_SIZE, LvmStore, template_content
from tests.lvm import volume_groups
from tests.lvm.volume_groups import group_on, loop_device


def test_a_full_pool_takes_no_disk_and_says_what_to_do(opened: Callable[..., LvmStore]) -> None:
    store = opened("lvm-thin", images_thin_pool_data_limit=1)
    volume_groups.run("lvcreate", "--yes", "-qq", "-V", "64M", "--thinpool", f"{store.group.name}/pool", "-n", "fat")
    volume_groups.run("dd", "if=/dev/zero", f"of={store.group.device('fat')}", "bs=1M", "count=16", "oflag=direct")
    before = store.files()

    with pytest.raises(exceptions.InsufficientSpace, match=r"of its data space are used.*extend it \(lvextend\)"):
        store.make()
    assert store.files() - before <= {"_base"} | {name for name in store.files() if name.startswith("_base/")}

    store.conf.set_override("images_thin_pool_data_limit", 95, group="libvirt")
    store.conf.set_override("images_thin_pool_metadata_limit", 1, group="libvirt")
    with pytest.raises(exceptions.InsufficientSpace, match=r"of its metadata space are used.*poolmetadatasize"):
        store.make()
    assert not store.image().exists()


def test_a_group_that_is_too_small_is_left_as_it_was(opened: Callable[..., LvmStore]) -> None:
    store = opened("lvm-thick")
    before = {volume.name for volume in store.group.report()}

    with pytest.raises(exceptions.InsufficientSpace, match="extend it"):
        store.make(size=64 << 30)

    assert {volume.name for volume in store.group.report()} == before


def test_a_pool_is_made_if_that_is_wanted_and_is_missed_if_not(opened: Callable[..., LvmStore]) -> None:
    store = opened("lvm-thin", images_thin_pool="another")

    with pytest.raises(exceptions.InvalidConfiguration, match="there is no pool another"):
        store.make()
    store.conf.set_override("images_thin_pool_size", 1, group="libvirt")
    store.make()

    (pool,) = store.group.report("another")
    assert (pool.kind, pool.size) == ("thin-pool", 1 << 30)
    store.empty()


#: What the second half of a device does, as device-mapper's tables have it. What hangs goes on with the next table.
HALVES = {
    "works": "linear {0}",
    "fails": "error",
    "comes and goes": "flakey {0} 4 2",
    "hangs": "delay {0} 0 {0} 3600000 {0} 0",
}


@contextlib.contextmanager
def failing_group(tmp_path: Path) -> Iterator[tuple[VolumeGroup, Callable[[str], None]]]:
    """Give a volume group on a device, and what has the device's second half do one of :data:`HALVES`."""
    size, name = 256 * MIB, "failing"
    sectors, half = size // 512, size // 1024
    # LVM is not to take the loop device for the one that it lies on.
    offset = MIB // 512

    def load(how: str) -> None:
        rest = f"{half} {sectors - half} {HALVES[how].format(f'{device} {offset + half}')}"
        table = f"0 {half} linear {device} {offset}\n{rest}\n"
        subprocess.run(["dmsetup", "reload", name], input=table, text=True, check=True, capture_output=True)
        volume_groups.run("dmsetup", "resume", name)

    with loop_device(tmp_path / "failing", size + MIB) as device:
        volume_groups.run("dmsetup", "create", name, "--table", f"0 {sectors} linear {device} {offset}")
        try:
            with group_on("fails", f"/dev/mapper/{name}") as group_name:
                yield VolumeGroup(group_name, timeout=60), load
        finally:
            volume_groups.run("dmsetup", "remove", "--retry", name)


def test_devices_that_fail_while_a_disk_is_filled_or_cleared(opened: Callable[..., LvmStore], tmp_path: Path) -> None:
    with failing_group(tmp_path) as (group, load):
        store = opened("lvm-thick", images_volume_group=group.name)
        group.create("first-half", 124 * MIB, (), Layout())
        before = {volume.name for volume in group.report()}

        load("fails")
        with pytest.raises(exceptions.StorageError, match="Input/output error"):
            store.make(size=16 * MIB)
        assert {volume.name for volume in group.report()} == before

        load("works")
        image = store.make(size=16 * MIB)
        load("fails")
        with pytest.raises(exceptions.StorageError, match="Input/output error"):
            image.remove()
        # It is no disk any more, but nobody else gets what is on it.
        assert not image.exists()
        (left,) = {volume.name for volume in group.report()} - before
        assert "+removed+" in left

        load("works")
        assert Lvm.sweep_disks(store.conf) == [left]
        assert {volume.name for volume in group.report()} == before


def test_a_device_that_comes_and_goes_fails_calls_and_harms_no_disk(
    opened: Callable[..., LvmStore], tmp_path: Path
) -> None:
    def wait_for_failure(step: str) -> None:
        if step in ("disk.create.made", "disk.resize.changed"):
            faults.arm(None)
            while reads("/dev/mapper/failing", 255 * MIB):
                pass

    def repeat(act: Callable[[], object], left: set[str]) -> None:
        """Do ``act`` until the device works for long enough; the first time, it goes away in between."""
        faults.arm(wait_for_failure)
        for _ in range(10):
            try:
                act()
                return
            except exceptions.StorageError:
                assert {volume.name for volume in group.report()} == left
        pytest.fail("the device never worked for long enough")

    with failing_group(tmp_path) as (group, load):
        store = opened("lvm-thick", images_volume_group=group.name)
        group.create("first-half", 124 * MIB, (), Layout())
        load("comes and goes")
        repeat(lambda: store.make(size=8 * MIB), {"first-half"})
        image = store.image()
        repeat(lambda: image.resize_image(16 * MIB), {"first-half", Path(image.path).name})
        load("works")

        content = template_content()
        assert store.content(image) == content + bytes(16 * MIB - len(content))
        image.remove()
        assert [volume.name for volume in group.report()] == ["first-half"]


def reads(device: str, offset: int) -> bool:
    """Return whether a device can be read, past what the kernel remembers of it."""
    descriptor = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        return bool(os.preadv(descriptor, [mmap.mmap(-1, 4096)], offset))
    except OSError:
        return False
    finally:
        os.close(descriptor)


def test_nobody_waits_for_a_removed_volume_to_be_cleared(opened: Callable[..., LvmStore], tmp_path: Path) -> None:
    def being_cleared() -> list[bool]:
        return [volume.open for volume in group.report() if "+removed+" in volume.name]

    with failing_group(tmp_path) as (group, load), ThreadPoolExecutor(1) as threads:
        store = opened("lvm-thick", images_volume_group=group.name)
        group.create("first-half", 124 * MIB, (), Layout())
        image = store.make(size=8 * MIB)
        # All that is free from here on works.
        volume_groups.run("lvcreate", "--yes", "-qq", "-Zn", "-Wn", "-l", "100%FREE", "-n", "rest", group.name)
        group.remove("first-half")
        load("hangs")
        try:
            removal = threads.submit(image.remove)
            while not any(being_cleared()):
                assert not removal.done()

            store.make(size=8 * MIB)
            store.make(disk_name="other").remove()
            assert store.content(store.image())[:TEMPLATE_SIZE] == template_content()
            assert being_cleared() == [True]
        finally:
            load("works")
        removal.result()
        assert being_cleared() == []
        assert image.exists()


def test_a_device_that_fails_while_a_template_is_copied_into_a_pool(
    opened: Callable[..., LvmStore], tmp_path: Path
) -> None:
    with failing_group(tmp_path) as (group, load):
        # The metadata where nothing fails, the data where everything does.
        device = "/dev/mapper/failing"
        volume_groups.run("lvcreate", "--yes", "-qq", "-L", "4M", "-n", "metadata", group.name, f"{device}:0-8")
        volume_groups.run("lvcreate", "--yes", "-qq", "-L", "64M", "-n", "thin", group.name, f"{device}:140-210")
        words = ["--type", "thin-pool", "--poolmetadata", "metadata", f"{group.name}/thin"]
        volume_groups.run("lvconvert", "--yes", "-qq", *words)
        store = opened("lvm-thin", images_volume_group=group.name, images_thin_pool="thin")

        load("fails")
        with pytest.raises(exceptions.StorageError, match="Input/output error"):
            store.make()
        assert [volume.kind for volume in group.report()] == ["thin-pool"]

        load("works")
        assert store.content(store.make())[:TEMPLATE_SIZE] == template_content()
        store.image().remove()


def test_a_group_that_is_renamed_is_found_by_its_new_name(opened: Callable[..., LvmStore], tmp_path: Path) -> None:
    store = opened("lvm-thick")
    with loop_device(tmp_path / "device", 64 * MIB) as device, group_on("before", device) as name:
        store.conf.set_override("images_volume_group", name, group="libvirt")
        image = store.make()
        volume_groups.run("vgrename", name, "after")
        try:
            for act in (image.exists, image.remove, lambda: image.libvirt_info("virtio", "vda", "disk", "none", {})):
                with pytest.raises(exceptions.InvalidConfiguration, match="no volume group before"):
                    act()
            store.conf.set_override("images_volume_group", "after", group="libvirt")
            renamed = store.image()
            assert renamed.path == image.path.replace("before", "after")
            assert store.content(renamed)[:TEMPLATE_SIZE] == template_content()
            renamed.resize_image(16 * MIB)
            renamed.remove()
            assert not renamed.exists()
        finally:
            volume_groups.run("vgrename", "after", name)


def test_groups_that_are_missing_or_lack_a_device(opened: Callable[..., LvmStore], tmp_path: Path) -> None:
    store = opened("lvm-thick", images_volume_group="nosuchgroup")
    for act in (store.make, store.image().remove, store.image().exists):
        with pytest.raises(exceptions.InvalidConfiguration, match="there is no volume group nosuchgroup"):
            act()

    with (
        loop_device(tmp_path / "one", 64 * MIB) as one,
        loop_device(tmp_path / "two", 64 * MIB) as two,
        group_on("halved", one, two) as group,
    ):
        store.conf.set_override("images_volume_group", group, group="libvirt")
        image = store.make(size=100 * MIB)
        volume_groups.run("lvchange", "--activate", "n", f"{group}/{Path(image.path).name}")
        volume_groups.run("losetup", "--detach", two)

        with pytest.raises(exceptions.StorageError, match=r"missing|[Rr]efusing|partial"):
            image.libvirt_info("virtio", "vda", "disk", "none", {})
        with pytest.raises(exceptions.StorageError, match="missing"):
            image.remove()
        assert image.exists()

        volume_groups.run("losetup", two, tmp_path / "two")
        image.libvirt_info("virtio", "vda", "disk", "none", {})
        assert store.content(image)[:TEMPLATE_SIZE] == template_content()


def test_processes_that_race_for_one_disk_make_it_once(opened: Callable[..., LvmStore]) -> None:
    store = opened("lvm-thin")
    store.backend.templates.fetch("template", store.fetch)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                store.make()
                code = 0
            finally:
                os._exit(code)
        children.append(child)

    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert store.content(store.image())[:TEMPLATE_SIZE] == template_content()
    assert len([volume for volume in store.group.report() if volume.kind == "thin"]) == 2  # with the template


def test_a_template_that_left_the_cache_harms_no_disk_and_serves_more(opened: Callable[..., LvmStore]) -> None:
    store = opened("lvm-thin")
    image = store.make()
    store.backend.templates.remove("template")

    other = store.make(disk_name="other", size=16 * MIB)
    with pytest.raises(exceptions.DiskTooSmall):
        store.make(disk_name="third", size=4 * MIB)

    assert len(store.fetches) == 1
    for each in (image, other):
        assert store.content(each)[:TEMPLATE_SIZE] == template_content()


def test_what_another_program_made_is_found_and_left_alone(opened: Callable[..., LvmStore]) -> None:
    store = opened("lvm-thick")
    image = store.image("disk_config")
    name = f"{image.instance}_disk__config"
    store.group.create(name, MIB, (), Layout())
    Path(image.path).write_bytes(b"nova" * 256)

    assert image.exists()
    assert ("5a3c2b1e-0000-4000-8000-000000000001", "disk_config") in Lvm.stored(store.conf)
    image.libvirt_info("virtio", "vda", "disk", "none", {})
    for act in (image.remove, lambda: image.import_file(image.instance, str(store.raw_template), "disk_config")):
        with pytest.raises(exceptions.StorageError, match="hand it over with 'lvchange --addtag"):
            act()
    assert Path(image.path).read_bytes()[:1024] == b"nova" * 256

    with pytest.raises(exceptions.StorageError) as caught:
        image.remove()
    volume_groups.run(*str(caught.value).partition("'")[2].partition("'")[0].split())
    image.remove()
    assert not image.exists()


@pytest.mark.parametrize(
    ("how", "size", "left"),
    [
        ("zero", 0, bytes(4 * MIB)),
        ("zero", 1, bytes(MIB) + b"x" * (3 * MIB)),
        ("shred", 0, None),
        ("discard", 0, bytes(4 * MIB)),
        ("none", 0, b"x" * (4 * MIB)),
    ],
)
def test_a_removed_volume_is_cleared_as_the_operator_wants(
    opened: Callable[..., LvmStore], tmp_path: Path, how: str, size: int, left: bytes | None
) -> None:
    store = opened("lvm-thick", volume_clear=how, volume_clear_size=size)
    with (
        loop_device(tmp_path / "device", 64 * MIB) as device,
        group_on(f"cleared{os.getpid()}", device) as group,
    ):
        store.conf.set_override("images_volume_group", group, group="libvirt")
        image: Image = store.image()
        image.create_from_func(lambda target: Path(target).write_bytes(b"x" * (4 * MIB)) and None, 4 * MIB)
        image.remove()
        volume_groups.run("lvcreate", "--yes", "-qq", "-Zn", "-Wn", "-L", "4M", "-n", "next", group)
        found = Path(f"/dev/{group}/next").read_bytes()

    assert found == left if left is not None else b"x" * 512 not in found
