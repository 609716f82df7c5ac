# SPDX-License-Identifier: Apache-2.0
"""``<source>``, as disks and the images behind them have it: a file, a block device, a folder or a network image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from imagebackend import exceptions
from imagebackend.guest.element import choice, escape, integer, path, text

if TYPE_CHECKING:
    from lxml import etree

__all__ = ["TYPES", "Source", "read_source", "write_source"]

#: Where images are, of what this library makes and of what can be behind it.
TYPES = choice("file", "block", "dir", "network")


_PATH_ATTRIBUTE = {"file": "file", "block": "dev", "dir": "dir"}
_PROTOCOLS = choice(
    "rbd", "nbd", "iscsi", "gluster", "nfs", "http", "https", "ftp", "ftps", "tftp", "sheepdog", "vxhs"
)
_PATH = path()
_PORT = integer(1, 65535)
_HOST = text(r"[a-zA-Z0-9.-]+|\[?[0-9A-Fa-f:.]+\]?", "a host name or an IP address")


class Source(Protocol):
    """The attributes that say where an image is.

    :ivar source_type: ``file``, ``block``, ``dir`` or ``network``; None where there is no image.
    :ivar source_path: absolute path of the file, device or folder.
    :ivar source_protocol: of a network image, such as ``rbd``.
    :ivar source_name: of a network image, such as ``pool/image``.
    :ivar source_hosts: names or addresses of its servers; IPv6 with or without brackets, written without.
    :ivar source_ports: the ports of ``source_hosts``, in the same order; None for the protocol's own.
    """

    source_type: str | None
    source_path: str | None
    source_protocol: str | None
    source_name: str | None
    source_hosts: list[str]
    source_ports: list[int | str | None]


def write_source(owner: Source, label: str, indent: str, attributes: str = "", children: str = "") -> str:
    """Return the ``<source>`` of ``owner``, a line or more.

    :param label: ``disk`` or ``backing_store``, for errors.
    :param attributes: more attributes, as XML.
    :param children: more children, as XML, each on lines of its own.
    :raises InvalidArgument: an attribute is missing, or is not what XML or libvirt takes.
    """
    if owner.source_type == "network":
        attributes = _network_attributes(owner, label) + attributes
        children = _hosts(owner, indent + "  ") + children
    else:
        attributes = _path_attribute(owner, label) + attributes
    if children:
        return f"{indent}<source{attributes}>\n{children}{indent}</source>\n"
    return f"{indent}<source{attributes}/>\n"


def _path_attribute(owner: Source, label: str) -> str:
    name = _PATH_ATTRIBUTE[TYPES.write(f"{label} source_type", owner.source_type)]
    return f' {name}="{_PATH.write("source_path", owner.source_path)}"'


def _network_attributes(owner: Source, label: str) -> str:
    if owner.source_protocol is None:
        raise exceptions.InvalidArgument(f"{label} source_protocol: needed where source_type is network")
    protocol = _PROTOCOLS.write("source_protocol", owner.source_protocol)
    # An NBD server may have one export without a name.
    if owner.source_name is None and protocol == "nbd":
        return f' protocol="{protocol}"'
    return f' protocol="{protocol}" name="{escape("source_name", owner.source_name)}"'


def _hosts(owner: Source, indent: str) -> str:
    hosts, ports = owner.source_hosts, owner.source_ports
    if ports and len(ports) != len(hosts):
        raise exceptions.InvalidArgument(f"source_ports: {len(ports)} ports for {len(hosts)} hosts")
    out = ""
    for host, port in zip(hosts, ports or [None] * len(hosts), strict=True):
        name = _HOST.write("source_hosts", host).strip("[]")
        number = "" if port is None else f' port="{_PORT.write("source_ports", port)}"'
        out += f'{indent}<host name="{name}"{number}/>\n'
    return out


def read_source(node: etree._Element, source_type: str) -> dict[str, Any]:
    """Return the attributes of :class:`Source` that ``node``, a ``<source>``, has."""
    found: dict[str, Any] = {}
    if source_type == "network":
        hosts = node.findall("host")
        found["source_protocol"] = node.get("protocol")
        found["source_name"] = node.get("name")
        found["source_hosts"] = [host.get("name", "") for host in hosts]
        ports = [host.get("port") for host in hosts]
        if any(ports):
            found["source_ports"] = [None if port is None else _PORT.read("source_ports", port) for port in ports]
    else:
        found["source_path"] = node.get(_PATH_ATTRIBUTE.get(source_type, "file"))
    return found
