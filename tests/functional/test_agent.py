# SPDX-License-Identifier: Apache-2.0
"""The example agent, run as an operator would, and guest by guest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import libvirt
import pytest

from examples import agent as example
from tools import boot, private_libvirtd
from tools.guest_image import ROOT_SAYS, SIZE_SAYS, GuestImage

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["qcow2", "raw"])
def ini(request: pytest.FixtureRequest, libvirtd: Path, guest: GuestImage, virt_type: str, tmp_path: Path) -> Path:
    """The ini file of an agent."""
    path = tmp_path / "agent.ini"
    path.write_text(f"""
[DEFAULT]
instances_path = {tmp_path}/instances
[libvirt]
images_type = {request.param}
virt_type = {virt_type}
snapshots_directory = {tmp_path}/snapshots
[agent]
connection_uri = {private_libvirtd.uri(libvirtd, "qemu")}
template_url = {guest.disk}
disk_size = {GIB}
kernel = {guest.kernel}
initrd = {guest.initrd}
command_line = {guest.command_line}
""")
    return path


def test_a_day_of_the_agent(ini: Path, libvirt_qemu: libvirt.virConnect, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "agent.py", "--config-file", ini, "--count", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "launched 3 guests" in done.stdout
    assert "deleted 3 guests" in done.stdout
    assert not libvirt_qemu.listAllDomains()
    assert sorted(os.listdir(tmp_path / "instances")) == ["_base", "locks"]
    assert [path.name for path in (tmp_path / "instances" / "_base").glob("[!.]*")] == ["template"]
    (snapshot,) = (tmp_path / "snapshots").iterdir()
    same = subprocess.run(["qemu-img", "check", "-f", "qcow2", snapshot], capture_output=True, timeout=60)
    assert same.returncode == 0


def test_guest_sees_its_disk_grow_and_comes_back_after_a_snapshot(
    ini: Path, libvirt_qemu: libvirt.virConnect, tmp_path: Path
) -> None:
    agent = example.Agent(example.read_configuration(["--config-file", str(ini)]), libvirt_qemu)
    instance = example.Instance()
    console = agent.console(instance)
    agent.launch(instance)
    try:
        domain = libvirt_qemu.lookupByUUIDString(instance.uuid)
        assert boot.wait_for_line(domain, console, ROOT_SAYS) == "/dev/vda1 ext4"
        assert boot.wait_for_line(domain, console, SIZE_SAYS) == str(GIB)
        agent.resize(instance, 2 * GIB)
        boot.wait_for_line(domain, console, f"imagebackend-guest: size=({2 * GIB})")
        image = agent.snapshot(instance, "first")
        shown = subprocess.run(
            ["debugfs", "-R", "cat /etc/guest-was-here", f"{raw_copy(image, tmp_path)}?offset={1 << 20}"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        assert shown.stdout == "written by the guest\n"
        assert domain.isActive()
    finally:
        agent.delete(instance)
    assert not os.path.exists(console.parent)


def test_failed_launch_leaves_nothing(ini: Path, libvirt_qemu: libvirt.virConnect, tmp_path: Path) -> None:
    agent = example.Agent(example.read_configuration(["--config-file", str(ini)]), libvirt_qemu)
    agent.conf.set_override("kernel", f"{tmp_path}/no-such-kernel", group="agent")
    with pytest.raises(libvirt.libvirtError, match="no-such-kernel"):
        agent.launch(example.Instance())
    assert not libvirt_qemu.listAllDomains()
    assert sorted(os.listdir(tmp_path / "instances")) == ["_base", "locks"]


def raw_copy(image: Path, folder: Path) -> Path:
    target = folder / "copy.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, target], check=True, timeout=60)
    return target
