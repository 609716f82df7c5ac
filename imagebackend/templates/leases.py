# SPDX-License-Identifier: Apache-2.0
"""Which disks depend on which template.

A lease is a symbolic link in the template's own folder of leases: named for the disk, and pointing, as
``host:path``, at it. One link is one atomic system call, ``ls -l`` shows it, and nothing has to be parsed or locked.
It is made before its disk is published and is durable when the disk's name is: on file systems that keep the order of
metadata changes (ext4, XFS), which is where local disks are, the sync of the later name includes the earlier link.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from imagebackend import exceptions
from imagebackend.storage import publish

__all__ = ["Lease", "Owner", "changed", "count", "drop", "holds", "read_all", "take", "touch"]


# The path is absolute, or an image in a Ceph pool; the host may be an IPv6 address.
_TARGET = re.compile(r"(.*?):(/.*|rbd:.*)", re.DOTALL)


@dataclass(frozen=True)
class Owner:
    """A disk that may hold leases.

    :ivar instance: the instance that the disk is of.
    :ivar disk: the disk's name.
    :ivar host: the host that made it.
    :ivar path: where it is.
    """

    instance: str
    disk: str
    host: str
    path: str

    @property
    def link(self) -> str:
        """The name of this disk's leases; ``:`` is in neither part."""
        return f"{self.instance}:{self.disk}"


@dataclass(frozen=True)
class Lease:
    """A disk's claim on a template."""

    template: str
    owner: Owner


def take(folder: str, owner: Owner) -> bool:
    """Make the lease of ``owner`` in a template's folder of leases; return whether it had none.

    :raises InsufficientSpace, PermissionDenied, StorageError: there is none.
    """
    link = f"{folder}/{owner.link}"
    target = f"{owner.host}:{owner.path}"
    try:
        try:
            os.symlink(target, link)
        except FileNotFoundError:
            os.makedirs(folder, mode=0o755, exist_ok=True)
            os.symlink(target, link)
    except FileExistsError:
        return False
    except OSError as error:
        raise exceptions.storage_error(error, link) from error
    return True


def drop(folder: str, owner: Owner) -> bool:
    """Remove the lease of ``owner``; return whether it was there.

    :raises PermissionDenied, StorageError: it is still there.
    """
    try:
        os.unlink(f"{folder}/{owner.link}")
    except FileNotFoundError:
        return False
    except OSError as error:
        raise exceptions.storage_error(error, f"{folder}/{owner.link}") from error
    return True


def holds(folder: str, owner: Owner) -> bool:
    """Return whether ``owner`` has a lease in a template's folder of leases."""
    return os.path.lexists(f"{folder}/{owner.link}")


def count(folder: str) -> int:
    """Return how many leases there are in a template's folder of leases.

    :raises PermissionDenied, StorageError: that cannot be known, so the template must count as used.
    """
    return len(publish.list_folder(folder))


def read_all(folder: str, template: str) -> list[Lease]:
    """Return every lease in a template's folder of leases, sorted by disk.

    :raises PermissionDenied, StorageError: they cannot be read, so the template must count as used.
    """
    found = []
    try:
        for link in sorted(os.listdir(folder)):
            try:
                target = os.readlink(f"{folder}/{link}")
            except FileNotFoundError:
                continue  # dropped since it was listed
            instance, _, disk = link.partition(":")
            parts = _TARGET.fullmatch(target)
            host, path = parts.groups() if parts is not None else ("", target)
            found.append(Lease(template, Owner(instance, disk, host, path)))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error
    return found


def changed(folder: str) -> float:
    """Return when a template's folder of leases changed last, in seconds since the epoch; 0: there is none.

    :raises PermissionDenied, StorageError: it cannot be known.
    """
    try:
        return os.stat(folder).st_mtime
    except FileNotFoundError:
        return 0.0
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error


def touch(folder: str) -> None:
    """Make a template's folder of leases one that was changed just now.

    :raises OSError: as the operating system says.
    """
    try:
        os.utime(folder)
    except FileNotFoundError:
        os.makedirs(folder, mode=0o755, exist_ok=True)
