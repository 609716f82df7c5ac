# SPDX-License-Identifier: Apache-2.0
"""The smallest domain that a device of the golden files can be defined in."""

from __future__ import annotations

__all__ = ["domain_xml"]

_OS = {"hvm": '<type arch="x86_64">hvm</type>', "exe": "<type>exe</type><init>/sbin/init</init>"}


def domain_xml(device: str, domain_type: str, name: str = "golden", boot: str = "hvm") -> str:
    """Return a domain of ``domain_type`` with one device.

    :param boot: ``hvm`` for a machine, ``exe`` for a container.
    """
    # The default controller has one target only.
    controller = '<controller type="scsi" model="virtio-scsi"/>\n' if boot == "hvm" else ""
    return (
        f'<domain type="{domain_type}">\n<name>{name}</name>\n<memory unit="MiB">64</memory>\n'
        f"<vcpu>1</vcpu>\n<iothreads>2</iothreads>\n<os>{_OS[boot]}</os>\n<devices>\n{controller}{device}</devices>\n</domain>\n"
    )
