# SPDX-License-Identifier: Apache-2.0
"""How an image service names a snapshot of an image in a Ceph cluster: ``rbd://fsid/pool/image/snapshot``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from imagebackend import exceptions, names

__all__ = ["Location", "parse_url"]

_FSID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.ASCII)


@dataclass(frozen=True)
class Location:
    """A snapshot of an image in a cluster, as an image service has it.

    :ivar fsid: the cluster.
    """

    fsid: str
    pool: str
    image: str
    snapshot: str

    def __str__(self) -> str:
        return f"rbd://{self.fsid}/{self.pool}/{self.image}/{self.snapshot}"


def parse_url(url: str) -> Location:
    """Return the location that an image service's URL means.

    :raises ImageUnacceptable: it is not ``rbd://fsid/pool/image/snapshot``.
    """
    scheme, _, rest = url.partition("://")
    parts = rest.split("/")
    if scheme != "rbd" or len(parts) != 4 or _FSID.match(parts[0]) is None:
        raise exceptions.ImageUnacceptable(url, "not of the form rbd://fsid/pool/image/snapshot")
    try:
        for kind, part in zip(("pool", "image", "snapshot"), parts[1:], strict=True):
            names.check_name(kind, part)
    except exceptions.InvalidName as error:
        raise exceptions.ImageUnacceptable(url, str(error)) from error
    return Location(*parts)
