# SPDX-License-Identifier: Apache-2.0
"""Booting the guest of :mod:`tools.guest_image` in a libvirt domain, and listening to what it says."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import libvirt

from tools import deadline
from tools.guest_image import CACHE, ROOT_SAYS, GuestImage

__all__ = ["BOOT_TIMEOUT", "domain_xml", "running", "virt_type", "wait_for_line"]

#: Seconds that a guest may take to say what is waited for. An emulated one takes 2 to 5 on an idle machine.
BOOT_TIMEOUT = 120.0

_KVM_TIMEOUT = 5.0


def virt_type(guest: GuestImage) -> str:
    """Return the fastest type of domain that works here: ``kvm``, or ``qemu``, which emulates.

    Found by booting, since a ``/dev/kvm`` that opens may still be unable to run a guest; and remembered until the
    machine boots again.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = CACHE / "virt_type"
    known = memory.read_text().split() if memory.exists() else []
    if known[:1] == [boot_id]:
        return known[1]
    found = "kvm" if _kvm_works(guest) else "qemu"
    partial = CACHE / f".virt_type.{os.getpid()}"
    partial.write_text(f"{boot_id} {found}\n")
    partial.replace(memory)
    return found


def _kvm_works(guest: GuestImage) -> bool:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    machine = ("-nodefaults", "-no-user-config", "-machine", "pc,accel=kvm", "-m", "128", "-no-reboot")
    console = ("-display", "none", "-serial", "stdio")
    system = ("-kernel", guest.kernel, "-initrd", guest.initrd, "-append", f"{guest.command_line} poweroff")
    disk = ("-drive", f"file={guest.disk},format=raw,if=virtio,snapshot=on")
    try:
        trial = subprocess.run(
            ["qemu-system-x86_64", *machine, *console, *system, *disk],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_KVM_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return re.search(ROOT_SAYS, trial.stdout) is not None


def domain_xml(name: str, guest: GuestImage, disks: Sequence[str], console: Path, virt_type: str) -> str:
    """Return a small domain that boots the guest's kernel directly.

    :param disks: ``<disk>`` elements; the one whose target is vda holds the guest's root.
    :param console: the file that the first serial port is written to.
    :param virt_type: as :func:`virt_type` returns it.
    """
    cpu = '\n  <cpu mode="host-passthrough"/>' if virt_type == "kvm" else ""
    # ACPI: a guest of machine type pc cannot power off without.
    return f"""\
<domain type="{virt_type}">
  <name>{name}</name>
  <memory unit="MiB">128</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="pc">hvm</type>
    <kernel>{guest.kernel}</kernel>
    <initrd>{guest.initrd}</initrd>
    <cmdline>{guest.command_line}</cmdline>
  </os>
  <features><acpi/></features>{cpu}
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
{textwrap.indent("".join(disks), "    ").rstrip()}
    <controller type="usb" model="none"/>
    <serial type="file"><source path="{console}"/></serial>
    <memballoon model="none"/>
  </devices>
</domain>
"""


@contextlib.contextmanager
def running(connection: libvirt.virConnect, xml: str) -> Iterator[libvirt.virDomain]:
    """Define a domain and run it in the block; it is destroyed and undefined afterwards.

    :raises libvirt.libvirtError: the XML does not validate against libvirt's schema, or the domain does not start.
    """
    domain = connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
    try:
        domain.create()
        try:
            yield domain
        finally:
            if domain.isActive():
                domain.destroy()
    finally:
        domain.undefine()


def wait_for_line(domain: libvirt.virDomain, console: Path, pattern: str, *, seconds: float = BOOT_TIMEOUT) -> str:
    """Return what the last line of the console that matches ``pattern`` has in the pattern's first group.

    :raises TimeoutError: no line matched in time.
    :raises RuntimeError: the domain ended without having said it.
    """

    def look() -> str | None:
        active = domain.isActive()
        said = re.findall(pattern, console.read_text(errors="replace")) if console.exists() else []
        if said:
            return str(said[-1])
        if not active:
            raise RuntimeError(f"{domain.name()} ended without a line {pattern!r}{_tail(console)}")
        return None

    try:
        return deadline.wait_for(look, seconds=seconds, what=f"line {pattern!r} from {domain.name()}")
    except TimeoutError as error:
        raise TimeoutError(f"{error}{_tail(console)}") from error


def _tail(console: Path) -> str:
    said = console.read_text(errors="replace")[-1000:] if console.exists() else ""
    return f"; its console said:\n{said}"
