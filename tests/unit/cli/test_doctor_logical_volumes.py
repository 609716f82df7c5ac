# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of a volume group: LVM is not asked."""

from __future__ import annotations

import dataclasses

import pytest

import imagebackend
from imagebackend import exceptions
from imagebackend.cli.doctor.logical_volumes import Group, judge_group
from imagebackend.storage.lvm2 import Volume

POOL = Volume("pool", "u", 1 << 30, frozenset(), "thin-pool", "", "", True, False, False, 10.0, 5.0, 1 << 22)


@pytest.mark.parametrize(
    ("options", "found", "statuses", "said"),
    [
        ({}, Group(), ["ok"], "vg: 0 volumes"),
        ({}, Group(failure=exceptions.InvalidConfiguration("o", "no vg")), ["error"], "no vg"),
        ({"images_thin_pool": "pool"}, Group((POOL,)), ["ok", "ok"], "10.0 % of its data and 5.0 %"),
        ({"images_thin_pool": "pool"}, Group(), ["ok", "error"], "there is no pool"),
        ({"images_thin_pool": "pool", "images_thin_pool_size": 3}, Group(), ["ok", "ok"], "made with 3 GiB"),
        (
            {"images_thin_pool": "pool"},
            Group((dataclasses.replace(POOL, kind="linear"),)),
            ["ok", "error"],
            "pool is a linear volume",
        ),
        (
            {"images_thin_pool": "pool"},
            Group((dataclasses.replace(POOL, data_percent=None),)),
            ["ok", "warning"],
            "not active",
        ),
        (
            {"images_thin_pool": "pool"},
            Group((dataclasses.replace(POOL, data_percent=95.1),)),
            ["ok", "error"],
            "no disk is made any more",
        ),
        (
            {"images_thin_pool": "pool"},
            Group((dataclasses.replace(POOL, metadata_percent=90.1),)),
            ["ok", "error"],
            "no disk is made any more",
        ),
    ],
)
def test_what_is_said_of_a_volume_group(
    options: dict[str, object], found: Group, statuses: list[str], said: str
) -> None:
    conf = imagebackend.load_config()
    for name, value in {"images_volume_group": "vg", **options}.items():
        conf.set_override(name, value, group="libvirt")

    findings = judge_group(found, conf)

    assert [each.status for each in findings] == statuses
    assert said in findings[-1].message


def test_encryption_needs_its_tool() -> None:
    conf = imagebackend.load_config()
    conf.set_override("enabled", True, group="ephemeral_storage_encryption")

    assert [each.status for each in judge_group(Group(cryptsetup=False), conf)] == ["ok", "error"]
    assert [each.status for each in judge_group(Group(), conf)] == ["ok"]
