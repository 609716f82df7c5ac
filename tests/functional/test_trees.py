# SPDX-License-Identifier: Apache-2.0
"""Root file systems, as folders and as archives, become templates, and disks of every type hold them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import imagebackend
from imagebackend import exceptions
from imagebackend.storage import mkfs, tree
from tests.contract.conftest import MIB, PloopStore, Store
from tests.functional import test_faults


def make_root(folder: Path) -> Path:
    """A tree with all that a root file system may have, and no devices."""
    root = folder / "root"
    for name in ("etc", "bin", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc" / "name with a space").write_text("found")
    os.chown(root / "etc" / "name with a space", 1000, 1001)
    (root / "bin" / "tool").write_bytes(os.urandom(3 * MIB))
    (root / "bin" / "tool").chmod(0o4755)
    os.link(root / "bin" / "tool", root / "bin" / "other")
    (root / "bin" / "sh").symlink_to("tool")
    (root / "outside").symlink_to("/etc/passwd")
    return root


def make_archive(folder: Path, *options: str, suffix: str = ".tar") -> Path:
    path = folder / f"root{suffix}"
    subprocess.run(["tar", "-C", make_root(folder), *options, "-cf", path, "."], check=True)
    return path


@contextlib.contextmanager
def mounted(image: str, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-o", "ro,loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def listing(root: Path) -> list[tuple[object, ...]]:
    """Return all that is in a tree: names, kinds, modes, owners, links, contents."""
    found: list[tuple[object, ...]] = []
    for path in sorted(root.rglob("*")):
        if "lost+found" in path.parts:
            continue
        state = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        links = state.st_nlink if path.is_file() else 0
        found.append((str(path.relative_to(root)), state.st_mode, state.st_uid, state.st_gid, links, content))
    return found


def times(root: Path) -> dict[str, int]:
    """Return when each thing in a tree was changed, in nanoseconds; itself included."""
    found = {str(path.relative_to(root)): path.lstat().st_mtime_ns for path in root.rglob("*")}
    return {"": root.lstat().st_mtime_ns, **found}


def plain(root: Path) -> Path:
    """Make of a tree of :func:`make_root` one that XFS can be made with, with names that are odd but can be told."""
    (root / "etc" / "name with a space").unlink()
    (root / "bin" / "other").unlink()
    for name in ("a:b", "#", "a;b", '"quoted"', "system-\\x2d.slice", "$x", "*", "-dash", "ünïcödé", "n" * 255):
        (root / "etc" / name).write_text(name)
    (root / "etc" / "empty").touch()
    os.chown(root / "etc" / "empty", 3_000_000_000, 100_000)
    os.utime(root / "etc" / "empty", ns=(1, 1_000_000_000_123_456_789))
    os.utime(root / "etc" / "#", ns=(1, -1))
    with (root / "etc" / "sparse").open("wb") as file:
        file.truncate(20 * MIB)
    deep = root.joinpath(*["d" * 200] * 12)
    deep.mkdir(parents=True)
    (deep / "below").write_text("deep")
    (deep / "below").chmod(0o2070)
    os.lchown(root / "bin" / "sh", 5, 6)
    os.utime(root / "bin" / "sh", ns=(1, 1_500_000_000_000_000_001), follow_symlinks=False)
    return root


def fetch(store: Store, url: Path, **options: object) -> imagebackend.Template:
    source = imagebackend.open_tree(str(url), store.conf, **options)  # type: ignore[arg-type]
    return store.backend.templates.fetch("container", source.fetch)


@pytest.mark.parametrize("image_type", ["raw", "qcow2", "ploop"])
@pytest.mark.parametrize("kind", ["folder", "archive", "compressed"])
def test_a_tree_becomes_a_disk(kind: str, image_type: str, xfs_folder: Path, tmp_path: Path) -> None:
    store = (PloopStore if image_type == "ploop" else Store)(xfs_folder, image_type, {})
    options = {"archive": ("--format=posix",), "compressed": ("--zstd", "--format=gnu")}
    path = make_root(tmp_path) if kind == "folder" else make_archive(tmp_path, *options[kind])

    source = imagebackend.open_tree(str(path), store.conf, size=64 * MIB, label="root")
    image = store.image()
    image.cache(source.fetch, "container", 80 * MIB)

    template = store.backend.templates.get("container")
    assert (template.format, template.virtual_size, template.content_sha256) == ("raw", 64 * MIB, "")
    assert template.source == path.as_uri()
    assert template.digest == f"sha256:{template.sha256}"
    store.backend.templates.verify("container")
    store.check(image)
    raw = tmp_path / "raw"
    image.snapshot_extract(str(raw), "raw")
    subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
    with mounted(str(raw), tmp_path / "mnt") as root:
        assert listing(root) == listing(tmp_path / "root")
        assert subprocess.run(["blkid", "-o", "value", "-s", "LABEL", raw], capture_output=True).stdout == b"root\n"
    assert not [name for name in store.files() if "tree" in name or "download" in name]


@pytest.mark.parametrize("image_type", ["raw", "qcow2", "ploop"])
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_tree_becomes_a_disk_with_xfs(kind: str, image_type: str, xfs_folder: Path, tmp_path: Path) -> None:
    store = (PloopStore if image_type == "ploop" else Store)(xfs_folder, image_type, {})
    (tmp_path / "with a space").mkdir()
    root = plain(make_root(tmp_path / "with a space"))
    path = root
    if kind == "archive":
        path = tmp_path / "root.tar"
        subprocess.run(["tar", "-C", root, "--format=posix", "-cf", path, "."], check=True)

    source = imagebackend.open_tree(str(path), store.conf, size=320 * MIB, filesystem="xfs", label="root")
    image = store.image()
    image.cache(source.fetch, "container", 320 * MIB)

    store.check(image)
    raw = tmp_path / "raw"
    image.snapshot_extract(str(raw), "raw")
    subprocess.run(["xfs_repair", "-n", "-f", raw], check=True, capture_output=True)
    with mounted(str(raw), tmp_path / "mnt") as mount:
        assert listing(mount) == listing(root)
        if kind == "folder":
            assert times(mount) == times(root)
        assert subprocess.run(["blkid", "-o", "value", "-s", "LABEL", raw], capture_output=True).stdout == b"root\n"
    assert not [name for name in store.files() if "tree" in name or "download" in name]


def hard_link(root: Path) -> Path:
    os.link(root / "bin" / "tool", root / "bin" / "other")
    return root / "bin" / "other"


def named(name: str) -> Callable[[Path], Path]:
    def spoil(root: Path) -> Path:
        (root / "etc" / name).touch()
        return root / "etc" / name

    return spoil


def with_attribute(root: Path) -> Path:
    os.setxattr(root / "bin" / "tool", "user.note", b"kept")
    return root / "bin" / "tool"


def large(root: Path) -> Path:
    with (root / "bin" / "large").open("wb") as file:
        file.truncate(2 << 30)
    return root / "bin" / "large"


def link_to_white(root: Path) -> Path:
    (root / "etc" / "link").symlink_to("name with a space")
    return root / "etc" / "link"


NOT_FOR_XFS = {
    "hard-link": (hard_link, "several names"),
    "space": (named("name with a space"), "a name that cannot be told"),
    "line-feed": (named("a\nb"), "a name that cannot be told"),
    "colon": (named(":a"), "a name that cannot be told"),
    "dollar": (named("$"), "a name that cannot be told"),
    "link-to-space": (link_to_white, "leads to a name that cannot be told"),
    "attribute": (with_attribute, "extended attributes"),
    "large": (large, "2147479552 is the limit"),
}


@pytest.mark.parametrize("case", NOT_FOR_XFS)
def test_what_xfs_cannot_be_made_with_is_named_and_ext4_can(case: str, ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    root = plain(make_root(tmp_path))
    spoil, reason = NOT_FOR_XFS[case]
    path = spoil(root)

    with pytest.raises(exceptions.Unsupported, match=f"{reason}.*; make it ext4") as caught:
        fetch(store, root, size=16 << 30, filesystem="xfs")

    assert path.name in caught.value.reason.replace("\\n", "\n") or case == "hard-link"
    assert not [name for name in store.files() if "container" in name]
    with mounted(fetch(store, root).path, tmp_path / "mnt") as mount:
        assert listing(mount) == listing(root)


def test_without_a_size_the_files_fit_into_xfs(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    root = plain(make_root(tmp_path))
    (root / "large").write_bytes(os.urandom(MIB) * 150)
    for number in range(3000):
        (root / "tmp" / f"{number}").touch()
    template = fetch(store, root, filesystem="xfs")
    with mounted(template.path, tmp_path / "mnt") as mount:
        assert listing(mount) == listing(root)
        assert os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize > 64 * MIB


@pytest.mark.parametrize("size", [200, 300])
def test_a_disk_that_the_tree_does_not_fit_into_with_xfs_is_refused(
    size: int, ext4_folder: Path, tmp_path: Path
) -> None:
    store = Store(ext4_folder, "raw", {})
    root = plain(make_root(tmp_path))
    (root / "more").write_bytes(os.urandom(MIB) * 200)
    with pytest.raises(exceptions.DiskTooSmall, match=r"what the tree takes|the least for xfs"):
        fetch(store, root, size=size * MIB, filesystem="xfs")
    assert not [name for name in store.files() if "container" in name]


def test_what_mkfs_xfs_writes_over_what_it_has_written_is_noticed(tmp_path: Path) -> None:
    """It does not look whether a file is in one piece, and ends well: here a group is smaller than the file."""
    root = plain(make_root(tmp_path))
    (root / "more").write_bytes(os.urandom(MIB) * 100)
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 300 * MIB)
    measured = dataclasses.replace(tree.measure(str(root), "root"), largest=0)
    with pytest.raises((exceptions.DiskTooSmall, exceptions.ToolFailed)):
        mkfs.make_root(str(disk), str(root), measured, filesystem="xfs", name="root", timeout=60)


def test_another_file_system_is_refused(ext4_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="'btrfs': not among ext4, xfs"):
        fetch(Store(ext4_folder, "raw", {}), tmp_path, filesystem="btrfs")


def test_without_a_size_the_files_fit_and_have_room(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    root = make_root(tmp_path)
    for number in range(5000):  # each an inode, which ext4 has not enough of by default
        (root / "etc" / f"{number}").touch()
    template = fetch(store, root)
    assert template.virtual_size < 64 * MIB
    with mounted(template.path, tmp_path / "mnt") as mount:
        assert len(list((mount / "etc").iterdir())) == 5001
        assert os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize > 8 * MIB
        assert os.statvfs(mount).f_ffree > 1000


@pytest.mark.parametrize("size", [MIB, 5 * MIB])
def test_a_disk_that_the_tree_does_not_fit_into_is_refused(size: int, ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    root = make_root(tmp_path)
    (root / "more").write_bytes(os.urandom(2 * MIB - 65536))  # fits into 5 MiB by itself
    with pytest.raises(exceptions.DiskTooSmall, match="what the tree takes"):
        fetch(store, root, size=size)
    assert not [name for name in store.files() if "container" in name]


def test_an_archive_is_held_to_its_checksum(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    archive = make_archive(tmp_path)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(exceptions.ChecksumMismatch):
        fetch(store, archive, checksum=f"sha256:{'0' * 64}")
    assert not [name for name in store.files() if "container" in name]
    fetch(store, archive, checksum=f"sha256:{digest}")
    store.backend.templates.remove("container")
    with pytest.raises(exceptions.InvalidArgument, match="give an archive"):
        fetch(store, tmp_path / "root", checksum=f"sha256:{digest}")


@pytest.mark.parametrize("spoil", ["--absolute-names", "device", "cut"])
def test_of_an_archive_that_is_refused_nothing_stays(spoil: str, ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    if spoil == "device":
        os.mknod(make_root(tmp_path) / "null", 0o020666, os.makedev(1, 3))
        archive = tmp_path / "root.tar"
        subprocess.run(["tar", "-C", tmp_path / "root", "-cf", archive, "."], check=True)
    elif spoil == "cut":
        archive = make_archive(tmp_path)
        os.truncate(archive, 2 * MIB)
    else:
        archive = tmp_path / "root.tar"
        subprocess.run(["tar", spoil, "-cf", archive, make_root(tmp_path)], check=True, capture_output=True)
    with pytest.raises(exceptions.ImageUnacceptable):
        fetch(store, archive)
    assert not [name for name in store.files() if "container" in name]


def test_a_full_disk_is_told_and_nothing_stays(small_tmpfs: Path, tmp_path: Path) -> None:
    store = Store(small_tmpfs, "raw", {})
    root = make_root(tmp_path)
    (root / "more").write_bytes(os.urandom(9 * MIB))
    with pytest.raises((exceptions.InsufficientSpace, exceptions.ToolFailed)):
        fetch(store, root)
    assert not [name for name in store.files() if "container" in name]


def test_killed_after_any_step_the_same_call_succeeds_and_leaves_nothing(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    archive = make_archive(tmp_path)

    def act() -> None:
        fetch(store, archive)

    steps = test_faults.steps_of(act)
    assert {"template.tree.fetched", "template.tree.unpacked"} <= set(steps)
    files = store.files()
    store.backend.templates.remove("container")
    for number in range(len(steps)):
        assert test_faults.run(number, act) == -signal.SIGKILL
        act()
        store.backend.templates.verify("container")
        assert store.files() == files, steps[number]
        store.backend.templates.remove("container")
        assert test_faults.run(number, act) == -signal.SIGKILL
        with contextlib.suppress(exceptions.TemplateNotFound):
            store.backend.templates.remove("container")
        assert not [name for name in store.files() if ".tree" in name or ".download" in name], steps[number]


def test_a_tree_that_is_not_there(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    with pytest.raises(exceptions.FetchFailed, match="No such file"):
        fetch(store, tmp_path / "missing")


def test_only_an_archive_tells_whether_it_is_as_it_was(ext4_folder: Path, tmp_path: Path) -> None:
    store = Store(ext4_folder, "raw", {})
    archive = make_archive(tmp_path)
    template = fetch(store, archive)
    known = {"sha256": template.sha256, "etag": template.etag, "last_modified": template.last_modified}
    assert imagebackend.open_tree(str(archive), store.conf).unchanged_since(**known)
    os.utime(archive)
    assert not imagebackend.open_tree(str(archive), store.conf).unchanged_since(**known)
    assert not imagebackend.open_tree(str(tmp_path / "root"), store.conf).unchanged_since(sha256="")
