# SPDX-License-Identifier: Apache-2.0
"""The exit status tells errors apart."""

from __future__ import annotations

import inspect

import pytest

from imagebackend import exceptions
from imagebackend.cli.exit_status import TABLE, status_of
from tests.unit.cli.conftest import Command

EXPECTED = {
    "ImageBackendError": 1,
    "AlreadyExists": 4,
    "Busy": 5,
    "Cancelled": 130,
    "ChecksumMismatch": 1,
    "Corrupt": 1,
    "CorruptDisk": 1,
    "CorruptRecord": 1,
    "CorruptTemplate": 1,
    "DiskExists": 4,
    "DiskInUse": 5,
    "DiskNotFound": 3,
    "DiskTooSmall": 1,
    "FetchDenied": 1,
    "FetchFailed": 1,
    "FetchTimeout": 8,
    "ImageUnacceptable": 1,
    "InsufficientSpace": 6,
    "InvalidArgument": 2,
    "InvalidConfiguration": 7,
    "InvalidName": 2,
    "InvalidSize": 2,
    "LockTimeout": 5,
    "NotFound": 3,
    "PermissionDenied": 1,
    "SignatureInvalid": 1,
    "SnapshotExists": 4,
    "SnapshotNotFound": 3,
    "StorageTimeout": 8,
    "StorageError": 1,
    "TemplateExists": 4,
    "TemplateInUse": 5,
    "TemplateNotFound": 3,
    "TimedOut": 8,
    "ToolFailed": 1,
    "ToolMissing": 1,
    "ToolTimeout": 8,
    "Unsupported": 1,
}


def test_every_error_of_the_library_has_its_exit_status() -> None:
    errors = {
        name: error
        for name, error in inspect.getmembers(exceptions, inspect.isclass)
        if issubclass(error, exceptions.ImageBackendError)
    }

    found = {name: status_of(error.__new__(error)) for name, error in errors.items()}

    assert found == EXPECTED


def test_an_error_that_nobody_foresaw_is_a_failure() -> None:
    assert status_of(RuntimeError()) == 1


def test_each_number_has_one_meaning() -> None:
    codes = [status.code for status in TABLE]

    assert codes == sorted(set(codes))


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_help_shows_the_table(command: Command, option: str) -> None:
    shown = " ".join(command.done(option).split())

    for status in TABLE:
        assert f"{status.code} {status.meaning}" in shown
