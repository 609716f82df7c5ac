# SPDX-License-Identifier: Apache-2.0
"""Limits on I/O that a flavor asks for in its extra specs: ``quota:disk_*``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from imagebackend import exceptions
from imagebackend.guest import iotune
from imagebackend.guest.disk import LibvirtConfigGuestDisk
from imagebackend.guest.element import escape

__all__ = ["disk_qos"]

LOG = logging.getLogger(__name__)

_PREFIX = "quota:disk_"
_NUMBERS = frozenset(
    [f"{limit}{suffix}" for limit in iotune.LIMITS for suffix in ("", "_max", "_max_length")] + ["size_iops_sec"]
)
_DECIMAL = re.compile(r"[0-9]{1,16}\Z")


def disk_qos(disk: LibvirtConfigGuestDisk, extra_specs: Mapping[str, object]) -> None:
    """Set the limits of ``extra_specs`` on ``disk``: all of them, or none if one is wrong.

    The keys are ``quota:disk_`` and a name of libvirt's ``<iotune>``: ``{read,write,total}_{bytes,iops}_sec``, the
    same with ``_max`` and ``_max_length``, ``size_iops_sec`` and ``group_name``. A limit of 0 is none. Other keys
    that begin with ``quota:disk_`` are passed over with a warning, as a flavor may be shared with hypervisors that
    know more of them; all other keys are not looked at.

    :param extra_specs: strings by key, as flavors have them; whole numbers are taken as well.
    :raises InvalidArgument: a value is not a number in ASCII digits from 0 to 10**15, or contradicts another one; the
        error names key and value.
    """
    numbers: dict[str, int] = {}
    group_name: str | None = None
    for key, value in extra_specs.items():
        if not key.startswith(_PREFIX):
            continue
        name = key.removeprefix(_PREFIX)
        if name in _NUMBERS:
            numbers[name] = _number(key, value)
        elif name == "group_name":
            escape(key, value)
            group_name = str(value)
        else:
            LOG.warning("%s is not a limit that libvirt has; it is ignored", key)
    if numbers:
        iotune.check(numbers, _PREFIX)
    for name, number in numbers.items():
        setattr(disk, f"disk_{name}", number or None)
    if group_name is not None:
        disk.disk_group_name = group_name


def _number(key: str, value: object) -> int:
    number = value
    if isinstance(value, str) and _DECIMAL.match(value):
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= iotune.MAXIMUM:
        raise exceptions.InvalidArgument(
            f"{key}={value!a:.80}: a whole number in ASCII digits from 0 to {iotune.MAXIMUM} is needed"
        )
    return number
