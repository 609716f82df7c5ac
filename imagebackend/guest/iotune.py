# SPDX-License-Identifier: Apache-2.0
"""Limits on a disk's I/O: the children of ``<iotune>`` and the rules that QEMU and libvirt keep for them.

Every limit comes in three: ``WHAT_UNIT_sec`` is the sustained rate, ``…_max`` the rate of bursts, ``…_max_length``
how many seconds a burst may last. ``total`` excludes ``read`` and ``write``. Source: libvirt's formatdomain
("iotune") and QEMU's docs/throttle.txt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from imagebackend import exceptions

__all__ = ["LIMITS", "MAXIMUM", "check"]

#: The highest number that libvirt and QEMU take, and the highest product of a burst's rate and length.
MAXIMUM: Final = 10**15

#: The sustained limits: bytes or operations a second.
LIMITS: Final = (
    "total_bytes_sec",
    "read_bytes_sec",
    "write_bytes_sec",
    "total_iops_sec",
    "read_iops_sec",
    "write_iops_sec",
)


def check(values: Mapping[str, int], prefix: str) -> None:
    """Refuse limits that contradict each other. 0 is no limit, as if it were not given.

    :param values: numbers by libvirt's names: those of :data:`LIMITS`, with ``_max`` and ``_max_length``, and
        ``size_iops_sec``. Others are not looked at.
    :param prefix: what the names begin with where the caller found them, for the error.
    :raises InvalidArgument: naming the limit and its value.
    """
    for limit in LIMITS:
        _check_burst(values, limit, prefix)
    for unit in ("bytes", "iops"):
        for suffix in ("", "_max", "_max_length"):
            _check_total(values, f"{unit}_sec{suffix}", prefix)
    size = values.get("size_iops_sec")
    if size and not any(values.get(limit) for limit in LIMITS if "iops" in limit):
        raise exceptions.InvalidArgument(f"{prefix}size_iops_sec={size}: needs a limit on iops")


def _check_burst(values: Mapping[str, int], limit: str, prefix: str) -> None:
    rate = values.get(limit) or 0
    burst = values.get(limit + "_max") or 0
    length = values.get(limit + "_max_length") or 0
    if burst and not rate:
        raise exceptions.InvalidArgument(f"{prefix}{limit}_max={burst}: needs {prefix}{limit}")
    if burst and burst < rate:
        raise exceptions.InvalidArgument(f"{prefix}{limit}_max={burst}: is below {prefix}{limit}={rate}")
    if length and not burst:
        raise exceptions.InvalidArgument(f"{prefix}{limit}_max_length={length}: needs {prefix}{limit}_max")
    if length * burst > MAXIMUM:
        raise exceptions.InvalidArgument(
            f"{prefix}{limit}_max_length={length}: too long for {prefix}{limit}_max={burst}:"
            f" their product may be {MAXIMUM}"
        )


def _check_total(values: Mapping[str, int], name: str, prefix: str) -> None:
    total = values.get(f"total_{name}")
    for other in (f"read_{name}", f"write_{name}"):
        if total and values.get(other):
            raise exceptions.InvalidArgument(
                f"{prefix}total_{name}={total}: excludes {prefix}{other}={values[other]}; give one or the other"
            )
