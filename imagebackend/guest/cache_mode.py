# SPDX-License-Identifier: Apache-2.0
"""Which cache mode and which I/O mode a disk gets. Decisions only: the facts are found out elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from imagebackend import exceptions

__all__ = ["choose_cache_mode", "choose_io_mode", "parse_disk_cachemodes"]

_OPTION = "[libvirt] disk_cachemodes"
_SOURCE_TYPES = ("file", "block", "network", "mount")
_CACHE_MODES = ("default", "none", "writethrough", "writeback", "directsync", "unsafe")
_IO_MODES = ("native", "threads", "io_uring")

# The modes that bypass the host's page cache. QEMU refuses native I/O with the others.
_DIRECT = ("none", "directsync")


def parse_disk_cachemodes(entries: Iterable[str]) -> dict[str, str]:
    """Return cache modes by type of source, from the entries of ``[libvirt] disk_cachemodes``.

    :param entries: such as ``file=directsync``.
    :raises InvalidConfiguration: an entry is not ``TYPE=MODE``, names an unknown type or mode, or contradicts
        another one.
    """
    modes: dict[str, str] = {}
    for entry in entries:
        source_type, equals, mode = (part.strip() for part in entry.partition("="))
        if not equals:
            raise exceptions.InvalidConfiguration(_OPTION, f"{entry!a:.80} is not TYPE=MODE, such as file=none")
        if source_type not in _SOURCE_TYPES:
            known = ", ".join(_SOURCE_TYPES)
            raise exceptions.InvalidConfiguration(_OPTION, f"type {source_type!a:.80} is not one of {known}")
        if mode not in _CACHE_MODES:
            known = ", ".join(_CACHE_MODES)
            raise exceptions.InvalidConfiguration(_OPTION, f"mode {mode!a:.80} is not one of {known}")
        if modes.setdefault(source_type, mode) != mode:
            raise exceptions.InvalidConfiguration(_OPTION, f"{source_type} is both {modes[source_type]} and {mode}")
    return modes


def choose_cache_mode(source_type: str, modes: Mapping[str, str], *, direct_io: bool, shareable: bool = False) -> str:
    """Return the cache mode for a disk.

    :param source_type: ``file``, ``block`` or ``network``.
    :param modes: what the operator chose: see :func:`parse_disk_cachemodes`.
    :param direct_io: whether the storage takes O_DIRECT. ``none`` is safe and fast there; elsewhere QEMU could not
        even open the disk, so it is ``writeback``, which honours the guest's flushes.
    :param shareable: several guests write to it. Then it is always ``none``: any cache would let them see different
        data.
    """
    if shareable:
        return "none"
    return modes.get(source_type, "none" if direct_io else "writeback")


def choose_io_mode(
    source_type: str, cache_mode: str, *, preallocated: bool = False, asked: str | None = None
) -> str | None:
    """Return the I/O mode that fits a cache mode; None for a network disk, whose client does its own I/O.

    ``native`` needs direct I/O, and pays only where every block is allocated: a write that allocates would block
    QEMU's main loop. ``threads`` is right for everything.

    :param cache_mode: what :func:`choose_cache_mode` returned.
    :param preallocated: every block of the disk has its place on the storage.
    :param asked: ``native``, ``threads`` or ``io_uring``. ``native`` becomes ``threads`` where the cache mode does
        not allow it; ``io_uring`` goes with every cache mode.
    :raises InvalidArgument: ``asked`` is something else.
    """
    if asked is not None and asked not in _IO_MODES:
        raise exceptions.InvalidArgument(f"io mode {asked!a:.80} is not one of {', '.join(_IO_MODES)}")
    if source_type == "network":
        return None
    if asked in ("io_uring", "threads"):
        return asked
    wants_native = preallocated or asked == "native"
    return "native" if wants_native and cache_mode in _DIRECT else "threads"
