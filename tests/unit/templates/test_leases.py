# SPDX-License-Identifier: Apache-2.0
"""Leases: which disks depend on which template, as links in a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.templates import leases
from imagebackend.templates.leases import Lease, Owner

NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """The folder of leases of a template, which nobody has made yet."""
    return str(tmp_path / "leases" / "template")


def owner(disk: str = "disk", instance: str = "instance", host: str = "host") -> Owner:
    return Owner(instance, disk, host, f"/srv/{instance}/{disk}")


def test_a_lease_is_there_until_it_is_dropped(folder):
    assert leases.read_all(folder, "template") == []
    leases.take(folder, owner())
    leases.take(folder, owner("disk.local"))
    leases.take(folder, owner(instance="another"))
    found = leases.read_all(folder, "template")
    assert found == [
        Lease("template", owner(instance="another")),
        Lease("template", owner()),
        Lease("template", owner("disk.local")),
    ]
    leases.drop(folder, owner())
    assert Lease("template", owner()) not in leases.read_all(folder, "template")
    assert len(leases.read_all(folder, "template")) == 2


def test_taking_and_dropping_may_be_repeated(folder):
    leases.drop(folder, owner())
    leases.take(folder, owner())
    leases.take(folder, owner())
    assert len(leases.read_all(folder, "template")) == 1
    leases.drop(folder, owner())
    leases.drop(folder, owner())
    assert leases.read_all(folder, "template") == []


def test_ls_shows_what_a_lease_says(folder):
    leases.take(folder, owner())
    assert {name: os.readlink(f"{folder}/{name}") for name in os.listdir(folder)} == {
        "instance:disk": "host:/srv/instance/disk"
    }


@settings(max_examples=50, deadline=None)
@given(
    NAME,
    NAME,
    st.sampled_from(["host", "host.example.org", "10.0.0.1", "::1", "fe80::1%eth0", "a:b", "h_1"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=50),
)
def test_any_owner_comes_back(tmp_path_factory, instance, disk, host, path):
    folder = str(tmp_path_factory.mktemp("leases"))
    taken = Owner(instance, disk, host, f"/{path}")
    leases.take(folder, taken)
    assert leases.read_all(folder, "template") == [Lease("template", taken)]
    leases.drop(folder, taken)
    assert os.listdir(folder) == []


def test_threads_may_take_and_drop_side_by_side(folder):
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for part in range(20):
                leases.take(folder, owner(f"disk{number}.{part}"))
                leases.read_all(folder, "template")
                if part % 2:
                    leases.drop(folder, owner(f"disk{number}.{part}"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = {lease.owner.disk for lease in leases.read_all(folder, "template")}
    assert found == {f"disk{number}.{part}" for number in range(8) for part in range(0, 20, 2)}


def test_leases_that_cannot_be_read_are_an_error_not_none(folder):
    os.makedirs(folder)
    Path(folder, "instance:disk").write_text("a copy that followed no links")
    with pytest.raises(exceptions.StorageError):
        leases.read_all(folder, "template")
    shutil.rmtree(folder)
    Path(folder).write_text("a file")
    for act in (
        lambda: leases.read_all(folder, "template"),
        lambda: leases.take(folder, owner()),
        lambda: leases.drop(folder, owner()),
    ):
        with pytest.raises(exceptions.StorageError, match="Not a directory"):
            act()


def test_a_full_file_system_takes_no_lease(small_tmpfs):
    """A link takes an inode and no data: it is inodes that run out."""
    folder = str(small_tmpfs / "leases")
    leases.take(folder, owner("first"))
    subprocess.run(["mount", "-o", "remount,nr_inodes=10", str(small_tmpfs)], check=True)
    taken = ["first"]

    def fill() -> None:
        for number in range(10):
            leases.take(folder, owner(f"other{number}"))
            taken.append(f"other{number}")

    with pytest.raises(exceptions.InsufficientSpace):
        fill()
    assert [lease.owner.disk for lease in leases.read_all(folder, "template")] == taken
    leases.drop(folder, owner("first"))
    leases.take(folder, owner("last"))
