# SPDX-License-Identifier: Apache-2.0
"""Fail each file operation of each operation: it is told, everything is as before, and the same call mends it.

What test_faults.py does with kills, this does with errors of the kernel. A new backend adds its stores, a new
operation a row to OPERATIONS.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from imagebackend import exceptions, process
from imagebackend.templates.sources import open_source
from tests.contract.conftest import MIB, STORES, Store, open_store
from tests.functional import failing_calls, test_faults
from tests.functional.failing_calls import Call, Fault, Outcome
from tests.functional.test_faults import Operation, State, nothing, state_of

SWEPT = ("raw-ext4", "raw-xfs", "qcow2", "ploop-ext4", "ploop-xfs")

SYNCS = ("fsync", "fdatasync")
WRITES = ("write", "pwrite64", "pwritev", "copy_file_range", "sendfile", "ftruncate", "fallocate")
NEED_SPACE = (*WRITES, *SYNCS, "ioctl", "openat", "mkdir", "symlink", "rename")
WATCHED = (*NEED_SPACE, "unlink", "rmdir", "fchmod", "chmod")

#: Calls that may fail without the operation failing, and why.
NEEDLESS = {
    r'unlink\(".*/locks/': "a lock file that stays is harmless: the kernel's lock decides",
    r'unlink\(".*\.download"': "it has been renamed, so there is nothing to undo",
    r'rmdir\(".*/\.leases/': "an empty folder of leases means nothing",
    r'openat\(.*\.download\.part"': "the part of an image that nobody can go on with is swept up",
    r"openat\(.*O_TMPFILE": "tempfile makes a file with a name instead",
    r"openat\(.*/locks/(disk|record)-.*ENOSPC": "only to remove a disk: that is what makes room",
    r"(openat|unlink)\(.*/\.records.*EIO": "to forget what a killed pull may have left, which the next pull does, too",
    r"openat\(.*/disk\.info.*O_RDONLY.*EIO": "whether a lease is needless cannot be known, so it stays",
}
#: Of these, those that leave something for the same call to clear later: records that mean nothing.
LEFT_FOR_LATER = r"openat\(.*/locks/record-.*ENOSPC|(openat|unlink)\(.*/\.records.*EIO"
#: What cannot be taken back once it is done: the error tells that it may not last, or that something is left to do.
IN_PLACE = (
    "resize",
    "snapshot",
    "roll back",
    "remove snapshot",
    "flatten",
    "rebase",
    "import",
    "import over a disk",
    "remove",
    "remove template",
    "prune",
    "rebuild leases",
)


def make_cold(store: Store) -> None:
    store.image().cache(open_source(str(store.source), store.conf).fetch, "template", 8 * MIB)


def make_cold_converted(store: Store) -> None:
    store.image().cache(open_source(str(store.qcow2_template), store.conf).fetch, "converted", 8 * MIB)


# Templates come from the library's own source, so that its errors are swept, too.
OPERATIONS = {
    **{name: operation for name, operation in test_faults.OPERATIONS.items() if "cold" not in name},
    "create, cold": Operation(nothing, make_cold),
    "create, cold, from qcow2": Operation(nothing, make_cold_converted),
}


class Swept:
    """A store that is put back as it was before the operation, as often as needed."""

    def __init__(self, name: str, operation: str, request: pytest.FixtureRequest) -> None:
        self._folder: Path = request.getfixturevalue(STORES[name][1])
        self._kept = self._folder / "kept"
        self._operation = OPERATIONS[operation]
        self._in_place = operation in IN_PLACE
        self.store = open_store(name, request)
        self.store.conf.set_override("lock_timeout", 5.0)
        self._operation.before(self.store)
        self.store.folder.mkdir(exist_ok=True)
        self._copy(self.store.folder, self._kept)
        # Once without faults, which also loads what is loaded once.
        self.before = state_of(self.store)
        self.act()
        self.after, self.files = state_of(self.store), self._files()
        self.restore()

    @property
    def does_nothing(self) -> bool:
        """Whether the operation changes nothing on this store."""
        return self.before == self.after

    def act(self) -> None:
        self._operation.act(self.store)

    def restore(self) -> None:
        """Put everything back."""
        shutil.rmtree(self.store.folder)
        for path in self.store.sources.glob("*extract*"):
            path.unlink()
        self._copy(self._kept, self.store.folder)
        self._files_before, self._folders_before = self._look()

    def close(self) -> None:
        shutil.rmtree(self._folder)  # the file systems are small, and all tests share them

    def concerns(self, call: Call) -> bool:
        """Return whether a call is about this store, rather than a log or a pipe."""
        return str(self.store.folder) in call.text or "extract" in call.text

    def check_failed(self, what: str) -> None:
        """Make sure that a call that failed changed nothing, and put things in order for the next one."""
        files, folders = self._look()
        if files != self._files_before:
            found = state_of(self.store)
            test_faults.check_left(self.before, self.after, found, what)
            assert self._in_place or _disks(found) == _disks(self.before), f"raised after all was done: {what}"
            left = {path for path in files.keys() - self._files_before.keys() if "/locks/" not in path}
            assert self._in_place or left <= self._allowed(found), f"left after {what}"
            with contextlib.suppress(self._operation.done):
                self.act()
            self.check_done(f"repeated after {what}")
        if (files, folders) != (self._files_before, self._folders_before):
            self.restore()

    def check_done(self, what: str) -> None:
        """Make sure that everything is as it was to be."""
        assert state_of(self.store) == self.after, what
        assert self._files() == self.files, f"left over: {what}"
        for path in self.store.sources.glob("extract*"):
            self.store.run("qemu-img", "check", "-f", "qcow2", path)

    def _files(self) -> set[str]:
        """Return what the store holds, but for folders of leases: a use makes one, once in five minutes at most."""
        return {path for path in self.store.files() if re.search(r"/\.leases(/[^/]*)?$", path) is None}

    def _allowed(self, found: State) -> set[str]:
        """Return the files of templates that were fetched: they are whole, and spare the next call the fetch."""
        templates = self.store.backend.templates
        paths = [Path(templates.path(name)) for name in found.templates]
        records = {path.parent / ".records" / f"{path.name}.json" for path in paths}
        images = {image for path in paths for image in (path.parent / ".ploop" / path.name).glob("*")}
        return {str(path) for path in {*paths, *records, *images}}

    def _look(self) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """Return the files, by what changes if anything does, and the folders."""
        files, folders = {}, set()
        for path in (*self.store.folder.rglob("*"), *self.store.sources.glob("*extract*")):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                folders.add(str(path))
            else:
                files[str(path)] = (found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        return files, folders

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True)


def _disks(state: State) -> tuple[object, ...]:
    return state.contents, state.snapshots, state.leases, state.extracts


def faults_of(calls: Sequence[Call], swept: Swept) -> Iterator[Fault]:
    """Yield every way in which one of the calls can fail."""
    numbers: collections.Counter[str] = collections.Counter()
    for call in calls:
        numbers[call.name] += 1
        # Sharing blocks is the one ioctl that matters: the others ask whether a file is a terminal.
        if not swept.concerns(call) or (call.name == "ioctl" and "CLONE" not in call.text):
            continue
        makes_no_file = call.name == "openat" and not ("O_CREAT" in call.text or "O_TMPFILE" in call.text)
        if call.name in NEED_SPACE and not makes_no_file:
            yield Fault(call.name, "ENOSPC", numbers[call.name])
        yield Fault(call.name, "EIO", numbers[call.name])


@contextlib.contextmanager
def prepared(name: str, operation: str, request: pytest.FixtureRequest) -> Iterator[Swept]:
    swept = Swept(name, operation, request)
    try:
        yield swept
    finally:
        swept.close()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", SWEPT)
def test_whatever_call_fails_it_is_told_and_nothing_has_changed(
    name: str, operation: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if OPERATIONS[operation].only not in ("", STORES[name][0]):
        return
    trace = tmp_path / "trace"
    with prepared(name, operation, request) as swept:
        if swept.does_nothing:
            return  # a snapshot where the file system cannot, a flatten of what stands alone
        counted = failing_calls.run(swept.act, WATCHED, None, trace)
        assert counted.error is None, counted.told
        swept.restore()

        for fault in faults_of(counted.calls, swept):
            check_fault(swept, fault, trace)

        swept.act()
        swept.check_done("after all faults")


def check_fault(swept: Swept, fault: Fault, trace: Path) -> None:
    """Make sure that the operation bears a fault."""
    outcome = failing_calls.run(swept.act, WATCHED, fault, trace)
    failed = next((call for call in outcome.calls if call.injected), None)
    # There may be other loop devices to be asked than when the calls were counted: another call failed, or none.
    if failed is None or not swept.concerns(failed):
        assert failed is not None or outcome.error is None, outcome.told
        swept.restore()
        return
    check_told(outcome, fault, failed)
    if outcome.error is None:
        if re.match(LEFT_FOR_LATER, str(failed)):
            swept.act()
        swept.check_done(str(failed))
        swept.restore()
    else:
        swept.check_failed(str(failed))


def check_told(outcome: Outcome, fault: Fault, failed: Call) -> None:
    """Make sure that a failure is told by the right name, or did not matter."""
    if outcome.error is None:
        # Of a sync in particular: the kernel has forgotten the error, and the data, whatever a later one says.
        assert any(re.match(call, str(failed)) for call in NEEDLESS), f"success in spite of {failed}"
        return
    if isinstance(outcome.error, OSError):
        assert "in fill" in outcome.told, (str(failed), outcome.told)  # the caller's function
    elif isinstance(outcome.error, exceptions.FetchFailed):
        assert "/sources/" in failed.text or ".download" in failed.text, (str(failed), outcome.told)
    elif fault.error == "ENOSPC":
        assert type(outcome.error) is exceptions.InsufficientSpace, (str(failed), outcome.told)
    else:
        assert type(outcome.error) is exceptions.StorageError, (str(failed), outcome.told)
    assert not outcome.descriptors, (str(failed), outcome.told)


# Without taking and removing snapshots: qemu-img 7.2 can leave wrong counts there that are mended only once writing
# works again, and leak a cluster in the next snapshot.
TOOL_FAULTS = (
    ("pwrite64", "ENOSPC"),
    ("pwrite64", "EIO"),
    ("pwritev", "ENOSPC"),
    ("ftruncate", "ENOSPC"),
    ("fallocate", "EIO"),
    ("fdatasync", "EIO"),
)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("qcow2", "create, filled"),
        ("qcow2", "resize"),
        ("qcow2", "roll back"),
        ("qcow2", "flatten"),
        ("qcow2", "rebase"),
        ("qcow2", "extract"),
        ("qcow2", "import over a disk"),
        ("raw-xfs", "extract"),
    ],
)
def test_whatever_call_of_qemu_img_fails_it_is_told_and_nothing_has_changed(
    name: str,
    operation: str,
    lasting: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = failing_calls.Tool(tmp_path, (*WRITES, *SYNCS))
    path = f"{tool.folder}{os.pathsep}{process.PATH}"
    faults = 0
    with prepared(name, operation, request) as swept:
        for call, error in TOOL_FAULTS:
            for number in (1,) if lasting else itertools.count(1):
                fault = Fault(call, error, number, lasting)
                tool.arm(fault)
                with monkeypatch.context() as patch:
                    patch.setattr(process, "PATH", path)
                    raised = raised_by(swept)
                if not tool.injected:
                    assert raised is None, raised
                    break
                faults += 1
                check_tool_fault(swept, tool, fault, raised)
            swept.restore()
        swept.act()
        swept.check_done("after all faults")
    assert faults


def raised_by(swept: Swept) -> exceptions.ImageBackendError | None:
    """Do the operation; return the error by which it failed."""
    try:
        swept.act()
    except exceptions.ImageBackendError as error:
        return error
    return None


def check_tool_fault(
    swept: Swept, tool: failing_calls.Tool, fault: Fault, raised: exceptions.ImageBackendError | None
) -> None:
    """Make sure that the operation bore a fault of its tool."""
    what = str(tool.injected[0])
    if raised is None:
        for call in tool.injected:
            check_needless(call, fault)
        swept.check_done(what)
        swept.restore()
    else:
        assert isinstance(raised, (exceptions.ToolFailed, exceptions.InsufficientSpace)), what
        swept.check_failed(what)


def check_needless(call: Call, fault: Fault) -> None:
    """Make sure that qemu-img may meet a failure and yet do its work, which is looked at then."""
    if "PUNCH_HOLE" in call.text:
        return  # giving space back may fail
    # What could not be written once is kept, and written at the end. A sync that failed is told once more to the
    # descriptor that we have had open all the time, and sync ourselves.
    assert not fault.lasting, str(call)
    assert call.name not in SYNCS or ".partial>" in call.text, str(call)
