# SPDX-License-Identifier: Apache-2.0
"""``disk.info``, the record of the formats of an instance's disks: no entry is ever lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions, locks
from imagebackend.images import disk_info
from tests import counting


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of an instance, which nobody has made yet."""
    return tmp_path / "instance"


def record(folder: Path, disk: str, disk_format: str, *, timeout: float = 60, durable: bool = False) -> None:
    lock = str(folder.parent / "locks" / "record")
    disk_info.record(str(folder / disk), disk_format, lock=lock, timeout=timeout, durable=durable)


def forget(folder: Path, disk: str) -> None:
    lock = str(folder.parent / "locks" / "record")
    disk_info.forget(str(folder / disk), lock=lock, timeout=60, durable=False)


def formats(folder: Path) -> dict[str, str]:
    return {os.path.basename(path): found for path, found in disk_info.read_all(str(folder)).items()}


def test_what_is_recorded_is_read(folder):
    assert disk_info.read(str(folder / "disk")) is None
    record(folder, "disk", "qcow2")
    record(folder, "disk.local", "raw")
    assert disk_info.read(str(folder / "disk")) == "qcow2"
    assert disk_info.read(str(folder / "disk.swap")) is None
    assert formats(folder) == {"disk": "qcow2", "disk.local": "raw"}
    record(folder, "disk", "raw")
    assert formats(folder) == {"disk": "raw", "disk.local": "raw"}


def test_the_last_one_takes_the_file_with_it(folder):
    record(folder, "disk", "qcow2")
    record(folder, "disk.local", "raw")
    forget(folder, "disk")
    forget(folder, "disk")
    assert formats(folder) == {"disk.local": "raw"}
    forget(folder, "disk.local")
    forget(folder, "disk.local")
    assert list(folder.iterdir()) == []
    assert list((folder.parent / "locks").iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["raw", "qcow2", None])), max_size=12))
def test_it_is_a_dictionary_that_stays(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("record") / "instance"
    expected: dict[str, str] = {}
    for disk, disk_format in changes:
        if disk_format is None:
            forget(folder, disk)
            expected.pop(disk, None)
        else:
            record(folder, disk, disk_format)
            expected[disk] = disk_format
        assert formats(folder) == expected
        assert (folder / "disk.info").exists() is bool(expected)


def test_nova_reads_it_and_we_read_novas(folder):
    record(folder, "disk", "qcow2")
    file = folder / "disk.info"
    assert file.read_text() == f'{{"{folder}/disk": "qcow2"}}'
    file.write_text(json.dumps({f"{folder}/disk": "raw", f"{folder}/disk.config": "raw"}))
    assert formats(folder) == {"disk": "raw", "disk.config": "raw"}
    # As Nova on another host may leave it.
    file.write_text(f'\n {{ "{folder}/disk" : "raw" }}\n')
    assert formats(folder) == {"disk": "raw"}


def test_its_mode_is_0600_and_that_of_the_folder_0755_whatever_the_umask_is(folder):
    before = os.umask(0o777)
    try:
        record(folder, "disk", "raw")
    finally:
        os.umask(before)
    assert (folder / "disk.info").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_longer_temporary_file_that_was_left_does_no_harm(folder):
    """In Nova its rest stays behind the new content, and the instance cannot be opened any more."""
    folder.mkdir()
    for name in (".disk.info.partial", "disk.info.tmp"):
        (folder / name).write_text(json.dumps({f"{folder}/disk{number}": "qcow2" for number in range(100)}))
    record(folder, "disk", "raw")
    assert formats(folder) == {"disk": "raw"}
    assert sorted(os.listdir(folder)) == ["disk.info", "disk.info.tmp"]


def test_threads_that_open_a_new_instance_lose_no_entry(folder):
    """In Nova one open in ten fails, because it looks before it locks."""
    barrier = threading.Barrier(6)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            barrier.wait()
            for part in range(5):
                record(folder, f"disk{number}.{part}", "qcow2")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert formats(folder) == {f"disk{number}.{part}": "qcow2" for number in range(6) for part in range(5)}


def test_processes_that_open_a_new_instance_lose_no_entry(folder):
    script = """
import sys
from imagebackend.images import disk_info
folder, number = sys.argv[1:]
for part in range(8):
    for call in disk_info.record, disk_info.record, disk_info.forget, disk_info.record:
        path = f"{folder}/disk{number}.{part}"
        arguments = [path] if call is disk_info.forget else [path, "raw"]
        call(*arguments, lock=f"{folder}/../locks/record", timeout=90, durable=False)
"""
    commands = [[sys.executable, "-c", script, str(folder), str(number)] for number in range(8)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate(timeout=100)[1] for process in running] == [""] * 8
    assert formats(folder) == {f"disk{number}.{part}": "raw" for number in range(8) for part in range(8)}
    assert os.listdir(folder) == ["disk.info"]


def test_readers_see_the_old_or_the_new_record(folder):
    record(folder, "disk", "raw")
    done = threading.Event()
    seen: set[tuple[str, ...]] = set()
    errors: list[BaseException] = []

    def watch() -> None:
        try:
            while not done.is_set():
                seen.add(tuple(sorted(formats(folder))))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(200):
        record(folder, "disk.local" * 20, "raw")
        forget(folder, "disk.local" * 20)
    done.set()
    thread.join()
    assert errors == []
    assert seen <= {("disk",), ("disk", "disk.local" * 20)}


CORRUPT = {
    "empty": b"",
    "cut": b'{"/i/disk": "qc',
    "garbage": b"\x00\xff\xfe\x80",
    "not UTF-8": b'{"/i/disk": "\xff"}',
    "a list": b'["/i/disk", "qcow2"]',
    "a string": b'"qcow2"',
    "null": b"null",
    "a format that is none": b'{"/i/disk": null}',
    "a nested record": b'{"/i/disk": {"format": "raw"}}',
    "two records": b'{"/i/disk": "raw"}{"/i/disk": "raw"}',
    "the rest of a longer one": b'{"/i/disk": "raw"}: "qcow2"}',
    "nested without end": b"[" * 100_000,
    "endless": b'{"/i/disk": "raw", "x": "' + b"x" * (1 << 20) + b'"}',
    "zeros of a lost write": bytes(4096),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_damaged_record_is_an_error_and_stays_for_whoever_mends_it(folder, content):
    folder.mkdir()
    file = folder / "disk.info"
    file.write_bytes(content)
    for act in (
        lambda: disk_info.read_all(str(folder)),
        lambda: disk_info.read(str(folder / "disk")),
        lambda: record(folder, "disk", "raw"),
        lambda: forget(folder, "disk"),
    ):
        with pytest.raises(exceptions.CorruptRecord, match="write it anew, as a JSON object") as caught:
            act()
        assert caught.value.path == str(file)
    assert file.read_bytes() == content
    assert os.listdir(folder) == ["disk.info"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), exceptions.StorageError),
        (lambda path: path.symlink_to("/etc/hostname"), exceptions.StorageError),
        (os.mkfifo, exceptions.CorruptRecord),
    ],
    ids=["folder", "link", "FIFO"],
)
def test_what_is_not_a_file_is_an_error_and_no_wait(folder, make, expected):
    folder.mkdir()
    make(folder / "disk.info")
    with pytest.raises(expected):
        disk_info.read_all(str(folder))
    with pytest.raises(expected):
        record(folder, "disk", "raw")


def test_a_folder_that_is_not_there_or_is_a_file_has_no_disks(tmp_path):
    (tmp_path / "file").touch()
    assert disk_info.read_all(str(tmp_path / "missing")) == {}
    assert disk_info.read_all(str(tmp_path / "file")) == {}


def test_whoever_changes_it_meanwhile_is_waited_for(folder):
    lock = str(folder.parent / "locks" / "record")
    with locks.hold(lock, timeout=0), pytest.raises(exceptions.LockTimeout):
        record(folder, "disk", "raw", timeout=0.05)
    assert not folder.exists()


def test_a_record_that_says_so_already_is_not_written_again(folder):
    record(folder, "disk", "raw")
    before = (folder / "disk.info").stat()
    record(folder, "disk", "raw")
    forget(folder, "disk.local")
    assert (folder / "disk.info").stat() == before


@pytest.mark.parametrize(("durable", "syncs"), [(True, 1), (False, 0)])
def test_the_cost_of_an_entry(folder, durable, syncs):
    setup = f"""
from imagebackend.images import disk_info
def record(disk):
    disk_info.record("{folder}/" + disk, "raw", lock="{folder}.lock", timeout=9, durable={durable})
record("first")
"""
    counts = counting.count("record('disk')", setup=setup)
    assert (counts.syncs, counts.processes, counts.threads) == (syncs, 0, 0)
    assert counts.total <= 20


def test_after_a_migration_to_another_instances_path_the_disk_is_found_by_its_name(folder):
    folder.mkdir()
    (folder / "disk.info").write_text(
        json.dumps({f"/elsewhere/{folder.name}/disk": "qcow2", "/elsewhere/other/disk.local": "raw"})
    )

    assert disk_info.read(f"{folder}/disk") == "qcow2"
    assert disk_info.read(f"{folder}/disk.local") is None
