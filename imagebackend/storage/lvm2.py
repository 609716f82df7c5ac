# SPDX-License-Identifier: Apache-2.0
"""Logical volumes, by LVM's own commands.

Which devices are looked at, and everything else that lvm.conf and the devices file say, is left to them. The commands
wait for udev themselves before they end. One that changes something is not killed with this process: it is over soon,
and cut short it could leave devices suspended.

Sizes are bytes; LVM rounds them up to whole extents. Every function raises, beside what it says:

- InvalidConfiguration: there is no such volume group;
- PermissionDenied: this process is not root, and has no helper that is;
- StorageError: LVM refused, for one because physical volumes are missing;
- ToolMissing, ToolTimeout: as :func:`imagebackend.process.run` says.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imagebackend import exceptions, process
from imagebackend.storage import device_mapper

__all__ = ["Layout", "Volume", "VolumeGroup", "check_name", "device_name"]

LOG = logging.getLogger(__name__)

_PACKAGE = "lvm2"
_OPTION = "[libvirt] images_volume_group"

# lvm(8): valid names.
_NAME = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]*\Z", re.ASCII)
_RESERVED_BEGINNINGS = ("snapshot", "pvmove")
_RESERVED_PARTS = (
    *("_cdata", "_cmeta", "_corig", "_cvol", "_imeta", "_iorig", "_mimage", "_mlog", "_rimage", "_rmeta"),
    *("_tdata", "_tmeta", "_vdata", "_vorigin", "_wcorig", "_pmspare"),
)
# What device-mapper takes, less the longest suffix that LVM gives to a volume's own devices.
_LONGEST_DEVICE_NAME = 127 - len("-tpool")
_TAG = re.compile(r"[A-Za-z0-9_+.\-/=!:&#]{1,1024}\Z", re.ASCII)

_FIELDS = (
    *("lv_name", "lv_uuid", "lv_size", "lv_tags", "segtype", "pool_lv", "origin", "lv_active", "lv_device_open"),
    *("lv_permissions", "data_percent", "metadata_percent", "vg_extent_size"),
)

_PAUSES = (0.1, 0.5, 2.0)
# What goes away by itself: udev or a scan has a device open for a moment, or memory is short.
_TRANSIENT = ("Device or resource busy", "Resource temporarily unavailable", "Giving up waiting for lock")
_IN_USE = ("in use", "is used by another device", "contains a filesystem in use")
_NOT_FOUND = ("Failed to find logical volume", "not found in volume group", "not found in Volume group")
_NO_SPACE = re.compile(
    r"insufficient free space|Insufficient free space|insufficient suitable|Insufficient suitable|reached threshold"
)
_NO_RIGHTS = ("Permission denied", "Running as a non-root user", "Operation not permitted")


@dataclass(frozen=True)
class Layout:
    """How a volume that is in no pool lies on its physical volumes.

    :ivar stripes: across how many it is striped.
    :ivar raid_type: ``raid1``, ``raid5``, ``raid6``, ``raid10``; None: no redundancy.
    """

    stripes: int = 1
    raid_type: str | None = None

    def arguments(self) -> list[str]:
        """Return what lvcreate(8) is told."""
        words = [] if self.raid_type is None else ["--type", self.raid_type]
        return words + ([] if self.stripes == 1 else ["--stripes", str(self.stripes)])


@dataclass(frozen=True)
class Volume:
    """A logical volume, as a report has it.

    :ivar uuid: of the volume; no other has or had it.
    :ivar size: bytes.
    :ivar kind: LVM's type of its segments: ``linear``, ``thin``, ``thin-pool``, ``raid1`` …
    :ivar pool: the name of the pool that it is in; empty: in none.
    :ivar origin: the name of the volume that it is a snapshot of; empty: of none.
    :ivar active: it has a device.
    :ivar open: something has the device open.
    :ivar read_only: it cannot be written to.
    :ivar data_percent, metadata_percent: how full a pool is, and how much of a thin volume is allocated; None if
        it is not active, or neither.
    :ivar extent_size: bytes; every size is a multiple of it.
    """

    name: str
    uuid: str
    size: int
    tags: frozenset[str]
    kind: str
    pool: str
    origin: str
    active: bool
    open: bool
    read_only: bool
    data_percent: float | None
    metadata_percent: float | None
    extent_size: int


class VolumeGroup:
    """A volume group. Making the object does no I/O.

    :param name: its name.
    :param timeout: seconds after which a command is killed.
    :param root_helper: what runs commands as root, as words; none: this process is root.
    """

    def __init__(self, name: str, *, timeout: float, root_helper: Sequence[str] = ()) -> None:
        self.name = check_name(name)
        self._timeout = timeout
        self._root_helper = list(root_helper)

    def device(self, volume: str) -> str:
        """Return the path of an active volume's device."""
        return f"/dev/{self.name}/{volume}"

    def report(self, *names: str, tags: Iterable[str] = ()) -> list[Volume]:
        """Return the volumes that have one of the names or one of the tags, or all of them if none are given.

        One command, whatever is asked.
        """
        wanted = [f'lv_name="{check_name(name)}"' for name in names] + [f'lv_tags="{_check_tag(tag)}"' for tag in tags]
        select = ["--select", " || ".join(wanted)] if wanted else []
        units = ["--reportformat", "json", "--units", "b", "--nosuffix"]
        said = self._run(["lvs", *units, "--options", ",".join(_FIELDS), *select, self.name], completes=False)
        return _parse(said)

    def create(self, name: str, size: int, tags: Iterable[str], layout: Layout) -> None:
        """Make a volume of extents of its own, active. What it reads as is whatever was there before.

        :raises DiskExists: there is one of that name.
        :raises InsufficientSpace: the volume group has no room.
        """
        # Neither zeroed nor looked at: what was there is overwritten anyway, and may be anything.
        options = ["--zero", "n", "--wipesignatures", "n", *layout.arguments()]
        self._create(name, [*options, "--size", f"{size}b"], tags, self.name)

    def create_thin(self, pool: str, name: str, size: int, tags: Iterable[str]) -> None:
        """Make a thin volume that reads as zeros, active.

        :raises DiskExists: there is one of that name.
        """
        pool_name = f"{self.name}/{check_name(pool)}"
        self._create(name, ["--type", "thin", "--virtualsize", f"{size}b", "--thinpool", pool_name], tags)

    def create_thin_pool(self, name: str, size: int, tags: Iterable[str] = ()) -> None:
        """Make a thin pool.

        :raises DiskExists: there is a volume of that name.
        :raises InsufficientSpace: the volume group has no room.
        """
        self._create(name, ["--type", "thin-pool", "--size", f"{size}b"], tags, self.name)

    def snapshot(
        self, origin: str, name: str, tags: Iterable[str], *, read_only: bool = False, activate: bool = True
    ) -> None:
        """Make a thin snapshot of a thin volume: a thin volume that shares its data.

        :param activate: now, and whenever the volume group is activated.
        :raises DiskNotFound: there is no volume ``origin``.
        :raises DiskExists: there is one called ``name``.
        """
        options = ["--snapshot", "--permission", "r" if read_only else "rw"]
        options += ["--setactivationskip", "n" if activate else "y"]
        words = ["lvcreate", "--yes", *options, *_tag_arguments("--addtag", tags), "--name", check_name(name)]
        self._run([*words, self._of(origin)])

    def publish(
        self, name: str, *, add_tags: Iterable[str] = (), drop_tags: Iterable[str] = (), read_only: bool = False
    ) -> None:
        """Change a volume's tags, and take it out of use if it is only to be read, in one change of the metadata.

        :param read_only: it becomes read-only, and is not activated any more unless it is asked for.
        :raises DiskNotFound: there is no such volume.
        """
        words = ["--permission", "r", "--setactivationskip", "y"] if read_only else []
        words += [*_tag_arguments("--addtag", add_tags), *_tag_arguments("--deltag", drop_tags)]
        self._run(["lvchange", "--yes", *words, self._of(name)])

    def activate(self, name: str) -> None:
        """Give a volume its device; nothing happens if it has it.

        :raises DiskNotFound: there is no such volume.
        """
        self._run(["lvchange", "--yes", "--activate", "y", "--ignoreactivationskip", self._of(name)])

    def deactivate(self, name: str) -> None:
        """Take a volume's device away: from then on nobody can open it.

        :raises DiskNotFound: there is no such volume.
        :raises DiskInUse: something has it open.
        """
        self._run(["lvchange", "--yes", "--activate", "n", self._of(name)])

    def rename(self, old: str, new: str) -> None:
        """Rename a volume, which may be in use.

        :raises DiskNotFound: there is no volume ``old``.
        :raises DiskExists: there is one called ``new``.
        """
        self._run(["lvrename", "--yes", self.name, check_name(old), check_name(new)])

    def resize(self, name: str, size: int, *, shrink: bool = False) -> None:
        """Give a volume another size, rounded up to whole extents; nothing happens if it has it.

        :param shrink: it may become smaller; what was beyond is lost.
        :raises DiskNotFound: there is no such volume.
        :raises InsufficientSpace: the volume group has no room.
        """
        force = ["--force"] if shrink else []
        try:
            self._run(["lvresize", "--yes", *force, "--size", f"{size}b", self._of(name)])
        except exceptions.StorageError as error:
            if "matches existing size" not in error.reason:
                raise

    def remove(self, *names: str) -> None:
        """Remove volumes, in this order, and give their space back.

        :raises DiskNotFound: one is not there; the others are removed.
        :raises DiskInUse: something has one open; it and those after it may still be there.
        """
        self._run(["lvremove", "--yes", "--force", *(self._of(name) for name in names)])

    def remove_reported(self, *volumes: Volume) -> None:
        """Remove volumes, in this order, but none that has got the name of one of them since they were reported.

        :raises DiskNotFound: there is none of one of the names; the others are removed.
        :raises DiskInUse: something has one open; it and those after it may still be there.
        """
        select = " || ".join(f'lv_uuid="{volume.uuid}"' for volume in volumes)
        names = (self._of(volume.name) for volume in volumes)
        self._run(["lvremove", "--yes", "--force", "--select", select, *names])

    def _of(self, name: str) -> str:
        return f"{self.name}/{check_name(name)}"

    def _create(self, name: str, words: list[str], tags: Iterable[str], *where: str) -> None:
        tagged = _tag_arguments("--addtag", tags)
        self._run(["lvcreate", "--yes", *words, *tagged, "--name", check_name(name), *where])

    def _run(self, command: list[str], *, completes: bool = True) -> str:
        for pause in (*_PAUSES, None):
            try:
                return process.run(
                    [*self._root_helper, *command],
                    timeout=self._timeout,
                    package=_PACKAGE,
                    environment=device_mapper.environment(),
                    completes=completes,
                ).stdout
            except (exceptions.ToolMissing, exceptions.ToolTimeout):
                raise
            except exceptions.ToolFailed as error:
                if pause is None or not any(reason in error.stderr for reason in _TRANSIENT):
                    raise self._typed(command, error) from error
                LOG.warning("%s failed for a reason that may pass, and is tried again: %s", command[0], error)
                time.sleep(pause)
        raise AssertionError  # the last pause is None

    def _typed(self, command: list[str], error: exceptions.ToolFailed) -> exceptions.ImageBackendError:
        # LVM has one exit status for all of it, and its messages are those of the C locale.
        said = error.stderr
        name = command[-1] if "/" in command[-1] else f"{self.name}/{command[-1]}"
        reason = " ".join(line.strip() for line in said.splitlines() if not line.strip().startswith("WARNING:"))
        if f'Volume group "{self.name}" not found' in said:
            return exceptions.InvalidConfiguration(_OPTION, f"there is no volume group {self.name}: {reason}")
        if any(words in said for words in _NO_RIGHTS):
            why = f"{command[0]} needs root: run as root, or set [DEFAULT] root_helper: {reason}"
            return exceptions.PermissionDenied(self.name, reason=why)
        if "already exists in volume group" in said or "is already in use" in said:
            return exceptions.DiskExists(name, reason)
        if _NO_SPACE.search(said):
            return exceptions.InsufficientSpace(self.name, reason=f"{reason}; remove or shrink volumes, or extend it")
        if any(words in said for words in _NOT_FOUND):
            return exceptions.DiskNotFound(name, reason)
        if any(words in said for words in _IN_USE):
            return exceptions.DiskInUse(name, reason)
        return exceptions.StorageError(self.name, reason or str(error))


def check_name(name: str) -> str:
    """Return a name if LVM takes it for a volume or volume group.

    :raises InvalidName: it does not.
    """
    if _NAME.match(name) is None or name in (".", ".."):
        raise exceptions.InvalidName(
            "volume", name, "letters, digits and '+', '_', '.', '-' are allowed, no '-' first"
        )
    if name.startswith(_RESERVED_BEGINNINGS) or any(part in name for part in _RESERVED_PARTS):
        reserved = ", ".join((*_RESERVED_BEGINNINGS, *_RESERVED_PARTS))
        raise exceptions.InvalidName("volume", name, f"LVM keeps names with these parts for itself: {reserved}")
    return name


def device_name(volume_group: str, volume: str) -> str:
    """Return what device-mapper calls a volume: the part of its path after ``/dev/mapper/``.

    :raises InvalidName: too long for device-mapper.
    """
    name = f"{volume_group.replace('-', '--')}-{volume.replace('-', '--')}"
    if len(name) > _LONGEST_DEVICE_NAME:
        reason = (
            f"{len(name)} characters with the volume group's, '-' counting twice; {_LONGEST_DEVICE_NAME} are possible"
        )
        raise exceptions.InvalidName("volume", volume, reason)
    return name


def _check_tag(tag: str) -> str:
    if _TAG.match(tag) is None or tag.startswith("-"):
        raise exceptions.InvalidName("tag", tag, "letters, digits and '_+.-/=!:&#' are allowed, no '-' first")
    return tag


def _tag_arguments(option: str, tags: Iterable[str]) -> list[str]:
    return [word for tag in sorted(tags) for word in (option, _check_tag(tag))]


def _parse(said: str) -> list[Volume]:
    try:
        (report,) = json.loads(said)["report"]
        return [_volume(row) for row in report["lv"]]
    except (ValueError, KeyError, TypeError) as error:
        raise exceptions.ToolFailed(["lvs"], 0, "", reason=f"said {said[:80]!r} ({error!r})") from error


def _volume(row: dict[str, Any]) -> Volume:
    return Volume(
        name=row["lv_name"],
        uuid=row["lv_uuid"],
        size=int(row["lv_size"]),
        tags=frozenset(filter(None, row["lv_tags"].split(","))),
        kind=row["segtype"],
        pool=row["pool_lv"],
        origin=row["origin"],
        active=row["lv_active"] == "active",
        open=row["lv_device_open"] == "open",
        read_only=row["lv_permissions"].startswith("read-only"),
        data_percent=float(row["data_percent"]) if row["data_percent"] else None,
        metadata_percent=float(row["metadata_percent"]) if row["metadata_percent"] else None,
        extent_size=int(row["vg_extent_size"]),
    )
