# SPDX-License-Identifier: Apache-2.0
"""Signatures of OpenPGP, verified by gpgv(1) against a keyring of trusted keys."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from imagebackend import exceptions, process

__all__ = ["is_clearsigned", "read_clearsigned", "verify"]

_BEGIN = b"-----BEGIN PGP SIGNED MESSAGE-----"
_TIMEOUT = 30.0
_LIMITS = process.Limits(cpu_time=20, address_space=1 << 30)


def is_clearsigned(content: bytes) -> bool:
    """Tell whether a text has its signature in itself."""
    return content.startswith(_BEGIN)


def read_clearsigned(content: bytes, keyring: str, name: str) -> bytes:
    """Return what is signed of a text that has its signature in itself.

    :param keyring: the path of a file of public keys, as ``gpg --export`` writes it.
    :param name: where the text comes from, for errors.
    :raises SignatureInvalid: no key of the keyring has signed it, or the keyring cannot be read.
    :raises ToolMissing, ToolTimeout: gpgv could not be run to its end.
    """
    return _run(["--output", "-", "-"], content, keyring, name).encode()


def verify(content: bytes, signature: bytes, keyring: str, name: str) -> None:
    """Make sure that a signature is one of ``content``.

    :param keyring, name: as for :func:`read_clearsigned`.
    :raises SignatureInvalid: no key of the keyring has made it for that, or the keyring cannot be read.
    :raises ToolMissing, ToolTimeout: gpgv could not be run to its end.
    """
    with _in_memory(signature) as descriptor:
        _run([f"/dev/fd/{descriptor}", "-"], content, keyring, name, descriptor)


def _run(arguments: list[str], content: bytes, keyring: str, name: str, *descriptors: int) -> str:
    command = ["gpgv", "--quiet", "--keyring", os.path.abspath(keyring), *arguments]
    try:
        result = process.run(
            command, timeout=_TIMEOUT, limits=_LIMITS, input=content, pass_fds=descriptors, package="gpgv"
        )
    except (exceptions.ToolMissing, exceptions.ToolTimeout):
        raise
    except exceptions.ToolFailed as error:
        said = " ".join(error.stderr.split()) or error.args[0]
        raise exceptions.SignatureInvalid(name, f"no key of {keyring} has signed it: {said}") from error
    return result.stdout


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    with open(os.memfd_create("signature"), "w+b", buffering=0) as file:
        file.write(content)
        file.seek(0)
        yield file.fileno()
