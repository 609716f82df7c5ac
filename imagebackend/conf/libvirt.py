# SPDX-License-Identifier: Apache-2.0
"""Options of ``[libvirt]``."""

from __future__ import annotations

from typing import Any

from oslo_config import cfg, types
from oslo_utils import units


class PowerOfTwo(types.Integer):
    """An integer that is a power of two."""

    def __call__(self, value: Any) -> int | float | None:
        number = super().__call__(value)
        if isinstance(number, int) and number & (number - 1):
            raise ValueError(f"{number} is not a power of two")
        return number


OPTIONS = (
    cfg.StrOpt(
        "images_type",
        default="default",
        help="""
The backend that stores disks: raw, flat (the same as raw), qcow2, lvm, rbd, ploop, or a type that another package
adds. 'default' is qcow2 with use_cow_images, raw without.
""",
    ),
    cfg.StrOpt(
        "virt_type",
        default="kvm",
        choices=["kvm", "lxc", "qemu", "parallels"],
        help="The type of domain that disks are described for.",
    ),
    cfg.StrOpt(
        "hw_disk_discard",
        choices=[
            ("ignore", "A guest's discard requests are dropped"),
            ("unmap", "A guest's discard requests give storage back to the host"),
        ],
        help="What happens to discard (TRIM, UNMAP) requests of guests. By default the hypervisor decides.",
    ),
    cfg.ListOpt(
        "disk_cachemodes",
        default=[],
        help="""
Cache modes by type of source, as 'file=MODE,block=MODE,network=MODE,mount=MODE', where MODE is one of default, none,
writethrough, writeback, directsync, unsafe. A source that is not named gets 'none' if its storage supports direct
I/O, 'writeback' otherwise.
""",
    ),
    cfg.StrOpt(
        "snapshot_image_format",
        choices=["raw", "qcow2", "vmdk", "vdi"],
        help="The format in which a disk is extracted when the caller names none. By default that of the disk.",
    ),
    cfg.BoolOpt(
        "snapshot_compression",
        default=False,
        help="Compress extracted qcow2 images. Slower, and smaller.",
    ),
    cfg.StrOpt(
        "snapshots_directory",
        default="$instances_path/snapshots",
        help="Where extracted images are put together before they are handed over.",
    ),
    cfg.IntOpt(
        "images_cpu_time_limit",
        default=30,
        min=1,
        help="How many seconds of CPU time a tool may use to read the facts of one image.",
    ),
    cfg.IntOpt(
        "images_address_space_limit",
        default=2,
        min=1,
        help="How many gibibytes of memory a tool that reads an image may use.",
    ),
    cfg.IntOpt(
        "images_tool_timeout",
        default=3600,
        min=1,
        help="After how many seconds a conversion, or any other tool that works on a whole disk, is killed.",
    ),
    cfg.Opt(
        "images_qcow2_cluster_size",
        type=PowerOfTwo(min=512, max=2 * units.Mi),
        default=65536,
        help="""
The cluster size of new qcow2 disks, in bytes: a power of two from 512 to 2097152. Larger clusters need less memory
for metadata, smaller ones less copying when a guest writes little.
""",
    ),
    cfg.BoolOpt(
        "images_qcow2_extended_l2",
        default=False,
        help="""
Divide the clusters of new qcow2 disks into 32 subclusters. Needs a cluster size of 16384 or more. Also what lets a
disk that has a template be preallocated.
""",
    ),
    cfg.BoolOpt(
        "images_qcow2_lazy_refcounts",
        default=False,
        help="Let QEMU update reference counts late: faster writes, and a repair when opened after a crash.",
    ),
    cfg.StrOpt(
        "images_qcow2_compression_type",
        default="zlib",
        choices=["zlib", "zstd"],
        help="How clusters of new qcow2 disks are compressed, where something compresses them.",
    ),
)
