# SPDX-License-Identifier: Apache-2.0
"""Leases made anew from real disks: qcow2 files, clones in a pool, domains of a real libvirt."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest

from imagebackend import exceptions
from imagebackend.templates.leases import Owner
from tests.contract.conftest import MIB, Store
from tests.functional import filesystems
from tests.functional.ceph import Contents, rbd_backend
from tests.functional.cli_command import Command
from tools import private_libvirtd
from tools.private_ceph import Cluster


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "qcow2", {})


def leases(store: Store) -> set[tuple[str, str]]:
    return {(each.template, each.owner.path) for each in store.backend.templates.lease_book.leases()}


def forget_leases(store: Store) -> None:
    shutil.rmtree(store.folder / "_base" / ".leases")


def test_lost_leases_come_back_from_the_disks_and_say_what_they_did(store: Store) -> None:
    first, second = store.make(), store.make(disk_name="disk.two")
    store.backend.image("vm2", "disk", "raw").cache(store.fetch, "template", 8 * MIB)
    before = store.backend.templates.lease_book.leases()
    assert [each.owner.path for each in before] == [first.path, second.path]
    forget_leases(store)
    assert leases(store) == set()

    rebuilt = store.backend.rebuild_leases()

    assert (rebuilt.made, rebuilt.dropped, rebuilt.failed) == (before, [], [])
    assert store.backend.templates.lease_book.leases() == before
    with pytest.raises(exceptions.TemplateInUse):
        store.backend.templates.remove("template")
    again = store.backend.rebuild_leases()
    assert (again.made, again.dropped, again.failed) == ([], [], [])


def test_what_nothing_needs_is_dropped_and_what_cannot_be_known_stays(store: Store) -> None:
    image = store.make()
    templates = store.backend.templates
    template = templates.get("template").file
    host = store.conf.host
    gone = Owner("gone", "disk", host, f"{store.folder}/gone/disk")
    elsewhere = Owner("elsewhere", "disk", host, "/mnt/elsewhere/disk")
    another = Owner("another", "disk", "another", f"{store.folder}/another/disk")
    flat = store.make(disk_name="disk.flat")
    for owner in (gone, elsewhere, another):
        templates.lease(template, owner)
    store.run("qemu-img", "rebase", "-f", "qcow2", "-b", "", flat.path)  # not by us, so that its lease stays

    rebuilt = store.backend.rebuild_leases()

    assert {each.owner.path for each in rebuilt.dropped} == {gone.path, flat.path}
    assert leases(store) == {(template, path) for path in (image.path, elsewhere.path, another.path)}


def test_a_disk_that_is_being_changed_keeps_its_leases(store: Store) -> None:
    image = store.make()
    template = store.backend.templates.get("template").file
    store.run("qemu-img", "rebase", "-f", "qcow2", "-b", "", image.path)
    with image._file.lock():  # type: ignore[attr-defined]
        assert store.backend.rebuild_leases().dropped == []
    assert leases(store) == {(template, image.path)}


def test_a_raw_disk_is_not_believed_and_one_without_a_record_is_read(store: Store) -> None:
    image = store.make()
    raw = store.backend.image("vm2", "disk", "raw")
    raw.cache(store.fetch, "template", 8 * MIB)
    shutil.copyfile(image.path, raw.path)  # as its guest can
    (store.folder / "vm3").mkdir()
    shutil.copyfile(image.path, store.folder / "vm3" / "disk")
    (store.folder / "vm3" / "disk.info").write_text("{")
    (store.folder / "vm3" / "notes").write_text("no disk")
    forget_leases(store)

    rebuilt = store.backend.rebuild_leases()

    assert {each.owner.path for each in rebuilt.made} == {image.path, f"{store.folder}/vm3/disk"}
    assert [(what, type(error)) for what, error in rebuilt.failed] == [
        (f"{store.folder}/vm3", exceptions.CorruptRecord)
    ]


def test_a_disk_whose_template_is_gone_or_whose_header_is_damaged_is_told(store: Store) -> None:
    image, damaged = store.make(), store.make(disk_name="disk.damaged")
    with open(damaged.path, "r+b") as file:
        file.write(b"x" * 512)
    forget_leases(store)
    (store.folder / "_base" / "template").unlink()

    rebuilt = store.backend.rebuild_leases()

    assert {what: type(error) for what, error in rebuilt.failed} == {
        damaged.path: exceptions.ImageUnacceptable,
        image.path: exceptions.TemplateNotFound,
    }
    assert rebuilt.made == []


@pytest.mark.parametrize("part", [".", "_base"])
def test_in_a_read_only_folder_each_lease_that_is_not_changed_is_told(store: Store, part: str) -> None:
    image = store.make()
    template = store.backend.templates.get("template").file
    owner = store.backend.templates.lease_book.leases()[0].owner
    gone = Owner("gone", "disk", store.conf.host, f"{store.folder}/gone/disk")
    store.backend.templates.lease(template, gone)
    store.backend.templates.release(template, owner)
    before = leases(store)
    with filesystems.read_only(store.folder / part):
        rebuilt = store.backend.rebuild_leases()

    assert (rebuilt.made, rebuilt.dropped) == ([], [])
    assert {what: type(error) for what, error in rebuilt.failed} == {
        image.path: exceptions.PermissionDenied,
        gone.path: exceptions.PermissionDenied,
    }
    assert leases(store) == before == {(template, gone.path)}


def test_a_chain_of_images_leads_to_the_template(store: Store) -> None:
    image = store.make()
    overlay = store.folder / Path(image.path).parent / "disk.overlay"
    store.run("qemu-img", "create", "-f", "qcow2", "-F", "qcow2", "-b", image.path, overlay)
    forget_leases(store)

    store.backend.rebuild_leases()

    assert {path for _, path in leases(store)} == {image.path, str(overlay)}


@pytest.mark.parametrize("clone_format", ["1", "2"])
def test_clones_in_a_pool_hold_leases_on_what_the_cache_has(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path, clone_format: str
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances", images_rbd_clone_format=clone_format)
    backend.image("vm1", "disk").cache(template.fetch, "template")
    before = backend.templates.lease_book.leases()
    assert len(before) == 1
    shutil.rmtree(tmp_path / "instances" / "_base" / ".leases")

    rebuilt = backend.rebuild_leases()

    assert (rebuilt.made, rebuilt.failed) == (before, [])
    backend.image("vm1", "disk").remove()
    backend.templates.lease("template", before[0].owner)
    assert [each.owner for each in backend.rebuild_leases().dropped] == [before[0].owner]


@pytest.fixture(params=["defined", "running"])
def domain(
    request: pytest.FixtureRequest, libvirt_qemu: libvirt.virConnect, store: Store
) -> Iterator[libvirt.virDomain]:
    """A domain that is only defined, or only runs, whose disk is elsewhere than ours are, and made from a template."""
    store.make()
    path = store.sources / "imported.qcow2"
    base = store.folder / "_base" / store.backend.templates.get("template").file
    store.run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", base, path)
    xml = f"""<domain type="qemu"><name>guest-{uuid.uuid4()}</name><memory>65536</memory><os><type>hvm</type></os>
        <devices><disk type="file"><driver name="qemu" type="qcow2"/><source file="{path}"/><target dev="vda"/></disk>
        <disk type="file" device="cdrom"><target dev="hdc"/></disk></devices></domain>"""
    if request.param == "defined":
        defined = libvirt_qemu.defineXML(xml)
        yield defined
        defined.undefine()
    else:
        running = libvirt_qemu.createXML(xml)
        yield running
        running.destroy()


def test_the_disks_of_libvirts_domains_count_wherever_they_are(
    store: Store, domain: libvirt.virDomain, libvirtd: Path, tmp_path: Path
) -> None:
    command = Command(tmp_path, store.folder)
    command.configure("", "[libvirt]", "images_type = qcow2")
    forget_leases(store)

    without = command.json("template", "leases", "--rebuild", "--no-domains")
    assert [each["instance"] for each in without["made"]] == ["5a3c2b1e-0000-4000-8000-000000000001"]
    uri = private_libvirtd.uri(libvirtd, "qemu")
    rebuilt = command.json("template", "leases", "--rebuild", "--connect", uri)

    assert [(each["instance"], each["disk"], each["path"]) for each in rebuilt["made"]] == [
        (domain.UUIDString(), "imported.qcow2", str(store.sources / "imported.qcow2"))
    ]
    assert (rebuilt["dropped"], rebuilt["failed"]) == ([], [])
    shown = command.done("template", "leases").splitlines()
    assert [line.split()[4] for line in shown] == ["SEEN", "yes", "yes"]

    failed = command.run("template", "leases", "--rebuild", "--connect", "qemu:///nowhere")
    assert failed.returncode == 1
    assert failed.stdout == "0 made, 0 dropped\n"
    assert "imagebackend: libvirt: libvirt cannot be reached at qemu:///nowhere" in failed.stderr


def test_leases_of_a_host_that_is_gone_are_dropped_on_purpose_but_for_disks_that_are_there(
    store: Store, tmp_path: Path
) -> None:
    here = store.make()
    templates = store.backend.templates
    file = templates.get("template").file
    shared = Owner("vm2", "disk", "dead", f"{store.folder}/vm2/disk")
    (store.folder / "vm2").mkdir()
    shutil.copyfile(here.path, shared.path)
    local = Owner("vm3", "disk", "dead", f"{store.folder}/vm3/disk")
    for owner in (shared, local):
        templates.lease(file, owner)
    command = Command(tmp_path, store.folder)

    assert templates.prune(templates.policy(minimum_age=0)).swept == []
    listed = command.json("template", "leases", "--host", "dead")["leases"]
    assert [(each["instance"], each["seen"]) for each in listed] == [("vm2", True), ("vm3", False)]
    refused = command.run("template", "leases", "--drop-host", store.conf.host)
    assert refused.returncode == 2
    assert "this one" in refused.stderr
    assert command.run("template", "leases", "--drop-host", "dead", "--rebuild").returncode == 2
    dropped = command.json("template", "leases", "--drop-host", "dead")

    assert ([each["path"] for each in dropped["dropped"]], [each["path"] for each in dropped["kept"]]) == (
        [local.path],
        [shared.path],
    )
    assert leases(store) == {(file, here.path), (file, shared.path)}
