# SPDX-License-Identifier: Apache-2.0
"""``<disk>``: a disk of a guest, as libvirt's domain XML describes it.

Source: https://libvirt.org/formatdomain.html#hard-drives-floppy-disks-cdroms and libvirt's domaincommon.rng. Versions
are those of that page's "since" and of libvirt's release notes. Neither dates ``discard_granularity``: Debian's 9.0
does not know it, and 9.7.0 is a cautious choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from imagebackend import exceptions
from imagebackend.guest import iotune
from imagebackend.guest.backing_store import FORMATS, LibvirtConfigGuestDiskBackingStore
from imagebackend.guest.element import (
    NEWEST,
    Element,
    Kind,
    Property,
    choice,
    empty_element,
    integer,
    parse_document,
    path,
    read_size,
    switch,
    text,
)
from imagebackend.guest.encryption import UUID, LibvirtConfigGuestDiskEncryption
from imagebackend.guest.source import TYPES, read_source, write_source

__all__ = ["LibvirtConfigGuestDeviceAddressDrive", "LibvirtConfigGuestDisk"]


def _block_size() -> Kind:
    size = integer(512, 2 << 20)

    def write(label: str, value: int) -> str:
        written = size.write(label, value)
        if int(written) & (int(written) - 1):
            raise exceptions.InvalidArgument(f"{label}: {written} is not a power of two")
        return written

    return Kind(write, size.read)


_NAME = text(r"[a-zA-Z0-9_+-]+", "a name of ASCII letters, digits, '_', '+' and '-'")
_ALIAS_NAME = text(r"[a-zA-Z0-9_-]+", "a name of ASCII letters, digits, '_' and '-'")
_SERIAL_NUMBER = text(r"[A-Za-z0-9_.+ -]+", "a serial number of ASCII letters, digits, space, '_', '.', '+' and '-'")
_TARGET_DEV = text(r"(ioemu:)?(fd|hd|sd|vd|xvd|ubd)[a-zA-Z0-9_]+", "a device name such as vda, sda, hda or fda")
_BUSES = choice("virtio", "scsi", "sata", "ide", "usb", "fdc", "xen", "sd")
_COUNT = integer(1, 2**31 - 1)
_SIZE = integer(1, 2**63 - 1)
_LIMIT = integer(0, iotune.MAXIMUM)

_DISK = Element(
    Property("source_type", "type", TYPES),
    Property("source_device", "device", choice("disk", "cdrom", "floppy", "lun")),
    Property("snapshot", "snapshot", choice("no", "internal", "external", newer={"manual": 8002000})),
)
_DRIVER = Element(
    Property("driver_name", "name", _NAME),
    Property("driver_format", "type", FORMATS),
    Property("driver_cache", "cache", choice("default", "none", "writethrough", "writeback", "directsync", "unsafe")),
    Property("driver_error_policy", "error_policy", choice("stop", "report", "ignore", "enospace")),
    Property("driver_rerror_policy", "rerror_policy", choice("stop", "report", "ignore")),
    # Without io, QEMU uses threads: right for every file, so that is what an older libvirt gets.
    Property("driver_io", "io", choice("threads", "native", newer={"io_uring": 6003000})),
    Property("driver_copy_on_read", "copy_on_read", switch()),
    Property("driver_discard", "discard", choice("ignore", "unmap"), since=1000006),
    Property("driver_iothread", "iothread", _COUNT, since=1002008),
    Property("driver_detect_zeroes", "detect_zeroes", choice("off", "on", "unmap"), since=2000000),
    Property("driver_queues", "queues", integer(1, 65535), since=3009000),
    Property("driver_queue_size", "queue_size", integer(1, 65535), since=7008000),
    Property("driver_discard_no_unref", "discard_no_unref", switch(), since=9005000),
)
_ALIAS = Element(Property("alias", "name", _ALIAS_NAME, since=3009000))
_STARTUP_POLICY = Element(Property("startup_policy", "startupPolicy", choice("mandatory", "requisite", "optional")))
_SLICE = Element(
    Property("source_slice_offset", "offset", integer(0, 2**63 - 1), since=6001000, needed=True),
    Property("source_slice_size", "size", _SIZE, since=6001000, needed=True),
)
_SNAPSHOT = Element(Property("source_snapshot", "name", text(), since=1002011, needed=True))
_CONFIG = Element(Property("source_config_file", "file", path(), since=1002011, needed=True))
_AUTH = Element(Property("auth_username", "username", text()))
_SECRET = Element(
    Property("auth_secret_type", "type", choice("ceph", "iscsi")),
    Property("auth_secret_uuid", "uuid", UUID),
)
_TARGET = Element(
    Property("target_dev", "dev", _TARGET_DEV),
    Property("target_bus", "bus", _BUSES),
)
_IDENTITY = Element(
    Property("serial", "serial", _SERIAL_NUMBER),
    Property("wwn", "wwn", text(r"(0x)?[0-9a-fA-F]{16}", "16 hexadecimal digits")),
)
_IOTUNE = Element(
    *(Property(f"disk_{each}", each, _LIMIT) for each in iotune.LIMITS),
    *(Property(f"disk_{each}_max", f"{each}_max", _LIMIT, since=1002011) for each in iotune.LIMITS),
    Property("disk_size_iops_sec", "size_iops_sec", _LIMIT, since=1002011),
    Property("disk_group_name", "group_name", text(), since=3000000),
    *(Property(f"disk_{each}_max_length", f"{each}_max_length", _LIMIT, since=2004000) for each in iotune.LIMITS),
)
_BLOCKIO = Element(
    Property("logical_block_size", "logical_block_size", _block_size()),
    Property("physical_block_size", "physical_block_size", _block_size()),
    Property("discard_granularity", "discard_granularity", _COUNT, since=9007000),
)
_BOOT = Element(Property("boot_order", "order", _COUNT))
_ADDRESS = Element(
    Property("controller", "controller", integer(0, 99)),
    Property("bus", "bus", integer(0, 99)),
    Property("target", "target", integer(0, 99)),
    Property("unit", "unit", integer(0, 99999)),
)

# What few disks have: one look tells that there is nothing to do.
_seldom: Callable[[object], tuple[object, ...]] = attrgetter(
    *("source_slice_offset", "source_slice_size", "source_snapshot", "source_config_file", "ephemeral_encryption"),
    "startup_policy",
)
_NO_SELDOM = (None,) * 6


@dataclass(slots=True, kw_only=True)
class LibvirtConfigGuestDeviceAddressDrive:
    """Where on a SCSI, SATA, IDE or floppy controller a disk is."""

    controller: int | None = None
    bus: int | None = None
    target: int | None = None
    unit: int | None = None


@dataclass(slots=True, kw_only=True, repr=False)
class LibvirtConfigGuestDisk:
    """A disk of a guest. The attributes are Nova's where Nova has them; None is not in the XML.

    :ivar source_type: ``file``, ``block``, ``dir`` or ``network``; with the other ``source_…`` attributes see
        :class:`imagebackend.guest.source.Source`. A cdrom or floppy without ``source_path`` is empty.
    :ivar source_device: ``disk``, ``cdrom``, ``floppy`` or ``lun``.
    :ivar source_snapshot: snapshot of an RBD image to use in its place.
    :ivar source_config_file: path of ceph.conf.
    :ivar source_slice_offset: where in the source the image begins, in bytes; with ``source_slice_size``.
    :ivar startup_policy: what happens if the source is missing: ``mandatory``, ``requisite``, ``optional``.
    :ivar driver_name: ``qemu``.
    :ivar driver_metadata_cache_size: how much of a qcow2 image's tables QEMU keeps in memory, in bytes.
    :ivar driver_iothread: number of the domain's I/O thread, from 1.
    :ivar auth_username: of Ceph; with ``auth_secret_type`` and ``auth_secret_uuid``.
    :ivar backing_store: the images behind it; None: libvirt finds them by itself.
    :ivar serial: and ``logical_block_size``, ``physical_block_size``, ``discard_granularity``: not written for a
        ``lun``, which brings its own.
    :ivar disk_read_bytes_sec: and the other limits of I/O: see :mod:`imagebackend.guest.iotune`.
    :ivar ephemeral_encryption: how the source is encrypted; stands inside ``<source>`` since libvirt 3.9.0.
    :ivar volume_encryption: the same for a volume of a storage pool; stands in ``<disk>``.
    """

    source_type: str | None = "file"
    source_device: str = "disk"
    driver_name: str | None = None
    driver_format: str | None = None
    driver_cache: str | None = None
    driver_discard: str | None = None
    driver_io: str | None = None
    driver_error_policy: str | None = None
    driver_rerror_policy: str | None = None
    driver_copy_on_read: bool | None = None
    driver_iothread: int | None = None
    driver_detect_zeroes: str | None = None
    driver_queues: int | None = None
    driver_queue_size: int | None = None
    driver_discard_no_unref: bool | None = None
    driver_metadata_cache_size: int | None = None
    source_path: str | None = None
    source_protocol: str | None = None
    source_name: str | None = None
    source_hosts: list[str] = field(default_factory=list)
    source_ports: list[int | str | None] = field(default_factory=list)
    source_snapshot: str | None = None
    source_config_file: str | None = None
    source_slice_offset: int | None = None
    source_slice_size: int | None = None
    startup_policy: str | None = None
    target_dev: str | None = None
    target_bus: str | None = None
    auth_username: str | None = None
    auth_secret_type: str | None = None
    auth_secret_uuid: str | None = None
    backing_store: LibvirtConfigGuestDiskBackingStore | None = None
    serial: str | None = None
    wwn: str | None = None
    disk_total_bytes_sec: int | None = None
    disk_read_bytes_sec: int | None = None
    disk_write_bytes_sec: int | None = None
    disk_total_iops_sec: int | None = None
    disk_read_iops_sec: int | None = None
    disk_write_iops_sec: int | None = None
    disk_total_bytes_sec_max: int | None = None
    disk_read_bytes_sec_max: int | None = None
    disk_write_bytes_sec_max: int | None = None
    disk_total_iops_sec_max: int | None = None
    disk_read_iops_sec_max: int | None = None
    disk_write_iops_sec_max: int | None = None
    disk_size_iops_sec: int | None = None
    disk_group_name: str | None = None
    disk_total_bytes_sec_max_length: int | None = None
    disk_read_bytes_sec_max_length: int | None = None
    disk_write_bytes_sec_max_length: int | None = None
    disk_total_iops_sec_max_length: int | None = None
    disk_read_iops_sec_max_length: int | None = None
    disk_write_iops_sec_max_length: int | None = None
    logical_block_size: int | None = None
    physical_block_size: int | None = None
    discard_granularity: int | None = None
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    snapshot: str | None = None
    boot_order: int | str | None = None
    device_addr: LibvirtConfigGuestDeviceAddressDrive | None = None
    alias: str | None = None
    ephemeral_encryption: LibvirtConfigGuestDiskEncryption | None = None
    volume_encryption: LibvirtConfigGuestDiskEncryption | None = None

    def __repr__(self) -> str:
        shown = [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if getattr(self, each.name)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def to_xml(self, libvirt_version: int | None = None) -> str:
        """Return the ``<disk>`` element, indented, with a newline at its end.

        :param libvirt_version: of the libvirt that will read it, as ``virConnectGetLibVersion`` returns it
            (major * 1000000 + minor * 1000 + release); what it does not know is left out. None: the newest.
        :raises InvalidArgument: an attribute is missing, contradicts another one, or has a value that libvirt does
            not take or XML cannot carry.
        :raises Unsupported: without something that this libvirt does not know, the guest would see other data.
        """
        version = NEWEST if libvirt_version is None else libvirt_version
        if self.target_dev is None:
            raise exceptions.InvalidArgument("target_dev: needed, such as vda")
        out = f"<disk{_DISK.attributes(self, version)}>\n{self._driver(version)}"
        if self.alias is not None:
            out += empty_element("alias", _ALIAS.attributes(self, version))
        out += self._source(version) + self._auth(version)
        if self.backing_store is not None and version >= 1002004:
            out += self.backing_store.element("  ")
        out += f"  <target{_TARGET.attributes(self, version)}/>\n"
        out += self._hardware(version) + self._flags(version)
        if self.device_addr is not None:
            out += f'  <address type="drive"{_ADDRESS.attributes(self.device_addr, version)}/>\n'
        if self.volume_encryption is not None:
            out += self.volume_encryption.element(version, "  ")
        elif self.ephemeral_encryption is not None and version < 3009000:
            out += self.ephemeral_encryption.element(version, "  ")
        return out + "</disk>\n"

    def _hardware(self, version: int) -> str:
        if self.source_device == "lun":
            return self._iotune(version)
        blockio = empty_element("blockio", _BLOCKIO.attributes(self, version))
        return _IDENTITY.children(self, version, "  ") + self._iotune(version) + blockio

    def _flags(self, version: int) -> str:
        out = ""
        if self.readonly:
            out = "  <readonly/>\n"
        if self.shareable:
            out += "  <shareable/>\n"
        if self.transient:
            out += "  <transient/>\n"
        if self.boot_order is not None:
            out += empty_element("boot", _BOOT.attributes(self, version))
        return out

    def _driver(self, version: int) -> str:
        head = _DRIVER.attributes(self, version)
        if self.driver_metadata_cache_size is None or version < 7000000:
            return empty_element("driver", head)
        size = _SIZE.write("driver_metadata_cache_size", self.driver_metadata_cache_size)
        return (
            f"  <driver{head}>\n    <metadata_cache>\n"
            f'      <max_size unit="bytes">{size}</max_size>\n    </metadata_cache>\n  </driver>\n'
        )

    def _source(self, version: int) -> str:
        if self.source_path is None and self.source_device in ("cdrom", "floppy") and self.source_type != "network":
            return ""
        if _seldom(self) == _NO_SELDOM:
            return write_source(self, "disk", "  ")
        policy = _STARTUP_POLICY.attributes(self, version)
        self._check_source()
        children = empty_element("snapshot", _SNAPSHOT.attributes(self, version), "    ")
        children += empty_element("config", _CONFIG.attributes(self, version), "    ")
        part = _SLICE.attributes(self, version)
        if part:
            children += f'    <slices>\n      <slice type="storage"{part}/>\n    </slices>\n'
        if self.ephemeral_encryption is not None and version >= 3009000:
            children += self.ephemeral_encryption.element(version, "    ")
        return write_source(self, "disk", "  ", policy, children)

    def _check_source(self) -> None:
        if (self.source_slice_offset is None) != (self.source_slice_size is None):
            raise exceptions.InvalidArgument("source_slice_offset and source_slice_size: one needs the other")
        if self.ephemeral_encryption is not None and self.volume_encryption is not None:
            raise exceptions.InvalidArgument("ephemeral_encryption and volume_encryption: one or the other")
        misplaced = ("startup_policy",) if self.source_type == "network" else ("source_snapshot", "source_config_file")
        for attribute in misplaced:
            if getattr(self, attribute) is not None:
                raise exceptions.InvalidArgument(f"{attribute}: not where source_type is {self.source_type}")

    def _auth(self, version: int) -> str:
        given = (self.auth_username, self.auth_secret_type, self.auth_secret_uuid)
        if given == (None, None, None):
            return ""
        if None in given:
            raise exceptions.InvalidArgument(
                "auth_username, auth_secret_type, auth_secret_uuid: all or none are needed"
            )
        secret = _SECRET.attributes(self, version)
        return f"  <auth{_AUTH.attributes(self, version)}>\n    <secret{secret}/>\n  </auth>\n"

    def _iotune(self, version: int) -> str:
        limits = _IOTUNE.children(self, version, "    ")
        if not limits:
            return ""
        given = {each.name: getattr(self, each.attribute) for each in _IOTUNE.properties}
        iotune.check({name: int(value) for name, value in given.items() if value and name != "group_name"}, "disk_")
        return f"  <iotune>\n{limits}  </iotune>\n"

    @classmethod
    def parse(cls, xml: str) -> LibvirtConfigGuestDisk:
        """Return the disk that a ``<disk>`` element describes. What this class does not have is passed over.

        :raises InvalidArgument: it is not such an element, is longer than 1 MiB, or has a number that is none.
        """
        root = parse_document(xml, "disk")
        found: dict[str, Any] = _DISK.read_attributes(root)
        for element, place in _ELEMENTS:
            found |= element.read_attributes(root.find(place))
        found |= _IDENTITY.read_children(root) | _IOTUNE.read_children(root.find("iotune"))
        source = root.find("source")
        if source is not None:
            found |= read_source(source, found.get("source_type", "file"))
        size = root.find("driver/metadata_cache/max_size")
        if size is not None:
            found["driver_metadata_cache_size"] = read_size("driver_metadata_cache_size", size)
        address = root.find("address[@type='drive']")
        if address is not None:
            found["device_addr"] = LibvirtConfigGuestDeviceAddressDrive(**_ADDRESS.read_attributes(address))
        return cls(
            backing_store=LibvirtConfigGuestDiskBackingStore.read(root.find("backingStore")),
            ephemeral_encryption=LibvirtConfigGuestDiskEncryption.read(root.find("source/encryption")),
            volume_encryption=LibvirtConfigGuestDiskEncryption.read(root.find("encryption")),
            readonly=root.find("readonly") is not None,
            shareable=root.find("shareable") is not None,
            transient=root.find("transient") is not None,
            **found,
        )


# Where parse() finds the elements that are nothing but attributes.
_ELEMENTS = (
    (_DRIVER, "driver"),
    (_ALIAS, "alias"),
    (_STARTUP_POLICY, "source"),
    (_SLICE, "source/slices/slice[@type='storage']"),
    (_SNAPSHOT, "source/snapshot"),
    (_CONFIG, "source/config"),
    (_AUTH, "auth"),
    (_AUTH, "source/auth"),
    (_SECRET, "auth/secret"),
    (_SECRET, "source/auth/secret"),
    (_TARGET, "target"),
    (_BLOCKIO, "blockio"),
    (_BOOT, "boot"),
)
