# SPDX-License-Identifier: Apache-2.0
"""qemu_img with the real qemu-img."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagebackend import exceptions, process
from imagebackend.storage import image_lock, qemu_img

MIB = 1 << 20
LIMITS = process.Limits(cpu_time=30, address_space=4 << 30)
RUN: dict[str, Any] = {"timeout": 60, "limits": LIMITS}

AWKWARD_NAMES = [
    "plain",
    "with,comma",
    "with,file.driver=nbd",
    "with:colon",
    "rbd:pool",
    "json:{}",
    "-h",
    "--help",
    "new\nline",
    "with space",
    "per%cent",
    os.fsdecode(b"\xff\xfe"),
    "x" * 200,
]


def qemu_io(path: Path, disk_format: str, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", "-f", disk_format, *words, str(path)], check=True, capture_output=True)


def info(path: Path, disk_format: str) -> dict[str, Any]:
    command = ["qemu-img", "info", "--output=json", "-f", disk_format, str(path)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def snapshot_names(path: Path) -> list[str]:
    return [snapshot["name"] for snapshot in info(path, "qcow2").get("snapshots", [])]


def qcow2(path: Path, *commands: str, size: int = 4 * MIB) -> Path:
    qemu_img.create(str(path), "qcow2", size, **RUN)
    if commands:
        qemu_io(path, "qcow2", *commands)
    return path


def test_version() -> None:
    assert qemu_img.version() >= (7, 0)


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_every_command_takes_any_name(tmp_path: Path, name: str) -> None:
    image, raw, overlay = tmp_path / name, tmp_path / f"{name}.raw", tmp_path / f"{name}.overlay"
    qemu_img.create(str(image), "qcow2", MIB, **RUN)
    qemu_img.snapshot_create(str(image), "one", **RUN)
    qemu_img.resize(str(image), "qcow2", 2 * MIB, **RUN)
    qemu_img.snapshot_delete(str(image), "one", **RUN)
    assert qemu_img.check(str(image), "qcow2", **RUN) == qemu_img.CheckResult(leaks=0, corruptions=0)
    qemu_img.create(str(overlay), "qcow2", 2 * MIB, backing_file=str(image), backing_format="qcow2", **RUN)
    qemu_img.rebase(str(overlay), "qcow2", str(image), "qcow2", unsafe=True, **RUN)
    qemu_img.rebase(str(overlay), "qcow2", None, None, **RUN)
    qemu_img.convert(str(image), "qcow2", str(raw), "raw", **RUN)
    qemu_img.compare(str(overlay), "qcow2", str(raw), "raw", **RUN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([image.name, raw.name, overlay.name])


def test_relative_paths_are_those_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qemu_img.create("-f", "qcow2", MIB, **RUN)
    assert info(tmp_path / "-f", "qcow2")["virtual-size"] == MIB


def test_create_with_options(tmp_path: Path) -> None:
    options = {"cluster_size": "16384", "extended_l2": "on", "lazy_refcounts": "on", "compression_type": "zstd"}
    qemu_img.create(str(tmp_path / "disk"), "qcow2", MIB, options=options, **RUN)
    found = info(tmp_path / "disk", "qcow2")
    assert found["cluster-size"] == 16384
    specific = found["format-specific"]["data"]
    assert (specific["extended-l2"], specific["lazy-refcounts"], specific["compression-type"]) == (True, True, "zstd")


@pytest.mark.parametrize(
    "option", ["backing_file", "data_file", "encrypt.format", "size", "preallocation,backing_file"]
)
def test_options_that_do_more_than_layout_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="not among"):
        qemu_img.create(str(tmp_path / "disk"), "qcow2", MIB, options={option: "x"}, **RUN)
    assert not (tmp_path / "disk").exists()


def test_a_comma_in_a_value_injects_nothing(tmp_path: Path) -> None:
    with pytest.raises(exceptions.ToolFailed, match=r"does not accept value '1\.1,data_file=/tmp/x'"):
        qemu_img.create(str(tmp_path / "disk"), "qcow2", MIB, options={"compat": "1.1,data_file=/tmp/x"}, **RUN)


def test_overlay_needs_the_format_of_its_backing_file(tmp_path: Path) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="format"):
        qemu_img.create(str(tmp_path / "disk"), "qcow2", MIB, backing_file="/x", **RUN)


def test_convert_keeps_the_inode_the_mode_and_holes(tmp_path: Path) -> None:
    source = qcow2(tmp_path / "source", "write -P 7 1M 64k", size=64 * MIB)
    target = tmp_path / "target"
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        qemu_img.convert(str(source), "qcow2", str(target), "raw", **RUN)
        assert os.fstat(descriptor).st_size == 64 * MIB
        assert os.pread(descriptor, 65536, MIB) == b"\x07" * 65536
        os.fdatasync(descriptor)
        assert os.fstat(descriptor).st_blocks * 512 < MIB
        assert target.stat().st_ino == os.fstat(descriptor).st_ino
        assert target.stat().st_mode & 0o777 == 0o600
    finally:
        os.close(descriptor)


def test_convert_flattens_and_compresses(tmp_path: Path) -> None:
    base = qcow2(tmp_path / "base", "write -P 1 0 1M")
    overlay = tmp_path / "overlay"
    qemu_img.create(str(overlay), "qcow2", 4 * MIB, backing_file=str(base), backing_format="qcow2", **RUN)
    qemu_io(overlay, "qcow2", "write -P 2 2M 1M")
    options = {"compression_type": "zstd"}
    qemu_img.convert(
        str(overlay),
        "qcow2",
        str(tmp_path / "out"),
        "qcow2",
        compress=True,
        options=options,
        timeout=60,
        limits=LIMITS,
    )
    assert "backing-filename" not in info(tmp_path / "out", "qcow2")
    assert (tmp_path / "out").stat().st_size < MIB
    qemu_img.compare(str(overlay), "qcow2", str(tmp_path / "out"), "qcow2", **RUN)


def test_convert_into_a_target_of_zeros(tmp_path: Path) -> None:
    source = qcow2(tmp_path / "source", "write -P 7 1M 64k")
    target = tmp_path / "target"
    with target.open("wb") as file:
        file.truncate(8 * MIB)
    qemu_img.convert(str(source), "qcow2", str(target), "raw", target_is_zero=True, **RUN)
    assert target.stat().st_size == 8 * MIB
    qemu_img.compare(str(source), "qcow2", str(target), "raw", **RUN)


@pytest.mark.parametrize("folder", ["ext4_folder", "xfs_folder", "btrfs_folder", "small_tmpfs"])
def test_convert_on_file_systems(request: pytest.FixtureRequest, folder: str, tmp_path: Path) -> None:
    source = qcow2(tmp_path / "source", "write -P 7 1M 64k")
    target = Path(request.getfixturevalue(folder)) / "target"
    qemu_img.convert(str(source), "qcow2", str(target), "raw", **RUN)
    qemu_img.compare(str(source), "qcow2", str(target), "raw", **RUN)


def test_progress_grows_to_the_end(tmp_path: Path) -> None:
    source = qcow2(tmp_path / "source", "write -P 7 0 32M", size=32 * MIB)
    total = source.stat().st_size
    for run in (
        lambda progress: qemu_img.convert(
            str(source), "qcow2", str(tmp_path / "target"), "raw", progress=progress, timeout=60
        ),
        lambda progress: qemu_img.compare(
            str(source), "qcow2", str(tmp_path / "target"), "raw", progress=progress, timeout=60
        ),
    ):
        seen: list[tuple[int, int]] = []
        run(lambda done, size, seen=seen: seen.append((done, size)))
        assert seen[0] == (0, total)
        assert seen[-1] == (total, total)
        assert seen == sorted(seen)
        assert len(seen) > 5


def test_progress_cancels(tmp_path: Path) -> None:
    source = qcow2(tmp_path / "source", "write -P 7 0 32M", size=32 * MIB)

    def cancel(done: int, size: int) -> None:
        if done:
            raise exceptions.Cancelled("enough")

    with pytest.raises(exceptions.Cancelled):
        qemu_img.convert(str(source), "qcow2", str(tmp_path / "target"), "raw", progress=cancel, timeout=60)
    assert not image_lock.is_in_use(str(tmp_path / "target"))


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_convert_to_a_full_file_system(tmp_path: Path, small_tmpfs: Path, target_format: str) -> None:
    source = qcow2(tmp_path / "source", "write -P 7 0 32M", size=32 * MIB)
    with pytest.raises(exceptions.InsufficientSpace):
        qemu_img.convert(str(source), "qcow2", str(small_tmpfs / "target"), target_format, **RUN)


def test_limits_reach_qemu_img(tmp_path: Path) -> None:
    source = qcow2(tmp_path / "source")
    limits = process.Limits(cpu_time=30, address_space=16 * MIB)
    with pytest.raises(exceptions.ToolFailed):
        qemu_img.convert(str(source), "qcow2", str(tmp_path / "target"), "raw", timeout=60, limits=limits)


def test_an_absent_or_wrong_image_is_an_error(tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    with pytest.raises(exceptions.ToolFailed, match="No such file"):
        qemu_img.convert(str(tmp_path / "absent"), "raw", target, "raw", **RUN)
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with pytest.raises(exceptions.ToolFailed, match="not in qcow2 format"):
        qemu_img.convert(str(tmp_path / "raw"), "qcow2", target, "raw", **RUN)
    with pytest.raises(exceptions.StorageError, match="absent"):
        qemu_img.convert(str(tmp_path / "absent"), "raw", target, "raw", progress=lambda *_: None, timeout=60)


def test_compare_raises_on_a_difference(tmp_path: Path) -> None:
    first = qcow2(tmp_path / "first", "write -P 1 0 64k")
    second = qcow2(tmp_path / "second", "write -P 1 0 64k", "write -P 2 1M 1k")
    longer = qcow2(tmp_path / "longer", "write -P 1 0 64k", size=5 * MIB)
    qemu_img.compare(str(first), "qcow2", str(longer), "qcow2", **RUN)
    with pytest.raises(exceptions.CorruptDisk) as raised:
        qemu_img.compare(str(first), "qcow2", str(second), "qcow2", **RUN)
    assert raised.value.path == str(second)
    qemu_io(longer, "qcow2", "write -P 3 4M 1k")
    with pytest.raises(exceptions.CorruptDisk):
        qemu_img.compare(str(first), "qcow2", str(longer), "qcow2", **RUN)


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_resize_grows_and_never_shrinks(tmp_path: Path, disk_format: str) -> None:
    disk = tmp_path / "disk"
    qemu_img.create(str(disk), disk_format, MIB, **RUN)
    qemu_img.resize(str(disk), disk_format, 3 * MIB, preallocation="full", **RUN)
    assert info(disk, disk_format)["virtual-size"] == 3 * MIB
    assert disk.stat().st_blocks * 512 >= 2 * MIB
    with pytest.raises(exceptions.ToolFailed, match="shrink"):
        qemu_img.resize(str(disk), disk_format, 2 * MIB, **RUN)
    assert info(disk, disk_format)["virtual-size"] == 3 * MIB


def test_raw_is_not_probed(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "disk")
    size = disk.stat().st_size
    qemu_img.resize(str(disk), "raw", 8 * MIB, **RUN)
    assert disk.stat().st_size == 8 * MIB
    assert size < 8 * MIB


def test_rebase_keeps_the_content(tmp_path: Path) -> None:
    old = qcow2(tmp_path / "old", "write -P 1 0 1M")
    new = qcow2(tmp_path / "new", "write -P 2 1M 1M")
    overlay, expected = tmp_path / "overlay", tmp_path / "expected"
    qemu_img.create(str(overlay), "qcow2", 4 * MIB, backing_file=str(old), backing_format="qcow2", **RUN)
    qemu_img.convert(str(overlay), "qcow2", str(expected), "raw", **RUN)
    seen: list[int] = []
    qemu_img.rebase(
        str(overlay), "qcow2", str(new), "qcow2", progress=lambda done, size: seen.append(size - done), timeout=60
    )
    assert seen[-1] == 0
    assert info(overlay, "qcow2")["backing-filename"] == str(new)
    qemu_img.compare(str(expected), "raw", str(overlay), "qcow2", **RUN)
    qemu_img.rebase(str(overlay), "qcow2", None, None, **RUN)
    assert "backing-filename" not in info(overlay, "qcow2")
    qemu_img.compare(str(expected), "raw", str(overlay), "qcow2", **RUN)


def test_snapshots(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "disk", "write -P 1 0 64k")
    before = tmp_path / "before"
    qemu_img.convert(str(disk), "qcow2", str(before), "raw", **RUN)
    qemu_img.snapshot_create(str(disk), "one", **RUN)
    qemu_io(disk, "qcow2", "write -P 2 0 64k")
    with pytest.raises(exceptions.CorruptDisk):
        qemu_img.compare(str(before), "raw", str(disk), "qcow2", **RUN)
    qemu_img.snapshot_apply(str(disk), "one", **RUN)
    qemu_img.compare(str(before), "raw", str(disk), "qcow2", **RUN)
    assert snapshot_names(disk) == ["one"]
    qemu_img.snapshot_delete(str(disk), "one", **RUN)
    assert snapshot_names(disk) == []
    for missing in (qemu_img.snapshot_apply, qemu_img.snapshot_delete):
        with pytest.raises(exceptions.ToolFailed, match="one"):
            missing(str(disk), "one", **RUN)


@pytest.mark.parametrize("name", ["1", "-l", "", "a/b", "x" * 129])
def test_snapshot_names_that_mislead_are_refused(tmp_path: Path, name: str) -> None:
    disk = qcow2(tmp_path / "disk")
    qemu_img.snapshot_create(str(disk), "one", **RUN)
    for action in (qemu_img.snapshot_create, qemu_img.snapshot_apply, qemu_img.snapshot_delete):
        with pytest.raises(exceptions.InvalidName):
            action(str(disk), name, **RUN)
    assert snapshot_names(disk) == ["one"]


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def first_refcounts(path: Path) -> int:
    """Return the offset of the first refcount block of a qcow2 file."""
    content = path.read_bytes()
    table = int.from_bytes(content[48:56], "big")
    return int.from_bytes(content[table : table + 8], "big")


def test_check_finds_and_repairs_leaks(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "disk", "write -P 1 0 64k")
    clusters = disk.stat().st_size // 65536
    overwrite(disk, first_refcounts(disk) + 2 * clusters, b"\x00\x01" * 3)
    os.truncate(disk, (clusters + 3) * 65536)
    assert qemu_img.check(str(disk), "qcow2", **RUN) == qemu_img.CheckResult(leaks=3, corruptions=0)
    result = qemu_img.check(str(disk), "qcow2", repair="leaks", **RUN)
    assert result == qemu_img.CheckResult(leaks=0, corruptions=0)
    assert qemu_img.check(str(disk), "qcow2", **RUN) == result


def test_check_finds_corruption_and_leaves_it(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "disk", "write -P 1 0 64k")
    overwrite(disk, first_refcounts(disk) + 2 * 4, b"\x00\x00")
    for repair in ("", "leaks"):
        assert qemu_img.check(str(disk), "qcow2", repair=repair, **RUN).corruptions > 0


def test_check_that_cannot_be_done(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(MIB))
    with pytest.raises(exceptions.Unsupported):
        qemu_img.check(str(tmp_path / "raw"), "raw", **RUN)
    with pytest.raises(exceptions.ToolFailed, match="not in qcow2 format"):
        qemu_img.check(str(tmp_path / "raw"), "qcow2", **RUN)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: qemu_img.resize(path, "qcow2", 8 * MIB, **RUN),
        lambda path: qemu_img.snapshot_create(path, "one", **RUN),
        lambda path: qemu_img.rebase(path, "qcow2", None, None, **RUN),
        lambda path: qemu_img.check(path, "qcow2", repair="leaks", **RUN),
        lambda path: qemu_img.convert(path, "qcow2", f"{path}.out", "raw", **RUN),
        lambda path: qemu_img.create(path, "qcow2", MIB, **RUN),
    ],
    ids=["resize", "snapshot", "rebase", "check", "convert", "create"],
)
def test_a_disk_in_use_is_left_alone(tmp_path: Path, change: Callable[[str], None]) -> None:
    disk = qcow2(tmp_path / "disk", "write -P 1 0 64k")
    before = disk.read_bytes()
    with image_lock.hold(str(disk)), pytest.raises(exceptions.DiskInUse) as raised:
        change(str(disk))
    assert raised.value.name == str(disk)
    assert disk.read_bytes() == before


def test_a_template_in_use_as_backing_file_can_be_read(tmp_path: Path) -> None:
    disk = qcow2(tmp_path / "disk", "write -P 1 0 64k")
    with image_lock.hold(str(disk), shared=True):
        qemu_img.convert(str(disk), "qcow2", str(tmp_path / "out"), "raw", **RUN)
        qemu_img.check(str(disk), "qcow2", **RUN)
