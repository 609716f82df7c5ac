# SPDX-License-Identifier: Apache-2.0
"""The text descriptor inside a VMDK: read strictly, and searched leniently for what strict reading might miss.

QEMU, VMware and libguestfs read this text differently: anywhere in it or line by line, with and without regard to
case. A descriptor passes only if every reading gives the same harmless result ("Virtual Disk Format 5.0", VMware).
"""

from __future__ import annotations

import re

from imagebackend.names import SECTOR
from imagebackend.templates.inspection.subject import Subject

__all__ = ["CREATE_TYPES", "check_descriptor"]

CREATE_TYPES = ("monolithicSparse", "streamOptimized")

_NO_PARENT = "ffffffff"
#: Words that name, or belong to, another file or a key, wherever they stand.
_FORBIDDEN = ("parentfilenamehint", "changetrackpath", "encryption", "keysafe")

# VirtualBox writes streams as read-only.
_EXTENT = re.compile(r'(?:RW|RDONLY) (?P<sectors>[0-9]{1,18}) SPARSE "(?P<file>[^"/\\:]{1,255})"')
_SETTING = re.compile(r'(?P<key>[A-Za-z][A-Za-z0-9_.:\-]*)\s*=\s*(?P<quote>"?)(?P<value>[^"]*)(?P=quote)')
_EXTENT_ANYWHERE = re.compile(r"\b(?:rw|rdonly|noaccess)\s+[0-9]", re.IGNORECASE)
#: What keeps matching cheap, and is far above what tools write.
_MAX_LINE = 1024
_MAX_REMNANT = 7
_SINGLE = ("version", "parentcid", "createtype")


def check_descriptor(subject: Subject, content: bytes, capacity: int) -> str:
    """Return the create type of a descriptor that names one sparse extent, this file's, and nothing else.

    :param content: the descriptor's sectors.
    :param capacity: the size of the disk by the binary header, in bytes.
    :raises ImageUnacceptable: it names a parent, another extent or a key, or can be read in more than one way.
    """
    text, _, rest = content.partition(b"\x00")
    # Where QEMU writes a shorter CID, the last characters of the longer text stay behind the new end.
    remnant = rest.rstrip(b"\x00")
    if len(remnant) > _MAX_REMNANT or not text.endswith(remnant):
        raise subject.refusal("its VMDK descriptor goes on after its end")
    # What is not ASCII may stand in comments, names and values, in any encoding: it means nothing to the format.
    whole = text.decode("ascii", "replace").replace("\r\n", "\n")
    extents, settings = _parse(subject, whole.split("\n"))
    _check_lenient(subject, whole.lower(), settings)
    if settings.get("parentcid", "").lower() != _NO_PARENT:
        raise subject.refusal(f"its VMDK descriptor names a parent, CID {settings.get('parentcid')!r:.40}")
    if settings.get("createtype") not in CREATE_TYPES:
        accepted = " and ".join(CREATE_TYPES)
        raise subject.refusal(f"VMDK type {settings.get('createtype')!r:.40}; {accepted} are accepted")
    if extents != [capacity // SECTOR]:
        raise subject.refusal(f"VMDK extents of {extents} sectors for a disk of {capacity} bytes")
    return settings["createtype"]


def _parse(subject: Subject, lines: list[str]) -> tuple[list[int], dict[str, str]]:
    """Return the sizes of the extents, in sectors, and the settings by their names in lower case."""
    extents = []
    settings: dict[str, str] = {}
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        if len(line) > _MAX_LINE:
            raise subject.refusal(f"its VMDK descriptor has a line of {len(line)} characters")
        if extent := _EXTENT.fullmatch(line):
            extents.append(int(extent["sectors"]))
        elif setting := _SETTING.fullmatch(line):
            key = setting["key"].lower()
            if key in settings:
                raise subject.refusal(f"its VMDK descriptor sets {setting['key']:.40} twice")
            settings[key] = setting["value"]
        else:
            raise subject.refusal(f"its VMDK descriptor has a line that is not allowed: {line!r:.100}")
    return extents, settings


def _check_lenient(subject: Subject, text: str, settings: dict[str, str]) -> None:
    for word in _FORBIDDEN:
        if word in text:
            raise subject.refusal(f"its VMDK descriptor has the word {word}: it needs a parent, another file or a key")
    if len(_EXTENT_ANYWHERE.findall(text)) != 1:
        raise subject.refusal("its VMDK descriptor does not name exactly one extent")
    for key in _SINGLE:
        if key not in settings or len(re.findall(rf"\b{key}\b", text)) != 1:
            raise subject.refusal(f"its VMDK descriptor does not have exactly one {key}")
