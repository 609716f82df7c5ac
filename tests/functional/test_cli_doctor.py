# SPDX-License-Identifier: Apache-2.0
"""``imagebackend doctor`` on this machine, and on one that lacks something."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.functional.cli_command import Command
from tools import private_libvirtd


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def by_check(document: Any) -> dict[str, str]:
    return {each["check"]: each["status"] for each in document["findings"]}


def test_a_host_with_everything_is_fit(command: Command, libvirtd: Path, virt_type: str) -> None:
    command.configure("[libvirt]", f"virt_type = {virt_type}")
    uri = private_libvirtd.uri(libvirtd, "qemu")

    finished = command.run("doctor", "--connect", uri)
    found = by_check(command.json("doctor", "--connect", uri))

    assert finished.returncode == 0, finished
    assert "error" not in found.values()
    assert found["tool qemu-img"] == found["libvirt"] == found["emulator"] == "ok"
    assert "errors: 0" in finished.stdout
    assert not command.instances.exists()


def test_a_host_without_kvm_is_told_of_emulation(command: Command, libvirtd: Path) -> None:
    command.configure("[libvirt]", "virt_type = qemu")

    document = command.json("doctor", "--connect", private_libvirtd.uri(libvirtd, "qemu"))

    emulator = next(each for each in document["findings"] if each["check"] == "emulator")
    assert emulator["status"] == "ok"
    assert "runs qemu guests" in emulator["message"]


def test_a_host_for_containers(command: Command, libvirtd: Path) -> None:
    command.configure("[libvirt]", "virt_type = lxc")

    found = by_check(command.json("doctor", "--connect", private_libvirtd.uri(libvirtd, "lxc")))

    assert found["libvirt"] == "ok"
    assert "emulator" not in found


def test_a_libvirt_that_was_asked_for_and_is_not_there_is_an_error(command: Command) -> None:
    finished = command.run("doctor", "--connect", "qemu:///system?socket=/nowhere")

    assert finished.returncode == 1
    assert "error    libvirt: cannot be reached at qemu:///system?socket=/nowhere" in finished.stdout
    assert finished.stderr == ""


def test_wrong_values_are_all_told(command: Command) -> None:
    command.configure("use_cow_images = perhaps", "[libvirt]", "disk_cachemodes = file=fast", "images_type = zfs")

    finished = command.run("doctor")

    assert finished.returncode == 1
    for name in ("[DEFAULT] use_cow_images", "[libvirt] disk_cachemodes", "[libvirt] images_type"):
        assert f"error    {name}: " in finished.stdout


def test_a_file_system_that_shares_blocks_is_seen(xfs_folder: Path, ext4_folder: Path, tmp_path: Path) -> None:
    on_xfs, on_ext4 = Command(tmp_path, xfs_folder), Command(tmp_path, ext4_folder)
    reflinks = {}
    for name, command in (("xfs", on_xfs), ("ext4", on_ext4)):
        command.configure("use_cow_images = false")
        found = by_check(command.json("doctor"))
        reflinks[name] = found["reflink"]
        assert found["direct I/O"] == found["locks"] == "ok"

    assert reflinks == {"xfs": "ok", "ext4": "warning"}
    assert os.listdir(xfs_folder) == os.listdir(ext4_folder) == []


def test_a_file_system_that_is_full_or_read_only_is_an_error(small_tmpfs: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, small_tmpfs)
    filler = small_tmpfs / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], check=False, capture_output=True, timeout=60)
    full = by_check(command.json("doctor"))
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_tmpfs], check=True, timeout=60)

    read_only = by_check(command.json("doctor"))

    assert (full["space"], full["direct I/O"]) == ("error", "warning")
    assert read_only[f"[DEFAULT] instances_path {small_tmpfs}"] == "error"
    assert "space" not in read_only


def test_a_missing_tool_is_named_with_its_package(command: Command) -> None:
    # In a mount namespace of its own, where the tool is an empty file that cannot be run.
    hide = 'mount --bind /dev/null /usr/bin/qemu-img && mount --bind /dev/null /usr/sbin/mkfs.ntfs && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", hide, "sh", *command.arguments("doctor")]

    finished = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    assert finished.returncode == 1
    assert "error    tool qemu-img: not found in" in finished.stdout
    assert "install the package qemu-utils" in finished.stdout
    assert "ok       tool mkfs.ntfs: not installed" in finished.stdout
