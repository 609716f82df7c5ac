# SPDX-License-Identifier: Apache-2.0
"""The errors: the tree that users read is the tree that they catch, and errors survive a trip between processes."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from imagebackend import exceptions

CLASSES = [
    value
    for value in vars(exceptions).values()
    if isinstance(value, type) and issubclass(value, exceptions.ImageBackendError)
]

#: One of each, the awkward ones among them: class, arguments, what it must carry.
ERRORS: list[tuple[type[Exception], tuple[Any, ...], dict[str, Any]]] = [
    (exceptions.ImageBackendError, ("text",), {"args": ("text",)}),
    (exceptions.InvalidConfiguration, ("[libvirt] x", "why"), {"option": "[libvirt] x", "reason": "why"}),
    (exceptions.InvalidArgument, ("text",), {"args": ("text",)}),
    (exceptions.InvalidName, ("disk", "\udcff\n", "why"), {"kind": "disk", "name": "\udcff\n", "reason": "why"}),
    (exceptions.InvalidSize, (-1, "why"), {"size": -1, "reason": "why"}),
    (exceptions.NotFound, ("n",), {"name": "n", "kind": "object"}),
    (exceptions.DiskNotFound, ("n", "hint"), {"name": "n", "kind": "disk"}),
    (exceptions.TemplateNotFound, ("n", "hint"), {"name": "n", "kind": "template"}),
    (exceptions.SnapshotNotFound, ("n",), {"name": "n", "kind": "snapshot"}),
    (exceptions.AlreadyExists, ("n",), {"name": "n", "kind": "object"}),
    (exceptions.DiskExists, ("n", "hint"), {"name": "n", "kind": "disk"}),
    (exceptions.TemplateExists, ("n",), {"name": "n", "kind": "template"}),
    (exceptions.SnapshotExists, ("n",), {"name": "n", "kind": "snapshot"}),
    (exceptions.Busy, ("n", "why"), {"name": "n", "reason": "why"}),
    (exceptions.DiskInUse, ("n", "why"), {"name": "n", "reason": "why", "kind": "disk"}),
    (exceptions.TemplateInUse, ("n", ["a", "b"]), {"name": "n", "users": ["a", "b"], "kind": "template"}),
    (exceptions.Unsupported, ("op", "why"), {"operation": "op", "reason": "why"}),
    (exceptions.DiskTooSmall, ("n", 1, 2, "why"), {"name": "n", "size": 1, "required": 2, "reason": "why"}),
    (exceptions.ImageUnacceptable, ("i", "why"), {"image": "i", "reason": "why"}),
    (exceptions.Corrupt, ("/p", "why"), {"path": "/p", "reason": "why"}),
    (exceptions.CorruptRecord, ("/p", "why"), {"path": "/p", "reason": "why"}),
    (exceptions.CorruptTemplate, ("/p", "why", ["a"]), {"path": "/p", "damage": "why", "users": ["a"]}),
    (exceptions.CorruptDisk, ("/p", "why"), {"path": "/p", "reason": "why"}),
    (exceptions.StorageError, ("/p", "why", errno.EIO), {"path": "/p", "reason": "why", "errno": errno.EIO}),
    (exceptions.InsufficientSpace, ("/p",), {"path": "/p", "required": None, "errno": errno.ENOSPC}),
    (exceptions.InsufficientSpace, ("/p", 5, 4), {"required": 5, "available": 4, "errno": errno.ENOSPC}),
    (exceptions.PermissionDenied, ("/p",), {"path": "/p", "errno": errno.EACCES}),
    (exceptions.PermissionDenied, ("/p", errno.EROFS), {"path": "/p", "errno": errno.EROFS}),
    (exceptions.FetchFailed, ("url", "why"), {"source": "url", "reason": "why"}),
    (exceptions.FetchDenied, ("url", "why"), {"source": "url", "reason": "why"}),
    (exceptions.SignatureInvalid, ("url", "why"), {"source": "url", "reason": "why"}),
    (
        exceptions.ChecksumMismatch,
        ("url", "md5", "aa", "bb"),
        {"source": "url", "algorithm": "md5", "expected": "aa", "actual": "bb"},
    ),
    (exceptions.ToolFailed, (("t", "-x"), 1, "said"), {"command": ["t", "-x"], "exit_code": 1, "stderr": "said"}),
    (exceptions.ToolFailed, (["t"], -9, "", ""), {"command": ["t"], "exit_code": -9, "stderr": ""}),
    (exceptions.ToolMissing, (["t"], "pkg"), {"command": ["t"], "package": "pkg", "exit_code": None}),
    (exceptions.TimedOut, ("w", 1.5), {"what": "w", "seconds": 1.5}),
    (exceptions.LockTimeout, ("/p", 2), {"name": "/p", "seconds": 2, "reason": "locked"}),
    (
        exceptions.StorageTimeout,
        ("/p", 2),
        {"path": "/p", "seconds": 2, "reason": "no answer", "errno": errno.ETIMEDOUT},
    ),
    (
        exceptions.ToolTimeout,
        (["t"], 3, "said"),
        {"command": ["t"], "seconds": 3, "exit_code": None, "stderr": "said"},
    ),
    (exceptions.FetchTimeout, ("url", 4), {"source": "url", "seconds": 4, "reason": "stalled"}),
    (exceptions.Cancelled, (), {"args": ()}),
]


def drawn_tree() -> Iterator[tuple[str, str]]:
    """Yield (parent, child) of every branch in the drawing."""
    assert exceptions.__doc__ is not None
    path: list[str] = []
    for line in exceptions.__doc__.splitlines():
        if "── " in line:
            start = line.index("── ") + 3
            depth = (start - 4) // 4
            path[depth:] = [line[start:].split()[0]]
            yield path[depth - 1], path[depth]
        elif line.strip() == "ImageBackendError":
            path = ["ImageBackendError"]


def test_the_tree_that_is_drawn_is_the_tree():
    drawn = list(drawn_tree())
    # A class that has two parents among these stands under the first.
    real = [(error.__bases__[0].__name__, error.__name__) for error in CLASSES[1:]]
    assert sorted(drawn) == sorted(real)
    assert len(drawn) == len(set(drawn)) == len(CLASSES) - 1


def test_every_class_is_public_and_has_a_docstring():
    assert sorted(exceptions.__all__) == sorted([error.__name__ for error in CLASSES] + ["storage_error"])
    assert [error.__name__ for error in CLASSES if not inspect.getdoc(error)] == []


def test_every_class_is_in_the_table_below():
    assert {error for error, _, _ in ERRORS} == set(CLASSES)


@pytest.mark.parametrize(("error_class", "arguments", "facts"), ERRORS)
def test_errors_carry_their_facts(error_class, arguments, facts):
    error = error_class(*arguments)
    assert {name: getattr(error, name) for name in facts} == facts
    assert str(error) or error_class is exceptions.Cancelled


@pytest.mark.parametrize(("error_class", "arguments", "facts"), ERRORS)
def test_errors_can_be_copied_and_pickled(error_class, arguments, facts):
    error = error_class(*arguments)
    error.add_note("a note")
    copies = [copy.copy(error), copy.deepcopy(error)]
    copies += [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in copies:
        assert type(other) is error_class
        assert str(other) == str(error)
        assert vars(other) == vars(error)
        assert {name: getattr(other, name) for name in facts} == facts
        assert traceback.format_exception_only(other) == traceback.format_exception_only(error)


def test_an_error_reaches_another_process():
    script = """
import pickle, sys
from imagebackend import exceptions
sys.stdout.buffer.write(pickle.dumps(exceptions.ToolTimeout(["qemu-img", "convert"], 5, "said")))
"""
    written = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60).stdout
    error = pickle.loads(written)
    with pytest.raises(exceptions.ToolFailed, match="qemu-img was killed: gave up after 5 s"):
        raise error
    assert (error.command, error.stderr) == (["qemu-img", "convert"], "said")


@pytest.mark.parametrize(
    ("error_class", "also"),
    [
        (exceptions.InvalidName, ValueError),
        (exceptions.InvalidSize, ValueError),
        (exceptions.LockTimeout, exceptions.Busy),
        (exceptions.StorageTimeout, exceptions.StorageError),
        (exceptions.ToolTimeout, exceptions.ToolFailed),
        (exceptions.FetchTimeout, exceptions.FetchFailed),
    ],
)
def test_some_are_errors_of_two_kinds(error_class, also):
    assert issubclass(error_class, also)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, exceptions.InsufficientSpace),
        (errno.EDQUOT, exceptions.InsufficientSpace),
        (errno.EACCES, exceptions.PermissionDenied),
        (errno.EPERM, exceptions.PermissionDenied),
        (errno.EROFS, exceptions.PermissionDenied),
        (errno.EIO, exceptions.StorageError),
        (errno.ELOOP, exceptions.StorageError),
        (errno.ENAMETOOLONG, exceptions.StorageError),
    ],
)
def test_what_the_operating_system_says_becomes_a_typed_error(number, expected):
    error = exceptions.storage_error(OSError(number, "said", "/there"), "/here")
    assert type(error) is expected
    assert isinstance(error, exceptions.StorageError)
    assert error.path == "/there"
    assert str(error).startswith("/there: ")
    if number != errno.EDQUOT:
        assert error.errno == number


def test_an_os_error_without_a_file_gets_the_one_that_was_worked_on():
    assert exceptions.storage_error(OSError(errno.EIO, "said"), "/here").path == "/here"
    assert exceptions.storage_error(OSError(errno.EIO, "said", 7), "/here").path == "/here"
    assert exceptions.storage_error(OSError("just text"), "/here").reason == "just text"


def test_the_way_out_is_said():
    assert "prune" in str(exceptions.InsufficientSpace("/p"))
    assert "5 bytes needed, 4 available" in str(exceptions.InsufficientSpace("/p", 5, 4))
    assert "install the package qemu-utils" in str(exceptions.ToolMissing(["qemu-img"], "qemu-utils"))
    assert "owner and mode" in str(exceptions.PermissionDenied("/p"))
    assert str(exceptions.DiskNotFound("d", "make it")) == "disk d does not exist: make it"


def test_long_lists_and_values_are_cut():
    assert "and 995 more" in str(exceptions.TemplateInUse("t", [f"disk{number}" for number in range(1000)]))
    assert len(str(exceptions.InvalidName("disk", "x" * 100000, "why"))) < 200
    assert len(str(exceptions.InvalidSize("9" * 100000, "why"))) < 200
    # Python itself refuses to write such a number in decimal.
    assert len(str(exceptions.InvalidSize(10**100000, "why"))) < 200
    assert len(str(exceptions.InvalidName("disk", -(10**100000), "why"))) < 200
