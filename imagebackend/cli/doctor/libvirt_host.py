# SPDX-License-Identifier: Apache-2.0
"""Can libvirt be reached, and can it run guests?"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from typing import Any

from imagebackend import exceptions
from imagebackend.cli import hypervisor
from imagebackend.cli.doctor.finding import Finding, error, fine, warning

__all__ = ["Host", "judge_host", "look_at_host"]

_TIMEOUT = 15.0
_CHECK = "libvirt"
_NEEDED = 9_000_000


@dataclass(frozen=True)
class Host:
    """What was learned of libvirt.

    :ivar uri: where it was looked for.
    :ivar import_failure: why libvirt-python cannot be imported; None: it can.
    :ivar failure: why libvirt cannot be reached; None: it can.
    :ivar version: of libvirt: 9000000 is 9.0.0.
    :ivar emulator: the program that runs guests; None: not asked for.
    :ivar guest_failure: why it runs no guests of the configured type; None: it does, or it is no QEMU.
    """

    uri: str
    import_failure: str | None = None
    failure: str | None = None
    version: int = 0
    emulator: str | None = None
    guest_failure: str | None = None


def look_at_host(uri: str, virt_type: str, *, timeout: float = _TIMEOUT) -> Host:
    """Connect to libvirt and ask it.

    :param timeout: seconds; a daemon that hangs must not hang this.
    """
    answers: list[Host] = []
    # A call into libvirt cannot be interrupted, only abandoned.
    thread = threading.Thread(target=lambda: answers.append(_ask(uri, virt_type)), daemon=True)
    thread.start()
    thread.join(timeout)
    return answers[0] if answers else Host(uri, failure=f"no answer within {timeout:g} s")


def judge_host(host: Host, virt_type: str, *, demanded: bool) -> list[Finding]:
    """Return what is to be said of libvirt.

    :param demanded: the user named it, so it must be there; otherwise the library makes disks without it.
    """
    if host.import_failure is not None:
        return [error(_CHECK, f"libvirt-python: {host.import_failure}", "install the package libvirt-python again")]
    if host.failure is not None:
        say = error if demanded else warning
        advice = "start libvirtd, or join the group libvirt; until then, disks can be made, but no guest can have them"
        return [say(_CHECK, f"cannot be reached at {host.uri}: {host.failure}", advice)]
    version = f"{host.version // 1_000_000}.{host.version // 1000 % 1000}.{host.version % 1000}"
    found = [fine(_CHECK, f"{version} at {host.uri}")]
    if host.version < _NEEDED:
        found = [warning(_CHECK, f"{version} at {host.uri}; 9.0.0 is tested", "prefer a later libvirt")]
    if host.guest_failure is not None:
        advice = "load the kernel's module kvm_intel or kvm_amd, or set [libvirt] virt_type = qemu (emulation, slow)"
        if virt_type != "kvm":
            advice = "install the package qemu-system-x86, or what your architecture needs"
        found.append(error("emulator", f"no {virt_type} guests here: {host.guest_failure}", advice))
    elif host.emulator is not None:
        found.append(fine("emulator", f"{host.emulator} runs {virt_type} guests"))
    return found


def _ask(uri: str, virt_type: str) -> Host:
    host = Host(uri)
    try:
        import libvirt
    except ImportError as failure:
        return replace(host, import_failure=str(failure))
    try:
        with hypervisor.connection(uri) as connection:
            host = replace(host, version=connection.getLibVersion())
            if virt_type in ("kvm", "qemu"):
                host = _ask_for_emulator(host, connection, virt_type)
    except exceptions.ImageBackendError as failure:
        host = replace(host, failure=str(failure.__cause__ or failure))
    except libvirt.libvirtError as failure:
        host = replace(host, failure=str(failure))
    return host


def _ask_for_emulator(host: Host, connection: Any, virt_type: str) -> Host:
    import libvirt
    from lxml import etree

    try:
        capabilities = connection.getDomainCapabilities(None, None, None, virt_type)
    except libvirt.libvirtError as failure:
        return replace(host, guest_failure=str(failure))
    emulator = etree.fromstring(capabilities).findtext("path") or ""
    if ":///" not in host.uri or os.access(emulator, os.X_OK):
        return replace(host, emulator=emulator)
    return replace(host, guest_failure=f"{emulator or 'the emulator'} cannot be run")
