# SPDX-License-Identifier: Apache-2.0
"""What an image is expected to hash to, which may have to be looked up first."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.storage import gpgv
from imagebackend.templates.sources.checksum import Checksum, find_checksum, parse_checksum
from imagebackend.templates.sources.document import Document

__all__ = ["Expectation"]

_URL = re.compile(r"(https?|file):", re.IGNORECASE)
# What publishers append to the name of a checksum file for that of its signature: Ubuntu, Debian, and others.
_SIGNATURES = (".gpg", ".sign", ".asc", ".sig")


class Expectation:
    """A checksum, or the file of a publisher that has it. Making the object touches nothing.

    With ``[image_cache] checksum_keyring``, a file must be signed by one of the keys there.

    :param text: ``algorithm:hex``, the URL of a checksum file (``http:``, ``https:``, ``file:``) or its path, which
        has a ``/`` in it; None: anything is as expected.
    :param name: the file name of the image, as it is in a checksum file.
    :param wait: called with seconds to wait between attempts.
    :raises InvalidArgument: it is none of these.
    """

    def __init__(
        self, text: str | None, name: str, conf: cfg.ConfigOpts, *, wait: Callable[[float], None] = time.sleep
    ) -> None:
        in_file = text is not None and (_URL.match(text) or "/" in text)
        self._checksum = parse_checksum(text) if text is not None and not in_file else None
        self._file: Document | None = None
        if text is not None and in_file:
            self._file = Document(text, conf, wait=wait)
            self._signatures = [Document(text, conf, suffix=suffix, wait=wait) for suffix in _SIGNATURES]
        self._name = name
        self._keyring: str | None = conf.image_cache.checksum_keyring

    def checksum(self, progress: Callable[[int, int], None] | None = None) -> Checksum | None:
        """Return it; a checksum file is read anew each time.

        :param progress: called with zeros while waiting; what it raises ends that.
        :raises FetchFailed: the checksum file cannot be had, or has no checksum of the image.
        :raises SignatureInvalid: it is not signed as it has to be.
        """
        if self._file is None:
            return self._checksum

        def report() -> None:
            if progress is not None:
                progress(0, 0)

        content = self._file.read(report)
        if self._keyring:
            content = self._signed(self._file, content, self._keyring, report)
        return find_checksum(content.decode("utf-8", "replace"), self._name, self._file.shown)

    def _signed(self, file: Document, content: bytes, keyring: str, report: Callable[[], None]) -> bytes:
        """Return what is signed of a checksum file's content."""
        if gpgv.is_clearsigned(content):
            return gpgv.read_clearsigned(content, keyring, file.shown)
        for document in self._signatures:
            try:
                signature = document.read(report)
            except exceptions.FetchDenied:
                continue  # how some servers say that there is none
            except exceptions.FetchTimeout:
                raise
            except exceptions.FetchFailed:
                continue
            gpgv.verify(content, signature, keyring, file.shown)
            return content
        raise exceptions.SignatureInvalid(
            file.shown, f"it is not signed, nor is there a signature beside it ({', '.join(_SIGNATURES)})"
        )
