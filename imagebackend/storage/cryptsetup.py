# SPDX-License-Identifier: Apache-2.0
"""Encrypted block devices: LUKS2 and plain dm-crypt, by cryptsetup(8).

Keys are bytes, whole: they are given on standard input, from memory, and are never encoded, hashed or cut. Every
function raises, beside what it says:

- PermissionDenied: this process is not root, and has no helper that is;
- StorageError: cryptsetup refused;
- ToolMissing, ToolTimeout: as :func:`imagebackend.process.run` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagebackend import exceptions, process
from imagebackend.storage import device_mapper

__all__ = ["LUKS_HEADER", "Cipher", "Cryptsetup", "device"]

#: The bytes of a device that a header of LUKS2 takes, unless it is told otherwise.
LUKS_HEADER = 16 << 20

_PACKAGE = "cryptsetup-bin"
# The least entropy that is left alone: what it protects is not stretched.
_SHORTEST_KEY = 16
# A random key cannot be guessed, however fast: each opening would take seconds for nothing.
_KEY_DERIVATION = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
_WRONG_KEY, _BUSY = 2, 5


@dataclass(frozen=True)
class Cipher:
    """How a device is encrypted.

    :ivar format: ``luks`` or ``plain``.
    :ivar name: the cipher and mode: ``aes-xts-plain64``.
    :ivar key_size: bits.
    """

    format: str
    name: str
    key_size: int

    @property
    def header(self) -> int:
        """The bytes at the beginning of the device that are not its user's."""
        return LUKS_HEADER if self.format == "luks" else 0

    def check_key(self, key: bytes) -> bytes:
        """Return a key if all of it is used.

        :raises InvalidArgument: it is too short, or plain dm-crypt would leave some of it out.
        """
        if self.format == "plain" and len(key) * 8 != self.key_size:
            reason = f"{len(key) * 8} bits, and plain dm-crypt uses exactly {self.key_size}"
            raise exceptions.InvalidArgument(f"encryption key: {reason} ([ephemeral_storage_encryption] key_size)")
        if len(key) < _SHORTEST_KEY:
            raise exceptions.InvalidArgument(f"encryption key: {len(key)} bytes, at least {_SHORTEST_KEY} are needed")
        return key


class Cryptsetup:
    """What runs cryptsetup.

    :param timeout: seconds after which it is killed.
    :param root_helper: what runs it as root, as words; none: this process is root.
    """

    def __init__(self, *, timeout: float, root_helper: Sequence[str] = ()) -> None:
        self._timeout = timeout
        self._root_helper = list(root_helper)

    def format(self, path: str, cipher: Cipher, key: bytes) -> None:
        """Write a header of LUKS2 to a device; nothing for plain dm-crypt.

        :raises DiskInUse: something is on the device.
        """
        cipher.check_key(key)
        if cipher.format == "luks":
            how = ["--type", "luks2", "--cipher", cipher.name, "--key-size", str(cipher.key_size), *_KEY_DERIVATION]
            place = ["--offset", str(LUKS_HEADER // 512), "--key-file", "-"]
            self._run(path, ["luksFormat", "--batch-mode", *how, *place, path], key)

    def open(self, path: str, name: str, cipher: Cipher, key: bytes, *, discards: bool) -> None:
        """Make a mapping through which a device is read and written.

        :param name: of the mapping, which becomes ``/dev/mapper/NAME``.
        :param discards: discard requests reach the device, which then shows what is not in use.
        :raises DiskExists: there is a mapping of that name.
        :raises DiskInUse: something is on the device.
        :raises InvalidArgument: the key is not the one.
        """
        cipher.check_key(key)
        words = ["--type", "luks2"]
        if cipher.format == "plain":
            words = ["--type", "plain", "--cipher", cipher.name, "--key-size", str(cipher.key_size)]
            words += ["--keyfile-size", str(len(key))]
        words += ["--allow-discards"] if discards else []
        self._run(path, ["open", "--batch-mode", *words, "--key-file", "-", path, name], key)

    def resize(self, name: str, key: bytes) -> None:
        """Give a mapping the size that its device has now.

        :raises DiskNotFound: there is no such mapping.
        :raises InvalidArgument: the key is not the one.
        """
        self._run(device(name), ["resize", "--batch-mode", "--key-file", "-", name], key)

    def close(self, name: str) -> None:
        """Remove a mapping; nothing happens if it is not there.

        :raises DiskInUse: something has it open.
        """
        try:
            self._run(device(name), ["close", name])
        except exceptions.DiskNotFound:
            return

    def _run(self, path: str, command: list[str], key: bytes = b"") -> None:
        try:
            process.run(
                [*self._root_helper, "cryptsetup", *command],
                timeout=self._timeout,
                input=key,
                package=_PACKAGE,
                environment=device_mapper.environment(),
                completes=True,
            )
        except (exceptions.ToolMissing, exceptions.ToolTimeout):
            raise
        except exceptions.ToolFailed as error:
            raise _typed(path, error) from error


def device(name: str) -> str:
    """Return the path of a mapping's device."""
    return f"/dev/mapper/{name}"


def _typed(path: str, error: exceptions.ToolFailed) -> exceptions.ImageBackendError:
    # cryptsetup(8): exit statuses.
    said = error.stderr.strip()
    if error.exit_code == _WRONG_KEY:
        return exceptions.InvalidArgument(f"encryption key: not that of {path}: {said}")
    if "already exists" in said:
        return exceptions.DiskExists(path, said)
    if error.exit_code == _BUSY or "in use" in said:
        return exceptions.DiskInUse(path, said)
    if "is not active" in said or "does not exist" in said:
        return exceptions.DiskNotFound(path, said)
    if "without root privileges" in said or "Permission denied" in said:
        why = f"cryptsetup needs root: run as root, or set [DEFAULT] root_helper: {said}"
        return exceptions.PermissionDenied(path, reason=why)
    return exceptions.StorageError(path, said or str(error))
