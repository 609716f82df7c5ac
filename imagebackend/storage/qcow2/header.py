# SPDX-License-Identifier: Apache-2.0
"""The facts that a qcow2 header states, with every bound checked.

Sources: docs/interop/qcow2.txt of QEMU, and the limits of ``qcow2_do_open`` in its block/qcow2.c.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from imagebackend import exceptions

__all__ = [
    "BACKING_FORMAT",
    "CORRUPT",
    "CRYPTO_HEADER",
    "DATA_FILE",
    "DATA_FILE_NAME",
    "DIRTY",
    "MAGIC",
    "MAX_BACKING_NAME",
    "MAX_CLUSTER_BITS",
    "MAX_FORMAT_NAME",
    "MAX_L1_SIZE",
    "MIN_CLUSTER_BITS",
    "V2",
    "V3",
    "Header",
    "read_header",
]

MAGIC = b"QFI\xfb"

#: The header of version 2, and what version 3 adds to it.
V2 = struct.Struct(">4sIQIIQIIQQIIQ")
V3 = struct.Struct(">QQQII")

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
#: QEMU's limits, in bytes: the L1 table, the refcount table, a backing file's name, a format's name.
MAX_L1_SIZE = 32 << 20
_MAX_REFCOUNT_TABLE_SIZE = 8 << 20
MAX_BACKING_NAME = 1023
MAX_FORMAT_NAME = 15
_MAX_SNAPSHOTS = 65536
_MAX_REFCOUNT_ORDER = 6

#: Incompatible feature bits.
DIRTY, CORRUPT, DATA_FILE, _COMPRESSION_TYPE, _EXTENDED_L2 = 1, 2, 4, 8, 16
_KNOWN_FEATURES = DIRTY | CORRUPT | DATA_FILE | _COMPRESSION_TYPE | _EXTENDED_L2
_KNOWN_COMPRESSION_TYPES = (0, 1)
#: QEMU refuses subclusters below 512 bytes, of which there are 32 in a cluster.
_MIN_EXTENDED_CLUSTER_BITS = 14

#: Header extension types.
BACKING_FORMAT, CRYPTO_HEADER, DATA_FILE_NAME = 0xE2792ACA, 0x0537BE77, 0x44415441
_EXTENSION = struct.Struct(">II")
#: The format defines five types; a header that holds many more was not made by a tool.
_MAX_EXTENSIONS = 32

_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class Header:
    """What a qcow2 header says of its image; sizes and offsets in bytes.

    :ivar version: 2 or 3.
    :ivar virtual_size: the size of the disk.
    :ivar backing_file: the backing file's name as it stands in the header, or None.
    :ivar backing_format: the backing file's recorded format, or None.
    :ivar incompatible_features: bits 0 to 4 at most; others were refused.
    :ivar l1_entries: number of entries of the active L1 table.
    :ivar refcount_table_clusters: number of clusters of the refcount table.
    :ivar crypt_method: 0 none, 1 AES, 2 LUKS.
    :ivar compression_type: 0 zlib, 1 zstd.
    :ivar dirty: whether the reference counts may be behind (lazy_refcounts): QEMU checks all of it when it opens it.
    :ivar data_file: whether the guest's data lie in another file.
    :ivar extensions: the types of the header extensions, in the order of the file.
    :ivar file_size: the size of the file itself.
    """

    version: int
    virtual_size: int
    cluster_size: int
    backing_file: str | None
    backing_format: str | None
    incompatible_features: int
    compatible_features: int
    autoclear_features: int
    refcount_order: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    crypt_method: int
    compression_type: int
    extensions: tuple[int, ...]
    file_size: int

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & _EXTENDED_L2)

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible_features & DIRTY)

    @property
    def data_file(self) -> bool:
        return bool(self.incompatible_features & DATA_FILE)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        return self.cluster_size // self.l2_entry_size


def read_header(descriptor: int, name: str) -> Header:
    """Return what the qcow2 header of an open file says.

    One ``pread`` of 4 KiB; where the header reaches further, up to 35 more of at most 1023 bytes.

    :param descriptor: a regular file, open for reading; its position does not change.
    :param name: what to call the image in errors.
    :raises ImageUnacceptable: not a qcow2 header, one that breaks a rule of the format, a table outside the file,
        or a feature that QEMU 7.2 does not know either.
    :raises StorageError: the file cannot be read.
    """
    try:
        return _Reader(descriptor, name).header()
    except OSError as error:
        raise exceptions.storage_error(error, name) from error


class _Reader:
    """One pass over one header: the window that was read, and the checks."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._window = os.pread(descriptor, _WINDOW, 0)
        self._file_size = os.fstat(descriptor).st_size

    def header(self) -> Header:
        window = self._window
        if window[:4] != MAGIC:
            raise self._refusal("it does not begin with qcow2's magic number")
        if len(window) < V2.size:
            raise self._refusal(f"its header is cut off after {len(window)} bytes")
        (
            _,
            version,
            backing_offset,
            backing_length,
            cluster_bits,
            virtual_size,
            crypt_method,
            l1_entries,
            l1_offset,
            refcount_table_offset,
            refcount_table_clusters,
            snapshot_count,
            snapshots_offset,
        ) = V2.unpack_from(window)
        if version not in (2, 3):
            raise self._refusal(f"qcow2 version {version}; 2 and 3 are known")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
            raise self._refusal(f"clusters of 2**{cluster_bits} bytes; 2**9 to 2**21 are allowed")
        if crypt_method > 2:
            raise self._refusal(f"unknown encryption method {crypt_method}")
        cluster_size = 1 << cluster_bits
        features = (0, 0, 0, 4, V2.size, 0) if version == 2 else self._version_3(cluster_bits)
        incompatible, compatible, autoclear, refcount_order, header_length, compression_type = features
        extensions = self._extensions(header_length, backing_offset or cluster_size, cluster_size)
        header = Header(
            version=version,
            virtual_size=virtual_size,
            cluster_size=cluster_size,
            backing_file=self._backing_file(backing_offset, backing_length, header_length, cluster_size),
            backing_format=self._backing_format(extensions),
            incompatible_features=incompatible,
            compatible_features=compatible,
            autoclear_features=autoclear,
            refcount_order=refcount_order,
            l1_entries=l1_entries,
            l1_offset=l1_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            snapshot_count=snapshot_count,
            snapshots_offset=snapshots_offset,
            crypt_method=crypt_method,
            compression_type=compression_type,
            extensions=tuple(extensions),
            file_size=self._file_size,
        )
        self._check_tables(header)
        return header

    def _version_3(self, cluster_bits: int) -> tuple[int, int, int, int, int, int]:
        if len(self._window) < V2.size + V3.size:
            raise self._refusal(f"its header is cut off after {len(self._window)} bytes")
        incompatible, compatible, autoclear, refcount_order, length = V3.unpack_from(self._window, V2.size)
        if unknown := incompatible & ~_KNOWN_FEATURES:
            raise self._refusal(f"unknown incompatible features {unknown:#x}")
        if length < V2.size + V3.size or length % 8 or length > 1 << cluster_bits:
            raise self._refusal(f"a header length of {length} bytes is not possible")
        if refcount_order > _MAX_REFCOUNT_ORDER:
            raise self._refusal(f"refcounts of 2**{refcount_order} bits; 2**6 is the limit")
        if incompatible & _EXTENDED_L2 and cluster_bits < _MIN_EXTENDED_CLUSTER_BITS:
            raise self._refusal(f"extended L2 entries with clusters of {1 << cluster_bits} bytes")
        compression_type = self._at(104, 1)[0] if length > 104 else 0
        if bool(compression_type) != bool(incompatible & _COMPRESSION_TYPE):
            raise self._refusal(f"compression type {compression_type} contradicts the feature bits")
        if compression_type not in _KNOWN_COMPRESSION_TYPES:
            raise self._refusal(f"unknown compression type {compression_type}")
        return incompatible, compatible, autoclear, refcount_order, length, compression_type

    def _extensions(self, start: int, end: int, cluster_size: int) -> dict[int, tuple[int, int]]:
        found: dict[int, tuple[int, int]] = {}
        offset = start
        end = min(end, cluster_size)
        while offset + _EXTENSION.size <= end:
            kind, length = _EXTENSION.unpack(self._at(offset, _EXTENSION.size))
            if kind == 0:
                break
            offset += _EXTENSION.size
            if length > end - offset:
                raise self._refusal(f"header extension {kind:#x} of {length} bytes passes the end of the header")
            if kind in found or len(found) == _MAX_EXTENSIONS:
                raise self._refusal(f"header extension {kind:#x} is one too many")
            found[kind] = (offset, length)
            offset += -(-length // 8) * 8
        return found

    def _backing_file(self, offset: int, length: int, header_length: int, cluster_size: int) -> str | None:
        if not offset:
            return None
        if offset < header_length or not 1 <= length <= min(MAX_BACKING_NAME, cluster_size - offset):
            raise self._refusal(f"a backing file name of {length} bytes at {offset} is not possible")
        return os.fsdecode(self._at(offset, length))

    def _backing_format(self, extensions: dict[int, tuple[int, int]]) -> str | None:
        if BACKING_FORMAT not in extensions:
            return None
        offset, length = extensions[BACKING_FORMAT]
        if not 1 <= length <= MAX_FORMAT_NAME:
            raise self._refusal(f"a backing format name of {length} bytes is not possible")
        return self._at(offset, length).decode("ascii", "backslashreplace")

    def _check_tables(self, header: Header) -> None:
        needed = -(-header.virtual_size // (header.cluster_size * header.l2_entries))
        if header.l1_entries < needed:
            raise self._refusal(f"an L1 table of {header.l1_entries} entries where {needed} are needed")
        self._check_table("L1 table", header, header.l1_offset, header.l1_entries * 8, MAX_L1_SIZE)
        length = header.refcount_table_clusters * header.cluster_size
        if not length:
            raise self._refusal("it has no refcount table")
        self._check_table("refcount table", header, header.refcount_table_offset, length, _MAX_REFCOUNT_TABLE_SIZE)
        if header.snapshot_count > _MAX_SNAPSHOTS:
            raise self._refusal(f"{header.snapshot_count} snapshots; {_MAX_SNAPSHOTS} is the limit")
        # The smallest entry has 40 bytes; how long each is, its reader checks.
        length = header.snapshot_count * 40
        self._check_table("snapshot table", header, header.snapshots_offset, length, length)

    def _check_table(self, what: str, header: Header, offset: int, length: int, limit: int) -> None:
        if not length:
            return
        if length > limit:
            raise self._refusal(f"a {what} of {length} bytes; {limit} is the limit")
        if offset % header.cluster_size or not offset:
            raise self._refusal(f"its {what} at {offset} does not begin on a cluster")
        if offset + length > header.file_size:
            raise self._refusal(f"its {what} reaches to {offset + length}, the file ends at {header.file_size}")

    def _at(self, offset: int, length: int) -> bytes:
        if offset + length <= len(self._window):
            return self._window[offset : offset + length]
        piece = os.pread(self._descriptor, length, offset)
        if len(piece) < length:
            raise self._refusal(f"its header is cut off after {offset + len(piece)} bytes")
        return piece

    def _refusal(self, reason: str) -> exceptions.ImageUnacceptable:
        return exceptions.ImageUnacceptable(self._name, reason)
