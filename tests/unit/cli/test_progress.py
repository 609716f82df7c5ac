# SPDX-License-Identifier: Apache-2.0
"""Progress, and its end by a signal."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import sys
from collections.abc import Iterator

import pytest

from imagebackend import exceptions
from imagebackend.cli.interruption import Interruption
from imagebackend.cli.progress import Progress

MIB = 1 << 20


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Fetching x", Interruption(), silent=False).shown() as progress:
        for done in range(101):
            progress(done * MIB, 100 * MIB)

    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [f"Fetching x: {tenth * 10} % of 100 MiB" for tenth in range(11)]


def test_an_operation_that_ends_without_a_last_report_is_shown_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", Interruption(), silent=False).shown() as progress:
        progress(1, 100)

    assert capsys.readouterr().err.splitlines()[-1] == "x: 100 % of 100 B"


def test_an_operation_that_fails_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress("x", Interruption(), silent=False).shown() as progress:
            progress(1, 100)
            raise exceptions.Unsupported("x", "y")

    with pytest.raises(exceptions.Unsupported):
        fail()

    assert capsys.readouterr().err.splitlines() == ["x: 1 % of 100 B"]


def test_of_unknown_lengths_the_bytes_done_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", Interruption(), silent=False).shown() as progress:
        for done in (0, 1, 64 * MIB, 65 * MIB, 130 * MIB):
            progress(done, 0)

    assert capsys.readouterr().err.splitlines() == ["x: 0 B", "x: 64 MiB", "x: 130 MiB"]


def test_silent_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", Interruption(), silent=True).shown() as progress:
        progress(1, 2)

    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_one_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("Converting x", Interruption(), silent=False).shown() as progress:
            for total in (100, 200):
                for done in range(0, total + 1, 50):
                    progress(done, total)
    shown = b""
    # The end of a terminal is an error, EIO.
    with contextlib.suppress(OSError):
        while piece := os.read(controller, 65536):
            shown += piece
    os.close(controller)

    lines = [line for line in shown.decode().split("\n") if line]
    assert len(lines) == 2, lines
    assert all("Converting x" in line and "100%" in line for line in lines), lines


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    interruption = Interruption()
    with interruption.handled():
        yield interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_watched_work_at_its_next_report(interruption: Interruption, number: int) -> None:
    steps = []

    def work() -> None:
        with Progress("x", interruption, silent=True).shown() as progress:
            for done in range(3):
                progress(done, 3)
                steps.append(done)
                signal.raise_signal(number)
                steps.append(done)

    with pytest.raises(exceptions.Cancelled):
        work()

    assert steps == [0, 0]
    assert interruption.signal == number
    # Undoing is not to be disturbed by the alarm.
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_ends_unwatched_work_at_once(interruption: Interruption) -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_watched_work_at_once(interruption: Interruption) -> None:
    with interruption.watch():
        signal.raise_signal(signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_work_that_does_not_report_is_ended_by_the_alarm(interruption: Interruption) -> None:
    with interruption.watch():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGALRM)


def test_a_signal_that_comes_when_the_work_is_done_changes_nothing(interruption: Interruption) -> None:
    with interruption.watch():
        signal.raise_signal(signal.SIGTERM)

    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_signals_are_handled_as_before_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]

    with Interruption().handled():
        assert [signal.getsignal(number) for number in numbers] != before

    assert [signal.getsignal(number) for number in numbers] == before
