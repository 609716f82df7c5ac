# SPDX-License-Identifier: Apache-2.0
"""``<backingStore>``: the images behind a disk, one inside the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagebackend import exceptions
from imagebackend.guest.element import choice
from imagebackend.guest.source import read_source, write_source

if TYPE_CHECKING:
    from lxml import etree

__all__ = ["FORMATS", "LibvirtConfigGuestDiskBackingStore"]

#: The image formats of libvirt's schema.
FORMATS = choice(
    *("raw", "qcow2", "qcow", "qed", "cow", "luks", "ploop"),
    *("vmdk", "vdi", "vpc", "vhd", "bochs", "cloop", "dmg", "iso", "fat", "dir"),
)

# QEMU itself refuses long chains much earlier; this bounds what a parser follows.
_DEEPEST = 200


@dataclass(slots=True, kw_only=True)
class LibvirtConfigGuestDiskBackingStore:
    """An image behind a disk, or behind another one.

    Without ``source_type`` it is the end of the chain: libvirt then does not look into the image before it for a
    backing file. Without a ``backing_store``, libvirt finds out by itself what comes next.

    :ivar source_type: and the other ``source_…`` attributes: see :class:`imagebackend.guest.source.Source`.
    :ivar driver_format: of the image, such as ``qcow2``.
    :ivar backing_store: what is behind it.
    """

    source_type: str | None = None
    source_path: str | None = None
    source_protocol: str | None = None
    source_name: str | None = None
    source_hosts: list[str] = field(default_factory=list)
    source_ports: list[int | str | None] = field(default_factory=list)
    driver_format: str | None = None
    backing_store: LibvirtConfigGuestDiskBackingStore | None = None

    def element(self, indent: str) -> str:
        """Return the element with all that it contains, each line with ``indent`` before it.

        :raises InvalidArgument: an attribute is missing or wrong, or the chain is too deep.
        """
        head, tail = "", ""
        image: LibvirtConfigGuestDiskBackingStore | None = self
        while image is not None:
            if len(indent) > 2 * _DEEPEST:
                raise exceptions.InvalidArgument(f"backing_store: more than {_DEEPEST} images")
            if image.source_type is None:
                head += f"{indent}<backingStore/>\n"
                break
            kind = FORMATS.write("driver_format", image.driver_format)
            head += f'{indent}<backingStore type="{image.source_type}">\n{indent}  <format type="{kind}"/>\n'
            tail = f"{indent}</backingStore>\n{tail}"
            indent += "  "
            head += write_source(image, "backing_store", indent)
            image = image.backing_store
        return head + tail

    @classmethod
    def read(cls, node: etree._Element | None) -> LibvirtConfigGuestDiskBackingStore | None:
        """Return the chain that begins with ``node``, a ``<backingStore>``; None for none.

        :raises InvalidArgument: the chain is too deep.
        """
        images: list[LibvirtConfigGuestDiskBackingStore] = []
        while node is not None:
            if len(images) == _DEEPEST:
                raise exceptions.InvalidArgument(f"<backingStore>: more than {_DEEPEST} images")
            image = cls()
            source, form = node.find("source"), node.find("format")
            if source is not None:
                image.source_type = node.get("type", "file")
                for attribute, value in read_source(source, image.source_type).items():
                    setattr(image, attribute, value)
            if form is not None:
                image.driver_format = form.get("type")
            if images:
                images[-1].backing_store = image
            images.append(image)
            node = node.find("backingStore")
        return images[0] if images else None
