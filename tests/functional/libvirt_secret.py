# SPDX-License-Identifier: Apache-2.0
"""Secrets of a real libvirt."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import libvirt

SECRET = """
<secret ephemeral="yes" private="no">
  <uuid>{uuid}</uuid><usage type="{usage}">{name}</usage>
</secret>
"""

# What libvirt wants to be told of a secret, by what it is used for.
USAGES = {"ceph": "<name>{uuid}</name>", "volume": "<volume>{uuid}</volume>"}


@contextlib.contextmanager
def secret(connection: libvirt.virConnect, value: bytes, usage: str = "ceph") -> Iterator[str]:
    """Have a secret defined in the block; give its UUID."""
    identifier = str(uuid.uuid4())
    name = USAGES[usage].format(uuid=identifier)
    defined = connection.secretDefineXML(SECRET.format(uuid=identifier, usage=usage, name=name))
    try:
        defined.setValue(value)
        yield identifier
    finally:
        defined.undefine()
