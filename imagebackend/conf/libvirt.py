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
        help="""
How many seconds of CPU time a tool may use that reads what an image is, and none of its data: qemu-img create and
resize, of disks that are not preallocated. Most facts need no tool: they are read by this library, in bounded pieces.
Tools that work on all of an image are bounded by images_tool_timeout.
""",
    ),
    cfg.IntOpt(
        "images_address_space_limit",
        default=2,
        min=1,
        help="How many gibibytes of memory (address space) qemu-img may use, whatever it does.",
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
    cfg.StrOpt(
        "images_rbd_pool",
        default="rbd",
        help="The Ceph pool that stores disks and their templates.",
    ),
    cfg.StrOpt(
        "images_rbd_namespace",
        default="",
        help="The RADOS namespace in that pool ('rbd namespace create'). By default the one without a name.",
    ),
    cfg.StrOpt(
        "images_rbd_data_pool",
        help="The pool, possibly erasure-coded, that holds the data of new disks. By default images_rbd_pool.",
    ),
    cfg.StrOpt(
        "images_rbd_ceph_conf",
        default="",
        help="Path of the ceph.conf of the cluster. By default where Ceph's own tools look for it.",
    ),
    cfg.ListOpt(
        "images_rbd_features",
        default=[],
        help="""
Image features of new disks, such as 'layering, exclusive-lock, object-map, fast-diff, deep-flatten'. By default what
ceph.conf says in rbd_default_features.
""",
    ),
    cfg.IntOpt(
        "images_rbd_object_size",
        default=0,
        min=0,
        max=32 * units.Mi,
        help="""
The size, in bytes, of the objects that new disks are stored in: a power of two from 4096 to 33554432. 0: what
ceph.conf says in rbd_default_order.
""",
    ),
    cfg.StrOpt(
        "images_rbd_clone_format",
        default="auto",
        choices=[
            ("auto", "2 where the cluster requires clients that know it, 1 elsewhere"),
            ("1", "Templates are protected as long as they have clones"),
            ("2", "For clusters whose clients are all of Ceph 13 (Mimic) or later"),
        ],
        help="The format of clones: whether templates must be protected to have them.",
    ),
    cfg.StrOpt(
        "images_rbd_encrypted_clones",
        default="auto",
        choices=[
            ("auto", "Where librbd can encrypt a clone (Ceph 18 and later); copies of their templates elsewhere"),
            ("always", "Where librbd cannot, it is an error"),
            ("never", "They are copies, which is what guests need whose QEMU has an earlier librbd"),
        ],
        help="Whether encrypted disks are clones of their templates.",
    ),
    cfg.IntOpt(
        "images_rbd_max_clone_depth",
        default=5,
        min=1,
        help="A disk that is cloned from an image with this many parents is flattened.",
    ),
    cfg.IntOpt(
        "images_rbd_trash_delay",
        min=0,
        help="""
Move removed disks to the pool's trash, and protect them there for this many seconds ('rbd trash restore'). By
default they are removed at once.
""",
    ),
    cfg.StrOpt(
        "rbd_user",
        help="The Ceph user, without 'client.', of this host and its guests. Needs rbd_secret_uuid.",
    ),
    cfg.StrOpt(
        "rbd_secret_uuid",
        help="The UUID of libvirt's secret that holds the key of rbd_user.",
    ),
    cfg.IntOpt(
        "rbd_connect_timeout",
        default=5,
        help="For how many seconds to try to connect to the cluster. 0 or below: as ceph.conf says.",
    ),
    cfg.IntOpt(
        "rbd_operation_timeout",
        default=60,
        min=0,
        help="After how many seconds without an answer a request to the cluster fails. 0: never.",
    ),
    cfg.IntOpt(
        "rbd_destroy_volume_retries",
        default=12,
        min=0,
        help="How often to try again to remove a disk that is in use: the cluster notices late that a guest died.",
    ),
    cfg.IntOpt(
        "rbd_destroy_volume_retry_interval",
        default=5,
        min=0,
        help="How many seconds to wait before each of these tries.",
    ),
)
