# SPDX-License-Identifier: Apache-2.0
"""The disks and file systems whose XML is kept in this folder, one file each, named for the case."""

from __future__ import annotations

from pathlib import Path

from imagebackend.guest import (
    LibvirtConfigGuestDeviceAddressDrive,
    LibvirtConfigGuestDisk,
    LibvirtConfigGuestDiskBackingStore,
    LibvirtConfigGuestDiskEncryption,
    LibvirtConfigGuestDiskEncryptionSecret,
    LibvirtConfigGuestFilesys,
    LibvirtConfigGuestIDMap,
    LibvirtConfigGuestIDRange,
)

FOLDER = Path(__file__).parent
SECRET = "8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10"


def disk(**attributes: object) -> LibvirtConfigGuestDisk:
    """A disk with the least that libvirt wants, changed by ``attributes``."""
    plain = {
        "driver_name": "qemu",
        "driver_format": "raw",
        "source_path": "/srv/instances/4c1b/disk",
        "target_dev": "vda",
        "target_bus": "virtio",
    }
    return LibvirtConfigGuestDisk(**(plain | attributes))


def rbd(**attributes: object) -> LibvirtConfigGuestDisk:
    return disk(
        source_type="network", source_path=None, source_protocol="rbd", source_name="vms/4c1b_disk", **attributes
    )


def luks(**attributes: object) -> LibvirtConfigGuestDiskEncryption:
    secret = LibvirtConfigGuestDiskEncryptionSecret(uuid=SECRET)
    return LibvirtConfigGuestDiskEncryption(secret=secret, **attributes)


def behind(*images: LibvirtConfigGuestDiskBackingStore) -> LibvirtConfigGuestDiskBackingStore:
    """The chain of ``images``, ended, so that libvirt looks for no more."""
    chain = LibvirtConfigGuestDiskBackingStore()
    for image in reversed(images):
        image.backing_store = chain
        chain = image
    return chain


DISKS = {
    "disk-file-raw": disk(driver_cache="none", driver_io="native"),
    "disk-file-qcow2": disk(driver_format="qcow2", driver_cache="none", driver_discard="unmap", boot_order=1),
    "disk-file-escaped": disk(source_path='/srv/a & b/<disk> "one"\'s/żółw', serial="one two+three"),
    "disk-block": disk(source_type="block", source_path="/dev/vg/4c1b_disk", driver_cache="none", driver_io="native"),
    "disk-dir": disk(source_type="dir", source_path="/srv/files", driver_format="fat", readonly=True),
    "disk-lun": disk(
        source_type="block", source_device="lun", source_path="/dev/sdx", target_dev="sda", target_bus="scsi"
    ),
    "disk-cdrom": disk(
        source_device="cdrom",
        source_path="/srv/config.iso",
        startup_policy="optional",
        target_dev="sda",
        target_bus="sata",
        readonly=True,
    ),
    "disk-cdrom-empty": disk(
        source_device="cdrom", source_path=None, target_dev="hda", target_bus="ide", readonly=True
    ),
    "disk-floppy": disk(source_device="floppy", source_path="/srv/floppy.img", target_dev="fda", target_bus="fdc"),
    "disk-scsi-address": disk(
        target_dev="sdb",
        target_bus="scsi",
        wwn="5000c50015ea71ad",
        serial="4c1b-sdb",
        device_addr=LibvirtConfigGuestDeviceAddressDrive(controller=0, bus=0, target=3, unit=1),
    ),
    "disk-driver": disk(
        driver_format="qcow2",
        driver_cache="directsync",
        driver_io="io_uring",
        driver_error_policy="enospace",
        driver_rerror_policy="report",
        driver_copy_on_read=True,
        driver_discard="unmap",
        driver_iothread=2,
        driver_detect_zeroes="unmap",
        driver_queues=4,
        driver_queue_size=256,
        driver_discard_no_unref=True,
        driver_metadata_cache_size=4 << 20,
        alias="ua-root-disk",
    ),
    "disk-blockio": disk(logical_block_size=4096, physical_block_size=4096, discard_granularity=65536),
    "disk-shareable": disk(shareable=True, driver_cache="none", snapshot="no"),
    "disk-transient": disk(transient=True, snapshot="external"),
    "disk-iotune-total": disk(
        disk_total_bytes_sec=100_000_000,
        disk_total_bytes_sec_max=200_000_000,
        disk_total_bytes_sec_max_length=10,
        disk_total_iops_sec=1000,
        disk_total_iops_sec_max=5000,
        disk_total_iops_sec_max_length=60,
        disk_size_iops_sec=4096,
        disk_group_name="guest & <all>",
    ),
    "disk-iotune-read-write": disk(
        disk_read_bytes_sec=100_000_000,
        disk_read_bytes_sec_max=200_000_000,
        disk_read_bytes_sec_max_length=10,
        disk_write_bytes_sec=50_000_000,
        disk_write_bytes_sec_max=60_000_000,
        disk_write_bytes_sec_max_length=20,
        disk_read_iops_sec=1000,
        disk_read_iops_sec_max=5000,
        disk_read_iops_sec_max_length=60,
        disk_write_iops_sec=500,
        disk_write_iops_sec_max=600,
        disk_write_iops_sec_max_length=30,
    ),
    "disk-slice": disk(source_slice_offset=1048576, source_slice_size=10737418240),
    "disk-backing-chain": disk(
        driver_format="qcow2",
        backing_store=behind(
            LibvirtConfigGuestDiskBackingStore(
                source_type="file", source_path="/srv/instances/4c1b/disk.1", driver_format="qcow2"
            ),
            LibvirtConfigGuestDiskBackingStore(source_type="block", source_path="/dev/vg/base", driver_format="qcow2"),
            LibvirtConfigGuestDiskBackingStore(
                source_type="network",
                source_protocol="rbd",
                source_name="images/debian-12",
                source_hosts=["192.0.2.1", "2001:db8::1"],
                source_ports=[6789, None],
                driver_format="raw",
            ),
        ),
    ),
    "disk-backing-none": disk(driver_format="qcow2", backing_store=behind()),
    "disk-luks": disk(ephemeral_encryption=luks()),
    "disk-luks-volume": disk(source_type="block", source_path="/dev/vg/4c1b_disk", volume_encryption=luks()),
    "disk-rbd": rbd(
        driver_cache="writeback",
        driver_discard="unmap",
        source_hosts=["192.0.2.1", "mon.example.org", "[2001:db8::1]", "2001:db8::2"],
        source_ports=[6789, None, 3300, 6789],
        auth_username="cinder",
        auth_secret_type="ceph",
        auth_secret_uuid=SECRET,
    ),
    "disk-rbd-config": rbd(source_snapshot="before-upgrade", source_config_file="/etc/ceph/ceph.conf", readonly=True),
    "disk-rbd-luks2": rbd(ephemeral_encryption=luks(format="luks2", engine="librbd"), source_hosts=["192.0.2.1"]),
    "disk-ploop": disk(driver_format="ploop", source_path="/srv/instances/4c1b/disk/root.hds"),
}

IDMAP = LibvirtConfigGuestIDMap(
    uid=(LibvirtConfigGuestIDRange(0, 100000, 65535), LibvirtConfigGuestIDRange(65535, 4294967294, 1)),
    gid=(LibvirtConfigGuestIDRange(0, 200000, 65536),),
)
FILESYSTEMS = {
    "filesystem-file-loop": LibvirtConfigGuestFilesys(source_type="file", source_file="/srv/instances/4c1b/disk"),
    "filesystem-file-nbd": LibvirtConfigGuestFilesys(
        source_type="file", source_file="/srv/instances/4c1b/disk", driver_type="nbd", driver_format="qcow2"
    ),
    "filesystem-file-ploop": LibvirtConfigGuestFilesys(
        source_type="file", source_file="/srv/instances/4c1b/disk", driver_type="ploop", driver_format="ploop"
    ),
    "filesystem-block": LibvirtConfigGuestFilesys(
        source_type="block",
        source_dev="/dev/vg/4c1b_disk",
        target_dir="/srv/data & more",
        readonly=True,
        space_hard_limit=10 << 30,
        space_soft_limit=9 << 30,
    ),
    "filesystem-mount": LibvirtConfigGuestFilesys(
        source_dir="/srv/shared", target_dir="shared", accessmode="mapped", driver_type="path"
    ),
    "filesystem-bind": LibvirtConfigGuestFilesys(source_type="bind", source_dir="/a", target_dir="/b"),
    "filesystem-template": LibvirtConfigGuestFilesys(source_type="template", source_name="debian-12", accessmode=None),
    "filesystem-ram": LibvirtConfigGuestFilesys(source_type="ram", source_usage=65536, target_dir="/tmp"),
}

#: What Debian 12's libvirt does not know, and must not be told.
NEWER: dict[str, LibvirtConfigGuestFilesys] = {
    "filesystem-idmap": LibvirtConfigGuestFilesys(
        source_dir="/srv/shared", target_dir="shared", driver_type="virtiofs", idmap=IDMAP
    ),
}

CASES: dict[str, LibvirtConfigGuestDisk | LibvirtConfigGuestFilesys] = {**DISKS, **FILESYSTEMS}
