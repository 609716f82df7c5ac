# SPDX-License-Identifier: Apache-2.0
"""``<filesystem>``: what a container has in place of disks, as libvirt's domain XML describes it.

Source: https://libvirt.org/formatdomain.html#filesystems and libvirt's domaincommon.rng.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imagebackend import exceptions
from imagebackend.guest.backing_store import FORMATS
from imagebackend.guest.element import (
    NEWEST,
    Element,
    Property,
    choice,
    empty_element,
    escape,
    integer,
    parse_document,
    path,
    read_size,
    text,
)
from imagebackend.guest.id_map import LibvirtConfigGuestIDMap

__all__ = ["LibvirtConfigGuestFilesys"]

_SIZE = integer(1, 2**63 - 1)
_PATH = path()
_TYPES = choice("mount", "template", "file", "block", "ram", "bind")
_DRIVERS = choice("path", "handle", "loop", "nbd", "ploop", newer={"virtiofs": 6002000})

_FILESYSTEM = Element(
    Property("source_type", "type", _TYPES),
    Property("accessmode", "accessmode", choice("passthrough", "mapped", "squash")),
)
_DRIVER = Element(
    Property("driver_type", "type", _DRIVERS, needed=True),
    Property("driver_format", "format", FORMATS),
)
# The one attribute of <source> that each type has.
_SOURCES = {
    "mount": Property("source_dir", "dir", _PATH),
    "bind": Property("source_dir", "dir", _PATH),
    "template": Property("source_name", "name", text(r"[a-zA-Z0-9_+-]+", "a name of ASCII letters and digits")),
    "file": Property("source_file", "file", _PATH),
    "block": Property("source_dev", "dev", _PATH),
    # In KiB, libvirt's unit for it.
    "ram": Property("source_usage", "usage", integer(1, 2**53 - 1)),
}
_IMAGE_DRIVERS = ("loop", "nbd", "ploop")
_IDMAP_SINCE = 10000000


@dataclass(slots=True, kw_only=True)
class LibvirtConfigGuestFilesys:
    """A file system of a container. The attributes are Nova's where Nova has them; None is not in the XML.

    :ivar source_type: ``file`` (an image), ``block`` (a device), ``mount`` or ``bind`` (a folder), ``template``,
        ``ram``.
    :ivar accessmode: ``passthrough``, ``mapped`` or ``squash``.
    :ivar source_file: path of the image, for ``file``.
    :ivar source_dev: path of the device, for ``block``.
    :ivar source_dir: path of the folder, for ``mount`` and ``bind``.
    :ivar source_name: for ``template``.
    :ivar source_usage: how much memory it may use, in KiB, for ``ram``.
    :ivar target_dir: where the guest has it mounted.
    :ivar driver_type: who makes a device of an image: ``loop``, ``nbd`` or ``ploop``; these are written for ``file``
        only. For ``mount``: ``path``, ``handle`` or ``virtiofs``.
    :ivar driver_format: the image's format, for ``file`` only.
    :ivar idmap: for ``virtiofs``, from libvirt 10.0.0 on: which users and groups of the host those of the guest are. A
        container has its own in the domain: see :class:`LibvirtConfigGuestIDMap`.
    :ivar readonly: the guest cannot write.
    :ivar space_hard_limit: at most this many bytes of it.
    :ivar space_soft_limit: more than this many bytes only for a while.
    """

    source_type: str = "mount"
    accessmode: str | None = "passthrough"
    source_file: str | None = None
    source_dev: str | None = None
    source_dir: str | None = None
    source_name: str | None = None
    source_usage: int | None = None
    target_dir: str = "/"
    driver_type: str | None = "loop"
    driver_format: str | None = "raw"
    idmap: LibvirtConfigGuestIDMap | None = None
    readonly: bool = False
    space_hard_limit: int | None = None
    space_soft_limit: int | None = None

    def to_xml(self, libvirt_version: int | None = None) -> str:
        """Return the ``<filesystem>`` element, indented, with a newline at its end.

        :param libvirt_version: of the libvirt that will read it, as ``virConnectGetLibVersion`` returns it
            (major * 1000000 + minor * 1000 + release); what it does not know is left out. None: the newest.
        :raises InvalidArgument: an attribute is missing, or has a value that libvirt does not take or XML cannot
            carry.
        :raises Unsupported: this libvirt does not know the driver, or an ``idmap``.
        """
        version = NEWEST if libvirt_version is None else libvirt_version
        source = _SOURCES[_TYPES.write("source_type", self.source_type)]
        place = getattr(self, source.attribute)
        if place is None:
            raise exceptions.InvalidArgument(f"{source.attribute}: needed where source_type is {self.source_type}")
        out = f"<filesystem{_FILESYSTEM.attributes(self, version)}>\n{self._driver(version)}"
        out += f'  <source {source.name}="{source.kind.write(source.attribute, place)}"/>\n'
        out += f'  <target dir="{escape("target_dir", self.target_dir)}"/>\n'
        out += self._idmap(version)
        if self.readonly:
            out += "  <readonly/>\n"
        for name in ("space_hard_limit", "space_soft_limit"):
            limit = getattr(self, name)
            if limit is not None:
                out += f'  <{name} unit="bytes">{_SIZE.write(name, limit)}</{name}>\n'
        return out + "</filesystem>\n"

    def _driver(self, version: int) -> str:
        driver = _DRIVER.attributes(self, version)
        if self.source_type == "file":
            return empty_element("driver", driver)
        if self.driver_type is None or self.driver_type in _IMAGE_DRIVERS:
            return ""
        return f'  <driver type="{self.driver_type}"/>\n'

    def _idmap(self, version: int) -> str:
        if self.idmap is None:
            return ""
        if self.driver_type != "virtiofs":
            reason = "idmap: of virtiofs alone; for a container, the domain has it"
            raise exceptions.InvalidArgument(reason)
        # Without it the guest would be other users than those that it is to be.
        if version < _IDMAP_SINCE:
            raise exceptions.Unsupported("an idmap in <filesystem>", "libvirt knows it since 10.0.0")
        return self.idmap.element("  ")

    @classmethod
    def parse(cls, xml: str) -> LibvirtConfigGuestFilesys:
        """Return what a ``<filesystem>`` element describes. What this class does not have is passed over.

        :raises InvalidArgument: it is not such an element, is longer than 1 MiB, or has a number that is none.
        """
        root = parse_document(xml, "filesystem")
        found: dict[str, Any] = {"accessmode": None} | _FILESYSTEM.read_attributes(root)
        if found.setdefault("source_type", "mount") == "file":
            found |= {"driver_type": None, "driver_format": None}
        found |= _DRIVER.read_attributes(root.find("driver"))
        source = _SOURCES.get(found["source_type"])
        if source is not None:
            found |= Element(source).read_attributes(root.find("source"))
        target = root.find("target")
        if target is not None:
            found["target_dir"] = target.get("dir", "/")
        for name in ("space_hard_limit", "space_soft_limit"):
            limit = root.find(name)
            if limit is not None:
                found[name] = read_size(name, limit)
        found["idmap"] = LibvirtConfigGuestIDMap.read(root.find("idmap"))
        return cls(readonly=root.find("readonly") is not None, **found)
