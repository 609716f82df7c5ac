# SPDX-License-Identifier: Apache-2.0
"""``disk.info``: the record of the formats of an instance's disks.

One JSON object, from absolute path to format, in the instance's folder: the form that Nova writes and reads, so that
the other side of a migration finds it whoever made it. A disk's format is recorded before the disk appears and
forgotten after it is gone, since a disk without a format is the one thing that must never be seen: its guest may have
written any header onto it, and nothing may guess from that.

Behind the format of an encrypted disk stands the secret of libvirt's that opens it: ``qcow2 secret=UUID``. Who knows
nothing of encryption knows no such format either, and leaves the disk alone.
"""

from __future__ import annotations

import json
import os

from imagebackend import exceptions, locks
from imagebackend.storage import publish

__all__ = ["forget", "read", "read_all", "read_secret", "record"]

_NAME = "disk.info"
_LARGEST = 1 << 20
_SECRET = " secret="  # noqa: S105 - not a password but what stands before a UUID


def read(path: str) -> str | None:
    """Return the recorded format of the disk at ``path``, or None.

    :raises CorruptRecord: the record is not a JSON object of strings.
    """
    recorded = _find(path)
    return None if recorded is None else recorded.partition(_SECRET)[0]


def read_secret(path: str) -> str | None:
    """Return the UUID of the secret that opens the disk at ``path``, as recorded; None: it is not encrypted.

    :raises CorruptRecord: the record is not a JSON object of strings.
    """
    return (_find(path) or "").partition(_SECRET)[2] or None


def read_all(folder: str) -> dict[str, str]:
    """Return the recorded formats of the disks in an instance's folder, by path.

    :raises CorruptRecord: the record is not a JSON object of strings.
    """
    return {path: recorded.partition(_SECRET)[0] for path, recorded in _read(f"{folder}/{_NAME}").items()}


def record(
    path: str, disk_format: str, *, secret_uuid: str | None = None, lock: str, timeout: float, durable: bool
) -> None:
    """Record the format of the disk at ``path``; the caller syncs the folder.

    :param secret_uuid: of the secret that opens the disk, if it is encrypted.
    :param lock: the lock file of the instance's record.
    :raises CorruptRecord: what is there cannot be read; it is left as it is.
    :raises LockTimeout: another thread, process or host was at it for longer than ``timeout`` seconds.
    """
    recorded = disk_format if secret_uuid is None else f"{disk_format}{_SECRET}{secret_uuid}"
    _change(path, recorded, lock=lock, timeout=timeout, durable=durable)


def forget(path: str, *, lock: str, timeout: float, durable: bool) -> None:
    """Drop the record of the disk at ``path``, and the file with the last one; the caller syncs the folder.

    :raises CorruptRecord: what is there cannot be read; it is left as it is.
    :raises LockTimeout: another thread, process or host was at it for longer than ``timeout`` seconds.
    """
    _change(path, None, lock=lock, timeout=timeout, durable=durable)


def _find(path: str) -> str | None:
    formats = _read(f"{os.path.dirname(path)}/{_NAME}")
    if path in formats:
        return formats[path]
    # Written on a host that keeps its instances elsewhere, before the instance was migrated.
    same_disk = "/" + "/".join(path.split("/")[-2:])
    found = {each for recorded, each in formats.items() if recorded.endswith(same_disk)}
    return found.pop() if len(found) == 1 else None


def _change(path: str, recorded: str | None, *, lock: str, timeout: float, durable: bool) -> None:
    file = f"{os.path.dirname(path)}/{_NAME}"
    with locks.hold(lock, timeout=timeout, transient=True):
        formats = _read(file)
        if formats.get(path) == recorded:
            return
        if recorded is None:
            del formats[path]
        else:
            formats[path] = recorded
        if formats:
            publish.write_file(file, json.dumps(formats).encode(), durable=durable)
        else:
            publish.remove_file(file)


def _read(file: str) -> dict[str, str]:
    content = publish.read_file(file, _LARGEST)
    if content is None:
        return {}
    way_out = "write it anew, as a JSON object from the absolute path of each disk to its format"
    try:
        formats = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise exceptions.CorruptRecord(file, f"not JSON ({error}); {way_out}") from error
    if not isinstance(formats, dict) or not all(isinstance(value, str) for value in formats.values()):
        raise exceptions.CorruptRecord(file, f"not an object of strings; {way_out}")
    return formats
