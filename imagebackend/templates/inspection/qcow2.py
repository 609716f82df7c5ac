# SPDX-License-Identifier: Apache-2.0
"""qcow2 images, versions 2 and 3 (docs/interop/qcow2.txt of QEMU)."""

from __future__ import annotations

from imagebackend.storage import qcow2
from imagebackend.templates.inspection.subject import Subject, Verdict, upper_bound

__all__ = ["inspect"]


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins like a qcow2 image.

    :raises ImageUnacceptable: it needs another file, is encrypted, was not closed cleanly, has a feature that is not
        known, or a table that breaks the format's rules.
    """
    descriptor, name = subject.descriptor, subject.name
    header = qcow2.read_header(descriptor, name)
    _check_policy(subject, header)
    subject.check_virtual_size(header.virtual_size)
    qcow2.read_snapshots(descriptor, header, name)
    allocated_size = upper_bound(qcow2.allocated_size(descriptor, header, name), header.virtual_size)
    notes = {
        "compression type zstd": header.compression_type == 1,
        "extended l2": header.extended_l2,
        "snapshots": header.snapshot_count > 0,
    }
    return Verdict("qcow2", header.virtual_size, allocated_size, tuple(note for note, is_so in notes.items() if is_so))


def _check_policy(subject: Subject, header: qcow2.Header) -> None:
    if header.backing_file is not None:
        raise subject.refusal(f"it has a backing file, {header.backing_file!r:.200}")
    if header.data_file or qcow2.DATA_FILE_NAME in header.extensions:
        raise subject.refusal("it has a data file: its content is elsewhere")
    if header.crypt_method or qcow2.CRYPTO_HEADER in header.extensions:
        raise subject.refusal("it is encrypted")
    if header.incompatible_features & qcow2.CORRUPT:
        raise subject.refusal("it is marked corrupt")
    if header.dirty:
        raise subject.refusal("it is marked dirty: it was not closed; run 'qemu-img check -r all' on it")
