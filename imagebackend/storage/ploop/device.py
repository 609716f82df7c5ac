# SPDX-License-Identifier: Apache-2.0
"""Ploop devices, as a kernel of OpenVZ lists them and the images below each under /sys/block."""

from __future__ import annotations

import errno
import glob
import os
import pathlib

from imagebackend import exceptions

__all__ = ["find_device"]

_DEVICES = "/sys/block"


def find_device(path: str) -> str | None:
    """Return the ploop device that an image is attached to, as ``/dev/ploopN``, or None.

    :param path: the image, absolute.
    :raises StorageError: the kernel does not tell.
    """
    wanted = os.fsencode(os.path.realpath(path))
    try:
        # glob() would take what it cannot read for empty.
        devices = [name for name in os.listdir(_DEVICES) if name.startswith("ploop")]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise exceptions.storage_error(error, _DEVICES) from error
    for listed in (path for name in devices for path in glob.glob(f"{_DEVICES}/{name}/pdelta/*/image")):
        try:
            if pathlib.Path(listed).read_bytes().removesuffix(b"\n") == wanted:
                return f"/dev/{listed.split('/')[3]}"
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV):
                continue  # detached since it was listed
            raise exceptions.storage_error(error, listed) from error
    return None
