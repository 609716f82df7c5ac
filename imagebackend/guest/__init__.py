# SPDX-License-Identifier: Apache-2.0
"""What libvirt is told about a guest's disks: XML, limits on I/O, cache modes. Pure: nothing here does I/O."""

from __future__ import annotations

from imagebackend.guest.backing_store import LibvirtConfigGuestDiskBackingStore
from imagebackend.guest.cache_mode import choose_cache_mode, choose_io_mode, parse_disk_cachemodes
from imagebackend.guest.disk import LibvirtConfigGuestDeviceAddressDrive, LibvirtConfigGuestDisk
from imagebackend.guest.encryption import LibvirtConfigGuestDiskEncryption, LibvirtConfigGuestDiskEncryptionSecret
from imagebackend.guest.filesystem import LibvirtConfigGuestFilesys
from imagebackend.guest.id_map import LibvirtConfigGuestIDMap, LibvirtConfigGuestIDRange
from imagebackend.guest.qos import disk_qos

__all__ = [
    "LibvirtConfigGuestDeviceAddressDrive",
    "LibvirtConfigGuestDisk",
    "LibvirtConfigGuestDiskBackingStore",
    "LibvirtConfigGuestDiskEncryption",
    "LibvirtConfigGuestDiskEncryptionSecret",
    "LibvirtConfigGuestFilesys",
    "LibvirtConfigGuestIDMap",
    "LibvirtConfigGuestIDRange",
    "choose_cache_mode",
    "choose_io_mode",
    "disk_qos",
    "parse_disk_cachemodes",
]
