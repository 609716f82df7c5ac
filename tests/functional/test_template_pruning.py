# SPDX-License-Identifier: Apache-2.0
"""Pruning where templates have a form of their own in a store: a real pool, with real clones."""

from __future__ import annotations

from pathlib import Path

import pytest
import rbd

from imagebackend import Backend, exceptions
from imagebackend.images.rbd import Rbd
from imagebackend.templates import eviction
from tests.functional.ceph import Contents, rbd_backend
from tests.functional.cli_command import Command
from tools.private_ceph import Cluster

DAY = 86400


@pytest.fixture
def backend(ceph: Cluster, rbd_pool: str, tmp_path: Path) -> Backend:
    return rbd_backend(ceph, rbd_pool, tmp_path / "instances")


def images(cluster: Cluster, pool: str) -> list[str]:
    with cluster.connect() as connection, connection.open_ioctx(pool) as opened:
        return sorted(rbd.RBD().list(opened))


def test_templates_in_a_pool_go_by_the_same_rules_once_their_clones_are_gone(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    for name in ("used", "unused", "pinned"):
        backend.image(name, "disk").cache(template.fetch, name)
        if name != "used":
            backend.image(name, "disk").remove()
    backend.templates.catalogue.pin("pinned")
    templates = backend.templates

    kept = templates.prune()
    assert (kept.removed, kept.failed, kept.swept) == ([], [], [])
    report = templates.prune(templates.policy(native_minimum_age=0))

    assert [(each.store, each.name) for each in report.removed] == [("rbd", "unused")]
    assert report.reclaimed == report.removed[0].own >= 8 << 20
    reasons = {each.candidate.name: each.reason for each in report.decisions if each.candidate.store}
    assert (reasons["used"], reasons["pinned"]) == ("in use by 1 disk", "pinned")
    assert images(ceph, rbd_pool) == ["template:pinned", "template:used", "used_disk"]
    # That of the cache is younger than a day, and imports it again.
    assert list(templates.names()) == ["pinned", "unused", "used"]
    backend.image("unused", "disk").cache(lambda target: pytest.fail("fetched again"), "unused")


def test_what_a_killed_import_left_in_the_pool_is_swept_up(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    backend.image("used", "disk").cache(template.fetch, "used")
    with ceph.connect() as connection, connection.open_ioctx(rbd_pool) as opened:
        rbd.RBD().create(opened, "partial:template:left", 1 << 20)

    assert backend.templates.prune().swept == ["rbd:partial:template:left"]
    assert images(ceph, rbd_pool) == ["template:used", "used_disk"]


def test_a_cluster_that_does_not_answer_keeps_nobody_from_pruning_files(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend = rbd_backend(ceph, "no-such-pool", tmp_path / "instances")
    backend.templates.fetch("template", template.fetch)

    report = backend.templates.prune(backend.templates.policy(minimum_age=0))

    assert [each.name for each in report.removed] == ["template"]
    assert {what for what, _ in report.failed} == {"rbd"}
    assert all(isinstance(error, exceptions.ImageBackendError) for _, error in report.failed)


def test_a_template_in_the_pool_that_is_cloned_after_the_decision_stays(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents
) -> None:
    backend.templates.fetch("template", template.fetch)
    stores = [Rbd.native_templates(backend.conf)]
    stores[0].prepare(backend.templates.get("template"))
    policy = backend.templates.policy(native_minimum_age=0)
    report = eviction.decide(backend.templates._folder, stores, policy)
    assert [each.candidate.store for each in report.decisions if each.remove] == ["rbd"]

    backend.image("new", "disk").cache(template.fetch, "template")
    eviction.evict(backend.templates._folder, stores, policy, report)

    assert (report.removed, report.failed) == ([], [])
    assert images(ceph, rbd_pool) == ["new_disk", "template:template"]


@pytest.mark.parametrize("size", [None, 64 << 20])
def test_what_is_made_ahead_spares_the_first_guest_the_import(
    backend: Backend, ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path, size: int | None
) -> None:
    command = Command(tmp_path)
    command.configure(
        "",
        "[libvirt]",
        "images_type = rbd",
        f"images_rbd_pool = {rbd_pool}",
        f"images_rbd_ceph_conf = {ceph.configuration}",
    )

    pulled = command.json("template", "pull", "--for-backend", "rbd", "--name", "debian", template.path)

    assert (pulled["pulled"], pulled["stores"]) == (True, ["rbd"])
    assert images(ceph, rbd_pool) == ["template:debian"]
    backend.image("vm", "disk").cache(lambda target: pytest.fail("fetched again"), "debian", size)
    assert images(ceph, rbd_pool) == ["template:debian", "vm_disk"]
    assert command.done("template", "pull", "--for-backend", "rbd", "--name", "debian", template.path) == (
        "template debian is there: raw, 24 MiB; ready in rbd\n"
    )
