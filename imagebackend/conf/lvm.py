# SPDX-License-Identifier: Apache-2.0
"""Options of ``[libvirt]`` about logical volumes."""

from __future__ import annotations

from oslo_config import cfg

OPTIONS = (
    cfg.StrOpt(
        "images_volume_group",
        help="The volume group that stores disks when images_type is lvm. It has to be there.",
    ),
    cfg.StrOpt(
        "images_thin_pool",
        help="""
The thin pool in that volume group that stores disks. A disk is then a snapshot of its template, which is in the pool
too. By default each disk is a volume of its own that its template is copied into.
""",
    ),
    cfg.IntOpt(
        "images_thin_pool_size",
        default=0,
        min=0,
        help="Make the thin pool, with this many gibibytes, if it is not there. 0: it has to be there.",
    ),
    cfg.IntOpt(
        "images_thin_pool_data_limit",
        default=95,
        min=1,
        max=100,
        help="""
Make no disk when this many percent of the pool's data space are used, or would be by copying a template into it: all
guests of a full pool stand still. Set lvm.conf's thin_pool_autoextend_threshold below that to have LVM extend it.
""",
    ),
    cfg.IntOpt(
        "images_thin_pool_metadata_limit",
        default=90,
        min=1,
        max=100,
        help="The same for the pool's metadata, without which nothing in the pool can be written to or removed.",
    ),
    cfg.BoolOpt(
        "sparse_logical_volumes",
        default=False,
        help="""
Without images_thin_pool: store each disk in a thin pool of its own, no larger than its template's data and 64 MiB, and
have LVM extend it (lvm.conf: thin_pool_autoextend_threshold). When the volume group is full, its guest stands still.
""",
    ),
    cfg.BoolOpt(
        "images_volume_group_zeroed",
        default=False,
        help="""
The free space of the volume group reads as zeros: it did when the group was made, and whatever uses the group clears
what it removes. Then the holes of a template are not written to a new volume. By default the device is told to zero
them, so that no guest reads what another one left.
""",
    ),
    cfg.IntOpt(
        "images_volume_stripes",
        default=1,
        min=1,
        help="Across how many physical volumes a new volume without images_thin_pool is striped.",
    ),
    cfg.StrOpt(
        "images_volume_raid_type",
        choices=["raid1", "raid5", "raid6", "raid10"],
        help="The RAID level of new volumes without images_thin_pool. By default none.",
    ),
    cfg.ListOpt(
        "images_volume_tags",
        default=[],
        help="Tags that new volumes get beside those of this library, such as 'tier1, backup'.",
    ),
    cfg.StrOpt(
        "volume_clear",
        default="zero",
        choices=[
            ("zero", "Overwrite it with zeros"),
            ("shred", "Overwrite it three times with patterns, with shred(1)"),
            ("discard", "Discard its blocks, and trust the device to forget them"),
            ("none", "Leave what is on it"),
        ],
        help="How a volume is cleared when its disk is removed. Volumes in a thin pool need no clearing.",
    ),
    cfg.IntOpt(
        "volume_clear_size",
        default=0,
        min=0,
        help="How many mebibytes at the beginning of a volume are cleared. 0: all of it.",
    ),
)
