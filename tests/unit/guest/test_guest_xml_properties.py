# SPDX-License-Identifier: Apache-2.0
"""Whatever the attributes hold: the XML reads back as the same object, or it is a typed error."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from imagebackend import exceptions
from imagebackend.guest import (
    LibvirtConfigGuestDeviceAddressDrive,
    LibvirtConfigGuestDisk,
    LibvirtConfigGuestDiskBackingStore,
    LibvirtConfigGuestDiskEncryption,
    LibvirtConfigGuestDiskEncryptionSecret,
    LibvirtConfigGuestFilesys,
)
from imagebackend.guest.element import escape

# Every character that XML can carry: the rest is tested below.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffe\uffff").filter(
    lambda character: character >= " " or character in "\t\n\r"
)
STRINGS = st.text(CHARACTERS, min_size=1, max_size=30)
PATHS = STRINGS.map(lambda tail: f"/{tail}")
NAMES = st.text("abcXYZ019_-", min_size=1, max_size=12)
UUIDS = st.uuids().map(str)
COUNTS = st.integers(1, 65535)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


SECRETS = st.builds(LibvirtConfigGuestDiskEncryptionSecret, uuid=UUIDS)
ENCRYPTIONS = st.builds(
    LibvirtConfigGuestDiskEncryption,
    format=st.sampled_from(["luks", "luks2", "luks-any"]),
    engine=st.sampled_from([None, "qemu", "librbd"]),
    secret=SECRETS,
)
HOSTS = st.lists(
    st.tuples(st.sampled_from(["192.0.2.1", "2001:db8::1", "mon-a.example.org"]), st.none() | st.integers(1, 65535)),
    max_size=3,
)


@st.composite
def places(draw: st.DrawFn) -> dict[str, Any]:
    """The attributes that say where an image is."""
    kind = draw(st.sampled_from(["file", "block", "dir", "network"]))
    if kind != "network":
        return {"source_type": kind, "source_path": draw(PATHS)}
    hosts = draw(HOSTS)
    ports = [port for _, port in hosts]
    return {
        "source_type": kind,
        "source_protocol": draw(st.sampled_from(["rbd", "nbd", "gluster"])),
        "source_name": draw(STRINGS),
        "source_hosts": [host for host, _ in hosts],
        "source_ports": ports if any(ports) else [],
    }


@st.composite
def chains(draw: st.DrawFn) -> LibvirtConfigGuestDiskBackingStore | None:
    """Images behind a disk, ended or left open."""
    chain = draw(st.sampled_from([None, LibvirtConfigGuestDiskBackingStore()]))
    for place in draw(st.lists(places(), max_size=3)):
        form = draw(st.sampled_from(["raw", "qcow2"]))
        chain = LibvirtConfigGuestDiskBackingStore(driver_format=form, backing_store=chain, **place)
    return chain


@st.composite
def disks(draw: st.DrawFn) -> LibvirtConfigGuestDisk:
    attributes = {
        "driver_name": draw(maybe(NAMES)),
        "driver_format": draw(st.sampled_from([None, "raw", "qcow2", "ploop"])),
        "driver_cache": draw(st.sampled_from([None, "none", "unsafe"])),
        "driver_io": draw(st.sampled_from([None, "native", "io_uring"])),
        "driver_copy_on_read": draw(maybe(st.booleans())),
        "driver_discard_no_unref": draw(maybe(st.booleans())),
        "driver_queues": draw(maybe(COUNTS)),
        "driver_metadata_cache_size": draw(maybe(st.integers(1, 2**63 - 1))),
        "target_dev": "vda",
        "serial": draw(maybe(st.text("abc XYZ019_.+-", min_size=1, max_size=36))),
        "disk_group_name": draw(maybe(STRINGS)),
        "disk_read_bytes_sec": draw(maybe(st.integers(0, 10**15))),
        "logical_block_size": draw(st.sampled_from([None, 512, 4096])),
        "readonly": draw(st.booleans()),
        "shareable": draw(st.booleans()),
        "transient": draw(st.booleans()),
        "boot_order": draw(maybe(COUNTS)),
        "device_addr": draw(
            maybe(st.builds(LibvirtConfigGuestDeviceAddressDrive, bus=st.integers(0, 99), unit=st.integers(0, 99999)))
        ),
        "alias": draw(maybe(NAMES)),
        draw(st.sampled_from(["ephemeral_encryption", "volume_encryption"])): draw(maybe(ENCRYPTIONS)),
        "backing_store": draw(chains()),
    }
    attributes |= draw(places())
    if attributes["source_type"] == "network":
        attributes["source_snapshot"] = draw(maybe(STRINGS))
        if draw(st.booleans()):
            attributes |= {"auth_username": draw(STRINGS), "auth_secret_type": "ceph", "auth_secret_uuid": draw(UUIDS)}
    else:
        attributes["startup_policy"] = draw(st.sampled_from([None, "optional"]))
    return LibvirtConfigGuestDisk(**attributes)


@st.composite
def filesystems(draw: st.DrawFn) -> LibvirtConfigGuestFilesys:
    kind, attribute = draw(
        st.sampled_from([("file", "source_file"), ("block", "source_dev"), ("mount", "source_dir")])
    )
    attributes: dict[str, Any] = {"source_type": kind, attribute: draw(PATHS)}
    if kind == "file":
        attributes["driver_type"] = draw(st.sampled_from([None, "loop", "nbd", "ploop"]))
        attributes["driver_format"] = draw(st.sampled_from([None, "raw", "qcow2"]))
    return LibvirtConfigGuestFilesys(
        accessmode=draw(st.sampled_from([None, "mapped", "squash"])),
        target_dir=draw(STRINGS),
        readonly=draw(st.booleans()),
        space_hard_limit=draw(maybe(st.integers(1, 2**63 - 1))),
        **attributes,
    )


@settings(max_examples=300, deadline=None)
@given(disks())
def test_disk_reads_back_as_it_was(disk: LibvirtConfigGuestDisk) -> None:
    written = disk.to_xml()
    assert LibvirtConfigGuestDisk.parse(written) == disk
    assert LibvirtConfigGuestDisk.parse(written).to_xml() == written


@settings(max_examples=200, deadline=None)
@given(filesystems())
def test_filesystem_reads_back_as_it_was(filesystem: LibvirtConfigGuestFilesys) -> None:
    assert LibvirtConfigGuestFilesys.parse(filesystem.to_xml()) == filesystem


@settings(max_examples=1000, deadline=None)
@given(st.text(st.characters(), max_size=20))
def test_a_string_arrives_whole_or_is_refused_as_lxml_does(value: str) -> None:
    node = etree.Element("a")
    try:
        node.set("b", value)
        node.text = value
    except (ValueError, UnicodeEncodeError):
        takes = False
    else:
        takes = value != ""
    try:
        written = escape("b", value)
    except exceptions.InvalidArgument:
        assert not takes
        return
    assert takes
    read = etree.fromstring(f'<a b="{written}">{written}</a>')
    assert (read.get("b"), read.text) == (value, value)


HOSTILE = st.text(st.characters(), max_size=12) | st.sampled_from(
    [
        "'/><readonly/>",
        '"/><source file="/etc/shadow"/>',
        "<!--",
        "]]>",
        "&x;",
        "\x00",
        "\ud800",
        "--",
        "\ufffe",
        "]\n",
    ]
)
ANYTHING = (
    HOSTILE | st.integers() | st.booleans() | st.none() | st.lists(st.integers(), max_size=1) | st.binary(max_size=3)
)
SIMPLE = sorted(
    set(LibvirtConfigGuestDisk.__slots__) - {"backing_store", "device_addr", "source_hosts", "source_ports"}
)
PLAIN = [name for name in SIMPLE if "encryption" not in name]


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from(PLAIN), ANYTHING, max_size=4), st.sampled_from(["file", "network"]))
def test_anything_is_well_formed_xml_or_a_typed_error(attributes: dict[str, Any], kind: str) -> None:
    place = {"source_type": kind, "source_path": "/disk", "source_protocol": "rbd", "source_name": "a/b"}
    disk = LibvirtConfigGuestDisk(**(place | {"target_dev": "vda"} | attributes))
    try:
        written = disk.to_xml()
    except exceptions.InvalidArgument:
        return
    root = etree.fromstring(written)
    assert [child.tag for child in root].count("source") <= 1
    assert (root.find("readonly") is not None) == bool(disk.readonly)
