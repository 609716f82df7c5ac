# SPDX-License-Identifier: Apache-2.0
"""What the other functional tests stand on: the guest, and the libvirtd that runs it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import libvirt
import pytest

from tools import boot, deadline, guest_image, linux_guest, private_libvirtd
from tools.guest_image import ROOT_SAYS, SIZE_SAYS, GuestImage

ROOT = Path(__file__).resolve().parents[2]

DISK = """
<disk type="file" device="disk">
  <driver name="qemu" type="raw"/><source file="{}"/><target dev="vda" bus="virtio"/>
</disk>
"""

LXC = """
<domain type="lxc">
  <name>container-{name}</name><memory unit="MiB">64</memory>
  <os><type>exe</type><init>/bin/sh</init><initarg>-c</initarg>
    <initarg>echo here >/etc/container-was-here; /bin/busybox sleep 600</initarg></os>
  <devices>
    <filesystem type="mount"><source dir="{folder}"/><target dir="/"/></filesystem>
    <console type="pty"/>
  </devices>
</domain>
"""


START = """
import pathlib, sys
from tools import private_libvirtd

with private_libvirtd.run(pathlib.Path(sys.argv[1])) as folder:
    with private_libvirtd.connect(private_libvirtd.uri(folder, "qemu")) as connection:
        connection.createXML(sys.argv[2])
        print("running", flush=True)
        sys.stdin.read()
"""


def test_guest_mounts_its_root_and_writes_to_it(start_guest, guest: GuestImage, tmp_path: Path) -> None:
    disk = shutil.copy(guest.disk, tmp_path / "disk")
    running = start_guest(DISK.format(disk))
    assert running.wait_for(ROOT_SAYS) == "/dev/vda1 ext4"
    assert running.wait_for(SIZE_SAYS) == str(64 << 20)
    running.domain.destroy()
    said = subprocess.run(
        ["debugfs", "-R", "cat /etc/guest-was-here", f"{disk}?offset={1 << 20}"],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert said.stdout == "written by the guest\n"


def test_guest_without_root_ends_and_is_not_waited_for(start_guest, tmp_path: Path) -> None:
    disk = tmp_path / "empty"
    disk.write_bytes(bytes(1 << 20))
    running = start_guest(DISK.format(disk))
    with pytest.raises(RuntimeError, match="imagebackend-guest: no root /dev/vda1"):
        running.wait_for(ROOT_SAYS)


def test_guest_is_built_once(guest: GuestImage) -> None:
    before = os.stat(guest.disk)
    again = guest_image.build()
    assert again == guest
    assert os.stat(again.disk).st_ino == before.st_ino


def test_container_runs_in_the_private_libvirtd(libvirt_lxc: libvirt.virConnect, tmp_path: Path) -> None:
    for name in ("bin", "etc", "dev", "proc", "sys"):
        (tmp_path / name).mkdir()
    shutil.copy("/bin/busybox", tmp_path / "bin")
    (tmp_path / "bin" / "sh").symlink_to("busybox")
    domain = libvirt_lxc.createXML(LXC.format(name=uuid.uuid4(), folder=tmp_path))
    try:
        written = tmp_path / "etc" / "container-was-here"
        deadline.wait_for(written.exists, seconds=30, what="file written by the container")
    finally:
        domain.destroy()


def test_everything_has_ended_when_the_private_libvirtd_has(guest: GuestImage, tmp_path: Path) -> None:
    xml = boot.domain_xml(
        "left", guest, [DISK.format(shutil.copy(guest.disk, tmp_path))], tmp_path / "console", "qemu"
    )
    with private_libvirtd.run(tmp_path / "libvirtd") as folder:
        with private_libvirtd.connect(private_libvirtd.uri(folder, "qemu")) as connection:
            connection.createXML(xml)
        assert {"libvirtd", "qemu-system-x86"} <= _processes_of(folder)
    assert not _processes_of(folder)


def test_everything_ends_when_the_starting_process_is_killed(guest: GuestImage, tmp_path: Path) -> None:
    folder = tmp_path / "libvirtd"
    xml = boot.domain_xml(
        "orphan", guest, [DISK.format(shutil.copy(guest.disk, tmp_path))], tmp_path / "console", "qemu"
    )
    command = [sys.executable, "-c", START, folder, xml]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starting:
        assert starting.stdout.readline() == b"running\n"
        assert {"libvirtd", "qemu-system-x86"} <= _processes_of(folder)
        starting.kill()
        deadline.wait_for(lambda: not _processes_of(folder), seconds=30, what="end of the processes")


def test_a_command_runs_on_a_kernel_of_its_own(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    script = f"test -e /dev/mapper/control && echo made >{inside}/file; echo lost >{outside}; uname -s; exit 7"
    said: list[str] = []

    status = linux_guest.run(["sh", "-c", script], shared=[inside], on_line=said.append, timeout=120)

    assert (status, said) == (7, ["Linux"])
    assert (inside / "file").read_text() == "made\n"
    assert not outside.exists()


def test_a_kernel_that_dies_shows_its_console() -> None:
    with pytest.raises(RuntimeError, match=r"guest died[^$]*sysrq"):
        linux_guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout=120)


def test_demonstration_passes_and_leaves_nothing() -> None:
    command = [sys.executable, "-m", "tools.demo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("It said so on its console: root=/dev/vda1 ext4, size=1073741824") == 2
    assert "launched 4 guests" in done.stdout
    (work,) = re.findall("instances_path = (.*)/instances", done.stdout)
    assert not os.path.exists(work)


def _processes_of(folder: Path) -> set[str]:
    """Return the names of the processes that see the daemon's own /etc/libvirt."""
    own = os.stat(folder / "etc")
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            seen = os.stat(process / "root/etc/libvirt")
            if (seen.st_dev, seen.st_ino) == (own.st_dev, own.st_ino):
                found.add((process / "comm").read_text().strip())
    return found
