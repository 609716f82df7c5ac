# SPDX-License-Identifier: Apache-2.0
"""What libvirt is told about a disk."""

from __future__ import annotations

import libvirt
import pytest

from imagebackend import exceptions, guest
from tests.contract.conftest import MIB, Store

DOMAIN = """
<domain type="test">
  <name>guest</name><memory>1024</memory>
  <os><type>hvm</type></os>
  <devices>{devices}</devices>
</domain>
"""


def test_the_description_says_where_and_what_the_disk_is(store: Store) -> None:
    image = store.make()

    disk = image.libvirt_info("virtio", "vda", "disk", "none", {}, boot_order=1, serial="abc")

    store.check_source(image, disk)
    assert disk.driver_name == "qemu"
    assert disk.driver_format == store.format(image)
    assert (disk.target_bus, disk.target_dev, disk.source_device) == ("virtio", "vda", "disk")
    assert (disk.driver_cache, disk.boot_order, disk.serial) == ("none", 1, "abc")


def test_libvirt_accepts_the_description(store: Store) -> None:
    specs = {"quota:disk_total_iops_sec": "1000", "quota:disk_total_iops_sec_max": "2000", "hw:other": "x"}
    disk = store.make().libvirt_info("scsi", "sda", "disk", None, specs, boot_order=1, disk_unit=3)

    connection = libvirt.open("test:///default")
    try:
        xml = DOMAIN.format(devices=disk.to_xml(connection.getLibVersion()))
        domain = connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)
        told = domain.XMLDesc()
        domain.undefine()  # all connections to this driver see one set of domains
    finally:
        connection.close()

    assert "<total_iops_sec>1000</total_iops_sec>" in told
    assert "unit='3'" in told


def test_what_only_some_guests_have_is_said_of_them_alone(store: Store) -> None:
    image = store.make()

    disk = image.libvirt_info("virtio", "vda", "disk", "none", {}, disk_unit=3)
    assert (disk.driver_name, disk.device_addr) == ("qemu", None)

    store.conf.set_override("virt_type", "lxc", group="libvirt")
    assert image.libvirt_info("virtio", "vda", "disk", "none", {}).driver_name is None


def test_without_a_cache_mode_the_operator_or_the_storage_decides(store: Store) -> None:
    image = store.make()

    disk = image.libvirt_info("virtio", "vda", "disk", None, {})
    assert disk.driver_cache == "none"  # these file systems take O_DIRECT, and clusters have no page cache

    other = "file" if image.source_type == "block" else "block"
    modes = [f"{image.source_type}=writeback", f"{other}=none"]
    store.conf.set_override("disk_cachemodes", modes, group="libvirt")
    disk = image.libvirt_info("virtio", "vda", "disk", None, {})
    assert (disk.driver_cache, disk.driver_io) == ("writeback", store.io_mode)

    store.conf.set_override("disk_cachemodes", ["file=fast"], group="libvirt")
    with pytest.raises(exceptions.InvalidConfiguration, match="disk_cachemodes"):
        image.libvirt_info("virtio", "vda", "disk", None, {})


def test_native_io_is_for_preallocated_disks_that_bypass_the_page_cache(store: Store) -> None:
    image = store.make()
    preallocated = store.preallocated or store.conf.preallocate_images == "space"
    direct = "native" if preallocated else store.io_mode

    assert image.libvirt_info("virtio", "vda", "disk", "none", {}).driver_io == direct
    assert image.libvirt_info("virtio", "vda", "disk", "writeback", {}).driver_io == store.io_mode


def test_discard_is_as_the_operator_says(store: Store) -> None:
    image = store.make()
    assert image.libvirt_info("virtio", "vda", "disk", "none", {}).driver_discard is None

    store.conf.set_override("hw_disk_discard", "unmap", group="libvirt")
    assert image.libvirt_info("virtio", "vda", "disk", "none", {}).driver_discard == "unmap"


def test_limits_that_are_no_numbers_are_refused(store: Store, subtests: pytest.Subtests) -> None:
    image = store.make()
    for value in ("-1", "1e3", "٣", "", "x", "99999999999999999999"):
        with subtests.test(value), pytest.raises(exceptions.InvalidArgument, match="quota:disk_read_bytes_sec"):
            image.libvirt_info("virtio", "vda", "disk", "none", {"quota:disk_read_bytes_sec": value})


def test_a_container_gets_the_disk_by_a_driver_for_its_format(store: Store) -> None:
    image = store.make(size=64 * MIB)
    if image.source_type == "network":
        with pytest.raises(exceptions.Unsupported, match="map it, or copy it"):
            image.libvirt_fs_info("/data")
        return

    filesystem = image.libvirt_fs_info("/data")
    assert guest.LibvirtConfigGuestFilesys.parse(filesystem.to_xml()) == filesystem
    if store.image_type == "ploop":
        assert (filesystem.source_file, filesystem.driver_type, filesystem.driver_format) == (
            image.path,
            "ploop",
            "ploop",
        )
        with pytest.raises(exceptions.Unsupported, match="extract it"):
            image.libvirt_fs_info("/", driver_type="nbd")
        return
    if image.source_type == "block":
        assert (filesystem.source_type, filesystem.source_dev) == ("block", store.qemu(image)[1])
        return

    raw = store.format(image) == "raw"
    assert (filesystem.source_type, filesystem.source_file, filesystem.target_dir) == ("file", image.path, "/data")
    assert (filesystem.driver_type, filesystem.driver_format) == ("loop" if raw else "nbd", store.format(image))
    assert image.libvirt_fs_info("/", driver_type="nbd").driver_type == "nbd"


def test_the_backends_static_facts(store: Store) -> None:
    image = store.image()

    facts = (image.is_shared_block_storage(), image.is_file_in_instance_path())
    assert facts == (image.source_type == "network", image.source_type == "file")
