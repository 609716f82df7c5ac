# SPDX-License-Identifier: Apache-2.0
"""``DiskDescriptor.xml``: which files a ploop disk is made of, and which of them is on top of which.

Source: lib/xml.c and lib/di.c of ploop. Read here is what ``ploop`` writes, in any order, and nothing that it would
read with a shrug: one storage, expanded images with plain names in the folder of the descriptor, one tree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagebackend import exceptions, names, untrusted_xml
from imagebackend.storage.ploop import header

if TYPE_CHECKING:
    from lxml import etree

__all__ = ["NAME", "ROOT_IMAGE", "TOP", "Delta", "Descriptor", "format_descriptor", "parse_descriptor"]

#: The name of the file.
NAME = "DiskDescriptor.xml"
#: What the image of a disk is called that has one.
ROOT_IMAGE = "root.hds"
#: The GUID of the delta that is written to, and what stands for no parent.
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
_NONE = "{00000000-0000-0000-0000-000000000000}"

_GUID = re.compile(r"\{[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\}\Z")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@{}-]{0,199}\Z", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,15}\Z", re.ASCII)
_MOST_DELTAS = 512


@dataclass(frozen=True, slots=True)
class Delta:
    """An image that holds what was written after its parent.

    :ivar guid: with braces, in lower case; :data:`TOP` for the one that is written to.
    :ivar parent: the GUID of the delta below; None: there is none.
    :ivar file: its name in the folder of the descriptor.
    """

    guid: str
    parent: str | None
    file: str


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A ploop disk.

    :ivar virtual_size: bytes. Of the image on top, its header has the last word.
    :ivar cluster_size: bytes.
    :ivar deltas: one tree, in which :data:`TOP` is a leaf.
    :ivar preallocated: every cluster has its storage.
    """

    virtual_size: int
    cluster_size: int
    deltas: tuple[Delta, ...]
    preallocated: bool = False

    @property
    def top(self) -> Delta:
        """The delta that is written to."""
        return self.delta(TOP)

    def delta(self, guid: str) -> Delta:
        """Return the delta with this GUID, which is there."""
        return next(delta for delta in self.deltas if delta.guid == guid)

    def chain(self, guid: str) -> Sequence[Delta]:
        """Return a delta and what is below it, the lowest first."""
        found = [self.delta(guid)]
        while found[0].parent is not None:
            found.insert(0, self.delta(found[0].parent))
        return found


def format_descriptor(descriptor: Descriptor) -> bytes:
    """Return the document."""
    sectors = descriptor.virtual_size // names.SECTOR
    cylinders, heads, in_track = header.geometry(descriptor.virtual_size)
    images = "".join(
        f"      <Image>\n        <GUID>{delta.guid}</GUID>\n        <Type>Compressed</Type>\n"
        f"        <File>{delta.file}</File>\n      </Image>\n"
        for delta in descriptor.deltas
    )
    shots = "".join(
        f"    <Shot>\n      <GUID>{delta.guid}</GUID>\n      <ParentGUID>{delta.parent or _NONE}</ParentGUID>\n"
        "    </Shot>\n"
        for delta in descriptor.deltas
    )
    preallocated = "      <Preallocated>1</Preallocated>\n" if descriptor.preallocated else ""
    return f"""<?xml version="1.0"?>
<Parallels_disk_image>
  <Disk_Parameters>
    <Disk_size>{sectors}</Disk_size>
    <Cylinders>{cylinders}</Cylinders>
    <Heads>{heads}</Heads>
    <Sectors>{in_track}</Sectors>
    <Padding>0</Padding>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start>
      <End>{sectors}</End>
      <Blocksize>{descriptor.cluster_size // names.SECTOR}</Blocksize>
{preallocated}{images}    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{TOP}</TopGUID>
{shots}  </Snapshots>
</Parallels_disk_image>
""".encode()


def parse_descriptor(content: bytes, name: str) -> Descriptor:
    """Return what a document describes.

    :param name: what to call it in errors.
    :raises ImageUnacceptable: it is not such a document, or describes what is not accepted here.
    """
    try:
        root = untrusted_xml.parse(content)
    except ValueError as error:
        raise exceptions.ImageUnacceptable(name, str(error)) from error
    return _Reader(name).descriptor(root)


class _Reader:
    """The checks of one document."""

    def __init__(self, name: str) -> None:
        self._name = name

    def descriptor(self, root: etree._Element) -> Descriptor:
        if root.tag != "Parallels_disk_image":
            raise self._refusal(f"it is <{root.tag!r:.80}>, not a ploop disk's descriptor")
        if root.find(".//Encryption") is not None:
            raise self._refusal("the disk is encrypted")
        parameters, storage = self._one(root, "Disk_Parameters"), self._one(root, "StorageData/Storage")
        cluster = self._number(storage, "Blocksize")
        sectors = self._number(parameters, "Disk_size")
        self._check_sizes(parameters, storage, sectors, cluster)
        deltas = self._deltas(storage, self._one(root, "Snapshots"))
        preallocated = storage.find("Preallocated") is not None and self._number(storage, "Preallocated") == 1
        return Descriptor(sectors * names.SECTOR, cluster * names.SECTOR, deltas, preallocated)

    def _check_sizes(self, parameters: etree._Element, storage: etree._Element, sectors: int, cluster: int) -> None:
        if not header.MIN_CLUSTER <= cluster <= header.MAX_CLUSTER or cluster & (cluster - 1):
            raise self._refusal(f"clusters of {cluster} sectors are not possible")
        start, end = self._number(storage, "Start"), self._number(storage, "End")
        if not sectors or sectors % cluster or sectors // cluster > header.MAX_ENTRIES:
            raise self._refusal(f"a disk of {sectors} sectors in clusters of {cluster} is not possible")
        if start or end != sectors:
            raise self._refusal(f"a disk of {sectors} sectors that is stored from {start} to {end}")
        cylinders, heads, in_track = (self._number(parameters, each) for each in ("Cylinders", "Heads", "Sectors"))
        if not 0 < cylinders * heads * in_track <= sectors:
            reason = f"{cylinders} cylinders, {heads} heads and {in_track} sectors do not make {sectors} sectors"
            raise self._refusal(reason)
        size = parameters.find("LogicSectorSize")
        if size is not None and self._number(parameters, "LogicSectorSize") != names.SECTOR:
            raise self._refusal(f"its sectors do not have {names.SECTOR} bytes")

    def _deltas(self, storage: etree._Element, snapshots: etree._Element) -> tuple[Delta, ...]:
        images, shots = storage.findall("Image"), snapshots.findall("Shot")
        if max(len(images), len(shots)) > _MOST_DELTAS:
            raise self._refusal(f"{len(images)} images; {_MOST_DELTAS} is the limit")
        if snapshots.find("TopGUID") is not None and self._guid(snapshots, "TopGUID") != TOP:
            raise self._refusal(f"its top is not {TOP}; 'ploop' converts such old descriptors")
        parents = {self._guid(shot, "GUID"): self._guid(shot, "ParentGUID") for shot in shots}
        files = {self._guid(image, "GUID"): self._file(image) for image in images}
        if len(parents) < len(shots) or len(files) < len(images) or len(set(files.values())) < len(files):
            raise self._refusal("a GUID or a file is named twice")
        if parents.keys() != files.keys():
            raise self._refusal("its images and its snapshots do not have the same GUIDs")
        self._check_tree(parents)
        return tuple(
            Delta(guid, None if parents[guid] == _NONE else parents[guid], file) for guid, file in files.items()
        )

    def _check_tree(self, parents: dict[str, str]) -> None:
        if TOP not in parents or TOP in parents.values():
            raise self._refusal(f"the top {TOP} is missing, or is below another image")
        roots = [guid for guid, parent in parents.items() if parent == _NONE]
        if len(roots) != 1 or _NONE in parents:
            raise self._refusal(f"{len(roots)} of its images have no parent; one is needed")
        # Every image that does not lead to the root leads in a circle, or to one that is not there.
        reached, left = set(roots), parents.keys() - roots
        while below := {guid for guid in left if parents[guid] in reached}:
            reached |= below
            left -= below
        if left:
            raise self._refusal(f"the parents of {', '.join(sorted(left))} do not lead to its root")

    def _file(self, image: etree._Element) -> str:
        kind, file = self._text(image, "Type"), self._text(image, "File")
        if kind != "Compressed":
            raise self._refusal(f"an image of type {kind!r:.40}; a raw image is given as such, without a descriptor")
        if _FILE.match(file) is None or file.startswith(NAME):
            raise self._refusal(f"the file {file!r:.80}; a plain name in the descriptor's folder is needed")
        return file

    def _guid(self, parent: etree._Element, tag: str) -> str:
        guid = self._text(parent, tag).lower()
        if _GUID.match(guid) is None:
            raise self._refusal(f"{tag} {guid!r:.60} is not a GUID in braces")
        return guid

    def _number(self, parent: etree._Element, tag: str) -> int:
        text = self._text(parent, tag)
        if _NUMBER.match(text) is None:
            raise self._refusal(f"{tag} {text!r:.40} is not a number")
        return int(text)

    def _text(self, parent: etree._Element, tag: str) -> str:
        node = self._one(parent, tag)
        if len(node):
            raise self._refusal(f"<{tag}> has more than text")
        return (node.text or "").strip()

    def _one(self, parent: etree._Element, path: str) -> etree._Element:
        found = parent.findall(path)
        if len(found) != 1:
            raise self._refusal(f"it has <{path}> {len(found)} times; once is needed")
        return found[0]

    def _refusal(self, reason: str) -> exceptions.ImageUnacceptable:
        return exceptions.ImageUnacceptable(self._name, reason)
