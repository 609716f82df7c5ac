# SPDX-License-Identifier: Apache-2.0
"""Options of ``[image_cache]``."""

from __future__ import annotations

from oslo_config import cfg

OPTIONS = (
    cfg.StrOpt(
        "subdirectory_name",
        default="_base",
        help="The folder under instances_path that holds the templates.",
    ),
    cfg.IntOpt(
        "manager_interval",
        default=2400,
        min=-1,
        help="""
How many seconds pass between two runs of what an agent calls regularly (TemplateCache.periodic): pruning, and sweeping
up what killed processes left. 0: 60 seconds. -1: it does nothing.
""",
    ),
    cfg.BoolOpt(
        "remove_unused_base_images",
        default=True,
        help="Whether pruning removes templates that no disk depends on, for their age or for want of space.",
    ),
    cfg.IntOpt(
        "remove_unused_original_minimum_age_seconds",
        default=86400,
        min=0,
        help="For how many seconds a template is kept after its last use.",
    ),
    cfg.IntOpt(
        "remove_unused_resized_minimum_age_seconds",
        default=3600,
        min=0,
        help="""
For how many seconds what was made from a template in another store, such as an image in a Ceph pool or a logical
volume, is kept after its last use.
""",
    ),
    cfg.IntOpt(
        "precache_concurrency",
        default=1,
        min=1,
        help="How many images are pulled at a time when several are asked for at once.",
    ),
    cfg.IntOpt(
        "total_size_limit",
        default=0,
        min=0,
        help="""
How many bytes the templates in the cache may take before pruning removes some that no disk depends on, those not used
for longest first. 0: no limit.
""",
    ),
    cfg.IntOpt(
        "free_space_target",
        default=0,
        min=0,
        help="""
How many bytes should be free on the file system of the cache: while there are fewer, pruning removes templates that no
disk depends on, those not used for longest first. 0: no target.
""",
    ),
    cfg.FloatOpt(
        "fetch_timeout",
        default=60.0,
        min=0.001,
        help="""
After how many seconds with less than 1 KiB of data each a connection counts as broken; fetch_retries says how often
it is taken up again.
""",
    ),
    cfg.IntOpt(
        "fetch_retries",
        default=5,
        min=0,
        help="""
How often a transfer is taken up again after a broken or stalled connection, a server's error (5xx), or being told to
come back later (429).
""",
    ),
    cfg.IntOpt(
        "max_virtual_size",
        default=0,
        min=0,
        help="The largest virtual size, in bytes, that a template may have. 0: no limit.",
    ),
    cfg.StrOpt(
        "fetch_credentials_file",
        help="""
A file with the names and passwords for web servers, in the form of ~/.netrc: 'machine HOST login NAME password WORD',
where HOST:PORT is for that port alone; 'default' is not used. Nobody but its owner, who is root or the user of this
service, may read it. By default the environment's NETRC says. A URL's own name and password come first.
""",
    ),
    cfg.StrOpt(
        "fetch_cafile",
        help="""
A file of certificates, in PEM: web servers must have one that these vouch for. By default those that the system trusts
do, or what the environment's SSL_CERT_FILE and SSL_CERT_DIR name.
""",
    ),
    cfg.StrOpt(
        "checksum_keyring",
        help="""
A file of public OpenPGP keys, as 'gpg --export' writes it. If it is set, every checksum file (SHA256SUMS) that a
checksum is taken from must be signed by one of them: in itself, or by a file beside it with .gpg, .sign, .asc or .sig
after its name. gpgv verifies it.
""",
    ),
)
