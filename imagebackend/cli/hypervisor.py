# SPDX-License-Identifier: Apache-2.0
"""The connection to libvirt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from imagebackend import exceptions

__all__ = ["connection", "default_uri", "descriptions", "domain"]

_DRIVERS = {"kvm": "qemu", "qemu": "qemu", "lxc": "lxc", "parallels": "parallels"}


def default_uri(virt_type: str) -> str:
    """Return the URI of this host's hypervisor for a value of ``[libvirt] virt_type``."""
    return f"{_DRIVERS[virt_type]}:///system"


@contextlib.contextmanager
def connection(uri: str) -> Iterator[Any]:
    """Give a ``libvirt.virConnect``.

    :raises ImageBackendError: libvirt cannot be reached.
    """
    import libvirt

    # libvirt prints every error on stderr, unless somebody takes it.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    try:
        opened = libvirt.open(uri)
    except libvirt.libvirtError as error:
        raise exceptions.ImageBackendError(f"libvirt cannot be reached at {uri}: {error}") from error
    try:
        yield opened
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            opened.close()


def descriptions(connection: Any) -> list[str]:
    """Return the XML of all domains, defined or running; of one that is both, as it runs and as it will.

    :raises ImageBackendError: libvirt does not tell.
    """
    import libvirt

    found = []
    try:
        for domain in connection.listAllDomains():
            with contextlib.suppress(libvirt.libvirtError):  # undefined since it was listed
                found.append(domain.XMLDesc())
                if domain.isActive() and domain.isPersistent():
                    found.append(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    except libvirt.libvirtError as error:
        raise exceptions.ImageBackendError(f"libvirt does not tell which domains there are: {error}") from error
    return found


def domain(connection: Any, name: str) -> Any:
    """Return a ``libvirt.virDomain`` by name or UUID.

    :raises NotFound: there is none.
    """
    import libvirt

    for look_up in (connection.lookupByName, connection.lookupByUUIDString):
        with contextlib.suppress(libvirt.libvirtError):
            return look_up(name)
    raise exceptions.NotFound(name, f"{connection.getURI()} has no such domain")
