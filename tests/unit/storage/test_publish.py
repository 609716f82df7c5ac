# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions, faults
from imagebackend.storage import publish
from tests import counting


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "folder" / "file")


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: str | Path) -> int:
    return os.stat(path).st_mode & 0o7777


def listing(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


def fill(path: str, content: bytes = b"new", *, durable: bool = True) -> None:
    with publish.new_file(path, durable=durable, replace=True) as (descriptor, _):
        os.write(descriptor, content)


def read(path: str) -> bytes:
    return Path(path).read_bytes()


WRITERS = {
    "new_file": fill,
    "write_file": lambda path, content=b"new", durable=True: publish.write_file(path, content, durable=durable),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


@writers
@pytest.mark.parametrize("durable", [True, False])
def test_a_file_appears_with_its_folder_and_replaces_what_was_there(path, write, durable):
    write(path, b"old", durable=durable)
    inode = os.stat(path).st_ino
    with open(path, "rb") as reader:
        write(path, b"new", durable=durable)
        assert reader.read() == b"old"
    assert read(path) == b"new"
    assert os.stat(path).st_ino != inode
    assert listing(path) == ["file"]


@writers
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177, 0o777])
def test_modes_are_meant_whatever_the_umask_is(tmp_path, write, mask):
    path = tmp_path / "a" / "b" / "file"
    with umask(mask):
        write(str(path))
    assert mode(path) == 0o600
    assert mode(path.parent) == mode(path.parent.parent) == 0o755


def test_the_mode_that_a_tool_left_does_not_stay(path):
    with publish.new_file(path, durable=False) as (_, partial):
        os.chmod(partial, 0o4777)
    assert mode(path) == 0o600


@writers
def test_what_a_killed_maker_left_is_thrown_away(path, write):
    os.makedirs(os.path.dirname(path))
    with open(publish.partial_path(path), "w+b") as other:
        other.write(b"much longer than what comes now")
        other.flush()
        write(path, b"new")
        # A tool that the killed maker started may go on writing.
        other.write(b"and more")
        other.flush()
    assert read(path) == b"new"
    assert listing(path) == ["file"]


@writers
def test_a_folder_at_the_temporary_name_is_thrown_away(path, write):
    os.makedirs(publish.partial_path(path) + "/a/b")
    write(path, b"new")
    assert (read(path), listing(path)) == (b"new", ["file"])


@writers
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, path, write, exists):
    victim = tmp_path / "victim"
    if exists:
        victim.write_text("precious")
    os.makedirs(os.path.dirname(path))
    os.symlink(victim, publish.partial_path(path))
    write(path, b"new")
    assert read(path) == b"new"
    assert not os.path.islink(path)
    assert victim.exists() is exists
    assert not exists or victim.read_text() == "precious"


@writers
def test_a_link_at_the_final_name_is_replaced_not_followed(tmp_path, path, write):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.makedirs(os.path.dirname(path))
    os.symlink(victim, path)
    write(path, b"new")
    assert (read(path), victim.read_text()) == (b"new", "precious")


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), exceptions.Cancelled()])
def test_a_block_that_fails_changes_nothing(path, error):
    fill(path, b"old")
    before = os.stat(path)

    def fail() -> None:
        with publish.new_file(path, durable=True) as (descriptor, _):
            os.write(descriptor, b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (read(path), os.stat(path).st_ino, listing(path)) == (b"old", before.st_ino, ["file"])


@pytest.mark.parametrize("error", [TimeoutError("no answer"), BrokenPipeError("peer left"), OSError(28, "full")])
def test_what_the_block_raises_propagates_as_it_is(path, error):
    def fail() -> None:
        with publish.new_file(path, durable=True):
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert listing(path) == []


@pytest.mark.parametrize("step", ["publish.filled", "publish.synced"])
@writers
def test_a_step_that_fails_changes_nothing(path, write, step):
    write(path, b"old")

    def stop(passed: str) -> None:
        if passed == step:
            raise Stop

    faults.arm(stop)
    try:
        with contextlib.suppress(Stop):
            write(path, b"new")
    finally:
        faults.arm(None)
    expected = b"new" if write is not fill and step == "publish.synced" else b"old"
    assert (read(path), listing(path)) == (expected, ["file"])


def test_a_tool_may_replace_the_file_under_its_temporary_name(tmp_path, path):
    with publish.new_file(path, durable=True) as (descriptor, partial):
        os.write(descriptor, b"not this")
        replacement = tmp_path / "replacement"
        replacement.write_bytes(b"but this")
        replacement.chmod(0o777)
        replacement.rename(partial)
    assert (read(path), mode(path), listing(path)) == (b"but this", 0o600, ["file"])


@pytest.mark.parametrize(
    "leave",
    [
        lambda partial: None,
        lambda partial: os.symlink("/etc/hostname", partial),
        lambda partial: os.makedirs(f"{partial}/a/b"),
        os.mkfifo,
    ],
    ids=["nothing", "link", "folder", "FIFO"],
)
def test_only_a_file_is_published(path, leave):
    fill(path, b"old")
    hostname = mode("/etc/hostname")

    def replace() -> None:
        with publish.new_file(path, durable=True) as (_, partial):
            os.unlink(partial)
            leave(partial)

    with pytest.raises(exceptions.StorageError):
        replace()
    assert (read(path), listing(path), mode("/etc/hostname")) == (b"old", ["file"], hostname)
    fill(path, b"new")
    assert read(path) == b"new"


CALLS = {
    "new_file": "with publish.new_file(path, durable={durable}) as (file, _): os.write(file, b'new')",
    "replacement": "with publish.new_file(path, durable={durable}, replace=True) as (file, _): os.write(file, b'new')",
    "write_file": "publish.write_file(path, b'new', durable={durable})",
}


@pytest.mark.parametrize(
    ("call", "durable", "fdatasyncs", "fsyncs"),
    [
        ("new_file", True, 1, 1),
        ("replacement", True, 1, 1),
        ("new_file", False, 0, 0),
        ("write_file", True, 1, 0),
        ("write_file", False, 0, 0),
    ],
)
def test_the_cost_of_a_file(path, call, durable, fdatasyncs, fsyncs):
    setup = f"import os; from imagebackend.storage import publish; path = {path!r}\n"
    code = CALLS[call].format(durable=durable)
    counts = counting.count(code, setup=setup + code)
    assert counts.by_name.get("fdatasync", 0) == fdatasyncs
    assert counts.by_name.get("fsync", 0) == counts.syncs - fdatasyncs == fsyncs
    assert counts.bytes_written == 3
    assert counts.total <= 12


@pytest.mark.parametrize(
    ("call", "fault", "content"),
    [
        ("replacement", "fchmod:error=EPERM", b"old"),
        ("replacement", "fdatasync:error=EIO", b"old"),
        ("replacement", "fdatasync:error=ENOSPC", b"old"),
        ("replacement", "rename:error=EIO", b"old"),
        # The old content is gone. The name may not last, and the caller is told so.
        ("replacement", "fsync:error=EIO", b"new"),
        ("new_file", "openat:error=ENOSPC", None),
        ("new_file", "fdatasync:error=EIO", None),
        ("new_file", "rename:error=EIO", None),
        ("new_file", "fsync:error=EIO", None),
        ("write_file", "write:error=EIO", b"old"),
        ("write_file", "write:error=ENOSPC", b"old"),
        ("write_file", "fdatasync:error=EIO", b"old"),
        ("write_file", "rename:error=EDQUOT", b"old"),
    ],
)
def test_every_system_call_of_ours_that_fails_is_a_typed_error(path, call, fault, content):
    fill(path, b"old")
    if call == "new_file":
        os.unlink(path)  # its caller knows that there is none
    script = f"""
import os, sys
from imagebackend import exceptions
from imagebackend.storage import publish
path = sys.argv[1]
try:
    {CALLS[call].format(durable=True)}
except exceptions.StorageError as error:
    print(type(error).__name__, type(error.__cause__).__name__)
"""
    files = [word for name in (publish.partial_path(path), path, os.path.dirname(path)) for word in ("-P", name)]
    command = ["strace", "-o", "/dev/null", *files, "-e", f"inject={fault}", sys.executable, "-c", script, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = {"ENOSPC": "InsufficientSpace", "EDQUOT": "InsufficientSpace", "EPERM": "PermissionDenied"}
    name = expected.get(fault.partition("=")[2], "StorageError")
    cause = "PermissionError" if name == "PermissionDenied" else "OSError"
    assert (done.stdout.strip(), done.stderr) == (f"{name} {cause}", "")
    assert listing(path) == ([] if content is None else ["file"])
    assert content is None or read(path) == content


def test_a_full_file_system_changes_nothing(small_tmpfs):
    path = str(small_tmpfs / "file")
    fill(path, b"old")
    free = os.statvfs(small_tmpfs).f_bavail
    # So much that only the last of three blocks does not fit: that write is cut short before one fails.
    (small_tmpfs / "other").write_bytes(bytes((free - 2) * 4096))
    with pytest.raises(exceptions.InsufficientSpace, match="no space left"):
        publish.write_file(path, b"n" * 10_000, durable=True)
    assert (read(path), listing(path)) == (b"old", ["file", "other"])
    (small_tmpfs / "other").unlink()
    publish.write_file(path, b"n" * 10_000, durable=True)
    assert read(path) == b"n" * 10_000


@writers
def test_a_read_only_file_system_is_permission_denied(small_tmpfs, write):
    path = str(small_tmpfs / "file")
    write(path, b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_tmpfs)], check=True)
    with pytest.raises(exceptions.PermissionDenied):
        write(path, b"new")
    with pytest.raises(exceptions.PermissionDenied):
        publish.remove_file(path)
    assert (read(path), listing(path)) == (b"old", ["file"])


def test_no_right_to_the_folder_is_permission_denied():
    script = """
import os, sys
from imagebackend import exceptions
from imagebackend.storage import publish
os.setgroups([]); os.setgid(65534); os.setuid(65534)
def fill(path):
    with publish.new_file(path, durable=True):
        print("made")
for act in fill, lambda path: publish.write_file(path, b"x", durable=True), publish.remove_file:
    for name in "file", "folder/file":
        try:
            print(act(sys.argv[1] + "/" + name))
        except exceptions.PermissionDenied as error:
            print(os.path.relpath(error.path, sys.argv[1]))
"""
    with tempfile.TemporaryDirectory(prefix="publish-", dir="/tmp") as folder:
        (Path(folder) / "file").write_text("old")
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == [".file.partial", "folder"] * 2 + ["file", "False"]
        assert (os.listdir(folder), (Path(folder) / "file").read_text()) == (["file"], "old")


def test_removing_may_be_repeated(path):
    fill(path)
    assert publish.remove_file(path) is True
    assert publish.remove_file(path) is False
    os.mkdir(path)
    with pytest.raises(exceptions.StorageError, match="Is a directory"):
        publish.remove_file(path)


def test_a_folder_that_cannot_be_synced_is_an_error(tmp_path):
    with pytest.raises(exceptions.StorageError, match="No such file"):
        publish.sync_folder(str(tmp_path / "missing"))
    (tmp_path / "file").touch()
    with pytest.raises(exceptions.StorageError, match="Not a directory"):
        publish.sync_folder(str(tmp_path / "file"))


def test_no_descriptor_stays_open(path):
    before = sorted(os.listdir("/proc/self/fd"))
    for write in WRITERS.values():
        write(path)
        os.unlink(path)
        os.mkdir(path)
        with pytest.raises(exceptions.StorageError):
            write(path)
        os.rmdir(path)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert listing(path) == []
