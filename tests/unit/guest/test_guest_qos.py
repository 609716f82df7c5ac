# SPDX-License-Identifier: Apache-2.0
"""Limits on I/O from a flavor's extra specs."""

from __future__ import annotations

import logging

import pytest

from imagebackend import exceptions
from imagebackend.guest import LibvirtConfigGuestDisk, disk_qos
from tests.golden.cases import disk

LIMITS = [f"{which}_{unit}_sec" for which in ("read", "write", "total") for unit in ("bytes", "iops")]


@pytest.mark.parametrize("limit", LIMITS)
def test_rate_burst_and_length_are_set(limit: str) -> None:
    limited = disk()
    specs = {f"quota:disk_{limit}": "10", f"quota:disk_{limit}_max": "20", f"quota:disk_{limit}_max_length": "3"}
    disk_qos(limited, specs)
    expected = {f"disk_{limit}": 10, f"disk_{limit}_max": 20, f"disk_{limit}_max_length": 3}
    assert limited == disk(**expected)
    assert LibvirtConfigGuestDisk.parse(limited.to_xml()) == limited


def test_size_of_operations_and_group() -> None:
    limited = disk()
    specs = {"quota:disk_total_iops_sec": 5, "quota:disk_size_iops_sec": "4096", "quota:disk_group_name": "all"}
    disk_qos(limited, specs)
    assert limited == disk(disk_total_iops_sec=5, disk_size_iops_sec=4096, disk_group_name="all")


def test_zero_is_no_limit() -> None:
    limited = disk(disk_total_bytes_sec=7)
    disk_qos(limited, {"quota:disk_total_bytes_sec": "0", "quota:disk_read_bytes_sec": "5"})
    assert limited == disk(disk_read_bytes_sec=5)


def test_read_and_write_in_bytes_go_with_total_in_operations() -> None:
    limited = disk()
    disk_qos(limited, {"quota:disk_read_bytes_sec": "5", "quota:disk_total_iops_sec": "6"})
    assert limited == disk(disk_read_bytes_sec=5, disk_total_iops_sec=6)


def test_other_keys_are_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    limited = disk()
    disk_qos(limited, {"quota:cpu_shares": "x", "hw:disk_total_bytes_sec": "x", "disk_total_bytes_sec": "x"})
    assert limited == disk()
    assert caplog.records == []


def test_unknown_limit_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    limited = disk()
    disk_qos(limited, {"quota:disk_io_limit": "5"})
    assert limited == disk()
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "quota:disk_io_limit is not a limit that libvirt has; it is ignored")
    ]


@pytest.mark.parametrize(
    "value",
    [
        *("", " 5", "+5", "-1", "5.0", "1_000", "0x10", "1e3", "٣", "5\n", "1000000000000001", "9" * 17),
        -1,
        1.5,
        True,
        None,
    ],
)
def test_value_that_is_no_limit_is_refused(value: object) -> None:
    limited = disk()
    with pytest.raises(exceptions.InvalidArgument) as caught:
        disk_qos(limited, {"quota:disk_total_iops_sec": 5, "quota:disk_read_bytes_sec": value})
    assert str(caught.value).startswith(f"quota:disk_read_bytes_sec={value!a}: a whole number")
    assert limited == disk()


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"total_bytes_sec": 9, "read_bytes_sec": 8},
            "quota:disk_total_bytes_sec=9: excludes quota:disk_read_bytes_sec=8",
        ),
        (
            {"total_iops_sec": 9, "write_iops_sec": 8},
            "quota:disk_total_iops_sec=9: excludes quota:disk_write_iops_sec=8",
        ),
        ({"read_bytes_sec_max": 9}, "quota:disk_read_bytes_sec_max=9: needs quota:disk_read_bytes_sec"),
        (
            {"total_iops_sec": 9, "total_iops_sec_max": 8},
            "quota:disk_total_iops_sec_max=8: is below quota:disk_total_iops_sec=9",
        ),
        ({"total_iops_sec": 9, "total_iops_sec_max_length": 8}, "quota:disk_total_iops_sec_max_length=8: needs"),
        (
            {"total_bytes_sec": 1, "total_bytes_sec_max": 10**14, "total_bytes_sec_max_length": 11},
            "quota:disk_total_bytes_sec_max_length=11: too long for",
        ),
        ({"total_bytes_sec": 9, "size_iops_sec": 512}, "quota:disk_size_iops_sec=512: needs a limit on iops"),
        ({"group_name": ""}, "quota:disk_group_name: the string is empty"),
        ({"group_name": "a\x01"}, "quota:disk_group_name: XML cannot carry"),
        ({"group_name": 5}, "quota:disk_group_name: a string is needed"),
    ],
)
def test_limits_that_contradict_are_refused(specs: dict[str, object], message: str) -> None:
    limited = disk()
    with pytest.raises(exceptions.InvalidArgument) as caught:
        disk_qos(limited, {f"quota:disk_{name}": value for name, value in specs.items()})
    assert message in str(caught.value)
    assert limited == disk()
