# SPDX-License-Identifier: Apache-2.0
"""Which format a file is, by every mark that QEMU's drivers look for, and some more.

Sources: the ``bdrv_probe`` functions of QEMU 7.2's block drivers. They get the first 512 bytes, zeros past the end.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from imagebackend.storage import ploop
from imagebackend.templates.inspection.subject import Subject

__all__ = ["detect"]

_HEAD = 4096
_TAIL = 1024
_VDI_SIGNATURE = struct.pack("<I", 0xBEDA107F)
_DMG_TRAILER = struct.pack(">4sI", b"koly", 4)
_VERSION_LINE = re.compile(rb"version\s*=\s*[0-9]")


def _starts(mark: bytes, offset: int = 0) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(mark, offset)


def _is_qcow2(head: bytes) -> bool:
    return head.startswith(b"QFI\xfb") and head[4:8] != b"\x00\x00\x00\x01"


def _is_vmdk_descriptor(head: bytes) -> bool:
    """Return whether a version line follows comments and empty lines; wider than QEMU: any white space, any case."""
    for line in map(bytes.strip, head.lower().split(b"\n")):
        if line.startswith(b"#"):
            if line.lstrip(b"# \t").startswith(b"disk descriptorfile"):
                return True
        elif line:
            return _VERSION_LINE.match(line) is not None
    return False


#: Formats that are accepted, after a closer look.
_ACCEPTED: dict[str, Callable[[bytes], bool]] = {
    "parallels": lambda head: head.startswith(tuple(ploop.SIGNATURES.values())),
    "qcow2": _is_qcow2,
    "vdi": _starts(_VDI_SIGNATURE, 64),
    "vhdx": _starts(b"vhdxfile"),
    "vmdk": _starts(b"KDMV"),
    "vpc": _starts(b"conectix"),
}
#: Formats that are recognised and refused, with what they are called in the refusal.
_REFUSED: dict[str, Callable[[bytes], bool]] = {
    "a bochs growing disk": _starts(b"Bochs Virtual HD Image"),
    "a cloop image": _starts(b"#!/bin/sh\n#V2.0 Format\n"),
    "a cow image of an old QEMU": _starts(b"OOOM"),
    "a LUKS volume": _starts(b"LUKS\xba\xbe"),
    "a qcow image of version 1": _starts(b"QFI\xfb\x00\x00\x00\x01"),
    "a qed image": _starts(b"QED\x00"),
    "a VMDK descriptor, whose extents are other files": _is_vmdk_descriptor,
    "a VMDK of type COWD": _starts(b"COWD"),
}


def detect(subject: Subject) -> str:
    """Return the one format whose mark the file bears; ``raw`` if it bears none.

    :raises ImageUnacceptable: the mark of a format that is not accepted, or of more than one.
    """
    head = subject.read_up_to(0, _HEAD).ljust(_HEAD, b"\x00")
    found = [name for name, matches in (_ACCEPTED | _REFUSED).items() if matches(head)] or _by_trailer(subject)
    if len(found) > 1:
        raise subject.refusal(f"it can be read as {' and as '.join(found)}")
    if not found:
        return "raw"
    if found[0] not in _ACCEPTED:
        raise subject.refusal(f"it is {found[0]}; convert it to raw or qcow2 first")
    return found[0]


def _by_trailer(subject: Subject) -> list[str]:
    tail = subject.read_up_to(max(0, subject.size - _TAIL), _TAIL)
    # Old versions of Virtual PC cut the last byte of the footer.
    if tail[-512:].startswith(b"conectix") or tail[-511:].startswith(b"conectix"):
        return ["vpc"]
    if _DMG_TRAILER in tail:
        return ["a dmg image"]
    return []
