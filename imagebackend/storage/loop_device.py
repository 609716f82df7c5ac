# SPDX-License-Identifier: Apache-2.0
"""Loop devices, as the kernel lists them under /sys/block."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib

__all__ = ["find"]


def find(path: str) -> str | None:
    """Return the loop device that is attached to a file, as ``/dev/loopN``, or None.

    :param path: the file, absolute.
    """
    wanted = os.path.realpath(path)
    for listed in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(FileNotFoundError):  # detached since it was listed
            if pathlib.Path(listed).read_bytes().removesuffix(b"\n") == os.fsencode(wanted):
                return f"/dev/{listed.split('/')[3]}"
    return None
