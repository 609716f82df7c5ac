# SPDX-License-Identifier: Apache-2.0
"""Options of ``[DEFAULT]``."""

from __future__ import annotations

import socket

from oslo_config import cfg

OPTIONS = (
    cfg.StrOpt(
        "state_path",
        default="/var/lib/imagebackend",
        help="The folder under which state is kept; other paths may refer to it as $state_path.",
    ),
    cfg.StrOpt(
        "instances_path",
        default="$state_path/instances",
        help="""
Where disks are stored: each instance has a folder of its own here, the template cache is in the folder named by
[image_cache] subdirectory_name, and lock files are in 'locks'. Hosts that share this folder share its templates.
""",
    ),
    # Not a type that checks it: what a machine is called already must not keep the library from being imported.
    cfg.StrOpt(
        "host",
        default=socket.gethostname(),
        sample_default="<current_hostname>",
        help="""
The name of this host. Leases on templates carry it, so that hosts that share a folder can tell theirs apart.
""",
    ),
    cfg.BoolOpt(
        "use_cow_images",
        default=True,
        help="""
With [libvirt] images_type = default: make qcow2 disks that are overlays of their template (true), or raw disks that
are copies of it (false).
""",
    ),
    cfg.BoolOpt(
        "force_raw_images",
        default=True,
        help="""
Convert templates to raw when they enter the cache. Guests then read them at full speed, and raw disks can be cloned
from them by reflink. Switched off, a qcow2 template stays as it was fetched, and disks are made from it as it is.
""",
    ),
    cfg.StrOpt(
        "preallocate_images",
        default="none",
        choices=[
            ("none", "Storage is allocated when the guest first writes to it"),
            ("space", "Storage is allocated when the disk is made"),
        ],
        help="Whether new disks have all their storage allocated, so that a full file system cannot stop a guest.",
    ),
    cfg.StrOpt(
        "default_ephemeral_format",
        help="""
The file system of ephemeral disks: ext2, ext3, ext4, xfs, vfat or ntfs. By default ext4 for Linux guests, ntfs for
Windows, vfat for others.
""",
    ),
    cfg.MultiStrOpt(
        "virt_mkfs",
        default=[],
        help="""
The command that formats ephemeral disks for one type of operating system, as 'os_type=command'; %(fs_label)s and
%(target)s are replaced. 'default' stands for every type that is not named. It is split into words as a shell would,
but no shell runs it.

For example: virt_mkfs = linux=mkfs.ext4 -L %(fs_label)s -F %(target)s
""",
    ),
    cfg.BoolOpt(
        "durable_writes",
        default=True,
        help="""
Wait until a new disk and its record have reached stable storage before saying that the disk exists. Switched off,
disks are made faster, and a power cut may leave one that must be made again.
""",
    ),
    cfg.StrOpt(
        "reflink",
        default="auto",
        choices=[
            ("auto", "Share blocks where the file system can, copy elsewhere"),
            ("always", "Fail where blocks cannot be shared"),
            ("never", "Always copy"),
        ],
        help="""
Whether raw disks and their snapshots share blocks with what they are made from (reflink: XFS, btrfs, bcachefs,
NFS 4.2). Disks with preallocate_images = space never share.
""",
    ),
    cfg.StrOpt(
        "root_helper",
        default="",
        help="""
What runs LVM's commands and cryptsetup as root, such as 'sudo' or 'sudo nova-rootwrap /etc/nova/rootwrap.conf'. It is
split into words as a shell would, but no shell runs it. By default nothing: this process is root itself. A process
that is not must also be in the group that owns block devices, usually 'disk'.
""",
    ),
    cfg.FloatOpt(
        "lock_timeout",
        default=600.0,
        min=0,
        help="""
For how many seconds to wait for a disk or template that another thread, process or host is working on, before the
call fails. Should be longer than it takes to fetch and convert the largest template.
""",
    ),
)
