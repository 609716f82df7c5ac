# SPDX-License-Identifier: Apache-2.0
"""The command ``imagebackend`` on disks and templates in a Ceph pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rbd

from tests.functional.cli_command import MIB, Command
from tools import private_libvirtd
from tools.private_ceph import Cluster

SECRET = "6b2f7f3e-0c5b-4b59-8a4e-8b1d2a7f9c31"


@pytest.fixture
def command(tmp_path: Path, ceph: Cluster, rbd_pool: str) -> Command:
    command = Command(tmp_path)
    configure(command, ceph, rbd_pool)
    return command


def configure(command: Command, cluster: Cluster, pool: str, *lines: str) -> None:
    rbd = [
        "[libvirt]",
        "images_type = rbd",
        f"images_rbd_pool = {pool}",
        f"images_rbd_ceph_conf = {cluster.configuration}",
    ]
    command.configure(*rbd, *lines)


def findings(command: Command, *words: str) -> dict[str, dict[str, Any]]:
    return {each["check"]: each for each in command.json("doctor", *words)["findings"]}


def test_the_doctor_tries_the_pool_and_leaves_nothing(command: Command) -> None:
    found = findings(command)

    assert found["Ceph pool"]["status"] == found["QEMU's rbd driver"]["status"] == "ok"
    assert "an image was made and removed" in found["Ceph pool"]["message"]
    assert found["Ceph monitors"]["status"] == "warning"
    assert command.json("disk", "list") == {"disks": []}


def test_the_doctor_tells_what_is_wrong_with_ceph(
    command: Command, ceph: Cluster, ceph_cephx: Cluster, rbd_pool: str, libvirtd: Path
) -> None:
    configure(command, ceph, "no-such-pool")
    found = findings(command)
    assert found["[libvirt] images_rbd_pool"]["status"] == "error"
    assert "rbd pool init" in found["[libvirt] images_rbd_pool"]["message"]

    configure(command, ceph_cephx, rbd_pool, "rbd_user = nobody", f"rbd_secret_uuid = {SECRET}", "virt_type = qemu")
    found = findings(command, "--connect", private_libvirtd.uri(libvirtd, "qemu"))
    assert found["[libvirt] rbd_user"]["status"] == "error"
    assert found["[libvirt] rbd_secret_uuid"]["status"] == "error"
    assert SECRET in found["[libvirt] rbd_secret_uuid"]["message"]


def test_a_disk_in_ceph_is_made_shown_and_removed(command: Command, rbd_pool: str) -> None:
    command.done("template", "add", "--name", "debian", command.image())
    command.done("disk", "create", "guest", "disk", "--template", "debian", "--size", "16M")

    shown = command.json("disk", "show", "guest", "disk")
    assert (shown["type"], shown["size"], shown["template"]) == ("rbd", 16 * MIB, "debian")
    assert (shown["allocated"], shown["in_use"]) == (0, False)
    assert f'<source protocol="rbd" name="{rbd_pool}/guest_disk">' in command.done("disk", "xml", "guest", "disk")
    command.done("disk", "flatten", "guest", "disk")
    shown = command.json("disk", "show", "guest", "disk")
    assert shown["template"] is None
    assert shown["allocated"] > 0
    command.done("disk", "remove", "guest", "disk")
    assert command.json("disk", "list") == {"disks": []}


def test_templates_in_the_pool_are_made_ahead_listed_and_removed(
    command: Command, ceph: Cluster, rbd_pool: str
) -> None:
    command.done("template", "add", "--name", "debian", command.image())
    assert command.json("template", "native", "list") == {"type": "rbd", "templates": []}

    finished = command.run("template", "native", "prepare", "debian")
    assert (finished.returncode, finished.stdout) == (0, "template debian is in the store\n")
    assert "Importing debian: 100 % of 8 MiB" in finished.stderr
    command.done("disk", "create", "guest", "disk", "--template", "debian")
    (listed,) = command.json("template", "native", "list")["templates"]
    assert (listed["name"], listed["virtual_size"]) == ("debian", 8 * MIB)
    assert [user["instance"] for user in listed["users"]] == ["guest"]
    assert "debian  8 MiB" in command.done("template", "native", "list")
    refused = command.run("template", "native", "remove", "debian")
    assert (refused.returncode, refused.stdout) == (5, "")

    command.done("disk", "remove", "guest", "disk")
    with ceph.connect() as connection, connection.open_ioctx(rbd_pool) as context:
        rbd.RBD().create(context, "partial:template:fedora", MIB)
    assert command.done("template", "native", "sweep") == "partial:template:fedora removed\n"
    assert command.done("template", "native", "sweep") == ""
    command.done("template", "native", "remove", "debian")
    assert command.run("template", "native", "remove", "debian").returncode == 3
    assert command.json("template", "native", "list")["templates"] == []
    assert [each["name"] for each in command.json("template", "list")["templates"]] == ["debian"]


def test_disks_in_files_have_no_templates_elsewhere(command: Command) -> None:
    finished = command.run("template", "native", "list", "--type", "qcow2")

    assert finished.returncode == 1
    assert "made from the cache" in finished.stderr
