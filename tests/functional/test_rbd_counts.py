# SPDX-License-Identifier: Apache-2.0
"""What a disk in Ceph costs a process that has made one before: no process, no thread, no connection."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagebackend.images.rbd import Rbd, Usage
from tests.counting import Counts, count
from tests.functional.ceph import Contents, rbd_backend, read, requests
from tools.private_ceph import Cluster

SIZE = 32 << 20

SETUP = """
import shutil
import imagebackend

conf = imagebackend.load_config()
conf.set_override("instances_path", {folder!r})
for name, value in {options!r}.items():
    conf.set_override(name, value, group="libvirt")
backend = imagebackend.Backend(conf)
def fetch(target):
    shutil.copyfile({template!r}, target)
def make(number, size={size}):
    image = backend.image(f"instance{{number}}", "disk")
    image.cache(fetch, "template", size)
    return image
first = make("-first")
make("-second")  # and everything that librbd starts when it first works on an image
"""


@pytest.fixture
def setup(ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path) -> str:
    options = {"images_type": "rbd", "images_rbd_pool": rbd_pool, "images_rbd_ceph_conf": str(ceph.configuration)}
    folder = str(tmp_path / "instances")
    return SETUP.format(folder=folder, options=options, template=str(template.path), size=SIZE)


def connections(counts: Counts) -> int:
    return counts.by_name.get("connect", 0) + counts.by_name.get("socket", 0)


def test_a_warm_disk_takes_no_process_no_thread_and_no_connection(setup: str) -> None:
    counts = count("make(0)", setup=setup)

    assert (counts.processes, counts.threads, counts.execs) == (0, 0, 0)
    assert connections(counts) == 0
    assert counts.blocked_locks == 0


def test_many_disks_of_several_threads_share_the_connection(setup: str) -> None:
    script = """
with ThreadPoolExecutor(8) as pool:
    list(pool.map(make, range(32)))
"""
    more = "from concurrent.futures import ThreadPoolExecutor\n"
    counts = count(script, setup=setup + more)

    assert counts.processes == 0
    assert counts.threads == 8  # those of the script
    assert connections(counts) == 0
    assert counts.blocked_locks == 0


def test_a_disk_of_a_template_holds_no_data_until_it_is_written_to(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    image = rbd_backend(ceph, rbd_pool, tmp_path / "instances").image("guest", "disk")
    image.cache(template.fetch, "template", SIZE)
    assert isinstance(image, Rbd)
    assert image.usage() == Usage(provisioned=SIZE, used=0)

    with image.pool.open("guest_disk") as opened:
        opened.write(b"x" * 512, SIZE - 512)
    used = image.usage().used
    assert 0 < used <= 4 << 20
    image.flatten()
    assert image.usage().used > used


def test_a_disk_that_exists_costs_neither_thread_nor_connection(setup: str) -> None:
    counts = count('make("-first")', setup=setup)

    assert (counts.processes, counts.threads, counts.syncs) == (0, 0, 0)
    assert connections(counts) == 0


def test_describing_a_disk_takes_no_process_no_thread_and_no_connection(setup: str) -> None:
    script = 'first.libvirt_info("virtio", "vda", "disk", "none", {}).to_xml()'
    counts = count(script, setup=f"{setup}\n{script}\n")

    assert (counts.processes, counts.threads, counts.syncs) == (0, 0, 0)
    assert connections(counts) == 0


def test_what_a_disk_asks_of_the_cluster(ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path) -> None:
    """A round trip each, of which a disk's description may have so many that it takes less than a millisecond."""
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    image = backend.image("guest", "disk")
    image.cache(template.fetch, "template", SIZE)
    image.libvirt_info("virtio", "vda", "disk", "none", {})

    assert requests(ceph, lambda: image.libvirt_info("virtio", "vda", "disk", "none", {})) == 3
    assert requests(ceph, lambda: image.get_disk_size(image.path)) == 3
    assert requests(ceph, image.exists) == 2
    assert requests(ceph, lambda: image.cache(template.fetch, "template", SIZE)) == 2


def test_a_disk_asks_little_more_than_a_bare_clone(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    import rbd

    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    first, second = backend.image("first", "disk"), backend.image("second", "disk")
    first.cache(template.fetch, "template", SIZE)
    with ceph.connect() as connection, connection.open_ioctx(rbd_pool) as context:
        with rbd.Image(context, "first_disk", read_only=True) as image:
            _, parent, snapshot = image.parent_info()
        bare = requests(ceph, lambda: rbd.RBD().clone(context, parent, snapshot, context, "bare"))
        ours = requests(ceph, lambda: second.cache(template.fetch, "template", SIZE))

    # Whether something was begun, whether the disk is there, and what is begun and done.
    assert ours <= bare + 5


def test_a_process_has_one_connection_whatever_it_does(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    import rbd

    image = rbd_backend(ceph, rbd_pool, tmp_path / "one").image("one", "disk")
    image.cache(template.fetch, "template", SIZE)
    # Another object, of another configuration that names the same cluster, user and pool.
    again = rbd_backend(ceph, rbd_pool, tmp_path / "two").image("one", "disk")
    clients = set()
    for each in (image, again):
        with each.pool.open("one_disk"):
            (watcher,) = each.pool.watchers("one_disk")
            clients.add(watcher.client)
    assert len(clients) == 1
    with ceph.connect() as connection, connection.open_ioctx(rbd_pool) as context, rbd.Image(context, "one_disk"):
        (watcher,) = image.pool.watchers("one_disk")
    assert watcher.client not in clients


def test_a_child_after_fork_has_a_connection_of_its_own(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    parent = backend.image("parent", "disk")
    parent.cache(template.fetch, "template", SIZE)
    with parent.pool.open("parent_disk"):
        (watcher,) = parent.pool.watchers("parent_disk")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                image = backend.image("child", "disk")
                image.cache(template.fetch, "template", SIZE)
                with image.pool.open("child_disk"):
                    os.write(writer, str(image.pool.watchers("child_disk")[0].client).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as said:
            client = said.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        # The parent's connection was not taken down with the child.
        assert parent.pool.watchers("parent_disk") == [watcher]
    assert int(client) != watcher.client
    backend.image("another", "disk").cache(template.fetch, "template", SIZE)
    child_disk = backend.image("child", "disk")
    assert read(child_disk, tmp_path / "copy")[: len(template.content)] == template.content
