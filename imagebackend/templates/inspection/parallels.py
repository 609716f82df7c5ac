# SPDX-License-Identifier: Apache-2.0
"""Images in the expanded format of ploop, which QEMU calls parallels, of both versions."""

from __future__ import annotations

from imagebackend.storage import ploop
from imagebackend.templates.inspection.subject import Subject, Verdict, upper_bound

__all__ = ["inspect"]


def inspect(subject: Subject) -> Verdict:
    """Return the verdict on a file that begins like an image of ploop.

    :raises ImageUnacceptable: it was not closed cleanly, or has a header or a table that breaks the format's rules.
    """
    header = ploop.read_header(subject.descriptor, subject.name)
    if header.in_use:
        raise subject.refusal(
            "it is marked in use: it was not closed; run 'qemu-img check -f parallels -r all' on it, or copy it again"
        )
    subject.check_virtual_size(header.virtual_size)
    clusters = ploop.allocated_clusters(ploop.read_table(subject.descriptor, header, subject.name))
    allocated_size = upper_bound(clusters * header.cluster_size, header.virtual_size)
    return Verdict("parallels", header.virtual_size, allocated_size)
