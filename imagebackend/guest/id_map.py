# SPDX-License-Identifier: Apache-2.0
"""``<idmap>``: which users and groups of the host those of a guest are.

Source: https://libvirt.org/formatdomain.html#container-boot. A container has one in its domain, which goes for all of
its file systems; a file system that virtiofs shares with a guest can have one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagebackend import exceptions
from imagebackend.guest.element import NEWEST, Element, Property, integer, parse_document

if TYPE_CHECKING:
    from lxml import etree

__all__ = ["LibvirtConfigGuestIDMap", "LibvirtConfigGuestIDRange"]

_LARGEST = 2**32 - 1
_RANGE = Element(
    Property("start", "start", integer(0, _LARGEST)),
    Property("target", "target", integer(0, _LARGEST)),
    Property("count", "count", integer(1, _LARGEST)),
)


@dataclass(frozen=True, slots=True)
class LibvirtConfigGuestIDRange:
    """Ids that follow each other.

    :ivar start: the first one in the guest.
    :ivar target: the first one on the host.
    :ivar count: how many there are.
    """

    start: int
    target: int
    count: int


@dataclass(slots=True, kw_only=True)
class LibvirtConfigGuestIDMap:
    """Users and groups. The root user of a container has to be among them.

    :ivar uid: of users.
    :ivar gid: of groups.
    """

    uid: Sequence[LibvirtConfigGuestIDRange] = ()
    gid: Sequence[LibvirtConfigGuestIDRange] = ()

    def to_xml(self) -> str:
        """Return the ``<idmap>`` element for a container's domain, with a newline at its end.

        :raises InvalidArgument: there are no users or no groups, or a number is none that an id can have.
        """
        return self.element("")

    def element(self, indent: str) -> str:
        """Return the element, each line with ``indent`` before it.

        :raises InvalidArgument: as :meth:`to_xml`.
        """
        if not self.uid or not self.gid:
            raise exceptions.InvalidArgument("idmap: users and groups are needed")
        lines = [f"{indent}  <uid{_RANGE.attributes(each, NEWEST)}/>\n" for each in self.uid]
        lines += [f"{indent}  <gid{_RANGE.attributes(each, NEWEST)}/>\n" for each in self.gid]
        return f"{indent}<idmap>\n{''.join(lines)}{indent}</idmap>\n"

    @classmethod
    def parse(cls, xml: str) -> LibvirtConfigGuestIDMap:
        """Return what an ``<idmap>`` element says.

        :raises InvalidArgument: it is not such an element, is longer than 1 MiB, or lacks a number.
        """
        found = cls.read(parse_document(xml, "idmap"))
        assert found is not None
        return found

    @classmethod
    def read(cls, node: etree._Element | None) -> LibvirtConfigGuestIDMap | None:
        """Return what ``node``, an ``<idmap>``, says; None for none."""
        if node is None:
            return None
        return cls(uid=_read(node, "uid"), gid=_read(node, "gid"))


def _read(node: etree._Element, tag: str) -> tuple[LibvirtConfigGuestIDRange, ...]:
    try:
        return tuple(LibvirtConfigGuestIDRange(**_RANGE.read_attributes(each)) for each in node.findall(tag))
    except TypeError:
        raise exceptions.InvalidArgument(f"<{tag}>: start, target and count are needed") from None
