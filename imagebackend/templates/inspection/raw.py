# SPDX-License-Identifier: Apache-2.0
"""Raw images: anything that bears no format's mark. What is on the disk is the guest's business."""

from __future__ import annotations

from imagebackend.names import SECTOR
from imagebackend.templates.inspection.subject import BLOCK, Subject, Verdict, round_up

__all__ = ["inspect"]

_ISO_DESCRIPTOR = 16 * 2048
_PARTITION_TABLE = slice(446, 510)


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that :mod:`.detection` took for raw.

    :raises ImageUnacceptable: less than one sector.
    """
    if subject.size < SECTOR:
        raise subject.refusal(f"it has {subject.size} bytes, less than one sector")
    # QEMU shows a file that ends within a sector as if the sector were whole.
    virtual_size = round_up(subject.size, SECTOR)
    return Verdict("raw", virtual_size, round_up(virtual_size, BLOCK), tuple(_notes(subject)))


def _notes(subject: Subject) -> list[str]:
    head = subject.read_up_to(0, 4096 + 8)
    notes = []
    if any(head.startswith(b"EFI PART", sector) for sector in (512, 4096)):
        notes.append("gpt")
    elif head[510:512] == b"\x55\xaa" and _has_partitions(head[_PARTITION_TABLE]):
        notes.append("mbr")
    if subject.read_up_to(_ISO_DESCRIPTOR + 1, 5) == b"CD001":
        notes.append("iso9660")
    return notes


def _has_partitions(table: bytes) -> bool:
    # The boot sectors of FAT and NTFS end like an MBR, but have code where the partitions would be.
    entries = [table[start : start + 16] for start in range(0, 64, 16)]
    return all(entry[0] in (0, 0x80) for entry in entries) and any(entry[4] and any(entry[12:]) for entry in entries)
