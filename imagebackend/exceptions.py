# SPDX-License-Identifier: Apache-2.0
"""Everything that this library raises on purpose.

::

    ImageBackendError
    ├── InvalidConfiguration       an option's value cannot be used
    ├── InvalidArgument            a name, size or format that no backend accepts (also a ValueError)
    │   ├── InvalidName
    │   └── InvalidSize
    ├── NotFound
    │   ├── DiskNotFound
    │   ├── TemplateNotFound
    │   └── SnapshotNotFound
    ├── AlreadyExists
    │   ├── DiskExists
    │   ├── TemplateExists
    │   └── SnapshotExists
    ├── Busy                       in use by someone else: try again later
    │   ├── DiskInUse
    │   └── TemplateInUse
    ├── Unsupported                this backend or this storage cannot do it
    ├── DiskTooSmall               the size asked for is below what must fit
    ├── ImageUnacceptable          an image that must not be used, and why
    ├── Corrupt
    │   ├── CorruptRecord          a record that cannot be read or does not match its object
    │   │   └── CorruptTemplate    a template whose data are not those that were recorded
    │   └── CorruptDisk            a disk that a check found damaged
    ├── StorageError               the storage refused
    │   ├── InsufficientSpace
    │   └── PermissionDenied
    ├── FetchFailed                a source did not deliver
    │   ├── FetchDenied            it wants credentials, or others
    │   ├── SignatureInvalid       a checksum file is not signed as it has to be
    │   └── ChecksumMismatch
    ├── ToolFailed                 a command exited with an error
    │   └── ToolMissing
    ├── TimedOut
    │   ├── LockTimeout
    │   ├── StorageTimeout
    │   ├── ToolTimeout
    │   └── FetchTimeout
    └── Cancelled                  a progress callback asked to stop

Errors carry their facts as attributes, so that callers need not read the text. They can be copied and pickled.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

__all__ = [
    "AlreadyExists",
    "Busy",
    "Cancelled",
    "ChecksumMismatch",
    "Corrupt",
    "CorruptDisk",
    "CorruptRecord",
    "CorruptTemplate",
    "DiskExists",
    "DiskInUse",
    "DiskNotFound",
    "DiskTooSmall",
    "FetchDenied",
    "FetchFailed",
    "FetchTimeout",
    "ImageBackendError",
    "ImageUnacceptable",
    "InsufficientSpace",
    "InvalidArgument",
    "InvalidConfiguration",
    "InvalidName",
    "InvalidSize",
    "LockTimeout",
    "NotFound",
    "PermissionDenied",
    "SignatureInvalid",
    "SnapshotExists",
    "SnapshotNotFound",
    "StorageError",
    "StorageTimeout",
    "TemplateExists",
    "TemplateInUse",
    "TemplateNotFound",
    "TimedOut",
    "ToolFailed",
    "ToolMissing",
    "ToolTimeout",
    "Unsupported",
    "storage_error",
]


class ImageBackendError(Exception):
    """The root of this library's errors."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls the constructor with the text alone, and most here take something else.
        return _made_again, (type(self), self.args), self.__dict__


class InvalidConfiguration(ImageBackendError):
    """An option's value cannot be used.

    :ivar option: group and name of the option, as ``[group] name``.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason


class InvalidArgument(ImageBackendError, ValueError):
    """A value that no backend accepts."""


class InvalidName(InvalidArgument):
    """A name that could be mistaken for a path, an option or a URL.

    :ivar kind: what was to be named: ``template``, ``instance``, ``disk``, ``snapshot``.
    """

    def __init__(self, kind: str, name: object, reason: str) -> None:
        super().__init__(f"{kind} name {_shown(name)}: {reason}")
        self.kind = kind
        self.name = name
        self.reason = reason


class InvalidSize(InvalidArgument):
    """A size that no disk can have.

    :ivar size: the size that was asked for, in bytes.
    """

    def __init__(self, size: object, reason: str) -> None:
        super().__init__(f"size {_shown(size)}: {reason}")
        self.size = size
        self.reason = reason


class NotFound(ImageBackendError):
    """Something that was named is not there."""

    kind = "object"

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(f"{self.kind} {name} does not exist" + (f": {hint}" if hint else ""))
        self.name = name


class DiskNotFound(NotFound):
    """The disk is not there."""

    kind = "disk"


class TemplateNotFound(NotFound):
    """The template is not in the cache."""

    kind = "template"


class SnapshotNotFound(NotFound):
    """The disk has no such snapshot."""

    kind = "snapshot"


class AlreadyExists(ImageBackendError):
    """Something of that name is there already."""

    kind = "object"

    def __init__(self, name: str, hint: str = "") -> None:
        super().__init__(f"{self.kind} {name} exists already" + (f": {hint}" if hint else ""))
        self.name = name


class DiskExists(AlreadyExists):
    """A disk of that name is there already."""

    kind = "disk"


class TemplateExists(AlreadyExists):
    """A template of that name is there already."""

    kind = "template"


class SnapshotExists(AlreadyExists):
    """The disk has a snapshot of that name already."""

    kind = "snapshot"


class Busy(ImageBackendError):
    """In use by someone else; the same call may succeed later."""

    kind = "object"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{self.kind} {name} is in use: {reason}")
        self.name = name
        self.reason = reason


class DiskInUse(Busy):
    """A running guest, or another process, holds the disk open."""

    kind = "disk"


class TemplateInUse(Busy):
    """Disks depend on the template.

    :ivar users: the disks that hold a lease on it.
    """

    kind = "template"

    def __init__(self, name: str, users: Sequence[str]) -> None:
        super().__init__(name, f"disks depend on it: {_listed(users)}")
        self.users = list(users)


class Unsupported(ImageBackendError):
    """This backend, or the storage underneath, cannot do it."""

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(f"{operation} is not supported: {reason}")
        self.operation = operation
        self.reason = reason


class DiskTooSmall(ImageBackendError):
    """The size asked for is smaller than what must fit.

    :ivar size: the size asked for, in bytes.
    :ivar required: the smallest size that would do, in bytes.
    """

    def __init__(self, name: str, size: int, required: int, reason: str) -> None:
        super().__init__(f"{name}: {size} bytes asked for, at least {required} bytes needed: {reason}")
        self.name = name
        self.size = size
        self.required = required
        self.reason = reason


class ImageUnacceptable(ImageBackendError):
    """An image that must not be used.

    :ivar image: what was looked at: a template name, a path or a URL.
    :ivar reason: what is wrong with it.
    """

    def __init__(self, image: str, reason: str) -> None:
        super().__init__(f"image {image} is unacceptable: {reason}")
        self.image = image
        self.reason = reason


class Corrupt(ImageBackendError):
    """Stored state that contradicts itself."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class CorruptRecord(Corrupt):
    """A record that cannot be read, or that does not match its object."""


class CorruptTemplate(CorruptRecord):
    """A template whose data are not those that were recorded: no disk is made from it any more.

    :ivar users: the disks that hold a lease on it.
    """

    def __init__(self, path: str, damage: str, users: Sequence[str]) -> None:
        depending = f"; disks depend on it: {_listed(users)}" if users else ""
        way_out = "pull it again with 'template pull --policy always', or restore the file and verify it"
        super().__init__(path, f"the template is damaged: {damage}{depending}; {way_out}")
        self.damage = damage
        self.users = list(users)


class CorruptDisk(Corrupt):
    """A disk that a check found damaged; it is not offered for use."""


class StorageError(ImageBackendError):
    """The storage refused an operation; the OSError is the cause.

    :ivar path: the file or folder.
    :ivar errno: the error number, or None.
    """

    def __init__(self, path: str, reason: str, number: int | None = None) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.errno = number


class InsufficientSpace(StorageError):
    """The file system is full, or would be.

    :ivar required: bytes needed, where known.
    :ivar available: bytes free, where known.
    """

    def __init__(self, path: str, required: int | None = None, available: int | None = None, reason: str = "") -> None:
        if required is None:
            reason = reason or "no space left on the file system; free some, or prune the template cache"
        else:
            reason = f"{required} bytes needed, {available} available; free some, or prune the template cache"
        super().__init__(path, reason, errno.ENOSPC)
        self.required = required
        self.available = available


class PermissionDenied(StorageError):
    """The process lacks the rights."""

    def __init__(self, path: str, number: int = errno.EACCES, reason: str = "") -> None:
        reason = reason or "permission denied; check the owner and mode of the file and its folders"
        super().__init__(path, reason, number)


class FetchFailed(ImageBackendError):
    """A source did not deliver the image.

    :ivar source: the URL, without credentials.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"cannot fetch {source}: {reason}")
        self.source = source
        self.reason = reason


class FetchDenied(FetchFailed):
    """The source wants credentials and got none, or does not grant the image to those that it got."""


class SignatureInvalid(FetchFailed):
    """A publisher's checksum file is not signed by a key that the operator trusts."""


class ChecksumMismatch(FetchFailed):
    """What the source delivered is not what was asked for."""

    def __init__(self, source: str, algorithm: str, expected: str, actual: str) -> None:
        super().__init__(source, f"{algorithm} is {actual}, expected {expected}")
        self.algorithm = algorithm
        self.expected = expected
        self.actual = actual


class ToolFailed(ImageBackendError):
    """A command exited with an error.

    :ivar command: the argument list, secrets masked.
    :ivar exit_code: its exit status; negative: the signal that ended it.
    :ivar stderr: what it wrote there, secrets masked and cut to a few kilobytes.
    """

    def __init__(self, command: Sequence[str], exit_code: int | None, stderr: str, reason: str = "") -> None:
        how = reason or (
            f"killed by signal {-exit_code}" if exit_code and exit_code < 0 else f"exit status {exit_code}"
        )
        said = stderr.strip()
        super().__init__(f"{command[0]} failed ({how})" + (f": {said}" if said else ""))
        self.command = list(command)
        self.exit_code = exit_code
        self.stderr = stderr


class ToolMissing(ToolFailed):
    """A command is not installed."""

    def __init__(self, command: Sequence[str], package: str = "") -> None:
        hint = f"; install the package {package}" if package else ""
        super().__init__(command, None, "", f"not found in PATH{hint}")
        self.package = package


class TimedOut(ImageBackendError):
    """It took longer than allowed.

    :ivar seconds: how long was allowed.
    """

    def __init__(self, what: str, seconds: float) -> None:
        # Not super(): the subclasses also inherit from errors with other arguments.
        ImageBackendError.__init__(self, f"{what}: gave up after {seconds:g} s")
        self.what = what
        self.seconds = seconds


class LockTimeout(TimedOut, Busy):
    """A lock was held by someone else for too long."""

    def __init__(self, path: str, seconds: float) -> None:
        TimedOut.__init__(self, f"waiting for the lock {path}, which another thread, process or host holds", seconds)
        self.name = path
        self.reason = "locked"


class StorageTimeout(TimedOut, StorageError):
    """The storage did not answer."""

    def __init__(self, path: str, seconds: float) -> None:
        TimedOut.__init__(self, f"{path}: no answer from the storage", seconds)
        self.path = path
        self.reason = "no answer"
        self.errno = errno.ETIMEDOUT


class ToolTimeout(TimedOut, ToolFailed):
    """A command ran past its deadline and was killed."""

    def __init__(self, command: Sequence[str], seconds: float, stderr: str = "") -> None:
        TimedOut.__init__(self, f"{command[0]} was killed", seconds)
        self.command = list(command)
        self.exit_code = None
        self.stderr = stderr


class FetchTimeout(TimedOut, FetchFailed):
    """A source stalled."""

    def __init__(self, source: str, seconds: float) -> None:
        TimedOut.__init__(self, f"fetching {source}: no data", seconds)
        self.source = source
        self.reason = "stalled"


class Cancelled(ImageBackendError):
    """Raised by a progress callback to stop a long operation; everything is undone and it propagates."""


def storage_error(error: OSError, path: str) -> ImageBackendError:
    """Return the typed error for ``error``: no space, no permission, or storage.

    :param error: what the operating system said.
    :param path: the file or folder that was worked on; used if the error names none.
    """
    name = error.filename if isinstance(error.filename, str) else path
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InsufficientSpace(name)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionDenied(name, error.errno)
    return StorageError(name, error.strerror or str(error), error.errno)


def _made_again(kind: type[ImageBackendError], arguments: tuple[object, ...]) -> ImageBackendError:
    return kind.__new__(kind, *arguments)


def _listed(users: Sequence[str]) -> str:
    return ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")


def _shown(value: object) -> str:
    # Python refuses to write integers of more than a few thousand digits in decimal.
    shown = hex(value) if isinstance(value, int) and value.bit_length() > 128 else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
