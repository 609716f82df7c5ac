# SPDX-License-Identifier: Apache-2.0
"""What an image must hash to: as it is written, and as the checksum files of publishers say. Decisions only."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from imagebackend import exceptions

__all__ = ["BROKEN", "Checksum", "find_checksum", "parse_checksum"]

LOG = logging.getLogger(__name__)

# Hexadecimal digits of each algorithm that may be asked for, the first being taken anyway.
_DIGITS = {"sha256": 64, "sha512": 128, "sha384": 96, "sha1": 40, "md5": 32}
#: Those that an attacker can make collide.
BROKEN = ("sha1", "md5")
_CHECKSUM = re.compile(r"([a-z0-9]+):([0-9a-f]+)", re.ASCII)

# As sha256sum(1) writes them, with a '*' for "binary", and with --tag, as BSD's sha256(1) and openssl dgst do.
_GNU_LINE = re.compile(r"([0-9a-fA-F]{32,128})(?: [ *](.+))?", re.ASCII)
_BSD_LINE = re.compile(r"([A-Za-z0-9-]+) ?\((.+)\) ?= ?([0-9a-fA-F]{32,128})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checksum:
    """What content must hash to."""

    algorithm: str
    hexdigest: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hexdigest}"


def parse_checksum(text: str) -> Checksum:
    """Return the checksum written as ``algorithm:hex``.

    :raises InvalidArgument: it is not written so, the algorithm is not known, or the number of digits is wrong.
    """
    match = _CHECKSUM.fullmatch(text.lower())
    if match is None or len(match[2]) != _DIGITS.get(match[1], -1):
        known = ", ".join(f"{name} ({digits} digits)" for name, digits in _DIGITS.items())
        raise exceptions.InvalidArgument(
            f"checksum {text[:160]!r}: 'algorithm:hexadecimal digits' is needed, where algorithm is one of {known}; "
            "or the URL of a checksum file, or its path, with a '/' in it"
        )
    return _warned_of(Checksum(match[1], match[2]))


def find_checksum(text: str, name: str, source: str) -> Checksum:
    """Return the best checksum that a publisher's file has for an image.

    :param text: the content of the file, in the format of GNU's or of BSD's tools; lines that are neither are left
        out, such as comments and signatures. A single digest without a name counts for every image.
    :param name: the image's own file name.
    :param source: where the file comes from, for errors.
    :raises FetchFailed: it has none, or contradicts itself.
    """
    exact: dict[str, set[str]] = {}
    elsewhere: dict[str, set[str]] = {}
    lines = text.splitlines()
    alone = sum(1 for line in lines if line.strip()) == 1
    for line in lines:
        algorithm, path, digits = _parse_line(line.rstrip())
        if path == "" and alone:
            path = name
        if not algorithm or not path or path.rpartition("/")[2] != name:
            continue
        found = exact if path.removeprefix("./") == name else elsewhere
        found.setdefault(algorithm, set()).add(digits)
    # The same name in other folders may be another image.
    found = exact or elsewhere
    for algorithm in _DIGITS:
        match sorted(found.get(algorithm, ())):
            case [digits]:
                return _warned_of(Checksum(algorithm, digits))
            case [_, *_]:
                raise exceptions.FetchFailed(source, f"it has more than one {algorithm} of {name!r}")
    raise exceptions.FetchFailed(source, f"it has no checksum of {name!r}")


def _parse_line(line: str) -> tuple[str, str, str]:
    """Return algorithm, path and digits; empty strings where there are none."""
    if match := _BSD_LINE.fullmatch(line):
        algorithm, path, digits = match[1].lower().removeprefix("sha2-").replace("-", ""), match[2], match[3]
        algorithm = algorithm if algorithm.startswith(("sha", "md")) else f"sha{algorithm}"
    elif match := _GNU_LINE.fullmatch(line):
        path, digits = match[2] or "", match[1]
        algorithm = next((each for each, length in _DIGITS.items() if length == len(digits)), "")
    else:
        return "", "", ""
    return (algorithm if _DIGITS.get(algorithm) == len(digits) else ""), path, digits.lower()


def _warned_of(checksum: Checksum) -> Checksum:
    if checksum.algorithm in BROKEN:
        LOG.warning("a checksum by %s finds accidents but stops no attacker; use sha256 or sha512", checksum.algorithm)
    return checksum
