# SPDX-License-Identifier: Apache-2.0
"""Which cache mode and which I/O mode a disk gets."""

from __future__ import annotations

import pytest

from imagebackend import exceptions
from imagebackend.guest import choose_cache_mode, choose_io_mode, parse_disk_cachemodes


def test_entries_are_read() -> None:
    entries = ["file=directsync", " block = none ", "network=writeback", "mount=default", "file=directsync"]
    expected = {"file": "directsync", "block": "none", "network": "writeback", "mount": "default"}
    assert parse_disk_cachemodes(entries) == expected
    assert parse_disk_cachemodes([]) == {}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "'' is not TYPE=MODE"),
        ("file", "'file' is not TYPE=MODE"),
        ("file:none", "'file:none' is not TYPE=MODE"),
        ("=none", "type '' is not one of file, block, network, mount"),
        ("tape=none", "type 'tape' is not one of"),
        ("file=", "mode '' is not one of default, none"),
        ("file=fast", "mode 'fast' is not one of"),
        ("file=none=none", "mode 'none=none' is not one of"),
        ("block=writeback", "block is both none and writeback"),
    ],
)
def test_bad_entry_names_the_option(entry: str, message: str) -> None:
    with pytest.raises(exceptions.InvalidConfiguration) as caught:
        parse_disk_cachemodes(["block=none", entry])
    assert caught.value.option == "[libvirt] disk_cachemodes"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source_type", "direct_io", "shareable", "expected"),
    [
        ("file", True, False, "writethrough"),
        ("file", False, False, "writethrough"),
        ("file", False, True, "none"),
        ("block", True, False, "none"),
        ("block", False, False, "writeback"),
        ("block", False, True, "none"),
        ("network", True, False, "none"),
        ("network", False, False, "writeback"),
    ],
)
def test_cache_mode(source_type: str, direct_io: bool, shareable: bool, expected: str) -> None:
    modes = {"file": "writethrough"}
    assert choose_cache_mode(source_type, modes, direct_io=direct_io, shareable=shareable) == expected


@pytest.mark.parametrize(
    ("source_type", "cache_mode", "preallocated", "asked", "expected"),
    [
        ("file", "none", False, None, "threads"),
        ("file", "none", True, None, "native"),
        ("block", "directsync", True, None, "native"),
        ("file", "writeback", True, None, "threads"),
        ("file", "writethrough", True, None, "threads"),
        ("file", "default", True, None, "threads"),
        ("file", "unsafe", True, None, "threads"),
        ("file", "none", False, "native", "native"),
        ("file", "writeback", True, "native", "threads"),
        ("file", "none", True, "threads", "threads"),
        ("file", "none", False, "io_uring", "io_uring"),
        ("file", "writeback", False, "io_uring", "io_uring"),
        ("network", "none", True, "native", None),
        ("network", "writeback", False, None, None),
    ],
)
def test_io_mode(
    source_type: str, cache_mode: str, preallocated: bool, asked: str | None, expected: str | None
) -> None:
    assert choose_io_mode(source_type, cache_mode, preallocated=preallocated, asked=asked) == expected


def test_unknown_io_mode_is_refused() -> None:
    with pytest.raises(exceptions.InvalidArgument, match="io mode 'aio' is not one of native, threads, io_uring"):
        choose_io_mode("network", "none", asked="aio")
