# SPDX-License-Identifier: Apache-2.0
"""Nova's own storage code, unmodified, driven from outside; runs in Nova's virtual environment.

Nothing of Nova is replaced: its classes, its glance client (against nginx, which answers what Glance would) and
its qemu-img calls are the real ones. Only the privileged calls stay in this process instead of a daemon of root's,
which saves Nova time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nova.conf
import nova.privsep
from nova import context
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils

from tests.bench import worker

CONF = nova.conf.CONF


class Peer:
    """The operations, over one configuration.

    :param configuration: the ini file, which both sides read.
    """

    def __init__(self, configuration: str) -> None:
        CONF(["--config-file", configuration], project="nova", default_config_files=[])
        nova.privsep.sys_admin_pctxt.set_client_mode(False)

    def adopt(self, template: str, path: str, size: int) -> None:
        """Put a local file into the cache by making a first disk from it, which is removed."""

        def copy(target: str, **_kwargs: object) -> None:
            subprocess.run(["cp", "--sparse=always", path, target], check=True)

        _make_folder("adopted")
        _image("adopted").cache(copy, template, size, image_id=template)
        self.remove(["adopted"])

    def cache(self, template: str, instances: list[str], size: int, threads: int = 1) -> worker.Timing:
        """Make a disk for each instance from a template that is in the cache, or find it made."""

        return worker.spread(lambda instance: self.make(template, instance, size), instances, threads)

    def make(self, template: str, instance: str, size: int) -> None:
        """Make one disk, or find it made, without a clock."""
        _make_folder(instance)
        _image(instance).cache(_never, template, size, image_id=template)

    def fetch(self, template: str, source: str, instance: str, size: int) -> worker.Timing:
        """Make a disk from a template that is not in the cache; ``source`` is the image's identifier in Glance."""
        request = context.RequestContext(user_id="bench", project_id="bench", auth_token="bench", is_admin=True)

        def one(name: str) -> None:
            _make_folder(name)
            fetch_func = libvirt_utils.fetch_image
            _image(name).cache(fetch_func, template, size, context=request, image_id=source, trusted_certs=None)

        return worker.spread(one, [instance], 1)

    def describe(self, instance: str, times: int, anew: bool) -> worker.Timing:
        """Describe a disk for libvirt, in XML; with ``anew``, from an Image made each time, as Nova's driver does."""
        if anew:
            return worker.repeat(lambda: _image(instance).libvirt_info("none", {}).to_xml(), times)
        image = _image(instance)
        return worker.repeat(lambda: image.libvirt_info("none", {}).to_xml(), times)

    def remove(self, instances: list[str]) -> None:
        """Remove disks, as Nova's driver does: the whole folder."""
        for instance in instances:
            shutil.rmtree(f"{CONF.instances_path}/{instance}", ignore_errors=True)

    def clone(self, location: str, instances: list[str], size: int) -> worker.Timing:
        """Make a disk for each instance from an image in the Ceph cluster.

        It does what Nova does once Glance has answered where the image is; that request is not made.
        """

        def one(instance: str) -> None:
            _make_folder(instance)
            image = _image(instance)

            def clone(target: str, **_kwargs: object) -> None:
                assert image.driver.is_cloneable({"url": location}, {"disk_format": "raw"})
                image.driver.clone({"url": location}, image.rbd_name)

            image.cache(clone, "template", size, image_id="template")

        return worker.spread(one, instances, 1)

    def remove_stored(self, instances: list[str]) -> None:
        """Remove disks from the Ceph pool."""
        for instance in instances:
            image = _image(instance)
            image.driver.remove_image(image.rbd_name)

    def forget(self, template: str) -> None:
        """Remove a template from the cache."""
        subprocess.run(["rm", "-f", f"{CONF.instances_path}/_base/{template}"], check=True)


def _image(instance: str) -> imagebackend.Image:
    mapping = {"bus": "virtio", "dev": "vda", "type": "disk"}
    backend = imagebackend.Backend(CONF.use_cow_images)
    return backend.by_name(SimpleNamespace(uuid=instance), "disk", disk_info_mapping=mapping)


def _make_folder(instance: str) -> None:
    # Nova's driver does, before it asks for the disk.
    os.makedirs(f"{CONF.instances_path}/{instance}", exist_ok=True)


def _never(target: str, **_kwargs: object) -> None:
    raise AssertionError(f"{target} should have been in the cache")


if __name__ == "__main__":
    worker.serve(Peer(sys.argv[1]))
