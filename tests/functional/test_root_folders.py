# SPDX-License-Identifier: Apache-2.0
"""Root file systems as folders: snapshots on btrfs, shared blocks on XFS, copies on ext4."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imagebackend
from imagebackend import exceptions
from tests.contract.conftest import configured
from tests.functional import test_faults
from tests.functional.filesystems import shared
from tests.functional.test_trees import listing, make_root


def template(folder: Path) -> Path:
    """A root file system that is a subvolume where there are such."""
    root = folder / "template"
    kind = subprocess.check_output(["findmnt", "-no", "FSTYPE", "-T", folder], text=True).strip()
    if kind == "btrfs":
        subprocess.run(["btrfs", "-q", "subvolume", "create", root], check=True)
    made = make_root(folder)
    subprocess.run(["cp", "-a", "--reflink=auto", f"{made}/.", root], check=True)
    os.setxattr(root / "etc" / "name with a space", "user.note", b"kept")
    os.utime(root / "bin" / "tool", ns=(1, 1_000_000_000_123_456_789))
    return root


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_a_folder_is_cloned_with_all_that_is_in_it(filesystem: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(f"{filesystem}_folder")
    conf, source = configured(folder / "instances", "raw"), template(folder)
    before = listing(source)
    seen: list[tuple[int, int]] = []

    described = imagebackend.clone_root(conf, str(source), "container", progress=lambda *each: seen.append(each))

    root = folder / "instances" / "container" / "root"
    assert (described.source_type, described.source_dir, described.target_dir) == ("mount", str(root), "/")
    assert listing(root) == before
    assert os.getxattr(root / "etc" / "name with a space", "user.note") == b"kept"
    assert (root / "bin" / "tool").stat().st_mtime_ns == 1_000_000_000_123_456_789
    assert (root.stat().st_ino == 256) == (filesystem == "btrfs")
    assert (shared(root / "bin" / "tool") > 0) == (filesystem != "ext4")
    assert filesystem == "btrfs" or (seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0)

    (root / "etc" / "new").write_text("the container's own")
    imagebackend.clone_root(conf, str(source), "container")
    assert (root / "etc" / "new").read_text() == "the container's own"
    assert listing(source) == before
    imagebackend.remove_root(conf, "container")
    imagebackend.remove_root(conf, "container")
    assert [path.name for path in (folder / "instances").rglob("*")] == ["locks"]


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs"])
def test_a_clone_needs_its_template_no_more(filesystem: str, request: pytest.FixtureRequest) -> None:
    """So that nothing has to keep one from being removed."""
    folder: Path = request.getfixturevalue(f"{filesystem}_folder")
    source = template(folder)
    before = listing(source)
    imagebackend.clone_root(configured(folder / "instances", "raw"), str(source), "container")

    (source / "bin" / "tool").write_bytes(os.urandom(1 << 20))
    remove = ["btrfs", "-q", "subvolume", "delete"] if filesystem == "btrfs" else ["rm", "-r"]
    subprocess.run([*remove, source], check=True)

    assert listing(folder / "instances" / "container" / "root") == before


@pytest.mark.parametrize("filesystem", ["ext4", "btrfs"])
def test_killed_after_any_step_there_is_a_whole_folder_or_none(
    filesystem: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(f"{filesystem}_folder")
    conf, source = configured(folder / "instances", "raw"), template(folder)
    root = folder / "instances" / "container" / "root"

    def swept(act: Callable[[], Any], before: Callable[[], Any], after: list[object]) -> None:
        before()
        for number, step in enumerate(test_faults.steps_of(act)):
            before()
            assert test_faults.run(number, act) == -signal.SIGKILL
            assert not root.exists() or listing(root) == listing(source), step
            act()
            assert (listing(root) if root.exists() else []) == after, step
            assert {path.name for path in root.parent.glob("*")} <= {"root"}, step

    def clone() -> None:
        imagebackend.clone_root(conf, str(source), "container")

    def remove() -> None:
        imagebackend.remove_root(conf, "container")

    swept(clone, remove, listing(source))
    swept(remove, clone, [])


def test_reflink_always_and_never(ext4_folder: Path, btrfs_folder: Path) -> None:
    conf, source = configured(ext4_folder / "instances", "raw", reflink="always"), template(ext4_folder)
    with pytest.raises(exceptions.Unsupported, match="reflink = always"):
        imagebackend.clone_root(conf, str(source), "container")
    assert not (ext4_folder / "instances" / "container" / "root").exists()
    conf, source = configured(btrfs_folder / "instances", "raw", reflink="never"), template(btrfs_folder)
    imagebackend.clone_root(conf, str(source), "container")
    assert shared(btrfs_folder / "instances" / "container" / "root" / "bin" / "tool") == 0


def test_a_subvolume_is_copied_to_another_file_system(btrfs_folder: Path, ext4_folder: Path) -> None:
    source = template(btrfs_folder)
    imagebackend.clone_root(configured(ext4_folder / "instances", "raw"), str(source), "container")
    assert listing(ext4_folder / "instances" / "container" / "root") == listing(source)


def test_what_is_no_root_is_left_alone(ext4_folder: Path, tmp_path: Path) -> None:
    conf = configured(ext4_folder / "instances", "ploop")
    image = imagebackend.Backend(conf).image("container", "disk")
    image.create_from_func(lambda target: None, 1 << 20)
    for act in (lambda: imagebackend.clone_root(conf, str(tmp_path), "container", "disk"),
                lambda: imagebackend.remove_root(conf, "container", "disk")):  # fmt: skip
        with pytest.raises(exceptions.DiskExists):
            act()
    assert image.exists()
    for instance, name in (("..", "root"), ("container", "../x"), ("locks", "root"), ("container", "disk.info")):
        with pytest.raises(exceptions.InvalidName):
            imagebackend.clone_root(conf, str(tmp_path), instance, name)


def test_of_a_clone_that_fails_nothing_stays(ext4_folder: Path, small_tmpfs: Path) -> None:
    source = template(ext4_folder)
    (source / "more").write_bytes(os.urandom(9 << 20))
    with pytest.raises(exceptions.InsufficientSpace):
        imagebackend.clone_root(configured(small_tmpfs / "instances", "raw"), str(source), "container")
    os.mkfifo(source / "fifo")
    with pytest.raises(exceptions.ImageUnacceptable, match="'fifo' is a device, a FIFO or a socket"):
        imagebackend.clone_root(configured(ext4_folder / "instances", "raw"), str(source), "container")
    with pytest.raises(exceptions.StorageError, match="missing"):
        imagebackend.clone_root(configured(ext4_folder / "instances", "raw"), "/missing", "container")
    for folder in (small_tmpfs, ext4_folder):
        assert not list((folder / "instances" / "container").glob("*"))
