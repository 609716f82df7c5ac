# SPDX-License-Identifier: Apache-2.0
"""A second opinion on the format, from oslo.utils, which Nova, Glance and Cinder trust.

Only its detection is used. Its safety checks pass parents of VMDK, VHD, VHDX and VDI and refuse good partition tables,
so they stay out; and it gets the first 64 KiB alone, for it would read a file of holes to its end.
"""

from __future__ import annotations

import io

from imagebackend.templates.inspection.subject import Subject, Verdict

__all__ = ["check"]

_HEAD = 64 << 10
_CHUNK = 4096
#: What is on a disk, not what a disk is kept in.
_CONTENTS = {"raw", "gpt", "iso"}


def check(subject: Subject, verdict: Verdict) -> None:
    """Refuse an image in which oslo.utils sees another format than this package does.

    :raises ImageUnacceptable: it does.
    """
    # Imported here: it takes longer than an inspection, and most processes never inspect.
    from oslo_utils.imageutils import format_inspector

    wrapper = format_inspector.InspectWrapper(io.BytesIO(subject.read_up_to(0, _HEAD)))
    while wrapper.read(_CHUNK):
        pass
    wrapper.close()
    found = {str(each) for each in wrapper.formats or ()} - _CONTENTS
    if unexpected := found - {"vhd" if verdict.format == "vpc" else verdict.format}:
        raise subject.refusal(f"it is {verdict.format}, but can also be read as {', '.join(sorted(unexpected))}")
