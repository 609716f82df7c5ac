# SPDX-License-Identifier: Apache-2.0
"""What the XML classes refuse, and what they leave out for an older libvirt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from imagebackend import exceptions
from imagebackend.guest import (
    LibvirtConfigGuestDeviceAddressDrive,
    LibvirtConfigGuestDisk,
    LibvirtConfigGuestDiskBackingStore,
    LibvirtConfigGuestDiskEncryption,
    LibvirtConfigGuestFilesys,
    LibvirtConfigGuestIDMap,
    LibvirtConfigGuestIDRange,
)
from tests.golden.cases import SECRET, disk, luks, rbd


def test_what_was_written_before_is_no_reason_to_take_what_only_looks_the_same() -> None:
    assert 'iothread="1"' in disk(driver_iothread=1).to_xml()
    assert 'iothread="1"' in disk(driver_iothread="1").to_xml()

    for _ in range(2):
        with pytest.raises(exceptions.InvalidArgument, match="a whole number is needed, not True"):
            disk(driver_iothread=True).to_xml()
        with pytest.raises(exceptions.InvalidArgument, match="is not one of"):
            disk(driver_cache=["none"]).to_xml()
    assert 'iothread="1"' in disk(driver_iothread=1).to_xml()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"target_dev": None}, "target_dev: needed"),
        ({"target_dev": "xda"}, "target_dev: 'xda' is not a device name"),
        ({"target_dev": "vda\n"}, "target_dev: 'vda\\n' is not"),
        ({"target_bus": "nvme"}, "target_bus: 'nvme' is not one of"),
        ({"source_type": "volume"}, "source_type: 'volume' is not one of block, dir, file, network"),
        ({"source_type": None}, "source_type: None is not one of"),
        ({"source_type": ["file"]}, "source_type: ['file'] is not one of"),
        ({"source_device": "tape"}, "source_device: 'tape' is not one of"),
        ({"source_path": None}, "source_path: a string is needed"),
        ({"source_path": ""}, "source_path: the string is empty"),
        ({"source_path": "disk"}, "source_path: 'disk' is not an absolute path"),
        ({"source_path": b"/disk"}, "source_path: a string is needed"),
        ({"source_path": "/a\x01b"}, "source_path: XML cannot carry '\\x01'"),
        ({"source_path": "/a\x00b"}, "source_path: XML cannot carry '\\x00'"),
        ({"source_path": "/a\ufffeb"}, "source_path: XML cannot carry '\\ufffe'"),
        ({"source_path": "/a\ud800b"}, "source_path: XML cannot carry '\\ud800'"),
        ({"driver_name": "qe mu"}, "driver_name: 'qe mu' is not a name"),
        ({"driver_format": "qcow3"}, "driver_format: 'qcow3' is not one of"),
        ({"driver_cache": "fast"}, "driver_cache: 'fast' is not one of"),
        ({"driver_io": "aio"}, "driver_io: 'aio' is not one of"),
        ({"driver_discard": True}, "driver_discard: True is not one of"),
        ({"driver_copy_on_read": "on"}, "driver_copy_on_read: True or False is needed"),
        ({"driver_iothread": 0}, "driver_iothread: 0 is not between 1 and"),
        ({"driver_iothread": True}, "driver_iothread: a whole number is needed, not True"),
        ({"driver_queues": 1.0}, "driver_queues: a whole number is needed, not 1.0"),
        ({"driver_queues": "1_0"}, "driver_queues: '1_0' is not a whole number in ASCII digits"),
        ({"driver_queues": "٣"}, "is not a whole number in ASCII digits"),
        ({"driver_metadata_cache_size": 0}, "driver_metadata_cache_size: 0 is not between"),
        ({"serial": "a/b"}, "serial: 'a/b' is not a serial number"),
        ({"wwn": "12"}, "wwn: '12' is not 16 hexadecimal digits"),
        ({"alias": "ua-a.b"}, "alias: 'ua-a.b' is not a name"),
        ({"logical_block_size": 3000}, "logical_block_size: 3000 is not a power of two"),
        ({"physical_block_size": 256}, "physical_block_size: 256 is not between 512 and 2097152"),
        ({"boot_order": "first"}, "boot_order: 'first' is not a whole number"),
        ({"snapshot": "yes"}, "snapshot: 'yes' is not one of"),
        ({"device_addr": LibvirtConfigGuestDeviceAddressDrive(unit=100000)}, "unit: 100000 is not between"),
        ({"disk_read_bytes_sec": -1}, "disk_read_bytes_sec: -1 is not between 0 and 1000000000000000"),
        ({"disk_read_bytes_sec_max": 5}, "disk_read_bytes_sec_max=5: needs disk_read_bytes_sec"),
        ({"source_slice_size": 5}, "one needs the other"),
        ({"source_snapshot": "s"}, "source_snapshot: not where source_type is file"),
        ({"source_config_file": "/a"}, "source_config_file: not where source_type is file"),
        ({"ephemeral_encryption": luks(), "volume_encryption": luks()}, "one or the other"),
        ({"auth_username": "cinder"}, "all or none are needed"),
        ({"ephemeral_encryption": LibvirtConfigGuestDiskEncryption()}, "the uuid of its secret is missing"),
        ({"ephemeral_encryption": luks(format="qcow")}, "format: 'qcow' is not one of"),
        (
            {"backing_store": LibvirtConfigGuestDiskBackingStore(source_type="file")},
            "driver_format: None is not one of",
        ),
        (
            {"backing_store": LibvirtConfigGuestDiskBackingStore(source_type="x", driver_format="raw")},
            "backing_store source_type: 'x' is not one of",
        ),
    ],
)
def test_disk_is_refused(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(exceptions.InvalidArgument) as caught:
        disk(**attributes).to_xml()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"source_protocol": None}, "source_protocol: needed"),
        ({"source_protocol": "smb"}, "source_protocol: 'smb' is not one of"),
        ({"source_name": None}, "source_name: a string is needed"),
        ({"source_hosts": ["a b"]}, "source_hosts: 'a b' is not a host name or an IP address"),
        ({"source_hosts": ["a"], "source_ports": [0]}, "source_ports: 0 is not between 1 and 65535"),
        ({"source_hosts": ["a"], "source_ports": [1, 2]}, "source_ports: 2 ports for 1 hosts"),
        ({"startup_policy": "optional"}, "startup_policy: not where source_type is network"),
        ({"source_config_file": "ceph.conf"}, "source_config_file: 'ceph.conf' is not an absolute path"),
    ],
)
def test_network_disk_is_refused(attributes: dict[str, Any], message: str) -> None:
    image = rbd()
    for name, value in attributes.items():
        setattr(image, name, value)
    with pytest.raises(exceptions.InvalidArgument) as caught:
        image.to_xml()
    assert message in str(caught.value)


ONE, BAD = LibvirtConfigGuestIDRange(0, 1000, 1), LibvirtConfigGuestIDRange(0, -1, 1)


def idmap(uid: LibvirtConfigGuestIDRange, *gid: LibvirtConfigGuestIDRange) -> LibvirtConfigGuestIDMap:
    return LibvirtConfigGuestIDMap(uid=(uid,), gid=gid)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"source_type": "volume"}, "source_type: 'volume' is not one of"),
        ({"source_type": "file"}, "source_file: needed where source_type is file"),
        ({"source_type": "block"}, "source_dev: needed where source_type is block"),
        ({}, "source_dir: needed where source_type is mount"),
        ({"source_dir": "a"}, "source_dir: 'a' is not an absolute path"),
        ({"source_dir": "/a", "target_dir": "\x02"}, "target_dir: XML cannot carry"),
        ({"source_dir": "/a", "driver_type": "fuse"}, "driver_type: 'fuse' is not one of"),
        ({"source_dir": "/a", "accessmode": "none"}, "accessmode: 'none' is not one of"),
        ({"source_dir": "/a", "space_hard_limit": -1}, "space_hard_limit: -1 is not between"),
        ({"source_dir": "/a", "idmap": idmap(ONE, ONE)}, "idmap: of virtiofs alone"),
        ({"source_dir": "/a", "driver_type": "virtiofs", "idmap": idmap(ONE)}, "idmap: users and groups are needed"),
        ({"source_dir": "/a", "driver_type": "virtiofs", "idmap": idmap(BAD, ONE)}, "target: -1 is not between"),
    ],
)
def test_filesystem_is_refused(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(exceptions.InvalidArgument) as caught:
        LibvirtConfigGuestFilesys(**attributes).to_xml()
    assert message in str(caught.value)


def test_unknown_attribute_is_an_error() -> None:
    plain: Any = disk()
    with pytest.raises(AttributeError):
        plain.driver_cach = "none"


@pytest.mark.parametrize(
    ("attributes", "since", "written"),
    [
        ({"driver_discard": "unmap"}, 1000006, "discard="),
        ({"driver_iothread": 1}, 1002008, "iothread="),
        ({"disk_total_iops_sec": 1, "disk_total_iops_sec_max": 2}, 1002011, "<total_iops_sec_max>"),
        ({"backing_store": LibvirtConfigGuestDiskBackingStore()}, 1002004, "<backingStore/>"),
        ({"driver_detect_zeroes": "on"}, 2000000, "detect_zeroes="),
        (
            {"disk_total_iops_sec": 1, "disk_total_iops_sec_max": 2, "disk_total_iops_sec_max_length": 3},
            2004000,
            "<total_iops_sec_max_length>",
        ),
        ({"disk_total_iops_sec": 1, "disk_group_name": "g"}, 3000000, "<group_name>"),
        ({"driver_queues": 2}, 3009000, "queues="),
        ({"alias": "ua-a"}, 3009000, "<alias"),
        ({"driver_io": "io_uring"}, 6003000, "io="),
        ({"driver_metadata_cache_size": 1}, 7000000, "<metadata_cache>"),
        ({"driver_queue_size": 2}, 7008000, "queue_size="),
        ({"snapshot": "manual"}, 8002000, "snapshot="),
        ({"driver_discard_no_unref": True}, 9005000, "discard_no_unref="),
        ({"discard_granularity": 512}, 9007000, "discard_granularity="),
    ],
)
def test_older_libvirt_gets_xml_without_it(attributes: dict[str, Any], since: int, written: str) -> None:
    described = disk(**attributes)
    assert written in described.to_xml()
    assert written in described.to_xml(since)
    assert written not in described.to_xml(since - 1)


def test_older_libvirt_keeps_native_and_threads() -> None:
    assert 'io="native"' in disk(driver_io="native").to_xml(6002000)


@pytest.mark.parametrize(
    ("make", "since"),
    [
        (lambda: disk(source_slice_offset=0, source_slice_size=512), 6001000),
        (lambda: rbd(source_snapshot="s"), 1002011),
        (lambda: rbd(source_config_file="/etc/ceph/ceph.conf"), 1002011),
        (lambda: disk(ephemeral_encryption=luks()), 2001000),
        (lambda: rbd(ephemeral_encryption=luks(format="luks2")), 7009000),
        (lambda: rbd(ephemeral_encryption=luks(engine="librbd")), 7009000),
        (lambda: rbd(ephemeral_encryption=luks(format="luks-any")), 9003000),
        (lambda: LibvirtConfigGuestFilesys(source_dir="/a", driver_type="virtiofs"), 6002000),
        (
            lambda: LibvirtConfigGuestFilesys(source_dir="/a", driver_type="virtiofs", idmap=idmap(ONE, ONE)),
            10000000,
        ),
    ],
)
def test_older_libvirt_is_an_error_where_the_guest_would_see_other_data(
    make: Callable[[], LibvirtConfigGuestDisk | LibvirtConfigGuestFilesys], since: int
) -> None:
    assert make().to_xml(since)
    with pytest.raises(exceptions.Unsupported, match="libvirt knows it since"):
        make().to_xml(since - 1)


def test_encryption_stands_in_the_disk_for_an_older_libvirt() -> None:
    encrypted = disk(ephemeral_encryption=luks())
    old = LibvirtConfigGuestDisk.parse(encrypted.to_xml(3008000))
    assert old.ephemeral_encryption is None
    assert old.volume_encryption == encrypted.ephemeral_encryption
    assert LibvirtConfigGuestDisk.parse(encrypted.to_xml(3009000)) == encrypted


def test_lun_brings_its_own_serial_and_block_sizes() -> None:
    lun = disk(source_type="block", source_device="lun", source_path="/dev/sdx", serial="a", logical_block_size=512)
    written = lun.to_xml()
    assert "serial" not in written
    assert "blockio" not in written


def test_backing_chain_has_a_limit() -> None:
    chain = LibvirtConfigGuestDiskBackingStore()
    for number in range(300):
        chain = LibvirtConfigGuestDiskBackingStore(
            source_type="file", source_path=f"/{number}", driver_format="qcow2", backing_store=chain
        )
    with pytest.raises(exceptions.InvalidArgument, match="more than 200 images"):
        disk(backing_store=chain).to_xml()
    nested = "<backingStore><format type='raw'/><source file='/b'/>" * 201 + "</backingStore>" * 201
    with pytest.raises(exceptions.InvalidArgument, match="more than 200 images"):
        LibvirtConfigGuestDisk.parse(f"<disk>{nested}</disk>")


def test_backing_chain_that_loops_ends() -> None:
    chain = LibvirtConfigGuestDiskBackingStore(source_type="file", source_path="/b", driver_format="qcow2")
    chain.backing_store = chain
    with pytest.raises(exceptions.InvalidArgument, match="more than 200 images"):
        disk(backing_store=chain).to_xml()


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("", "<disk>"),
        ("<disk>", "<disk>"),
        ("<volume/>", "<disk> was expected, not <volume>"),
        ("<disk>\ud800</disk>", "surrogates not allowed"),
        ('<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><disk><serial>&x;</serial></disk>', "document type"),
        ("<disk>" + " " * (1 << 20) + "</disk>", "at most 1048576"),
        ("<disk><boot order='1_0'/></disk>", "boot_order: '1_0' is not a whole number"),
        ("<disk><driver copy_on_read='yes'/></disk>", "driver_copy_on_read: 'yes' is neither on nor off"),
        (
            "<disk><driver><metadata_cache><max_size unit='acre'>1</max_size></metadata_cache></driver></disk>",
            "driver_metadata_cache_size: 'acre' is not a unit of size",
        ),
    ],
)
def test_document_is_refused(xml: str, message: str) -> None:
    with pytest.raises(exceptions.InvalidArgument) as caught:
        LibvirtConfigGuestDisk.parse(xml)
    assert message in str(caught.value)


def test_declared_encoding_does_not_matter() -> None:
    declared = '<?xml version="1.0" encoding="utf-16"?>\n' + disk(source_path="/żółw").to_xml()
    assert LibvirtConfigGuestDisk.parse(declared) == disk(source_path="/żółw")


@pytest.mark.parametrize(
    ("unit", "size"), [("bytes", 3), ("b", 3), ("KiB", 3 << 10), ("K", 3 << 10), ("MB", 3 * 10**6), ("G", 3 << 30)]
)
def test_units_of_size(unit: str, size: int) -> None:
    xml = f"<filesystem><target dir='/'/><space_hard_limit unit='{unit}'>3</space_hard_limit></filesystem>"
    assert LibvirtConfigGuestFilesys.parse(xml).space_hard_limit == size


def test_what_a_running_domain_shows_is_read() -> None:
    """Elements that are libvirt's own are passed over; <auth> may stand in <source>."""
    live = f"""
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/>
      <source protocol='rbd' name='vms/a' index='1'>
        <host name='192.0.2.1' port='6789'/>
        <auth username='cinder'><secret type='ceph' uuid='{SECRET}'/></auth>
        <privateData><nodenames><nodename type='storage' name='x'/></nodenames></privateData>
      </source>
      <mirror type='file' job='copy'/>
      <target dev='vda' bus='virtio'/>
      <alias name='virtio-disk0'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>"""
    read = LibvirtConfigGuestDisk.parse(live)
    assert read == LibvirtConfigGuestDisk(
        source_type="network",
        driver_name="qemu",
        driver_format="raw",
        source_protocol="rbd",
        source_name="vms/a",
        source_hosts=["192.0.2.1"],
        source_ports=[6789],
        auth_username="cinder",
        auth_secret_type="ceph",
        auth_secret_uuid=SECRET,
        target_dev="vda",
        target_bus="virtio",
        alias="virtio-disk0",
    )


def test_lxml_is_imported_only_to_parse() -> None:
    use = "imagebackend.guest.LibvirtConfigGuestFilesys(source_dir='/a').to_xml()"
    program = f"import sys, imagebackend.guest; {use}; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "imagebackend.guest" in modules
    assert not {"lxml", "xml", "libvirt"} & set(modules)


def test_repr_shows_what_is_set() -> None:
    shown = repr(LibvirtConfigGuestDisk(target_dev="vda"))
    assert shown == "LibvirtConfigGuestDisk(source_type='file', source_device='disk', target_dev='vda')"


def test_an_idmap_that_lacks_a_number_is_refused() -> None:
    with pytest.raises(exceptions.InvalidArgument, match="<gid>: start, target and count are needed"):
        LibvirtConfigGuestIDMap.parse('<idmap><gid start="0" count="1"/></idmap>')
