#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A compute agent, in small: launches guests from one template, grows one, snapshots one, deletes them all.

What a real agent asks of imagebackend is all here: one :class:`imagebackend.Backend` for the life of the process,
one :class:`imagebackend.Image` for each disk, and libvirt for the rest. Run it with an ini file, which holds the
library's options and, in a group of its own, the agent's::

    [DEFAULT]
    instances_path = /var/lib/agent/instances

    [libvirt]
    images_type = qcow2
    virt_type = kvm

    [agent]
    template_url = https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2

    $ examples/agent.py --config-file agent.ini --count 4
"""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import libvirt
from oslo_config import cfg

import imagebackend

GIB = 1 << 30

OPTIONS = (
    cfg.StrOpt("connection_uri", default="qemu:///system", help="The libvirt that runs the guests."),
    cfg.StrOpt("template_name", default="template", help="What the template is called in the cache."),
    cfg.StrOpt("template_url", required=True, help="Where the template comes from: a path or a URL."),
    cfg.IntOpt("disk_size", default=GIB, help="The size of each guest's disk, in bytes."),
    cfg.IntOpt("memory", default=128, help="The memory of each guest, in MiB."),
    cfg.StrOpt("kernel", help="A kernel to boot directly; by default the guest boots from its disk."),
    cfg.StrOpt("initrd", default="", help="The initramfs for it."),
    cfg.StrOpt("command_line", default="", help="The command line for it."),
)


@dataclass(frozen=True)
class Instance:
    """A guest; imagebackend only asks for its ``uuid``."""

    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def name(self) -> str:
        return f"instance-{self.uuid[:8]}"


class Agent:
    """Runs guests. One object serves all threads: so do the backend and the connection."""

    def __init__(self, conf: cfg.ConfigOpts, connection: libvirt.virConnect) -> None:
        self.conf = conf
        self.connection = connection
        self.backend = imagebackend.Backend(conf)

    def launch(self, instance: Instance) -> None:
        """Make the instance's disk from the template, which the first one fetches, and boot a domain on it."""
        source = imagebackend.open_source(self.conf.agent.template_url, self.conf)
        image = self.backend.image(instance, "disk")
        with contextlib.ExitStack() as undo:
            image.cache(source.fetch, self.conf.agent.template_name, self.conf.agent.disk_size)
            undo.callback(image.remove)
            undo.callback(self.console(instance).unlink, missing_ok=True)
            disk = image.libvirt_info("virtio", "vda", "disk", None, extra_specs={})
            xml = self._domain_xml(instance, disk.to_xml(self.connection.getLibVersion()))
            domain = self.connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
            undo.callback(domain.undefine)
            domain.create()
            undo.pop_all()

    def resize(self, instance: Instance, size: int) -> None:
        """Grow the instance's disk to ``size`` bytes while its guest runs, which sees the new size at once."""
        self.backend.image(instance, "disk").resize_image(size, domain=self._domain(instance))

    def snapshot(self, instance: Instance, name: str) -> Path:
        """Snapshot the instance's disk, extract a standalone image from it, and return where that is.

        The guest is stopped meanwhile: a disk that somebody writes to would be torn.
        """
        image = self.backend.image(instance, "disk")
        target = Path(self.conf.libvirt.snapshots_directory) / f"{instance.uuid}-{name}.qcow2"
        target.parent.mkdir(parents=True, exist_ok=True)
        domain = self._domain(instance)
        domain.destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)
        try:
            if image.capabilities.snapshots:
                image.create_snap(name)
            image.snapshot_extract(str(target), "qcow2")
        finally:
            domain.create()
        return target

    def delete(self, instance: Instance) -> None:
        """Remove whatever there is of the instance: each step does nothing where nothing is left to do."""
        for domain in self.connection.listAllDomains():
            if domain.UUIDString() == instance.uuid:
                if domain.isActive():
                    domain.destroy()
                domain.undefine()
        self.console(instance).unlink(missing_ok=True)
        self.backend.image(instance, "disk").remove()

    def console(self, instance: Instance) -> Path:
        """Return the file that has what the guest says on its first serial port."""
        return Path(self.conf.instances_path) / instance.uuid / "console.log"

    def _domain(self, instance: Instance) -> libvirt.virDomain:
        return self.connection.lookupByUUIDString(instance.uuid)

    def _domain_xml(self, instance: Instance, disk_xml: str) -> str:
        agent = self.conf.agent
        boot = '<boot dev="hd"/>'
        if agent.kernel:
            boot = (
                f"<kernel>{escape(agent.kernel)}</kernel><initrd>{escape(agent.initrd)}</initrd>"
                f"<cmdline>{escape(agent.command_line)}</cmdline>"
            )
        return f"""
<domain type="{self.conf.libvirt.virt_type}">
  <name>{instance.name}</name>
  <uuid>{instance.uuid}</uuid>
  <memory unit="MiB">{agent.memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="pc">hvm</type>{boot}</os>
  <features><acpi/></features>
  <devices>
    {disk_xml}
    <controller type="usb" model="none"/>
    <serial type="file"><source path={quoteattr(str(self.console(instance)))}/></serial>
    <memballoon model="none"/>
  </devices>
</domain>
"""


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what was done in the block, and how long it took."""
    started = time.monotonic()
    yield
    print(f"{time.monotonic() - started:8.3f} s  {what}", flush=True)


def read_configuration(arguments: Sequence[str]) -> cfg.ConfigOpts:
    """Return the agent's own configuration object, which the library's options are registered with."""
    conf = cfg.ConfigOpts()
    conf.register_cli_opt(cfg.IntOpt("count", default=3, min=1, help="How many guests to launch."))
    conf.register_opts(OPTIONS, group="agent")
    imagebackend.register_opts(conf)
    conf(arguments, project="agent", default_config_files=[])
    return conf


def main(arguments: Sequence[str]) -> int:
    """Run the agent's whole day in a few seconds."""
    conf = read_configuration(arguments)
    libvirt.registerErrorHandler(lambda _context, _error: None, None)  # it raises them; printing them too is noise
    with contextlib.closing(libvirt.open(conf.agent.connection_uri)) as connection:
        agent = Agent(conf, connection)
        instances = [Instance() for _ in range(conf.count)]
        first, last = instances[0], instances[-1]
        try:
            with step(f"launched {len(instances)} guests at the same time"):
                in_parallel(agent.launch, instances)
            with step(f"grew the disk of {first.name} from {conf.agent.disk_size} bytes to twice that, while it ran"):
                agent.resize(first, 2 * conf.agent.disk_size)
            with step(f"snapshotted {last.name}"):
                image = agent.snapshot(last, "first")
            print(f"{'':12}{image}: {image.stat().st_size} bytes")
        finally:
            with step(f"deleted {len(instances)} guests"):
                in_parallel(agent.delete, instances)
    return 0


def in_parallel(work: Callable[[Instance], None], instances: Sequence[Instance]) -> None:
    """Do something with every instance at the same time, and raise the first error once all have ended."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, instances))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
