# SPDX-License-Identifier: Apache-2.0
"""A disk that is there has its lease, and one that is not has none, whatever failed in between."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.images.base import Image
from imagebackend.images.qcow2 import Qcow2
from tests.contract.conftest import MIB, Store, template_content

SIZE = 8 * MIB

MAKE = """
import sys
from imagebackend import Backend, exceptions, load_config
conf = load_config()
conf.set_override("instances_path", sys.argv[1])
conf.set_override("images_type", "qcow2", group="libvirt")
try:
    Backend(conf).image("guest", "disk").cache(None, "template", 8 << 20)
except exceptions.ImageBackendError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def store(ext4_folder: Path) -> Iterator[Store]:
    store = Store(ext4_folder, "qcow2", {})
    store.backend.templates.fetch("template", store.fetch)
    yield store
    shutil.rmtree(ext4_folder)


def leases(store: Store, template: str = "template") -> list[str]:
    return [lease.owner.path for lease in store.backend.templates.leases(template)]


def make_failing(store: Store, *faults: str) -> str:
    """Make a disk in a process whose system calls on the disk and its folder fail; return the name of the error."""
    folder = store.folder / "guest"
    files = [word for path in (folder, folder / "disk") for word in ("-P", str(path))]
    injected = [word for fault in faults for word in ("-e", f"inject={fault}")]
    command = ["strace", "-qq", "-o", "/dev/null", *files, *injected, sys.executable, "-c", MAKE, str(store.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_a_disk_whose_name_may_not_last_is_not_there_and_holds_no_lease(store: Store) -> None:
    files = store.files()

    assert make_failing(store, "fsync:error=EIO") == "StorageError"

    image = store.image("disk", "guest")
    assert not image.exists()
    assert leases(store) == []
    # Folders may stay.
    assert {path for path in store.files() - files if not (store.folder / path).is_dir()} == set()
    image.cache(store.fetch, "template", SIZE)
    assert leases(store) == [image.path]


def test_a_disk_that_could_not_be_taken_back_keeps_its_lease(store: Store) -> None:
    assert make_failing(store, "fsync:error=EIO", "unlink:error=EIO") == "StorageError"

    image = store.image("disk", "guest")
    assert image.exists()
    assert leases(store) == [image.path]
    with pytest.raises(exceptions.TemplateInUse):
        store.backend.templates.remove("template")
    assert 'type="qcow2"' in image.libvirt_info("virtio", "vda", "disk", "none", {}).to_xml()
    assert store.content(image)[: len(template_content())] == template_content()


@pytest.mark.parametrize(
    "use",
    [
        lambda image, store: image.create_image(store.fetch, "template", SIZE),
        lambda image, store: image.create_from_func(lambda target: None, SIZE),
        lambda image, store: image.resize_image(SIZE),
        lambda image, store: image.resize_image(2 * SIZE),
        lambda image, store: image.create_snap("one"),
        lambda image, store: image.snapshot_extract(str(store.sources / "extract")),
    ],
)
def test_a_lease_that_was_lost_comes_back(store: Store, use: Callable[[Image, Store], object]) -> None:
    image = store.make(SIZE)
    shutil.rmtree(Path(store.backend.templates.folder, ".leases"))

    use(image, store)

    assert leases(store) == [image.path]
    with pytest.raises(exceptions.TemplateInUse):
        store.backend.templates.remove("template")


def rebased(store: Store) -> Qcow2:
    """A disk, and a template with other data, none of which the guest may ever see."""

    def fetch(target: str) -> None:
        Path(target).write_bytes(b"other" * MIB)

    store.backend.templates.fetch("other", fetch)
    image = store.make(SIZE)
    store.write(image, 65536, 4096, 1)
    assert isinstance(image, Qcow2)
    return image


def test_a_rebase_keeps_what_the_guest_reads(store: Store) -> None:
    image = rebased(store)
    content = store.content(image)

    image.rebase("other")

    assert store.content(image) == content
    assert [each.path for each in image.backing_chain()] == [image.path, store.backend.templates.path("other")]
    assert (leases(store), leases(store, "other")) == ([], [image.path])
    store.backend.templates.remove("template")
    assert store.content(image) == content
    store.check(image)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cancelled_rebase_leaves_contents_and_leases(store: Store, share: float) -> None:
    image = rebased(store)
    content = store.content(image)

    def cancel(done: int, total: int) -> None:
        if done >= total * share:
            raise exceptions.Cancelled("enough")

    with pytest.raises(exceptions.Cancelled):
        image.rebase("other", progress=cancel)

    assert store.content(image) == content
    assert (leases(store), leases(store, "other")) == ([image.path], [])
    assert not os.path.exists(f"{os.path.dirname(image.path)}/.disk.intent")
    store.backend.templates.remove("other")
    store.check(image)
    image.libvirt_info("virtio", "vda", "disk", "none", {})
    assert store.content(image) == content
