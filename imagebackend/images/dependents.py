# SPDX-License-Identifier: Apache-2.0
"""Which disks depend on which templates, as the disks' own headers and libvirt's domains say.

No tool and no lock is needed, and no record but that of the disks' formats: a disk that is recorded as raw is not
looked at, since its guest can write any header onto it. One without a record is: a lease too many removes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Set

from oslo_config import cfg

from imagebackend import exceptions, names, untrusted_xml
from imagebackend.images import disk_file, disk_info, transfer
from imagebackend.storage import qcow2
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.lease_book import Evidence
from imagebackend.templates.leases import Lease, Owner

__all__ = ["look_at_domain", "look_at_folder", "needs"]

# How many files a chain may have.
_MAX_DEPTH = 64


def look_at_folder(conf: cfg.ConfigOpts, evidence: Evidence) -> None:
    """Note what the disks in files under ``instances_path`` depend on.

    :raises PermissionDenied, StorageError: the folder cannot be read.
    """
    instances = os.path.abspath(conf.instances_path)
    for instance in _listed(instances):
        try:
            formats = _formats(f"{instances}/{instance}")
        except exceptions.ImageBackendError as error:
            evidence.failed.append((f"{instances}/{instance}", error))
            formats = {}
        for disk in _disks(conf, instance, evidence):
            _note_file(conf, disk.path, formats.get(disk.owner.disk), disk.owner, evidence)


def look_at_domain(conf: cfg.ConfigOpts, xml: str, evidence: Evidence) -> None:
    """Note what the disks of a libvirt domain depend on, wherever they are."""
    try:
        domain = untrusted_xml.parse(xml.encode())
    except ValueError as error:
        evidence.failed.append(("a domain of libvirt", exceptions.InvalidArgument(str(error))))
        return
    uuid = domain.findtext("uuid") or ""
    cache = TemplateFolder(conf).path
    for disk in domain.iterfind("devices/disk"):
        source, driver, target = disk.find("source"), disk.find("driver"), disk.find("target")
        path = None if source is None else source.get("file")
        if path is None or not path.startswith("/"):
            continue
        try:
            owner = _owner(conf, uuid, path, "" if target is None else target.get("dev", ""))
        except exceptions.InvalidName as error:
            evidence.failed.append((path, error))
            continue
        for each in disk.iterfind(".//source[@file]"):
            if (file := _file_in(cache, each.get("file", ""))) is not None:
                evidence.needed.add(Lease(file, owner))
        if driver is not None and driver.get("type") == "qcow2":
            _note_file(conf, path, "qcow2", owner, evidence)


def needs(conf: cfg.ConfigOpts, owner: Owner) -> Set[str] | None:
    """Return the files of templates that a disk depends on, under the disk's lock; None: it cannot be known."""
    try:
        disk = disk_file.for_disk(conf, owner.instance, owner.disk)
        if owner.path != disk.path or not disk.is_settled():
            return None
        recorded = _formats(disk.folder).get(owner.disk)
        if recorded in ("raw", "ploop"):
            return set()
        return set(_files_below(disk.path, TemplateFolder(conf).path)) if recorded == "qcow2" else None
    except exceptions.ImageBackendError:
        return None


def _disks(conf: cfg.ConfigOpts, instance: str, evidence: Evidence) -> Iterator[disk_file.DiskFile]:
    """Yield what may be the disks of an instance; what has another kind of name is something else."""
    folder = f"{os.path.abspath(conf.instances_path)}/{instance}"
    try:
        for name in _listed(folder):
            try:
                disk = disk_file.for_disk(conf, instance, name)
            except exceptions.InvalidName:
                continue
            if os.path.isfile(disk.path):
                yield disk
    except exceptions.ImageBackendError as error:
        evidence.failed.append((folder, error))


def _note_file(conf: cfg.ConfigOpts, path: str, recorded: str | None, owner: Owner, evidence: Evidence) -> None:
    if recorded not in ("qcow2", None):
        return
    try:
        for file in _files_below(path, TemplateFolder(conf).path):
            evidence.needed.add(Lease(file, owner))
    except exceptions.ImageBackendError as error:
        if recorded is not None:
            evidence.failed.append((path, error))


def _files_below(path: str, cache: str) -> list[str]:
    """Return the files of the cache that an image depends on, by the headers of the files above them.

    :raises ImageUnacceptable: a header breaks the format's rules, or the chain is too long.
    :raises DiskNotFound, PermissionDenied, StorageError: a file above them cannot be read.
    """
    for _ in range(_MAX_DEPTH):
        with transfer.open_file(path) as descriptor:
            header = qcow2.read_header(descriptor, path)
        if header.backing_file is None:
            return []
        path = os.path.join(os.path.dirname(path), header.backing_file)
        if (file := _file_in(cache, path)) is not None:
            return [file]
        if header.backing_format != "qcow2":
            return []
    raise exceptions.ImageUnacceptable(path, f"its backing chain has more than {_MAX_DEPTH} files")


def _file_in(cache: str, path: str) -> str | None:
    """Return the name of a file of the cache, by whatever path it is named; None: it is elsewhere."""
    folder, _, name = path.rpartition("/")
    if folder == cache or (os.path.isdir(folder) and os.path.realpath(folder) == os.path.realpath(cache)):
        return name
    return None


def _formats(folder: str) -> dict[str, str]:
    """Return the recorded formats of the disks in an instance's folder, by name, whichever host recorded them."""
    return {path.rpartition("/")[2]: each for path, each in disk_info.read_all(folder).items()}


def _owner(conf: cfg.ConfigOpts, uuid: str, path: str, target: str) -> Owner:
    """Return who depends on a template: the disk of ours that has the path, or one that only libvirt knows.

    :raises InvalidName: the domain, or its disk, has a name that no lease can have.
    """
    folder, _, disk = path.rpartition("/")
    instances, _, instance = folder.rpartition("/")
    if instances == os.path.abspath(conf.instances_path):
        return disk_file.for_disk(conf, instance, disk).owner
    with contextlib.suppress(exceptions.InvalidName):
        return Owner(names.check_name("instance", uuid), names.check_name("disk", disk), conf.host, path)
    return Owner(names.check_name("instance", uuid), names.check_name("disk", target), conf.host, path)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise exceptions.storage_error(error, folder) from error
