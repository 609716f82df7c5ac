# SPDX-License-Identifier: Apache-2.0
"""Loop devices, as the kernel lists them under /sys/block."""

from __future__ import annotations

import errno
import glob
import os
import pathlib

from imagebackend import exceptions

__all__ = ["find"]


def find(path: str) -> str | None:
    """Return the loop device that is attached to a file, as ``/dev/loopN``, or None.

    :param path: the file, absolute.
    :raises StorageError: the kernel does not tell.
    """
    wanted = os.path.realpath(path)
    for listed in glob.glob("/sys/block/loop*/loop/backing_file"):
        try:
            if pathlib.Path(listed).read_bytes().removesuffix(b"\n") == os.fsencode(wanted):
                return f"/dev/{listed.split('/')[3]}"
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                continue  # detached since it was listed, or opened
            raise exceptions.storage_error(error, listed) from error
    return None
