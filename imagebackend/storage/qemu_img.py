# SPDX-License-Identifier: Apache-2.0
"""qemu-img(1), one function a command.

The format of every image is said, never probed. Paths are made absolute, so that none begins with ``-`` or is read as
``protocol:…``, and go where QEMU does not split them at commas. What qemu-img writes on stderr is a failure even if it
exits with 0, since it does so when its last writes fail.

An encrypted image is one in ``luks``, or a qcow2 image with LUKS in it; it goes with its passphrase, which reaches
qemu-img as a file in memory.

Every function takes ``timeout``, the seconds of wall clock after which the command is killed, and ``limits`` on CPU
time and memory, for images that were not made here. All raise:

- ToolMissing, ToolTimeout, ToolFailed: as :func:`imagebackend.process.run` says;
- DiskInUse: another process has locked an image, such as the QEMU of a running guest;
- InsufficientSpace: the file system is full.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from imagebackend import exceptions, names, process
from imagebackend.storage import direct_io

__all__ = [
    "CheckResult",
    "check",
    "compare",
    "convert",
    "create",
    "rebase",
    "resize",
    "snapshot_apply",
    "snapshot_create",
    "snapshot_delete",
    "version",
]

Progress = Callable[[int, int], None]

_PACKAGE = "qemu-utils"
# Creation options that change the layout and nothing else: none names a file or a secret.
_OPTIONS = frozenset(
    (
        "adapter_type",
        "cluster_size",
        "compat",
        "compression_type",
        "extended_l2",
        "lazy_refcounts",
        "preallocation",
        "refcount_bits",
        "subformat",
    )
)
#: What a command knows the passphrase of an image as.
_SECRET = "passphrase"  # noqa: S105 - not a password but its name
_PERCENT = re.compile(r"\((\d+\.\d+)/100%\)")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found.

    :ivar leaks: clusters that nothing refers to: they waste space and are harmless otherwise.
    :ivar corruptions: errors that mean, or will mean, lost data.
    """

    leaks: int
    corruptions: int


def version(*, timeout: float = 10) -> tuple[int, ...]:
    """Return the version of qemu-img: (7, 2, 22)."""
    said = process.run(["qemu-img", "--version"], timeout=timeout, package=_PACKAGE).stdout
    found = re.match(r"qemu-img version (\d+(?:\.\d+)+)", said)
    if found is None:
        raise exceptions.ToolFailed(["qemu-img", "--version"], 0, "", reason=f"said {said[:80]!r}")
    return tuple(int(number) for number in found[1].split("."))


def create(
    path: str,
    disk_format: str,
    size: int,
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
    options: Mapping[str, str] | None = None,
    passphrase: str | None = None,
    iter_time: int | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Make an image, replacing the content of a file that is there.

    :param size: virtual size in bytes.
    :param backing_file: absolute path of what it is an overlay of; with ``backing_format``.
    :param options: creation options (``-o``): cluster_size, preallocation …
    :param passphrase: encrypt it.
    :param iter_time: how many milliseconds it is to take to try a passphrase.
    :raises InvalidArgument: an option that is not a plain matter of layout.
    """
    command = ["create", "-q", "-f", disk_format, *_options(options, _encrypting(disk_format, passphrase, iter_time))]
    if backing_file is not None:
        command += _backing(backing_file, backing_format)
    _run(path, [*command, _absolute(path), str(size)], timeout, limits, passphrase)


def convert(
    source: str,
    source_format: str,
    target: str,
    target_format: str,
    *,
    options: Mapping[str, str] | None = None,
    compress: bool = False,
    target_is_zero: bool = False,
    source_passphrase: str | None = None,
    target_passphrase: str | None = None,
    iter_time: int | None = None,
    progress: Progress | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Copy the content of an image, with all that its backing files provide, into another.

    It is not durable when this returns. The caller syncs a descriptor of the target that was opened before, which is
    also the only way to hear of every write error, and compares the two where it matters.

    :param target: a path; the content of a file that is there is replaced, and its owner and mode are kept.
    :param options: creation options (``-o``) of the target.
    :param compress: compress the target's clusters.
    :param target_is_zero: the target exists, is large enough and reads as zeros: it is filled, not created.
    :param source_passphrase: of a source that is encrypted.
    :param target_passphrase: encrypt the target, which is created; the source is not encrypted.
    :param iter_time: how many milliseconds it is to take to try a passphrase on the target.
    :param progress: called with the done share of the source's file size, and that size.
    :raises InvalidArgument: an option that is not a plain matter of layout.
    """
    encrypting = _encrypting(target_format, target_passphrase, iter_time)
    command = ["convert", "-O", target_format, *_options(options, encrypting)]
    # Half the time and CPU of a write-back that fdatasync must wait for, when it is possible.
    if _is_device(target) or direct_io.is_supported(os.path.dirname(_absolute(target))):
        command += ["-t", "none"]
    if target_format == "raw":
        # Writes out of order do not fragment a raw file.
        command.append("-W")
    if compress:
        command.append("-c")
    if target_is_zero:
        command += ["-n", "--target-is-zero"]
    command += [*_image(source, source_format, source_passphrase), _absolute(target)]
    passphrase = source_passphrase or target_passphrase
    _run_with_progress(source, command, progress, timeout, limits, passphrase)


def resize(
    path: str,
    disk_format: str,
    size: int,
    *,
    preallocation: str | None = None,
    passphrase: str | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Grow an image; qemu-img refuses to shrink it.

    :param size: the new virtual size in bytes.
    :param preallocation: what to do for the new part: ``off``, ``metadata``, ``falloc`` or ``full``.
    """
    command = ["resize", "-q"]
    if preallocation is not None:
        command.append(f"--preallocation={preallocation}")
    _run(path, [*command, *_image(path, disk_format, passphrase), str(size)], timeout, limits, passphrase)


def rebase(
    path: str,
    disk_format: str,
    backing_file: str | None,
    backing_format: str | None,
    *,
    unsafe: bool = False,
    passphrase: str | None = None,
    progress: Progress | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Give an image another backing file, or none, copying into it what it would lose.

    :param backing_file: absolute path; None: the image stands alone afterwards.
    :param backing_format: the format of ``backing_file``.
    :param unsafe: change the name only: the new backing file holds what the old one does.
    :param progress: called with the done share of the image's file size, and that size.
    """
    command = ["rebase", *(["-u"] if unsafe else [])]
    command += ["-b", ""] if backing_file is None else _backing(backing_file, backing_format)
    command += _image(path, disk_format, passphrase)
    _run_with_progress(path, command, progress, timeout, limits, passphrase)


def snapshot_create(
    path: str,
    name: str,
    *,
    passphrase: str | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Take an internal snapshot of a qcow2 image. qemu-img does not mind if another one has the name.

    :raises InvalidName: the name is not safe, or could be taken for a snapshot's number.
    """
    _snapshot("-c", path, name, timeout, limits, passphrase)


def snapshot_apply(
    path: str,
    name: str,
    *,
    passphrase: str | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Set a qcow2 image back to the state of an internal snapshot.

    :raises InvalidName: the name is not safe, or could be taken for a snapshot's number.
    """
    _snapshot("-a", path, name, timeout, limits, passphrase)


def snapshot_delete(
    path: str,
    name: str,
    *,
    passphrase: str | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Delete an internal snapshot of a qcow2 image.

    :raises InvalidName: the name is not safe, or could be taken for a snapshot's number.
    """
    _snapshot("-d", path, name, timeout, limits, passphrase)


def check(
    path: str,
    disk_format: str,
    *,
    repair: str = "",
    passphrase: str | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> CheckResult:
    """Check the consistency of an image's metadata.

    :param repair: ``leaks``: if leaks are all that is wrong, give them back; ``all``: mend what can be mended. What is
        returned is the state afterwards.
    :raises Unsupported: images of this format cannot be checked.
    :raises ToolFailed: also when the check could not be completed (exit status 1).
    """
    how = (timeout, limits, passphrase)
    found = _check(path, disk_format, [], *how)
    if repair == "all" and (found.leaks or found.corruptions):
        _check(path, disk_format, ["-r", "all"], *how)
        return _check(path, disk_format, [], *how)
    if repair == "leaks" and found.leaks and not found.corruptions:
        return _check(path, disk_format, ["-r", "leaks"], *how)
    return found


def compare(
    first: str,
    first_format: str,
    second: str,
    second_format: str,
    *,
    first_passphrase: str | None = None,
    second_passphrase: str | None = None,
    progress: Progress | None = None,
    timeout: float,
    limits: process.Limits | None = None,
) -> None:
    """Make sure that two images have the same content; the longer one may end in zeros that the other lacks.

    :param first_passphrase, second_passphrase: of one that is encrypted; the other is not.
    :param progress: called with the done share of the first image's file size, and that size.
    :raises CorruptDisk: the second differs from the first.
    """
    command = ["compare", "-f", first_format, "-F", second_format, _absolute(first), _absolute(second)]
    passphrase = first_passphrase or second_passphrase
    if passphrase is not None:
        images = (first, first_format, first_passphrase), (second, second_format, second_passphrase)
        command = ["compare", "--image-opts", *(_image_options(*image) for image in images)]
    result = _run_with_progress(first, command, progress, timeout, limits, passphrase, success=(0, 1))
    if "Images are identical." not in result.stdout:
        raise exceptions.CorruptDisk(second, f"differs from {first}")


def _absolute(path: str) -> str:
    return os.path.join(os.getcwd(), path)


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def _size(path: str) -> int:
    """Return the size of a file or block device."""
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise exceptions.storage_error(error, path) from error


def _options(options: Mapping[str, str] | None, encrypting: Mapping[str, str]) -> list[str]:
    unknown = sorted((options or {}).keys() - _OPTIONS)
    if unknown:
        raise exceptions.InvalidArgument(f"image options {unknown}: not among {sorted(_OPTIONS)}")
    words = [f"{key}={_escape(value)}" for key, value in {**(options or {}), **encrypting}.items()]
    return ["-o", ",".join(words)] if words else []


def _encrypting(disk_format: str, passphrase: str | None, iter_time: int | None) -> dict[str, str]:
    """Return the creation options that have a new image encrypted."""
    if passphrase is None:
        return {}
    how = {"key-secret": _SECRET, **({"iter-time": str(iter_time)} if iter_time else {})}
    return {"encrypt.format": "luks", **_prefixed(how)} if disk_format == "qcow2" else how


def _prefixed(options: Mapping[str, str]) -> dict[str, str]:
    """Return options of LUKS as those of a qcow2 image that has LUKS in it."""
    return {f"encrypt.{key}": value for key, value in options.items()}


def _image(path: str, disk_format: str, passphrase: str | None) -> list[str]:
    """Return the words that name the one image that a command opens."""
    if passphrase is None:
        return ["-f", disk_format, _absolute(path)]
    return ["--image-opts", _image_options(path, disk_format, passphrase)]


def _image_options(path: str, disk_format: str, passphrase: str | None) -> str:
    opening = {} if passphrase is None else {"key-secret": _SECRET}
    options = {
        "driver": disk_format,
        **(_prefixed(opening) if disk_format == "qcow2" else opening),
        "file.driver": "host_device" if _is_device(path) else "file",
        "file.filename": _absolute(path),
    }
    return ",".join(f"{key}={_escape(value)}" for key, value in options.items())


@contextlib.contextmanager
def _secret(passphrase: str | None) -> Iterator[tuple[list[str], list[int]]]:
    """Give the words that lead a command to a passphrase, and the descriptor that it inherits for that."""
    if passphrase is None:
        yield [], []
        return
    with open(os.memfd_create("passphrase"), "wb", buffering=0) as file:
        file.write(passphrase.encode())
        yield ["--object", f"secret,id={_SECRET},file=/proc/self/fd/{file.fileno()}"], [file.fileno()]


def _escape(value: str) -> str:
    return value.replace(",", ",,")


def _backing(path: str, disk_format: str | None) -> list[str]:
    if disk_format is None:
        raise exceptions.InvalidArgument(f"backing file {path}: its format must be given, it is never guessed")
    return ["-b", _absolute(path), "-F", disk_format]


def _check(
    path: str,
    disk_format: str,
    repair: list[str],
    timeout: float,
    limits: process.Limits | None,
    passphrase: str | None,
) -> CheckResult:
    command = ["check", "--output=json", *repair, *_image(path, disk_format, passphrase)]
    # qemu-img(1): 2 corruptions, 3 leaks, 63 no checks for this format. What it found is told on stderr, too.
    result = _run(path, command, timeout, limits, passphrase, silent=False, success=(0, 2, 3, 63))
    if not result.stdout:
        raise exceptions.Unsupported(f"checking {path}", f"images of format {disk_format} have no metadata to check")
    found = json.loads(result.stdout)
    return CheckResult(leaks=int(found.get("leaks", 0)), corruptions=int(found.get("corruptions", 0)))


def _snapshot(
    action: str, path: str, name: str, timeout: float, limits: process.Limits | None, passphrase: str | None
) -> None:
    names.check_name("snapshot", name)
    if name.isdigit():
        raise exceptions.InvalidName("snapshot", name, "qemu-img would look for the snapshot with this number")
    # This command has no -f.
    command = ["snapshot", "-q", "--image-opts", action, name, _image_options(path, "qcow2", passphrase)]
    _run(path, command, timeout, limits, passphrase)


def _run_with_progress(
    path: str,
    command: list[str],
    progress: Progress | None,
    timeout: float,
    limits: process.Limits | None,
    passphrase: str | None,
    success: Sequence[int] = (0,),
) -> process.Result:
    if progress is None:
        return _run(path, command, timeout, limits, passphrase, success=success)
    total = _size(path)
    done = 0
    tail = ""

    def on_output(piece: str) -> None:
        nonlocal done, tail
        tail += piece
        percents = _PERCENT.findall(tail)
        if percents:
            done = min(int(total * float(percents[-1]) / 100), total)
        tail = tail[-len("(100.00/100%)") :]
        progress(done, total)

    progress(0, total)
    command = [command[0], "-p", *command[1:]]
    result = _run(path, command, timeout, limits, passphrase, success=success, on_output=on_output)
    progress(total, total)
    return result


def _run(
    path: str,
    command: list[str],
    timeout: float,
    limits: process.Limits | None,
    passphrase: str | None,
    *,
    silent: bool = True,
    success: Sequence[int] = (0,),
    on_output: Callable[[str], None] | None = None,
) -> process.Result:
    try:
        with _secret(passphrase) as (words, descriptors):
            return process.run(
                ["qemu-img", command[0], *words, *command[1:]],
                timeout=timeout,
                limits=limits,
                pass_fds=descriptors,
                package=_PACKAGE,
                silent=silent,
                success=success,
                on_output=on_output,
            )
    except exceptions.ToolTimeout:
        raise
    except exceptions.ToolFailed as error:
        if "Failed to get" in error.stderr and " lock" in error.stderr:
            raise exceptions.DiskInUse(path, "a running guest or a tool has it open; stop the guest first") from error
        if "No space left on device" in error.stderr:
            raise exceptions.InsufficientSpace(path) from error
        if "Invalid password" in error.stderr:
            raise exceptions.InvalidArgument(f"passphrase of {path}: it is another") from error
        raise
