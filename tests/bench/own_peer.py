# SPDX-License-Identifier: Apache-2.0
"""This project's code, used as a compute agent would use it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import imagebackend
from imagebackend.images.rbd import Rbd
from tests.bench import worker


class Peer:
    """The operations, over one configuration.

    :param configuration: the ini file, which both sides read.
    """

    def __init__(self, configuration: str) -> None:
        self.conf = imagebackend.load_config([configuration])
        self.backend = imagebackend.Backend(self.conf)

    def adopt(self, template: str, path: str, size: int) -> None:
        """Put a local file into the cache by making a first disk from it, which is removed."""

        def copy(target: str) -> None:
            subprocess.run(["cp", "--sparse=always", path, target], check=True)

        self.backend.image("adopted", "disk").cache(fetch_func=copy, filename=template, size=size)
        self.remove(["adopted"])

    def cache(self, template: str, instances: list[str], size: int, threads: int = 1) -> worker.Timing:
        """Make a disk for each instance from a template that is in the cache, or find it made."""

        return worker.spread(lambda instance: self.make(template, instance, size), instances, threads)

    def make(self, template: str, instance: str, size: int) -> None:
        """Make one disk, or find it made, without a clock."""
        self.backend.image(instance, "disk").cache(fetch_func=_never, filename=template, size=size)

    def fetch(self, template: str, source: str, instance: str, size: int) -> worker.Timing:
        """Make a disk from a template that is not in the cache; ``source`` is the image's URL."""

        def one(name: str) -> None:
            fetch_func = imagebackend.open_source(source, self.conf).fetch
            self.backend.image(name, "disk").cache(fetch_func=fetch_func, filename=template, size=size)

        return worker.spread(one, [instance], 1)

    def pull(self, template: str, source: str) -> worker.Timing:
        """Fetch a template that is not in the cache; ``source`` is the image's URL."""
        fetch_func = imagebackend.open_source(source, self.conf).fetch
        return worker.spread(lambda name: self.backend.templates.fetch(name, fetch_func), [template], 1)

    def describe(self, instance: str, times: int, anew: bool) -> worker.Timing:
        """Describe a disk for libvirt, in XML; with ``anew``, from an Image made each time."""
        device: tuple[Any, ...] = ("virtio", "vda", "disk", "none", {})
        if anew:
            return worker.repeat(lambda: self.backend.image(instance, "disk").libvirt_info(*device).to_xml(), times)
        image = self.backend.image(instance, "disk")
        return worker.repeat(lambda: image.libvirt_info(*device).to_xml(), times)

    def remove(self, instances: list[str]) -> None:
        """Remove disks."""
        for instance in instances:
            self.backend.image(instance, "disk").remove()

    def forget_stored(self, template: str) -> None:
        """Remove a template from the Ceph pool, and leave it in the cache."""
        Rbd.native_templates(self.conf).remove(template)

    def forget(self, template: str) -> None:
        """Remove a template from the cache."""
        self.backend.templates.remove(template)


def _never(target: str) -> None:
    raise AssertionError(f"{target} should have been in the cache")


if __name__ == "__main__":
    worker.serve(Peer(sys.argv[1]))
