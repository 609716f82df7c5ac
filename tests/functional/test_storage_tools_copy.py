# SPDX-License-Identifier: Apache-2.0
"""reflink and sparse_copy on the file systems that they are for."""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.storage import reflink, sparse_copy
from imagebackend.storage.run import Run
from tests import counting
from tests.functional.filesystems import allocated, shared

MIB = 1 << 20


@contextmanager
def opened(*paths: Path) -> Iterator[list[int]]:
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT, 0o600) for path in paths]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def write_sparse(path: Path, size: int, extents: dict[int, int], seed: int = 0) -> bytes:
    """Write random data at the given offsets of an otherwise empty file; return the whole content."""
    source = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in extents.items():
            file.seek(offset)
            file.write(source.randbytes(length))
        file.flush()
        os.fsync(file.fileno())
    return path.read_bytes()


LAYOUTS = {
    "empty": (0, {}),
    "hole": (5 * MIB, {}),
    "data": (5 * MIB, {0: 5 * MIB}),
    "odd": (5 * MIB + 12345, {4096: 100, 2 * MIB: MIB, 5 * MIB + 12000: 345}),
    "tail hole": (64 * MIB, {0: MIB, 32 * MIB: 9 * MIB + 17}),
}


@pytest.fixture(params=["ext4_folder", "xfs_folder", "btrfs_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copy_is_equal_and_keeps_holes(folder: Path, layout: str, share: bool) -> None:
    size, extents = LAYOUTS[layout]
    content = write_sparse(folder / "source", size, extents)
    with opened(folder / "source", folder / "target") as (source, target):
        sparse_copy.copy(source, target, share=share)
    assert (folder / "target").read_bytes() == content
    assert allocated(folder / "target") <= allocated(folder / "source")


@pytest.mark.parametrize(("kind", "sharing"), [("ext4", False), ("xfs", True), ("btrfs", True)])
def test_copy_shares_where_it_can(request: pytest.FixtureRequest, kind: str, sharing: bool) -> None:
    folder = Path(request.getfixturevalue(f"{kind}_folder"))
    write_sparse(folder / "source", 8 * MIB, {0: 4 * MIB})
    with opened(folder / "source", folder / "target") as (source, target):
        sparse_copy.copy(source, target)
    allocated(folder / "target")
    assert shared(folder / "target") == (4 * MIB if sharing else 0)
    assert reflink.is_supported(str(folder)) is sharing
    assert sorted(entry.name for entry in folder.iterdir()) == ["source", "target"]


def test_real_copy_shares_nothing(folder: Path) -> None:
    write_sparse(folder / "source", 16 * MIB, {0: 9 * MIB})
    with opened(folder / "source", folder / "target") as (source, target):
        sparse_copy.copy(source, target, share=False)
    assert allocated(folder / "target") >= 9 * MIB
    assert shared(folder / "target") == 0


@pytest.mark.parametrize("share", [True, False])
def test_copy_between_file_systems(ext4_folder: Path, xfs_folder: Path, share: bool) -> None:
    content = write_sparse(ext4_folder / "source", 20 * MIB + 1, {MIB: 9 * MIB, 20 * MIB: 1})
    with opened(ext4_folder / "source", xfs_folder / "target") as (source, target):
        assert not reflink.clone_file(source, target)
        sparse_copy.copy(source, target, share=share)
    assert (xfs_folder / "target").read_bytes() == content
    assert allocated(xfs_folder / "target") < 10 * MIB


@pytest.mark.parametrize("share", [True, False])
def test_copy_drops_what_the_target_held(folder: Path, share: bool) -> None:
    content = write_sparse(folder / "source", 4 * MIB, {MIB: MIB})
    write_sparse(folder / "target", 6 * MIB, {0: 6 * MIB}, seed=1)
    with opened(folder / "source", folder / "target") as (source, target):
        sparse_copy.copy(source, target, share=share)
    assert (folder / "target").read_bytes() == content


def test_copy_reports_progress_and_can_be_cancelled(folder: Path) -> None:
    write_sparse(folder / "source", 64 * MIB, {0: 20 * MIB, 50 * MIB: MIB})
    seen: list[tuple[int, int]] = []

    def cancel(done: int, size: int) -> None:
        seen.append((done, size))
        if done > 10 * MIB:
            raise exceptions.Cancelled("enough")

    with opened(folder / "source", folder / "target") as (source, target):
        sparse_copy.copy(source, target, share=False, progress=lambda done, size: seen.append((done, size)))
        assert {size for _, size in seen} == {64 * MIB}
        steps = [done for done, _ in seen]
        assert steps[0] == 0
        assert steps[-1] == 64 * MIB
        assert steps == sorted(steps)
        assert max(after - before for before, after in itertools.pairwise(steps[:6])) <= 16 * MIB
        seen.clear()
        with pytest.raises(exceptions.Cancelled):
            sparse_copy.copy(source, target, share=False, progress=cancel)
        assert seen[-1][0] < 20 * MIB


@pytest.mark.parametrize("share", [True, False])
def test_copy_to_a_full_file_system(tmp_path: Path, small_tmpfs: Path, share: bool) -> None:
    write_sparse(tmp_path / "source", 20 * MIB, {0: 20 * MIB})
    with (
        opened(tmp_path / "source", small_tmpfs / "target") as (source, target),
        pytest.raises(exceptions.InsufficientSpace) as raised,
    ):
        sparse_copy.copy(source, target, share=share)
    assert raised.value.path == str(small_tmpfs / "target")


@pytest.mark.parametrize("share", [True, False])
def test_copy_of_a_source_that_gets_shorter(ext4_folder: Path, share: bool) -> None:
    write_sparse(ext4_folder / "source", 32 * MIB, {0: 32 * MIB})
    with opened(ext4_folder / "source", ext4_folder / "target") as (source, target):

        def cut(done: int, size: int) -> None:
            os.truncate(ext4_folder / "source", 6 * MIB)

        with pytest.raises(exceptions.StorageError, match="earlier than expected") as raised:
            sparse_copy.copy(source, target, share=share, progress=lambda done, size: done and cut(done, size))
    assert raised.value.path == str(ext4_folder / "source")


def test_copy_runs_to_a_full_file_system(tmp_path: Path, small_tmpfs: Path) -> None:
    write_sparse(tmp_path / "source", 20 * MIB, {0: 20 * MIB})
    with opened(tmp_path / "source", small_tmpfs / "target") as (source, target):
        os.ftruncate(target, 20 * MIB)
        with pytest.raises(exceptions.InsufficientSpace):
            sparse_copy.copy_runs(source, target, [Run(0, 0, 20 * MIB)])


@pytest.mark.parametrize("share", [True, False])
def test_copy_runs_scatters(folder: Path, share: bool) -> None:
    content = write_sparse(folder / "source", 12 * MIB, {0: 12 * MIB})
    runs = [
        Run(0, 9 * MIB, 65536),
        Run(MIB, MIB, 6 * MIB),
        Run(20 * MIB, 512, 4096),
        Run(31 * MIB, 0, MIB + 512),
    ]
    size = 32 * MIB + 512
    seen: list[int] = []
    with opened(folder / "source", folder / "target") as (source, target):
        os.ftruncate(target, size)
        sparse_copy.copy_runs(source, target, runs, share=share, progress=lambda done, _: seen.append(done))
    expected = bytearray(size)
    for run in runs:
        expected[run.guest_offset : run.guest_offset + run.length] = content[run.host_offset :][: run.length]
    assert (folder / "target").read_bytes() == expected
    assert (seen[0], seen[-1]) == (0, size)
    sharing = share and reflink.is_supported(str(folder))
    assert allocated(folder / "target") < 8 * MIB
    assert shared(folder / "target") == (65536 + 7 * MIB if sharing else 0)


def test_copy_runs_past_the_end(ext4_folder: Path) -> None:
    write_sparse(ext4_folder / "source", MIB, {0: MIB})
    with opened(ext4_folder / "source", ext4_folder / "target") as (source, target):
        os.ftruncate(target, 4 * MIB)
        with pytest.raises(exceptions.StorageError, match="earlier than expected"):
            sparse_copy.copy_runs(source, target, [Run(0, 0, 2 * MIB)])


def test_clone_refuses_what_is_a_mistake(xfs_folder: Path) -> None:
    write_sparse(xfs_folder / "source", MIB, {0: MIB})
    with opened(xfs_folder / "target") as (target,):
        source = os.open(xfs_folder / "source", os.O_WRONLY)
        try:
            with pytest.raises(exceptions.StorageError) as raised:
                reflink.clone_file(source, target)
        finally:
            os.close(source)
    assert raised.value.errno == errno.EBADF
    assert (xfs_folder / "target").stat().st_size == 0


def test_clone_range_needs_alignment(xfs_folder: Path) -> None:
    content = write_sparse(xfs_folder / "source", MIB, {0: MIB})
    with opened(xfs_folder / "source", xfs_folder / "target") as (source, target):
        assert not reflink.clone_range(source, target, 512, 4096, 0)
        assert os.fstat(target).st_size == 0
        assert reflink.clone_range(source, target, 8192, 65536, 4096)
    assert (xfs_folder / "target").read_bytes() == bytes(4096) + content[8192 : 8192 + 65536]


def test_allocate_allocates_grows_and_never_shrinks(folder: Path) -> None:
    content = write_sparse(folder / "disk", 8 * MIB, {MIB: 4096})
    with opened(folder / "disk") as (disk,):
        sparse_copy.allocate(disk, 16 * MIB)
        assert os.fstat(disk).st_size == 16 * MIB
        assert os.fstat(disk).st_blocks * 512 >= 16 * MIB
        sparse_copy.allocate(disk, 4 * MIB)
        assert os.fstat(disk).st_size == 16 * MIB
    assert (folder / "disk").read_bytes() == content + bytes(8 * MIB)


def test_allocate_without_room_keeps_the_size(folder: Path) -> None:
    with opened(folder / "disk") as (disk,):
        os.ftruncate(disk, MIB)
        with pytest.raises(exceptions.InsufficientSpace):
            sparse_copy.allocate(disk, 4 << 30)
        assert os.fstat(disk).st_size == MIB


def test_allocate_without_rights(tmp_path: Path) -> None:
    write_sparse(tmp_path / "disk", MIB, {})
    disk = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        with pytest.raises(exceptions.StorageError) as raised:
            sparse_copy.allocate(disk, 2 * MIB)
    finally:
        os.close(disk)
    assert raised.value.errno == errno.EBADF


def copy_with_fault(folder: Path, fault: str, *, share: bool) -> str:
    """Copy ``source`` to ``target`` in a process in which a system call does not work; return its complaint."""
    script = (
        "import os, sys; from imagebackend.storage import sparse_copy; "
        "source, target = (os.open(path, os.O_RDWR | os.O_CREAT) for path in sys.argv[1:3]); "
        f"sparse_copy.copy(source, target, share={share})"
    )
    command = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={fault}", sys.executable, "-c", script]
    done = subprocess.run(
        [*command, str(folder / "source"), str(folder / "target")], check=False, capture_output=True, text=True
    )
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("result", ["error=ENOSYS", "error=EXDEV", "error=EOPNOTSUPP", "error=EINVAL", "retval=0"])
@pytest.mark.parametrize(("call", "share"), [("copy_file_range", True), ("sendfile", False)])
def test_a_way_that_is_not_there_is_replaced(ext4_folder: Path, call: str, share: bool, result: str) -> None:
    content = write_sparse(ext4_folder / "source", 16 * MIB, {MIB: 9 * MIB + 5})
    assert copy_with_fault(ext4_folder, f"{call}:{result}", share=share) == ""
    assert (ext4_folder / "target").read_bytes() == content
    assert allocated(ext4_folder / "target") < 10 * MIB


@pytest.mark.parametrize(
    ("fault", "share", "expected"),
    [
        ("copy_file_range:error=EIO:when=2", True, "StorageError: .*/target: Input/output error"),
        ("copy_file_range:error=EPERM", True, "PermissionDenied: .*/target: permission denied"),
        ("copy_file_range:error=ENOSPC:when=2", True, "InsufficientSpace: .*/target: no space"),
        ("sendfile:error=EIO:when=2", False, "StorageError: .*/target: Input/output error"),
        ("sendfile:error=EDQUOT", False, "InsufficientSpace: .*/target: no space"),
        ("ftruncate:error=EFBIG", False, "InsufficientSpace: .*/target: no space"),
    ],
)
def test_other_errors_are_errors(ext4_folder: Path, fault: str, share: bool, expected: str) -> None:
    write_sparse(ext4_folder / "source", 16 * MIB, {MIB: 9 * MIB})
    assert re.search(expected, copy_with_fault(ext4_folder, fault, share=share))


def test_a_clone_that_fails_is_not_copied(xfs_folder: Path) -> None:
    write_sparse(xfs_folder / "source", MIB, {0: MIB})
    assert re.search(
        "StorageError: .*/target: Input/output", copy_with_fault(xfs_folder, "ioctl:error=EIO", share=True)
    )
    assert (xfs_folder / "target").stat().st_size == 0


def test_clone_costs_the_same_whatever_the_size(xfs_folder: Path) -> None:
    costs = []
    for megabytes in (1, 64):
        write_sparse(xfs_folder / "source", megabytes * MIB, {0: megabytes * MIB // 2})
        setup = (
            "import os; from imagebackend.storage import sparse_copy; "
            f"source = os.open({str(xfs_folder / 'source')!r}, os.O_RDONLY); "
            f"target = os.open({str(xfs_folder / f'target{megabytes}')!r}, os.O_RDWR | os.O_CREAT)"
        )
        costs.append(counting.count("sparse_copy.copy(source, target)", setup=setup))
    assert costs[0].by_name == costs[1].by_name
    assert costs[0].by_name["ioctl"] == 1
    assert sum(costs[0].by_name.values()) <= 3
    assert costs[0].bytes_written == 0
