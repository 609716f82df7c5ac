# SPDX-License-Identifier: Apache-2.0
"""Templates in the form that one store makes disks from: a thin volume, an RBD image, a ploop folder.

They are children of the template of that name in the cache: made from it once, and told apart from those of another
image of that name by its digest. A backend whose store keeps such templates implements :class:`NativeTemplates` and
returns it from :meth:`imagebackend.images.base.Image.native_templates`; the cache lists, makes ahead and prunes all of
them by the same rules.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from oslo_config import cfg

from imagebackend import locks
from imagebackend.templates.leases import Owner
from imagebackend.templates.record import Template

__all__ = ["NativeTemplate", "NativeTemplates", "lock"]


@dataclass(frozen=True)
class NativeTemplate:
    """A template in a store of its own.

    :ivar name: that of the template in the cache.
    :ivar sha256: of the image as it was fetched, as in :class:`~imagebackend.templates.record.Template`.
    :ivar virtual_size: bytes.
    :ivar used: bytes of storage that it takes by itself.
    :ivar made: when it was made, as ISO 8601 in UTC.
    :ivar users: the disks that depend on it, as the store itself knows them.
    """

    name: str
    sha256: str
    virtual_size: int
    used: int
    made: str
    users: tuple[Owner, ...]


class NativeTemplates(abc.ABC):
    """The templates of one store. Making the object does no I/O."""

    #: The image type whose disks are made from them: ``rbd``, ``lvm``, ``ploop``.
    image_type: ClassVar[str]

    @abc.abstractmethod
    def list(self) -> Sequence[NativeTemplate]:
        """Return all that are whole, sorted by name.

        :raises StorageError: the store does not tell.
        """

    @abc.abstractmethod
    def prepare(self, template: Template, progress: Callable[[int, int], None] | None = None) -> None:
        """Make it from a template of the cache, which nobody removes meanwhile; do nothing if it is there.

        :param progress: called with the bytes done and in all; an exception that it raises cancels, and propagates.
        """

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove it.

        :raises TemplateNotFound: it is not there.
        :raises TemplateInUse: disks depend on it.
        """

    @abc.abstractmethod
    def sweep(self) -> Sequence[str]:
        """Remove what killed processes left, without waiting for a call that needs it.

        :returns: the names, in the store, of what was removed.
        """


def lock(
    conf: cfg.ConfigOpts, image_type: str, name: str, timeout: float | None = None
) -> contextlib.AbstractContextManager[None]:
    """Hold the lock under which a store's template is made and removed, on the hosts that share ``instances_path``.

    :param name: what the store calls it; a safe name.
    :param timeout: seconds to wait at most; None: ``[DEFAULT] lock_timeout``.
    :raises LockTimeout: someone else held it all that time.
    """
    path = f"{locks.folder(os.path.abspath(conf.instances_path))}/{image_type}-template-{name}"
    return locks.hold(path, timeout=conf.lock_timeout if timeout is None else timeout, transient=True)
