# SPDX-License-Identifier: Apache-2.0
"""Disks that QEMU, or librbd in it, encrypts: with LUKS, by a passphrase that is also a secret of libvirt's."""

from __future__ import annotations

from dataclasses import dataclass, field

from imagebackend import exceptions

__all__ = ["Encryption"]

_FORMATS = ("", "luks1", "luks2")


@dataclass(frozen=True)
class Encryption:
    """How a disk is encrypted.

    :ivar passphrase: what opens it; never recorded.
    :ivar secret_uuid: of libvirt's secret that holds the passphrase.
    :ivar format: ``luks1`` or ``luks2``; empty: the newest of whoever encrypts, which is ``luks2`` for disks in Ceph
        and ``luks1`` for disks in files.
    :ivar iter_time: how many milliseconds it is to take to try a passphrase on a disk in a file, whoever tries; the
        less the passphrase can be guessed, the less is needed, and one that is random needs none.
    """

    passphrase: str = field(repr=False)
    secret_uuid: str
    format: str = ""
    iter_time: int = 2000

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise exceptions.InvalidArgument(f"encryption format {self.format!a:.80}: luks1 or luks2 is needed")
        if self.iter_time <= 0:
            raise exceptions.InvalidArgument(f"iter_time {self.iter_time}: at least a millisecond is needed")
