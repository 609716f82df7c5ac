# SPDX-License-Identifier: Apache-2.0
"""Options of ``[ephemeral_storage_encryption]``."""

from __future__ import annotations

from oslo_config import cfg

OPTIONS = (
    cfg.BoolOpt(
        "enabled",
        default=False,
        help="Encrypt new disks in logical volumes, with a key of the agent's key manager.",
    ),
    cfg.StrOpt(
        "cipher",
        default="aes-xts-plain64",
        help="The cipher and mode, as cryptsetup(8) names them: what 'cryptsetup benchmark' says is fast.",
    ),
    cfg.IntOpt(
        "key_size",
        default=512,
        min=1,
        help="The bits of the encryption key. XTS splits the key in two: 512 is AES-256.",
    ),
    cfg.StrOpt(
        "default_format",
        default="luks",
        choices=[
            ("luks", "LUKS2: a header on the volume has the key, encrypted with that of the key manager"),
            ("plain", "No header: the key manager's key, of exactly key_size bits, is the one that encrypts"),
        ],
        help="How the volume is encrypted.",
    ),
)
