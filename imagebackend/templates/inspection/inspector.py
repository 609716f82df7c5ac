# SPDX-License-Identifier: Apache-2.0
"""The way through an inspection: which format, whether it is the claimed one, whether it is harmless."""

from __future__ import annotations

from collections.abc import Callable

from imagebackend import exceptions
from imagebackend.templates.inspection import detection, parallels, qcow2, raw, second_reading, vdi, vhdx, vmdk, vpc
from imagebackend.templates.inspection.subject import Subject, Verdict

__all__ = ["INSPECTOR_VERSION", "inspect"]

#: Goes up whenever an image that was accepted may now be refused: older verdicts are then worth nothing.
INSPECTOR_VERSION = 1

_INSPECTIONS: dict[str, Callable[[Subject], Verdict]] = {
    "parallels": parallels.inspect,
    "qcow2": qcow2.inspect,
    "raw": raw.inspect,
    "vdi": vdi.inspect,
    "vhdx": vhdx.inspect,
    "vmdk": vmdk.inspect,
    "vpc": vpc.inspect,
}
#: Glance's names for what QEMU has another name for, or none: it opens the last five as raw.
_ALIASES = {"vhd": "vpc", "ploop": "parallels", "ami": "raw", "aki": "raw", "ari": "raw", "gpt": "raw", "iso": "raw"}


def inspect(descriptor: int, name: str, claimed_format: str | None = None) -> Verdict:
    """Return what an image is, if it may be used as a template.

    Everything is read through the descriptor, at its own offsets, so that what was checked is what is used later.
    At most 350 MiB are read of a qcow2 image with the largest tables that are accepted, 160 MiB of any other, and
    under 80 KiB of a raw one.

    :param descriptor: the image, open for reading; its position does not change.
    :param name: what to call the image in errors.
    :param claimed_format: what the image is said to be, by QEMU's name or Glance's; None takes what it is.
    :raises ImageUnacceptable: not a regular file, not a format that is accepted, not the one claimed, or harmful.
    :raises StorageError: the file cannot be read.
    """
    try:
        subject = Subject(descriptor, name)
    except OSError as error:
        raise exceptions.storage_error(error, name) from error
    claimed = _ALIASES.get(claimed_format, claimed_format) if claimed_format is not None else None
    if claimed is not None and claimed not in _INSPECTIONS:
        accepted = ", ".join(sorted(_INSPECTIONS.keys() | _ALIASES.keys()))
        raise subject.refusal(f"claimed to be {claimed_format!r:.40}; accepted are {accepted}")
    detected = detection.detect(subject)
    if claimed is not None and claimed != detected:
        raise subject.refusal(f"claimed to be {claimed_format}, but it is {detected}")
    verdict = _INSPECTIONS[detected](subject)
    second_reading.check(subject, verdict)
    return verdict
