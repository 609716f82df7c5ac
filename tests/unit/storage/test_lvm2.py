# SPDX-License-Identifier: Apache-2.0
"""Which names LVM and device-mapper take. What the commands do is in tests/lvm."""

from __future__ import annotations

import pytest

from imagebackend import exceptions
from imagebackend.storage import lvm2


@pytest.mark.parametrize("name", ["disk", "a_b", "template+debian-12+1f", ".x", "+x", "x-snapshot", "a__b_c.local"])
def test_names_that_lvm_takes(name: str) -> None:
    assert lvm2.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-x", "a b", "a/b", "a\n", "é", "a:b", "snapshot1", "pvmove0", "x_tdata", "x_rimage_0", "a@b", "a,b"]
)
def test_names_that_it_does_not_take(name: str) -> None:
    with pytest.raises(exceptions.InvalidName):
        lvm2.check_name(name)


def test_hyphens_count_twice_in_the_name_of_a_device() -> None:
    assert lvm2.device_name("vg-1", "a-b_c") == "vg--1-a--b_c"
    assert len(lvm2.device_name("vg", "x" * 118)) == 121
    for name in ("x" * 119, "-".join("x" * 41)):
        with pytest.raises(exceptions.InvalidName, match="counting twice"):
            lvm2.device_name("vg", name)


@pytest.mark.parametrize("tag", ["", "-x", "a b", "a,b", "a\n", "é", "x" * 1025, '"', "a'b"])
def test_tags_that_lvm_does_not_take(tag: str) -> None:
    with pytest.raises(exceptions.InvalidName):
        lvm2.VolumeGroup("vg", timeout=1).publish("x", drop_tags=[tag])
