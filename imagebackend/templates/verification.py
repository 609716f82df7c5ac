# SPDX-License-Identifier: Apache-2.0
"""Reading templates again, where they lie, and putting damaged ones into quarantine.

A verification that was cut short is taken up by the next one, of whatever process; see :mod:`.rereading`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Any

from imagebackend import exceptions
from imagebackend.storage import digest
from imagebackend.templates import record, removal
from imagebackend.templates.fetching import Progress
from imagebackend.templates.folder import TemplateFolder
from imagebackend.templates.record import Template
from imagebackend.templates.rereading import Checkpoint, Pace, Reader, opened

__all__ = ["verify", "verify_alone"]

LOG = logging.getLogger(__name__)

# How long to wait for those who make disks, to note that a template is sound, in seconds.
_PATIENCE = 1.0


def verify(folder: TemplateFolder, name: str, progress: Progress | None = None, rate: int = 0) -> Template:
    """Read a template again and compare it with its digest; see :meth:`.cache.TemplateCache.verify`."""
    with folder.verify_lock(name):
        return verify_alone(folder, name, progress, rate)


def verify_alone(folder: TemplateFolder, name: str, progress: Progress | None, rate: int = 0) -> Template:
    """Do what :func:`verify` does, under the lock of verifications."""
    with folder.lock(name, shared=True):
        template = folder.read(name, check_file=False)
        if template is None:
            raise exceptions.TemplateNotFound(name)
        with opened(template.path) as descriptor:
            # Before it is read: what is changed while it is read, behind the reader, must show as changed later.
            found = os.fstat(descriptor)
            reader = Reader(template.path, descriptor, Pace(rate), progress)
            checkpoint = Checkpoint(folder.checkpoint(template.file), found)
            actual, expected, blocks = _digests(template, reader, checkpoint)
    if actual != expected:
        raise _quarantined(folder, template, f"its digest is {actual}, recorded as {expected}")
    # Same bytes, another time of change: a copy or a restore touched the file, not its content.
    changes: dict[str, Any] = {"modified": found.st_mtime_ns, "block_digest": blocks, "quarantined": ""}
    patience = None if (template.modified, template.quarantined) != (found.st_mtime_ns, "") else _PATIENCE
    try:
        return folder.rewrite(template, "verified", timeout=patience, **changes)
    except exceptions.LockTimeout:
        if patience is None:
            raise
        LOG.info("template %s is sound, which is not noted: disks are being made from it", name)
        return template


def _digests(template: Template, reader: Reader, checkpoint: Checkpoint) -> tuple[str, str, str]:
    """Return a digest of the file, what is recorded of it, and the digest by blocks."""
    is_known = template.digest.startswith(f"{digest.BLOCKS}:")
    expected = template.block_digest or (template.digest if is_known else "")
    if not expected:
        # A plain digest cannot be taken up again in the middle. It is taken once; then that of the blocks is known.
        plain = hashlib.sha256()
        blocks = reader.blocks(also=plain.update)
        return f"{digest.SHA256}:{plain.hexdigest()}", template.digest, blocks
    began = checkpoint.load()
    actual = reader.blocks(checkpoint)
    checkpoint.remove()
    if actual != expected and began:
        # Rather the note is wrong, which a power cut may have spoiled, than the template.
        actual = reader.blocks()
    return actual, expected, actual


def _quarantined(folder: TemplateFolder, template: Template, reason: str) -> exceptions.CorruptTemplate:
    """Put a template into quarantine; return the error that says so."""
    users = [f"{lease.owner.host}:{lease.owner.path}" for lease in removal.users(folder, template.name)]
    told = f"is damaged, and quarantined: {reason}; disks that depend on it: %s"
    try:
        folder.rewrite(template, "damaged", reason, quarantined=f"{record.now()}: {reason}")
        folder.events.tell("quarantined", template.name, told, ", ".join(users) or "none", reason=reason, users=users)
    except exceptions.ImageBackendError as error:
        LOG.error("template %s is damaged (%s), and cannot be quarantined: %s", template.name, reason, error)
    return exceptions.CorruptTemplate(template.path, reason, users)
