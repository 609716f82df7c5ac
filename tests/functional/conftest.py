# SPDX-License-Identifier: Apache-2.0
"""A real libvirt and a real guest for the functional tests."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import pytest
from oslo_config import cfg

from imagebackend.conf import load_config
from tools import boot, guest_image, private_libvirtd


@dataclass(frozen=True)
class RunningGuest:
    """A guest that was started, and where it talks."""

    domain: libvirt.virDomain
    console: Path

    def wait_for(self, pattern: str) -> str:
        return boot.wait_for_line(self.domain, self.console, pattern)


StartGuest = Callable[..., RunningGuest]


@pytest.fixture
def conf(tmp_path: Path) -> cfg.ConfigOpts:
    """Options of a cache of the test's own, which asks a source once."""
    conf = load_config([])
    conf.set_override("instances_path", str(tmp_path / "instances"))
    conf.set_override("fetch_retries", 0, group="image_cache")
    return conf


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a libvirtd of this run's own."""
    with private_libvirtd.run(tmp_path_factory.mktemp("libvirtd")) as folder:
        yield folder


@pytest.fixture(scope="session")
def libvirt_qemu(libvirtd: Path) -> Iterator[libvirt.virConnect]:
    with private_libvirtd.connect(private_libvirtd.uri(libvirtd, "qemu")) as connection:
        yield connection


@pytest.fixture(scope="session")
def libvirt_lxc(libvirtd: Path) -> Iterator[libvirt.virConnect]:
    with private_libvirtd.connect(private_libvirtd.uri(libvirtd, "lxc")) as connection:
        yield connection


@pytest.fixture(scope="session")
def guest() -> guest_image.GuestImage:
    return guest_image.build()


@pytest.fixture(scope="session")
def virt_type(guest: guest_image.GuestImage) -> str:
    return boot.virt_type(guest)


@pytest.fixture
def start_guest(
    libvirt_qemu: libvirt.virConnect, guest: guest_image.GuestImage, virt_type: str, tmp_path: Path
) -> Iterator[StartGuest]:
    """A function that boots the guest on the given <disk> elements; its domains end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*disks: str) -> RunningGuest:
            name = f"guest-{uuid.uuid4()}"
            console = tmp_path / f"{name}.console"
            xml = boot.domain_xml(name, guest, disks, console, virt_type)
            return RunningGuest(stack.enter_context(boot.running(libvirt_qemu, xml)), console)

        yield start
