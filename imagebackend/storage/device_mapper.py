# SPDX-License-Identifier: Apache-2.0
"""What device-mapper knows of a device, by dmsetup(8): a fraction of the time that a report of LVM's takes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from imagebackend import exceptions, process

__all__ = ["PoolStatus", "environment", "open_count", "pool_status"]

_PACKAGE = "dmsetup"
_TIMEOUT = 60.0
_SECTOR = 512
# Documentation/admin-guide/device-mapper/thin-provisioning.rst of Linux: the status of a thin-pool target.
_STATUS = re.compile(r"0 (\d+) thin-pool \d+ (\d+)/(\d+) (\d+)/(\d+) \S+ (.*)")
_ABSENT = ("not found", "No such device or address", "does not exist")


@dataclass(frozen=True)
class PoolStatus:
    """How full a thin pool is.

    :ivar data_used, data_size: bytes.
    :ivar metadata_used, metadata_size: blocks.
    :ivar state: ``rw``, ``ro``, ``out_of_data_space``, ``fail``, and what else the kernel says.
    """

    data_used: int
    data_size: int
    metadata_used: int
    metadata_size: int
    state: str


def environment() -> dict[str, str]:
    """Return the variables of this process that commands that use libdevmapper need, too."""
    # Its own switch, for machines and containers without udev.
    return {name: os.environ[name] for name in ("DM_DISABLE_UDEV",) if name in os.environ}


def pool_status(device: str, root_helper: Sequence[str] = ()) -> PoolStatus | None:
    """Return how full a thin pool is; None if there is no such device: the pool is not active, or not there.

    :param device: device-mapper's name of it: ``group-pool-tpool``.
    :raises StorageError: the kernel does not tell.
    """
    said = _ask(["dmsetup", "status", "--target", "thin-pool", device], root_helper)
    if said is None:
        return None
    found = _STATUS.match(said)
    if found is None:
        raise exceptions.StorageError(device, f"its state is {said.strip()!r}; repair it (lvconvert --repair)")
    sectors, metadata_used, metadata_size, used, blocks = (int(number) for number in found.groups()[:5])
    size = sectors * _SECTOR
    return PoolStatus(size * used // blocks, size, metadata_used, metadata_size, found[6])


def open_count(device: str, root_helper: Sequence[str] = ()) -> int | None:
    """Return how often a device is open; None if there is no such device.

    :param device: device-mapper's name of it.
    :raises StorageError: the kernel does not tell.
    """
    said = _ask(["dmsetup", "info", "--columns", "--noheadings", "--options", "open", device], root_helper)
    return None if said is None else int(said)


def _ask(command: list[str], root_helper: Sequence[str]) -> str | None:
    try:
        return process.run(
            [*root_helper, *command], timeout=_TIMEOUT, package=_PACKAGE, environment=environment(), completes=True
        ).stdout
    except (exceptions.ToolMissing, exceptions.ToolTimeout):
        raise
    except exceptions.ToolFailed as error:
        if any(words in error.stderr for words in _ABSENT):
            return None
        if "Permission denied" in error.stderr:
            why = "dmsetup needs root: run as root, or set [DEFAULT] root_helper"
            raise exceptions.PermissionDenied(command[-1], reason=why) from error
        raise exceptions.StorageError(command[-1], str(error)) from error
