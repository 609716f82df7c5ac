# SPDX-License-Identifier: Apache-2.0
"""Bad input, a full file system, signals: the executable says what it is, and everything is as it was."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from imagebackend import locks
from tests.functional import web
from tests.functional.cli_command import MIB, Command
from tests.functional.hostile_images import HOSTILE_IMAGES, HostileImage
from tests.functional.image_building import held

#: One of each kind of refusal; all of them are in test_inspection.py.
HOSTILE = [
    next(image for image in HOSTILE_IMAGES if image.claimed_format == each) for each in ("qcow2", "vmdk", "raw")
]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def one_message(finished: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failure is told in, progress aside."""
    lines = [line for line in finished.stderr.splitlines() if not line.startswith(("Fetching ", "Converting "))]
    assert len(lines) == 1, finished
    assert lines[0].startswith("imagebackend: ")
    return lines[0]


@pytest.mark.parametrize("image", HOSTILE, ids=lambda image: image.name)
def test_a_hostile_image_is_refused_by_check_and_by_add(image: HostileImage, command: Command) -> None:
    path = command.folder / "hostile"
    image.build(path)
    before = sorted(os.listdir(command.folder))

    checked = command.run("template", "check", "--format", image.claimed_format, path)
    added = command.run("template", "add", "--name", "x", "--format", image.claimed_format, path)
    used = command.run("disk", "create", "vm1", "disk", "--from", path, "--format", image.claimed_format)

    assert (checked.returncode, added.returncode, used.returncode) == (1, 1, 1)
    assert (checked.stdout, added.stdout, used.stdout) == ("", "", "")
    reason = one_message(checked).partition(" is unacceptable: ")[2]
    assert reason
    assert one_message(added).endswith(reason)
    assert one_message(used).endswith(reason)
    assert command.files() == set()
    assert sorted(set(os.listdir(command.folder)) - {"instances"}) == before


def run_without_capabilities(arguments: list[str | bytes]) -> subprocess.CompletedProcess[str]:
    """Run a command for which, though it is root's, the modes of files count."""
    return subprocess.run(
        ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_check_needs_no_rights_but_to_read(command: Command) -> None:
    image = command.image()
    image.chmod(0o400)
    command.instances.mkdir(mode=0)
    check = command.arguments("template", "check", "--format", "raw", image)

    readable = run_without_capabilities(check)
    image.chmod(0)
    unreadable = run_without_capabilities(check)

    assert (readable.returncode, readable.stderr) == (0, "")
    assert unreadable.returncode == 2
    assert "cannot be read: Permission denied" in unreadable.stderr


def test_missing_rights_are_told_with_what_they_are_missing_for(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.image())
    before = command.files()
    command.instances.chmod(0o500)

    made = run_without_capabilities(command.arguments("disk", "create", "vm1", "disk", "--template", "base"))
    examined = run_without_capabilities(command.arguments("doctor"))

    assert made.returncode == 1
    assert f"{command.instances}" in one_message(made)
    assert "permission denied; check the owner and mode" in one_message(made)
    assert examined.returncode == 1
    assert f"error    [DEFAULT] instances_path {command.instances}: nothing can be made in it: " in examined.stdout
    assert command.files() == before


def test_a_full_file_system_is_told_and_gets_its_space_back(small_tmpfs: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, small_tmpfs / "instances")
    image = command.image(size=32 * MIB)
    qcow2 = command.folder / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1G"], check=True, timeout=60)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 7M", qcow2], check=True, timeout=60, capture_output=True)

    fetched = command.run("template", "add", "--name", "x", image)
    converted = command.run("template", "add", "--name", "x", qcow2)
    document = command.json("template", "add", "--name", "x", image)

    assert (fetched.returncode, converted.returncode) == (6, 6)
    assert "free some" in one_message(fetched)
    assert "free some" in one_message(converted)
    assert document["error"]["type"] == "InsufficientSpace"
    assert document["error"]["required"] > document["error"]["available"]
    assert command.files() == set()

    command.done("disk", "create", "vm1", "disk", "--blank", "--size", "64M", "--type", "raw")
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 6M", command.instances / "vm1" / "disk"], check=True,
                   timeout=60, capture_output=True)  # fmt: skip
    before = command.files()
    extracted = command.run("disk", "extract", "--format", "qcow2", "vm1", "disk", small_tmpfs / "out")
    assert extracted.returncode == 6
    assert command.files() == before
    assert os.listdir(small_tmpfs) == ["instances"]


def stalling(server_socket: socket.socket, request: web.Request) -> None:
    """Half of an image, and then nothing until the other end gives up."""
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {64 * MIB}\r\n\r\n".encode()
    server_socket.sendall(head + bytes(32 * MIB))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "words", [("template", "add"), ("disk", "create", "vm1", "disk", "--template", "x", "--from")]
)
def test_an_interrupted_download_leaves_nothing(
    command: Command, number: int, status: int, words: tuple[str, ...]
) -> None:
    name = ("--name", "x") if words[0] == "template" else ()

    def answer(connection: socket.socket, request: web.Request) -> None:
        stalling(connection, request)
        server.wait_until_gone(connection, request)

    with web.misbehaving_server(answer) as server, command.started(*words, f"{server.url}/x.raw", *name) as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        while told.startswith("Fetching x: ") and " 50 %" not in told:
            told = process.stderr.readline()
        assert told == "Fetching x: 50 % of 64 MiB\n"
        assert any(name.endswith(".download") for name in command.files())
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)

    assert (process.returncode, stdout) == (status, "")
    word = {130: "interrupted", 143: "ended by SIGTERM"}[status]
    assert stderr == f"imagebackend: {word}\n"
    assert command.files() == set()


def test_an_interrupted_wait_for_a_lock_ends(command: Command) -> None:
    path = command.instances / "locks" / "template-x"
    with locks.hold(str(path), timeout=10), command.started("--json", "-vv", "template", "remove", "x") as process:
        # It opens the lock again and again.
        wait = ["strace", "-q", "-e", "trace=openat", "-P", str(path), "-p", str(process.pid)]
        with subprocess.Popen(wait, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            assert "template-x" in tracer.stderr.readline()
            process.send_signal(signal.SIGTERM)
            stdout, _ = process.communicate(timeout=60)

    assert process.returncode == 143
    error = json.loads(stdout)["error"]
    assert (error["type"], error["exit_status"]) == ("Cancelled", 143)


def test_a_lock_that_is_held_for_too_long_is_in_use(command: Command) -> None:
    command.configure("lock_timeout = 0")

    with locks.hold(str(command.instances / "locks" / "template-x"), timeout=10):
        finished = command.run("template", "remove", "x")

    assert finished.returncode == 5
    assert "another thread, process or host holds" in one_message(finished)


def test_an_interrupted_flatten_leaves_the_disk_whole(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.image(size=64 * MIB))
    made = command.json("disk", "create", "vm1", "disk", "--template", "base")

    with command.started("disk", "flatten", "vm1", "disk") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Flattening disk: 0 %")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)

    # It may have been done already.
    assert process.returncode in (0, 130)
    checked = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", made["path"]], capture_output=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked
    compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", made["path"], command.folder / "image.raw"]
    subprocess.run(compare, check=True, timeout=60, capture_output=True)
    assert not [name for name in command.files() if "intent" in name]
    command.done("disk", "flatten", "vm1", "disk")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"caf\xe9.qcow2", b"\x1b[31mred", b"a\nb", "é".encode()])
def test_a_name_in_no_encoding_is_only_a_name(command: Command, name: bytes) -> None:
    image = command.image()
    os.rename(image, os.path.join(os.fsencode(command.folder), name))

    checked = command.run("template", "check", "--format", "raw", name)
    added = command.run("template", "add", "--name", "x", name)
    called = command.run("template", "show", name)
    disk = command.run("disk", "show", "vm1", name)

    assert checked.returncode == 0, checked
    assert added.returncode == 0, added
    assert (called.returncode, disk.returncode) == (2, 2)
    for finished in (checked, added, called, disk):
        assert "\x1b" not in finished.stdout + finished.stderr
        assert "Traceback" not in finished.stderr
    document = command.json("template", "check", "--format", "raw", name)
    assert os.fsencode(document["file"]) == name


def test_an_ascii_terminal_is_no_reason_to_fail(command: Command) -> None:
    image = command.image("é.raw")
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    words = command.arguments("template", "check", "--format", "raw", image)

    finished = subprocess.run(words, env={**os.environ, **locale}, capture_output=True, timeout=60, check=False)

    assert (finished.returncode, finished.stderr) == (0, b"")
    assert b"acceptable as raw" in finished.stdout


@pytest.mark.parametrize("words", [("template", "list"), ("--json", "disk", "list"), ("--help",), ("doctor",)])
def test_a_reader_that_has_enough_is_no_reason_for_a_traceback(command: Command, words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        finished = subprocess.run(
            command.arguments(*words), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(writer)

    assert (finished.returncode, finished.stderr) == (1, "")


def test_no_streams_at_all_are_no_reason_to_fail(command: Command) -> None:
    words = " ".join(str(word) for word in command.arguments("template", "list"))

    assert subprocess.run(["sh", "-c", f"{words} <&- >&- 2>&-"], timeout=60, check=False).returncode == 0


def test_a_template_that_vanished_is_told(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.image())
    command.done("disk", "create", "vm1", "disk", "--template", "base")
    (command.instances / "_base" / "base").unlink()

    made = command.run("disk", "create", "vm1", "disk2", "--template", "base")
    listed = command.json("template", "list")

    assert made.returncode == 1
    assert "the template's file is gone" in one_message(made)
    assert [each["name"] for each in listed["damaged"]] == ["base"]
    assert not (command.instances / "vm1" / "disk2").exists()


def test_a_disk_in_use_cannot_be_snapshotted(command: Command) -> None:
    made = command.json("disk", "create", "vm1", "disk", "--blank", "--size", "8M")

    with held("qcow2", made["path"]):
        finished = command.run("disk", "snapshot", "create", "vm1", "disk", "first")

    assert finished.returncode == 5
    assert "is in use" in one_message(finished)
    assert command.json("disk", "show", "vm1", "disk")["snapshots"] == []
