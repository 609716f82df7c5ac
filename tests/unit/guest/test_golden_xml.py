# SPDX-License-Identifier: Apache-2.0
"""The XML of every golden case: kept, read back, valid, and covering every attribute.

``pytest tests/unit/guest --regenerate-golden`` writes the files anew; read the diff before it is committed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from imagebackend import exceptions
from imagebackend.guest import (
    LibvirtConfigGuestDeviceAddressDrive,
    LibvirtConfigGuestDisk,
    LibvirtConfigGuestDiskBackingStore,
    LibvirtConfigGuestDiskEncryption,
    LibvirtConfigGuestDiskEncryptionSecret,
    LibvirtConfigGuestFilesys,
    LibvirtConfigGuestIDMap,
)
from tests.golden.cases import CASES, FOLDER, IDMAP, NEWER
from tests.golden.domain import domain_xml

# Debian 12's: package libvirt0 9.0.0.
SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
SCHEMA_VERSION = 9000000

CLASSES = [
    LibvirtConfigGuestDisk,
    LibvirtConfigGuestDiskBackingStore,
    LibvirtConfigGuestDiskEncryption,
    LibvirtConfigGuestDiskEncryptionSecret,
    LibvirtConfigGuestDeviceAddressDrive,
    LibvirtConfigGuestFilesys,
    LibvirtConfigGuestIDMap,
]
ALL = {**CASES, **NEWER}


@pytest.fixture(scope="module")
def schema() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(SCHEMA))


@pytest.mark.parametrize("name", ALL)
def test_xml_is_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    golden = FOLDER / f"{name}.xml"
    if request.config.getoption("--regenerate-golden"):
        golden.write_text(ALL[name].to_xml(), encoding="utf-8")
    assert ALL[name].to_xml() == golden.read_text(encoding="utf-8")


def test_every_golden_file_has_a_case() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.xml")) == sorted(ALL)


@pytest.mark.parametrize("name", ALL)
def test_golden_file_is_read_back(name: str) -> None:
    case = ALL[name]
    read = type(case).parse((FOLDER / f"{name}.xml").read_text(encoding="utf-8"))
    if isinstance(case, LibvirtConfigGuestDisk):
        # Written without the brackets that some callers have around an IPv6 address.
        case = dataclasses.replace(case, source_hosts=[host.strip("[]") for host in case.source_hosts])
    assert read == case


@pytest.mark.parametrize("name", CASES)
def test_xml_is_valid_by_the_schema_of_libvirt(name: str, schema: etree.RelaxNG) -> None:
    domain = domain_xml(CASES[name].to_xml(SCHEMA_VERSION), "test")
    assert schema.validate(etree.fromstring(domain)), schema.error_log


@pytest.mark.parametrize(
    ("name", "attribute"), [("disk-driver", "discard_no_unref"), ("disk-blockio", "discard_granularity")]
)
def test_what_the_schema_does_not_know_is_left_out_for_that_version(
    name: str, attribute: str, schema: etree.RelaxNG
) -> None:
    newest = CASES[name].to_xml()
    assert attribute in newest
    assert attribute not in CASES[name].to_xml(SCHEMA_VERSION)
    assert not schema.validate(etree.fromstring(domain_xml(newest, "test")))


@pytest.mark.parametrize("name", NEWER)
def test_what_an_older_libvirt_must_know_is_no_xml_for_it(name: str, schema: etree.RelaxNG) -> None:
    assert not schema.validate(etree.fromstring(domain_xml(NEWER[name].to_xml(), "test")))
    with pytest.raises(exceptions.Unsupported):
        NEWER[name].to_xml(SCHEMA_VERSION)


def test_the_idmap_of_a_container_is_valid_by_the_schema_of_libvirt(schema: etree.RelaxNG) -> None:
    domain = domain_xml("", "lxc", boot="exe").replace("<devices>", f"{IDMAP.to_xml()}<devices>")
    assert schema.validate(etree.fromstring(domain)), schema.error_log
    assert LibvirtConfigGuestIDMap.parse(IDMAP.to_xml()) == IDMAP


def _objects(owner: Any) -> list[Any]:
    """The object and those inside it."""
    found = [owner]
    for each in dataclasses.fields(owner):
        value = getattr(owner, each.name)
        if dataclasses.is_dataclass(value):
            found += _objects(value)
    return found


def _default(each: dataclasses.Field[Any]) -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


def _shows_in_xml(case: Any, owner: Any, each: dataclasses.Field[Any]) -> bool:
    """Whether setting the attribute back to its default changes the XML, or makes it impossible."""
    before, value = case.to_xml(), getattr(owner, each.name)
    setattr(owner, each.name, _default(each))
    try:
        return bool(case.to_xml() != before)
    except exceptions.InvalidArgument:
        return True
    finally:
        setattr(owner, each.name, value)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_attribute_is_in_a_golden_file(kind: type) -> None:
    seen = set()
    for case in ALL.values():
        for owner in _objects(case):
            if isinstance(owner, kind):
                changed = [each for each in dataclasses.fields(owner) if getattr(owner, each.name) != _default(each)]
                seen |= {each.name for each in changed if _shows_in_xml(case, owner, each)}
    # Constant so far: the one type of secret that libvirt has for disks.
    constant = {"type"} if kind is LibvirtConfigGuestDiskEncryptionSecret else set()
    assert {each.name for each in dataclasses.fields(kind)} - seen == constant
