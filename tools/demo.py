# SPDX-License-Identifier: Apache-2.0
"""The demonstration: from a template to guests that run on disks made from it, with the time that each step takes.

Everything is real: the guest is Debian's kernel with a busybox root on a partitioned ext4 disk, the domains run in
libvirt and QEMU. It uses a libvirtd of its own, leaves the machine's alone, and removes what it made; what takes long
to make (.venv and .cache) is kept for the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import libvirt

import imagebackend
from tools import boot, guest_image, private_libvirtd
from tools.guest_image import ROOT_SAYS, SIZE_SAYS, GuestImage

GIB = 1 << 30
MIB = 1 << 20
AGENT = Path(__file__).resolve().parent.parent / "examples" / "agent.py"
AGENT_TIMEOUT = 240.0

INI = """\
[DEFAULT]
instances_path = {work}/instances

[libvirt]
virt_type = {virt_type}
snapshots_directory = {work}/snapshots

[agent]
connection_uri = {uri}
template_url = {guest.disk}
kernel = {guest.kernel}
initrd = {guest.initrd}
command_line = {guest.command_line}
"""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done in the block, and how long it took."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"{time.monotonic() - started:9.3f} s  FAILED: {what}", flush=True)
        raise
    print(f"{time.monotonic() - started:9.3f} s  {what}", flush=True)


def show(text: str) -> None:
    print(textwrap.indent(text.strip("\n"), " " * 13), flush=True)


def demonstrate(work: Path) -> None:
    with step("built the guest, or found it in .cache"):
        guest = guest_image.build()
    show(f"{guest.disk}: {guest.disk.stat().st_size // MIB} MiB")
    with step("found out whether KVM can be used, or remembered"):
        virt_type = boot.virt_type(guest)
    show(f"domains are of type {virt_type}: " + ("KVM works" if virt_type == "kvm" else "QEMU emulates the CPU"))
    with contextlib.ExitStack() as stack:
        with step("started a libvirtd"):
            uri = private_libvirtd.uri(stack.enter_context(private_libvirtd.run(work / "libvirtd")), "qemu")
            connection = stack.enter_context(private_libvirtd.connect(uri))
        show(f"libvirt {version(connection.getLibVersion())}, QEMU {version(connection.getVersion())}")
        ini = work / "imagebackend.conf"
        ini.write_text(INI.format(work=work, virt_type=virt_type, uri=uri, guest=guest))
        show(ini.read_text())

        backend = imagebackend.Backend(imagebackend.load_config([str(ini)]))
        source = imagebackend.open_source(str(guest.disk), backend.conf)
        with step("put the template into the cache: fetched, hashed, inspected, durable, recorded"):
            template = backend.templates.fetch("demo", source.fetch)
        show(f"{template.path}: {template.format}, {template.virtual_size // MIB} MiB, sha256 {template.sha256}")
        for image_type in ("qcow2", "raw"):
            print()
            image = backend.image(f"demo-{image_type}", "disk", image_type)
            with step(f"made a {image_type} disk of 1 GiB from the template"):
                image.cache(source.fetch, "demo", GIB)
            boot_from(image, f"demo-{image_type}", connection, guest, virt_type, work / f"{image_type}.console")
        print()
        with step("ran examples/agent.py"):
            run_agent(ini)
        with step("removed the template and stopped the libvirtd"):
            backend.templates.remove("demo")
            stack.close()


def boot_from(
    image: imagebackend.Image,
    name: str,
    connection: libvirt.virConnect,
    guest: GuestImage,
    virt_type: str,
    console: Path,
) -> None:
    """Boot a guest from a disk, grow the disk meanwhile, and remove both."""
    show_size(image)
    disk = image.libvirt_info("virtio", "vda", "disk", None, extra_specs={}).to_xml(connection.getLibVersion())
    show(f"The disk for libvirt:\n{disk}")
    xml = boot.domain_xml(name, guest, [disk], console, virt_type)
    show(f"The domain:\n{xml}")
    with contextlib.ExitStack() as stack:
        with step("defined and started the domain"):
            domain = stack.enter_context(boot.running(connection, xml))
        with step("the guest mounted its root from the disk"):
            root = boot.wait_for_line(domain, console, ROOT_SAYS)
            size = boot.wait_for_line(domain, console, SIZE_SAYS)
        show(f"It said so on its console: root={root}, size={size}")
        with step("grew the disk to 2 GiB, and the guest saw it"):
            image.resize_image(2 * GIB, domain=domain)
            boot.wait_for_line(domain, console, f"imagebackend-guest: size=({2 * GIB})")
        show_size(image)
        with step("removed the domain and the disk"):
            stack.close()
            image.remove()


def show_size(image: imagebackend.Image) -> None:
    size, allocated = image.get_disk_size(image.path), os.stat(image.path).st_blocks * 512
    show(f"{image.path}: {size // MIB} MiB, of which {allocated / MIB:.1f} MiB are allocated")


def run_agent(ini: Path) -> None:
    """Run the example agent with the same ini file, of which it reads its own group too."""
    done = subprocess.run(
        [sys.executable, AGENT, "--config-file", ini, "--count", "4"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=AGENT_TIMEOUT,
        check=False,
    )
    show(done.stdout)
    if done.returncode:
        raise RuntimeError(f"the agent failed with exit status {done.returncode}")


def version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def main() -> int:
    argparse.ArgumentParser(
        prog="tools/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    # What was made is removed then, too.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    # Not in /tmp, which may be in memory, where there is no direct I/O.
    with tempfile.TemporaryDirectory(prefix="imagebackend-demo-", dir="/var/tmp") as work:
        demonstrate(Path(work))
    print(f"\nThe demonstration passed in {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
