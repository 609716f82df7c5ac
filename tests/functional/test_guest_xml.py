# SPDX-License-Identifier: Apache-2.0
"""A real libvirt takes the XML of every golden case, by its schema and by its parser, and keeps all that was said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import libvirt
import pytest
from lxml import etree

from tests.golden.cases import CASES, DISKS, FILESYSTEMS
from tests.golden.domain import domain_xml
from tools import private_libvirtd

# Which connection defines what. QEMU shares folders with a guest; the other kinds of file system are for containers.
DRIVERS = {
    "libvirt_test": ("test", "hvm", list(CASES)),
    "libvirt_qemu": ("qemu", "hvm", [*DISKS, "filesystem-mount"]),
    "libvirt_lxc": ("lxc", "exe", list(FILESYSTEMS)),
}


@pytest.fixture(scope="module")
def libvirt_test() -> Iterator[libvirt.virConnect]:
    with private_libvirtd.connect("test:///default") as connection:
        yield connection


def define(connection: libvirt.virConnect, xml: str, flags: int) -> str:
    """Define a domain, and undefine it again; the XML that libvirt made of it."""
    domain = connection.defineXMLFlags(xml, flags)
    try:
        return str(domain.XMLDesc())
    finally:
        domain.undefine()


def agrees(said: object, kept: object) -> bool:
    """Whether everything that was said was kept. What was left open, libvirt may have filled in."""
    if said is None:
        return True
    if dataclasses.is_dataclass(said):
        names = [each.name for each in dataclasses.fields(said)]
        return type(said) is type(kept) and all(agrees(getattr(said, name), getattr(kept, name)) for name in names)
    return said == kept


@pytest.mark.parametrize("flags", [0, libvirt.VIR_DOMAIN_DEFINE_VALIDATE], ids=["parser", "schema"])
@pytest.mark.parametrize(
    ("driver", "name"), [(driver, name) for driver, (_, _, names) in DRIVERS.items() for name in names]
)
def test_libvirt_takes_and_keeps_it(driver: str, name: str, flags: int, request: pytest.FixtureRequest) -> None:
    connection = request.getfixturevalue(driver)
    domain_type, boot, _ = DRIVERS[driver]
    device = CASES[name].to_xml(connection.getLibVersion())
    said = type(CASES[name]).parse(device)

    kept = define(connection, domain_xml(device, domain_type, boot=boot), flags)

    found = etree.fromstring(kept).find(f"devices/{etree.fromstring(device).tag}")
    assert agrees(said, type(said).parse(etree.tostring(found, encoding="unicode"))), kept


@pytest.mark.parametrize("name", ["disk-driver", "disk-blockio"])
def test_libvirt_refuses_by_its_schema_what_it_does_not_know(name: str, libvirt_test: libvirt.virConnect) -> None:
    """Debian 12's does not know discard_no_unref and discard_granularity: what the version is asked for."""
    newest = domain_xml(CASES[name].to_xml(), "test")
    with pytest.raises(libvirt.libvirtError, match="XML document failed to validate"):
        define(libvirt_test, newest, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
