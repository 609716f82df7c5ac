# SPDX-License-Identifier: Apache-2.0
"""What only disks in Ceph can do: clone images, share templates between hosts, be the source of images."""

from __future__ import annotations

import contextlib
import datetime
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import rbd

from imagebackend import Backend, exceptions
from imagebackend.images.rbd import Encryption, Rbd
from imagebackend.images.rbd_template import RbdTemplates
from imagebackend.storage import ceph as storage
from imagebackend.templates.sources import Fetched, Metadata, Source
from tests.functional.ceph import Contents, rbd_backend, read
from tools.private_ceph import Cluster

MIB = 1 << 20


@pytest.fixture(params=["1", "2"])
def backend(request: pytest.FixtureRequest, ceph: Cluster, rbd_pool: str, tmp_path: Path) -> Backend:
    return rbd_backend(ceph, rbd_pool, tmp_path / "instances", images_rbd_clone_format=request.param)


@contextlib.contextmanager
def context(cluster: Cluster, pool: str) -> Iterator[Any]:
    with cluster.connect() as connection, connection.open_ioctx(pool) as opened:
        yield opened


def images(cluster: Cluster, pool: str) -> set[str]:
    with context(cluster, pool) as opened:
        return {name.partition(":")[0] if name.startswith("zombie:") else name for name in rbd.RBD().list(opened)}


def store(backend: Backend) -> RbdTemplates:
    return Rbd.native_templates(backend.conf)


def test_another_host_clones_what_one_has_imported_and_fetches_nothing(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend.image("one", "disk").cache(template.fetch, "debian")
    other = rbd_backend(ceph, rbd_pool, tmp_path / "other")

    image = other.image("two", "disk")
    image.cache(lambda target: pytest.fail("fetched again"), "debian", 64 * MIB)

    assert image.get_disk_size(image.path) == 64 * MIB
    assert read(image, tmp_path / "copy")[: 24 * MIB] == template.content
    with pytest.raises(exceptions.DiskTooSmall):
        other.image("three", "disk").cache(template.fetch, "debian", 8 * MIB)


def test_a_template_that_has_other_content_replaces_the_old_one_which_goes_with_its_last_disk(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    old = backend.image("old", "disk")
    old.cache(template.fetch, "debian")
    other = rbd_backend(ceph, rbd_pool, tmp_path / "other")
    other.templates.fetch("debian", lambda target: Path(target).write_bytes(b"new" * MIB))

    new = other.image("new", "disk")
    new.cache(template.fetch, "debian")

    assert read(new, tmp_path / "new-copy") == b"new" * MIB
    assert read(old, tmp_path / "old-copy") == template.content
    assert images(ceph, rbd_pool) == {"template:debian", "old_disk", "new_disk", "zombie"}
    old.remove()
    assert images(ceph, rbd_pool) == {"template:debian", "new_disk"}


def test_a_removed_template_goes_with_its_last_disk(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    first, second = backend.image("first", "disk"), backend.image("second", "disk")
    for image in (first, second):
        image.cache(template.fetch, "debian")
    assert [each.name for each in store(backend).list()] == ["debian"]

    store(backend).retire("debian")
    assert store(backend).list() == []
    assert images(ceph, rbd_pool) == {"first_disk", "second_disk", "zombie"}
    first.flatten()
    assert "zombie" in images(ceph, rbd_pool)
    second.remove()

    assert images(ceph, rbd_pool) == {"first_disk"}
    with pytest.raises(exceptions.TemplateNotFound):
        store(backend).retire("debian")


def test_templates_are_made_ahead_listed_and_removed_when_no_disk_needs_them(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    cached = backend.templates.fetch("debian", template.fetch)
    told: list[tuple[int, int]] = []
    store(backend).prepare(cached, lambda done, total: told.append((done, total)))
    store(backend).prepare(cached, lambda done, total: pytest.fail("imported again"))
    assert told[-1] == (24 * MIB, 24 * MIB)
    (before,) = store(backend).list()
    assert (before.name, before.sha256, before.virtual_size) == ("debian", cached.sha256, 24 * MIB)
    assert before.users == ()
    assert 8 * MIB <= before.used <= 24 * MIB
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(before.made)
    assert datetime.timedelta(seconds=-1) <= age < datetime.timedelta(seconds=60)

    disk = backend.image("guest", "disk")
    disk.cache(lambda target: pytest.fail("fetched again"), "debian", 32 * MIB)
    with context(ceph, rbd_pool) as opened:
        rbd.RBD().clone(opened, "template:debian", f"{cached.sha256[:32]}.{32 * MIB}", opened, "by-hand")
    (after,) = store(backend).list()
    users = sorted(after.users, key=lambda user: user.instance)
    assert [(user.instance, user.disk) for user in users] == [("", "by-hand"), ("guest", "disk")]
    assert users[1].path == disk.path
    with pytest.raises(exceptions.TemplateInUse, match="guest_disk") as caught:
        store(backend).remove("debian")
    assert sorted(caught.value.users) == sorted(user.path for user in users)
    assert store(backend).list() == [after]

    disk.remove()
    with context(ceph, rbd_pool) as opened:
        rbd.RBD().remove(opened, "by-hand")
    store(backend).remove("debian")
    assert images(ceph, rbd_pool) == set()
    with pytest.raises(exceptions.TemplateNotFound):
        store(backend).remove("debian")


def test_an_import_that_is_cancelled_leaves_nothing_and_a_flatten_is_not_cancelled(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    def cancel(done: int, total: int) -> None:
        if 0 < done < total:
            raise exceptions.Cancelled("enough")

    cached = backend.templates.fetch("debian", template.fetch)
    with pytest.raises(exceptions.Cancelled):
        store(backend).prepare(cached, cancel)
    assert images(ceph, rbd_pool) == set()

    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian")
    assert isinstance(disk, Rbd)
    disk.flatten(progress=cancel)
    assert disk.parents() == []
    assert read(disk, tmp_path / "copy") == template.content


def test_what_the_callback_of_a_flatten_raises_is_not_lost(backend: Backend, template: Contents) -> None:
    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian")

    def fail(done: int, total: int) -> None:
        raise RuntimeError("a defect of the caller")

    with pytest.raises(RuntimeError, match="defect"):
        disk.flatten(progress=fail)


def test_a_template_whose_record_is_damaged_is_left_out(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    for name in ("debian", "fedora"):
        backend.image(name, "disk").cache(template.fetch, name)
    with context(ceph, rbd_pool) as opened, rbd.Image(opened, "template:debian") as image:
        image.metadata_set("imagebackend", "{")

    assert [each.name for each in store(backend).list()] == ["fedora"]


def test_templates_that_the_cache_keeps_as_qcow2_are_not_made_ahead(
    ceph: Cluster, rbd_pool: str, tmp_path: Path
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    backend.conf.set_override("force_raw_images", False)
    make = ["qemu-img", "create", "-q", "-f", "qcow2"]
    cached = backend.templates.fetch("debian", lambda target: subprocess.run([*make, target, "16M"], check=True))

    with pytest.raises(exceptions.InvalidConfiguration, match="force_raw_images"):
        store(backend).prepare(cached)
    assert images(ceph, rbd_pool) == set()


def test_disks_of_one_size_share_a_snapshot(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    for number, size in enumerate((32 * MIB, 64 * MIB, 32 * MIB, 24 * MIB)):
        image = backend.image(f"guest{number}", "disk")
        image.cache(template.fetch, "debian", size)
        assert image.get_disk_size(image.path) == size

    with context(ceph, rbd_pool) as opened, rbd.Image(opened, "template:debian", read_only=True) as image:
        assert sorted(each["size"] // MIB for each in image.list_snaps()) == [24, 32, 64]


def test_a_disk_becomes_an_image_and_an_image_a_disk(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian")

    url = disk.direct_snapshot(None, "nightly", "raw", "an-image", "base")
    assert url == f"rbd://{ceph.fsid}/{rbd_pool}/an-image/snap"
    assert disk.list_snaps() == []
    with pytest.raises(exceptions.DiskExists):
        disk.direct_snapshot(None, "nightly", "raw", "an-image", "base")
    disk.remove()

    copy = backend.image("copy", "disk")
    copy.clone(None, url)
    copy.clone(None, url)
    assert read(copy, tmp_path / "copy") == template.content
    with pytest.raises(exceptions.DiskInUse, match="has clones"):
        copy.cleanup_direct_snapshot(url)
    copy.cleanup_direct_snapshot(url, ignore_errors=True)
    copy.flatten()
    copy.cleanup_direct_snapshot(url, also_destroy_volume=True)

    assert images(ceph, rbd_pool) == {"template:debian", "copy_disk"}


class Served(Source):
    """An image as an image service has it: a format, and where it is."""

    def __init__(self, disk_format: str, *locations: str) -> None:
        self._format = disk_format
        self._locations = locations

    def metadata(self) -> Metadata:
        return Metadata("service:image", disk_format=self._format)

    def fetch(self, target: str, progress: object = None) -> Fetched:
        pytest.fail("fetched")

    def locations(self) -> Sequence[str]:
        return self._locations


def test_an_image_is_cloned_by_its_id_where_its_source_has_it(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian")
    location = disk.direct_snapshot(None, "nightly", "raw", "an-image", "base")
    copy = backend.image("copy", "disk")

    for context, reason in (
        (Served("qcow2", location), "its format is qcow2"),
        (Served("raw"), "no location"),
        (Served("raw", "file:///image", location.replace("/snap", "/gone")), "does not exist"),
    ):
        with pytest.raises(exceptions.ImageUnacceptable, match=reason):
            copy.clone(context, "3f1c6f0e-image")
        assert not copy.exists()
    with pytest.raises(exceptions.ImageUnacceptable, match="nowhere"):
        copy.clone(None, "nowhere:image")

    copy.clone(Served("raw", "file:///image", location), "3f1c6f0e-image")
    assert read(copy, tmp_path / "copy") == template.content
    copy.clone(Served("raw"), "3f1c6f0e-image")


def test_what_cannot_be_cloned_says_why(backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents) -> None:
    backend.image("guest", "disk").cache(template.fetch, "debian")
    elsewhere = "rbd://00000000-0000-0000-0000-000000000000/pool/image/snap"
    nothing = f"rbd://{ceph.fsid}/{rbd_pool}/guest_disk/nothing"
    no_pool = f"rbd://{ceph.fsid}/no-such-pool/image/snap"
    image = backend.image("other", "disk")
    assert isinstance(image, Rbd)

    with pytest.raises(exceptions.ImageUnacceptable) as caught:
        image.clone(None, [elsewhere, nothing, no_pool, "file:///image"])

    for reason in ("another cluster", "does not exist", "no pool 'no-such-pool'", "not of the form"):
        assert reason in str(caught.value)
    assert not image.exists()


def test_a_clone_with_too_many_parents_is_flattened(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances", images_rbd_max_clone_depth=2)
    disk = backend.image("guest0", "disk")
    disk.cache(template.fetch, "debian")
    parents = []
    for number in range(1, 4):
        disk.create_snap("base")
        disk = backend.image(f"guest{number}", "disk")
        with context(ceph, rbd_pool) as opened, rbd.Image(opened, f"guest{number - 1}_disk") as image:
            image.protect_snap("base")
        disk.clone(None, f"rbd://{ceph.fsid}/{rbd_pool}/guest{number - 1}_disk/base")
        with context(ceph, rbd_pool) as opened, rbd.Image(opened, f"guest{number}_disk", read_only=True) as image:
            try:
                parents.append(image.parent_info()[1])
            except rbd.ImageNotFound:
                parents.append(None)

    assert parents == ["guest0_disk", None, "guest2_disk"]
    assert read(disk, tmp_path / "copy") == template.content


def test_removed_disks_wait_in_the_trash(ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances", images_rbd_trash_delay=3600)
    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian")
    disk.create_snap("kept")

    disk.remove()

    assert not disk.exists()
    with context(ceph, rbd_pool) as opened:
        (trashed,) = rbd.RBD().trash_list(opened)
        assert trashed["name"] == "guest_disk"
        rbd.RBD().trash_restore(opened, trashed["id"], "guest_disk")
    assert [snapshot.name for snapshot in disk.list_snaps()] == ["kept"]
    assert read(disk, tmp_path / "copy") == template.content


def test_a_namespace_and_a_layout_are_used(ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path) -> None:
    with context(ceph, rbd_pool) as opened, ceph.pool() as data_pool:
        rbd.RBD().namespace_create(opened, "tenant")
        options = {"images_rbd_namespace": "tenant", "images_rbd_object_size": MIB, "images_rbd_data_pool": data_pool}
        features = {"images_rbd_features": ["layering", "exclusive-lock"]}
        backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances", **options, **features)

        disk = backend.image("guest", "disk")
        disk.cache(template.fetch, "debian", 32 * MIB)

        assert [image.path for image in backend.disks()] == [disk.path]
        assert rbd.RBD().list(opened) == []
        opened.set_namespace("tenant")
        with rbd.Image(opened, "guest_disk", read_only=True) as image:
            assert image.stat()["obj_size"] == MIB
            assert image.data_pool_id() != -1
            assert image.features() & rbd.RBD_FEATURE_FAST_DIFF == 0
        assert read(disk, tmp_path / "copy")[: 24 * MIB] == template.content
        for each in ("guest_disk", "template:debian"):
            with rbd.Image(opened, each) as image:
                for name in [snapshot["name"] for snapshot in image.list_snaps()]:
                    image.unprotect_snap(name)
                    image.remove_snap(name)
            rbd.RBD().remove(opened, each)


def test_usage_counts_a_disks_own_data(backend: Backend, template: Contents) -> None:
    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian", 64 * MIB)
    assert isinstance(disk, Rbd)
    before = disk.usage()
    disk.flatten()
    after = disk.usage()

    assert (before.provisioned, before.used) == (64 * MIB, 0)
    assert after.provisioned == 64 * MIB
    assert 8 * MIB <= after.used <= 24 * MIB


def test_zeros_of_a_template_take_no_storage(backend: Backend, tmp_path: Path) -> None:
    content = b"boot" + bytes(24 * MIB) + b"end"
    disk = backend.image("guest", "disk")
    disk.cache(lambda target: Path(target).write_bytes(content), "debian", 64 * MIB)

    assert [template.used for template in store(backend).list()] == [8 * MIB]
    assert read(disk, tmp_path / "copy")[: len(content)] == content


def test_the_sweep_removes_what_killed_processes_left(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    disk = backend.image("guest", "disk")
    disk.cache(template.fetch, "debian")
    assert isinstance(disk, Rbd)
    pool = disk.pool
    pool.create("partial:template:other", MIB, storage.Layout())
    pool.create("half_disk", MIB, storage.Layout())
    pool.swap_intent("half_disk", "", f'{{"operation": "clone", "host": "{backend.conf.host}"}}')
    pool.create("busy_disk", MIB, storage.Layout())
    pool.swap_intent("busy_disk", "", '{"operation": "clone", "host": "another"}')

    swept = store(backend).sweep()

    assert swept == ["half_disk", "partial:template:other"]
    assert images(ceph, rbd_pool) == {"template:debian", "guest_disk", "busy_disk"}
    assert store(backend).sweep() == []
    assert [image.path for image in backend.disks()] == [disk.path]


@pytest.mark.parametrize("luks", ["luks1", "luks2"])
def test_an_encrypted_disk_holds_the_template_and_keeps_it_secret(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path, luks: str
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    disk = backend.image("guest", "disk")
    assert isinstance(disk, Rbd)
    disk.encryption = Encryption("correct horse", "8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10", luks)
    assert "correct horse" not in repr(disk.encryption)

    disk.cache(template.fetch, "debian", 32 * MIB)

    assert disk.get_disk_size(disk.path) == 32 * MIB
    with context(ceph, rbd_pool) as opened, rbd.Image(opened, "guest_disk", read_only=True) as image:
        stored = image.read(0, image.size())
    assert stored.startswith((b"LUKS\xba\xbe", b"RBDL\xba\xbe"))  # the second: an encrypted clone
    assert template.content[:4096] not in stored
    xml = disk.libvirt_info("virtio", "vda", "disk", None, {}).to_xml()
    assert f'<encryption format="{luks.replace("luks1", "luks")}" engine="librbd">' in xml
    assert 'type="passphrase" uuid="8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10"' in xml

    disk.create_snap("one")
    disk.resize_image(40 * MIB)
    assert disk.get_disk_size(disk.path) == 40 * MIB
    assert [snapshot.virtual_size for snapshot in disk.list_snaps()] == [32 * MIB]
    assert read(disk, tmp_path / "copy") == template.content + bytes(16 * MIB)

    again = backend.image("guest", "disk")
    assert isinstance(again, Rbd)
    for work in (
        lambda: again.snapshot_extract(str(tmp_path / "secret"), "raw"),
        lambda: again.import_file("guest", str(template.path), "disk"),
    ):
        with pytest.raises(exceptions.InvalidArgument, match="is encrypted"):
            work()
    with pytest.raises(exceptions.Unsupported):
        again.direct_snapshot(None, "nightly", "raw", "an-image", "base")
    again.encryption = Encryption("wrong", "8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10", luks)
    with pytest.raises(exceptions.StorageError):
        again.snapshot_extract(str(tmp_path / "secret"), "raw")
    assert not (tmp_path / "secret").exists()
    disk.remove()
    assert images(ceph, rbd_pool) <= {"template:debian"}  # which clones need, where librbd encrypts those


def test_encrypted_disks_are_clones_only_where_librbd_can_encrypt_those(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    def make(name: str, clones: str) -> Rbd:
        options = {"images_rbd_encrypted_clones": clones}
        disk = rbd_backend(ceph, rbd_pool, tmp_path / "instances", **options).image(name, "disk")
        assert isinstance(disk, Rbd)
        disk.encryption = Encryption("correct horse", "8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10")
        disk.cache(template.fetch, "debian", 32 * MIB)
        assert read(disk, tmp_path / name)[: 24 * MIB] == template.content
        return disk

    copy = make("copy", "never")
    assert images(ceph, rbd_pool) == {"copy_disk"}
    if hasattr(rbd.Image, "encryption_load2"):
        clone = make("clone", "always")
        assert images(ceph, rbd_pool) == {"template:debian", "copy_disk", "clone_disk"}
        assert clone.usage().used < 24 * MIB < copy.usage().used
        clone.flatten()
        assert read(clone, tmp_path / "flat")[: 24 * MIB] == template.content
    else:
        with pytest.raises(exceptions.Unsupported, match="install that of Ceph 18"):
            make("clone", "always")
        assert images(ceph, rbd_pool) == {"copy_disk"}


def test_an_unknown_encryption_is_refused() -> None:
    with pytest.raises(exceptions.InvalidArgument):
        Encryption("passphrase", "8d3c7f52-6a0e-4f0b-9c1d-2b7e5a4f9e10", "rot13")


def test_a_user_without_a_secret_is_a_clear_error(ceph: Cluster, rbd_pool: str, tmp_path: Path) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path, rbd_user="cinder")

    for ask in (
        lambda: backend.image("guest", "disk").libvirt_info("virtio", "vda", "disk", None, {}),
        lambda: backend.image("guest", "disk").get_model(None),
    ):
        with pytest.raises(exceptions.InvalidConfiguration, match="rbd_secret_uuid"):
            ask()
