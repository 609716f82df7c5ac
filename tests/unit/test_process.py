# SPDX-License-Identifier: Apache-2.0
"""The door through which every process is started, with real processes behind it."""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator

import pytest

from imagebackend import exceptions, process

MIB = 1 << 20
#: Longer than any test: what runs as long was killed, or the test fails.
FOREVER = "1000"


class Watch:
    """A process that the test looks after through a pidfd, which a pid that is used again cannot fool."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.descriptor = os.pidfd_open(pid)

    def ends(self) -> bool:
        """Wait until it has ended."""
        poll = select.poll()
        poll.register(self.descriptor, select.POLLIN)
        return bool(poll.poll(20_000))

    def close(self) -> None:
        os.close(self.descriptor)


@pytest.fixture
def watches() -> Iterator[list[Watch]]:
    found: list[Watch] = []
    yield found
    for watch in found:
        watch.close()


def watch_pids(watches: list[Watch]):
    def on_output(piece: str) -> None:
        watches.extend(Watch(int(line)) for line in piece.split())

    return on_output


def shell(script: str, **options) -> process.Result:
    return process.run(["sh", "-c", script], **{"timeout": 60, **options})


def test_arguments_reach_the_command_as_they_are():
    hostile = ["$(id)", "`id`", "; exit 1", "a b", "a\nb", "*", "-x", "--", "", "é", "\udcff", "'", '"']
    result = process.run(["printf", "%s\\0", *hostile], timeout=60)
    assert result.stdout.split("\0")[:-1] == [word.replace("\udcff", "\ufffd") for word in hostile]
    assert result.stderr == ""


def test_the_environment_is_named_and_clean(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD_FOR_TEST", "x")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    said = process.run(["env"], timeout=60).stdout.splitlines()
    assert sorted(said) == ["HOME=/", "LC_ALL=C", "MALLOC_ARENA_MAX=2", f"PATH={process.PATH}"]


def test_a_caller_may_add_to_the_environment():
    said = process.run(["env"], timeout=60, environment={"DM_DISABLE_UDEV": "1", "HOME": "/root"}).stdout
    assert {"DM_DISABLE_UDEV=1", "HOME=/root", "LC_ALL=C"} <= set(said.splitlines())


def test_the_environments_path_is_not_where_commands_are_looked_for(monkeypatch, tmp_path):
    for name in ("cat", "imagebackend-own-tool"):
        (tmp_path / name).write_text("#!/bin/sh\necho wrong\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert process.run(["cat"], timeout=60, input=b"right").stdout == "right"
    assert process.find("imagebackend-own-tool") is None
    assert process.find("cat") in ("/usr/bin/cat", "/bin/cat")


def test_a_command_starts_in_the_root_folder_and_in_a_session_of_its_own():
    said = shell("pwd; echo $$; cut -d ' ' -f 5,6 /proc/$$/stat").stdout.split()
    assert said[0] == "/"
    assert said[1] == said[2] == said[3]


def test_a_command_reads_nothing_unless_it_is_given():
    assert shell("readlink /proc/self/fd/0; cat").stdout == "/dev/null\n"


@pytest.mark.parametrize("length", [1, 65536, 65537, 4 * MIB])
def test_a_command_reads_what_it_is_given(length):
    content = (b"0123456789abcdef" * (length // 16 + 1))[:length]
    result = process.run(["cat"], timeout=60, input=content)
    assert result.stdout == content.decode()


def test_a_command_that_does_not_read_its_input_holds_nobody_up():
    assert process.run(["true"], timeout=60, input=b"x" * 4 * MIB).stdout == ""
    with pytest.raises(exceptions.ToolTimeout):
        process.run(["sleep", FOREVER], timeout=0.3, input=b"x" * 4 * MIB)


def test_only_the_descriptors_that_are_named_are_inherited(tmp_path):
    (tmp_path / "file").write_text("content")
    passed = os.open(tmp_path / "file", os.O_RDONLY)
    other = os.open(tmp_path / "file", os.O_RDONLY)
    os.set_inheritable(other, True)
    try:
        result = shell(f"cat /proc/self/fd/{passed}; echo; ls /proc/$$/fd", pass_fds=[passed])
    finally:
        os.close(passed)
        os.close(other)
    content, *descriptors = result.stdout.split()
    assert content == "content"
    assert set(descriptors) == {"0", "1", "2", str(passed)}


def test_limits_are_set_for_the_command():
    limits = process.Limits(cpu_time=7, address_space=512 * MIB)
    said = shell("ulimit -St; ulimit -Ht; ulimit -Sv; ulimit -Hv", limits=limits).stdout.split()
    assert said == ["7", "7", str(512 * 1024), str(512 * 1024)]
    assert shell("ulimit -v").stdout.strip() == "unlimited"


def test_a_command_that_computes_too_long_is_ended():
    with pytest.raises(exceptions.ToolFailed) as caught:
        shell("while :; do :; done", limits=process.Limits(cpu_time=1, address_space=512 * MIB))
    assert caught.value.exit_code in (-signal.SIGKILL, -signal.SIGXCPU)
    assert not isinstance(caught.value, exceptions.ToolTimeout)


def test_a_command_that_takes_too_much_memory_fails():
    command = [sys.executable, "-S", "-c", "bytearray(1 << 30)"]
    with pytest.raises(exceptions.ToolFailed, match="MemoryError"):
        process.run(command, timeout=60, limits=process.Limits(cpu_time=60, address_space=512 * MIB))


def test_the_whole_group_is_killed_at_the_deadline(watches):
    with pytest.raises(exceptions.ToolTimeout) as caught:
        shell(
            f"echo $$; (trap '' TERM HUP; echo $(sh -c 'echo $PPID'); sleep {FOREVER}) & sleep {FOREVER}",
            timeout=1,
            on_output=watch_pids(watches),
        )
    assert (caught.value.seconds, caught.value.command[0], caught.value.exit_code) == (1, "sh", None)
    assert len(watches) == 2
    assert all(watch.ends() for watch in watches)


def test_a_timeout_carries_what_was_said_until_then():
    with pytest.raises(exceptions.ToolTimeout) as caught:
        shell(f"echo reading sector 7 >&2; exec sleep {FOREVER}", timeout=1)
    assert caught.value.stderr == "reading sector 7\n"


def test_a_command_that_closed_its_output_is_killed_at_the_deadline(watches):
    with pytest.raises(exceptions.ToolTimeout):
        shell(f"echo $$; exec >&- 2>&-; exec sleep {FOREVER}", timeout=1, on_output=watch_pids(watches))
    assert watches[0].ends()


def test_what_a_command_leaves_running_is_killed(watches):
    shell(f"sleep {FOREVER} >/dev/null 2>&1 & echo $!", on_output=watch_pids(watches))
    assert watches[0].ends()


@pytest.mark.parametrize("script", ["true", "exit 3", "kill -9 $$", f"sleep {FOREVER}"])
def test_no_zombie_and_no_descriptor_is_left(script):
    pids: list[int] = []
    descriptors = sorted(os.listdir("/proc/self/fd"))

    def on_output(piece: str) -> None:
        pids.extend(int(line) for line in piece.split())

    try:
        shell(f"echo $$; {script}", timeout=1, on_output=on_output, input=b"input")
    except exceptions.ToolFailed:
        assert script != "true"
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], os.WNOHANG)


@pytest.mark.parametrize(
    ("script", "exit_code", "text"),
    [
        ("echo out; echo no such disk >&2; exit 3", 3, r"sh failed \(exit status 3\): no such disk"),
        ("kill -9 $$", -9, r"sh failed \(killed by signal 9\)"),
        ("kill -SEGV $$", -11, r"sh failed \(killed by signal 11\)"),
    ],
)
def test_a_failure_carries_its_facts(script, exit_code, text):
    with pytest.raises(exceptions.ToolFailed, match=text) as caught:
        shell(script)
    assert caught.value.exit_code == exit_code
    assert caught.value.command == ["sh", "-c", script]


def test_other_statuses_may_be_success():
    assert shell("echo compared; exit 1", success=(0, 1)).stdout == "compared\n"
    with pytest.raises(exceptions.ToolFailed):
        shell("exit 0", success=(1,))


def test_silent_takes_any_word_on_stderr_for_a_failure():
    assert shell("echo warning >&2").stderr == "warning\n"
    assert shell("echo; echo >&2", silent=True).stdout == "\n"
    with pytest.raises(exceptions.ToolFailed, match=r"it reported a problem.*: could not flush") as caught:
        shell("echo could not flush >&2", silent=True)
    assert caught.value.exit_code == 0


def test_secrets_are_masked_wherever_a_command_is_shown(caplog):
    secrets = ["pass", "pass-phrase", ""]
    said = "opening with pass-phrase and pass"
    caplog.set_level(logging.DEBUG, "imagebackend")
    with pytest.raises(exceptions.ToolFailed) as failed:
        process.run(["sh", "-c", 'echo "$0" >&2; exit 1', said], timeout=60, secrets=secrets)
    with pytest.raises(exceptions.ToolTimeout) as timed_out:
        process.run(["sh", "-c", f'echo "$0" >&2; sleep {FOREVER}', said], timeout=1, secrets=secrets)
    with pytest.raises(exceptions.ToolMissing) as missing:
        process.run(["no-such-tool", said], timeout=60, secrets=secrets)
    for error in (failed.value, timed_out.value, missing.value):
        assert error.command[-1] == "opening with *** and ***"
        shown = "".join(traceback.format_exception(error)).partition("\nimagebackend.")[2] + repr(error.__cause__)
        assert "pass" not in shown + error.stderr + str(error)
    assert failed.value.stderr == timed_out.value.stderr == "opening with *** and ***\n"
    assert "opening with *** and ***" in caplog.text
    assert "pass-phrase" not in caplog.text


def test_names_that_are_not_utf_8_can_be_logged(caplog):
    caplog.set_level(logging.DEBUG, "imagebackend")
    process.run(["true", "disk\udcff"], timeout=60)
    assert caplog.text.encode().count(rb"disk\udcff") == 1


def test_what_stderr_shows_is_cut():
    with pytest.raises(exceptions.ToolFailed) as caught:
        shell("head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1")
    assert caught.value.stderr == "x" * 4096


@pytest.mark.parametrize("stream", ["", " >&2"])
def test_a_command_that_never_stops_writing_is_killed(stream, watches):
    with pytest.raises(exceptions.ToolFailed, match=f"more than {16 * MIB} bytes") as caught:
        shell(f"exec cat /dev/zero {stream}")
    assert caught.value.exit_code is None


def test_output_that_is_not_text_is_shown_all_the_same():
    assert shell(r"printf '\377ok'").stdout == "\ufffdok"


def test_a_missing_command_names_its_package():
    with pytest.raises(exceptions.ToolMissing, match=r"no-such-tool.*install the package its-package") as caught:
        process.run(["no-such-tool", "-x"], timeout=60, package="its-package")
    assert (caught.value.package, caught.value.command) == ("its-package", ["no-such-tool", "-x"])


def test_a_command_that_cannot_be_started_is_a_failure_of_the_command():
    with pytest.raises(exceptions.ToolFailed, match="cannot be started: Argument list too long"):
        process.run(["true", "x" * 200_000], timeout=60)


def test_output_is_passed_on_while_the_command_runs(tmp_path):
    """The command goes on only when what it wrote has arrived."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    pieces: list[str] = []

    def on_output(piece: str) -> None:
        pieces.append(piece)
        if piece == "one\n":
            gate.write_text("go")

    result = shell(f"echo one; cat {gate} >/dev/null; echo two", on_output=on_output)
    assert "".join(pieces) == result.stdout == "one\ntwo\n"


@pytest.mark.parametrize(
    "script",
    [
        f"exec sleep {FOREVER}",
        "while :; do echo still busy >&2; done",
        f"exec 1>&-; exec sleep {FOREVER}",
    ],
    ids=["silent", "talks on stderr only", "closed its output"],
)
def test_a_command_that_writes_nothing_can_be_cancelled(script, watches):
    def on_output(piece: str) -> None:
        if piece:
            watches.append(Watch(int(piece)))
        else:
            raise exceptions.Cancelled

    with pytest.raises(exceptions.Cancelled):
        shell(f"echo $$; {script}", on_output=on_output)
    assert watches[0].ends()


def test_an_exception_while_output_is_passed_on_kills_the_command(watches):
    class Stop(Exception):
        pass

    def on_output(piece: str) -> None:
        watches.append(Watch(int(piece)))
        raise Stop

    with pytest.raises(Stop):
        shell(f"echo $$; exec sleep {FOREVER}", on_output=on_output)
    assert watches[0].ends()


@pytest.mark.parametrize("limits", ["None", "process.Limits(60, 1 << 30)"])
def test_a_command_dies_with_the_process_that_started_it(limits, watches):
    script = f"""
from imagebackend import process
process.run(["sh", "-c", "echo $$; exec sleep {FOREVER}"], timeout=600, limits={limits},
            on_output=lambda piece: print(piece, end="", flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        watches.append(Watch(int(parent.stdout.readline())))
        parent.kill()
    assert watches[0].ends()


def test_a_command_that_completes_outlives_the_process_that_started_it(tmp_path, watches):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    command = f"echo $$; cat {gate} >/dev/null; echo nobody; echo reads >&2; touch {tmp_path}/done"
    script = f"""
from imagebackend import process
process.run(["sh", "-c", {command!r}], timeout=600, completes=True,
            on_output=lambda piece: print(piece, end="", flush=True))
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        watches.append(Watch(int(parent.stdout.readline())))
        parent.kill()
    gate.write_text("go")
    assert watches[0].ends()
    assert (tmp_path / "done").exists()


def test_threads_may_run_commands_side_by_side():
    said: dict[int, str] = {}

    def run(number: int) -> None:
        said[number] = process.run(["cat"], timeout=60, input=str(number).encode() * 1000).stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: str(number) * 1000 for number in range(16)}
