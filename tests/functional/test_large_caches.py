# SPDX-License-Identifier: Apache-2.0
"""Ten thousand templates and a hundred thousand disks: what looking after them costs, in system calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagebackend import Backend
from imagebackend.templates.leases import Owner
from imagebackend.templates.sources import open_source
from tests import counting
from tests.contract.conftest import Store, configured

SMALL, LARGE = 1_000, 10_000
DISKS = 10

#: How many templates are pruned: each costs syncs, too.
FEW, MANY = 50, 500

SETUP = """
from imagebackend import Backend, load_config
from imagebackend.templates.leases import Owner
conf = load_config()
conf.set_override("instances_path", "{folder}")
conf.set_override("images_type", "qcow2", group="libvirt")
templates = Backend(conf).templates
owner = Owner("vm", "disk", "host", "/vm/disk")
policy = templates.policy(minimum_age=0, total_size_limit=1, free_space_target=1)
def act():
    {work}
"""

#: What is done, and how many system calls each template, with ten disks, may cost.
WORK = {
    "list": ("return templates.catalogue.entries()", 25),
    "dry run": ("return templates.prune(policy, dry_run=True).decisions", 25),
    "lease check": ("return templates.lease_book.leases()", 8 + DISKS),
    "what is in use": ("return [templates.leases(name) for name in templates.names()]", 16 + DISKS),
}


def fill(folder: Path, templates: int) -> None:
    """Have so many templates, and ten times as many disks that depend on them."""
    backend = Backend(configured(folder, "qcow2"))
    first = backend.templates.fetch("template", lambda target: Path(target).write_bytes(b"x" * 4096))
    base, record = folder / "_base", (folder / "_base" / ".records" / "template.json").read_text()
    for number in range(templates):
        name = f"template{number}"
        os.link(first.path, base / name)
        (base / ".records" / f"{name}.json").write_text(record.replace('"template"', f'"{name}"'))
        for disk in range(DISKS):
            instance = f"vm{number}-{disk}"
            backend.templates.lease(name, Owner(instance, "disk", "host", f"{folder}/{instance}/disk"))
    backend.templates.remove("template")


def fill_with_unused(folder: Path, templates: int) -> None:
    """Have so many templates that no disk depends on, each with a tag, and with one that had its name before."""
    backend = Backend(configured(folder, "qcow2"))
    for image in (b"former", b"x"):
        source = folder.parent / "image"
        source.write_bytes(image * 4096)
        backend.templates.pull("template", open_source(str(source), backend.conf), "always")
    base, records = folder / "_base", folder / "_base" / ".records"
    contents = {path.name: path.read_text() for path in records.iterdir()}
    assert len(contents) == 2
    for number in range(templates):
        for name, content in contents.items():
            own = content.replace('"template', f'"template{number}')
            (records / name.replace("template", f"template{number}")).write_text(own)
            file = json.loads(content)["file"]
            os.link(base / file, base / file.replace("template", f"template{number}"))
        backend.templates.catalogue.tag(f"template{number}", f"tag{number}")


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory, where making so many files takes seconds."""
    mounted = tmp_path_factory.mktemp("large")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mounted], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.fixture(scope="module")
def folders(memory: Path) -> dict[int, Path]:
    made = {size: memory / str(size) for size in (SMALL, LARGE)}
    for size, folder in made.items():
        fill(folder, size)
    return made


@pytest.mark.parametrize("work", WORK)
def test_what_it_costs_grows_with_what_there_is_and_no_process_starts(folders: dict[int, Path], work: str) -> None:
    code, most = WORK[work]
    counts = {
        size: counting.count("act()", setup=SETUP.format(folder=folder, work=code), timeout=300)
        for size, folder in folders.items()
    }
    for size, found in counts.items():
        assert (found.processes, found.execs, found.syncs, found.bytes_written) == (0, 0, 0, 0)
        assert found.total <= most * size, (work, size, found.total / size, found.by_name)
    assert counts[LARGE].total <= 1.05 * (LARGE / SMALL) * counts[SMALL].total


def test_all_of_them_are_there(folders: dict[int, Path]) -> None:
    templates = Backend(configured(folders[LARGE], "qcow2")).templates
    entries = templates.catalogue.entries()
    assert [len(entries), {each.users for each in entries}, {each.damage for each in entries}] == [
        LARGE,
        {DISKS},
        {None},
    ]
    decisions = templates.prune(templates.policy(total_size_limit=1), dry_run=True).decisions
    assert {(each.remove, each.reason) for each in decisions} == {(False, f"in use by {DISKS} disks")}
    assert len(templates.lease_book.leases()) == LARGE * DISKS


def test_what_takes_a_template_does_not_grow_with_what_else_is_there(folders: dict[int, Path]) -> None:
    work = """
    with templates.use("template7") as template:
        templates.lease(template.file, owner)
        templates.release(template.file, owner)
"""
    setups = [SETUP.format(folder=folder, work=work.strip()) for folder in folders.values()]
    # Once before, which also loads what is loaded once.
    assert len({counting.count("act()", setup=f"{setup}\nact()").total for setup in setups}) == 1


def rebuild(folder: Path) -> counting.Counts:
    setup = SETUP.format(folder=folder, work="return backend.rebuild_leases()")
    return counting.count("act()", setup=f"{setup}\nbackend = Backend(conf)")


def test_a_rebuild_of_leases_costs_the_same_for_each_disk(tmp_path: Path) -> None:
    few, many = 20, 200
    made, dropped = {}, {}
    for disks in (few, many):
        (tmp_path / str(disks)).mkdir()
        store = Store(tmp_path / str(disks), "qcow2", {})
        first = Path(store.make().path).parent
        copies = [store.folder / f"vm{number}" for number in range(disks - 1)]
        for copy in copies:
            shutil.copytree(first, copy)

        made[disks] = rebuild(store.folder)
        assert len(store.backend.templates.lease_book.leases()) == disks
        for copy in copies:
            shutil.rmtree(copy)
        dropped[disks] = rebuild(store.folder)
        assert len(store.backend.templates.lease_book.leases()) == 1
    for counts in (made, dropped):
        assert {(each.processes, each.execs) for each in counts.values()} == {(0, 0)}
        assert counts[many].total <= 1.05 * (many / few) * counts[few].total


def refuse_quadratic(counts: dict[int, counting.Counts]) -> None:
    assert {(each.processes, each.execs) for each in counts.values()} == {(0, 0)}
    # What is listed again for each of them shows there first.
    few, many = sorted(counts)
    assert counts[many].by_name["getdents64"] <= 1.05 * (many / few) * counts[few].by_name["getdents64"]
    assert counts[many].total <= 1.05 * (many / few) * counts[few].total


def test_pruning_costs_the_same_for_each_template_that_goes(memory: Path) -> None:
    counts = {}
    for templates in (FEW, MANY):
        folder = memory / f"unused{templates}"
        fill_with_unused(folder, templates)
        setup = SETUP.format(folder=folder, work="return templates.prune(templates.policy(minimum_age=0))")
        counts[templates] = counting.count("act()", setup=setup)
        assert [(folder / "_base" / each).exists() for each in ("template0", "template")] == [False, False]
        assert list((folder / "_base" / ".records").iterdir()) == list((folder / "_base" / ".tags").iterdir()) == []
    refuse_quadratic(counts)


def test_a_rebuild_costs_the_same_for_each_template_that_is_in_a_store(memory: Path) -> None:
    counts = {}
    for templates in (FEW, MANY):
        folder = memory / f"stored{templates}"
        fill_with_unused(folder, templates)
        setup = SETUP.format(folder=folder, work="return templates.lease_book.rebuild(evidence, lambda owner: None)")
        setup += """
from imagebackend.templates.lease_book import Evidence
from imagebackend.templates.native import NativeTemplate
def native(template):
    owner = Owner(f"vm-{template.name}", "disk", "", f"rbd:pool/{template.name}")
    return NativeTemplate(template.name, template.sha256, 1, 1, template.fetched, (owner,))
evidence = Evidence(natives=[native(each) for each in templates.list()])
"""
        counts[templates] = counting.count("act()", setup=setup)
        leases = Backend(configured(folder, "qcow2")).templates.lease_book.leases()
        assert len({each.template for each in leases}) == templates + 1
    refuse_quadratic(counts)


def test_pruning_costs_the_same_for_each_ploop_image_that_goes(xfs_folder: Path) -> None:
    counts = {}
    for templates in (5, 50):
        folder = xfs_folder / f"ploop{templates}"
        backend = Backend(configured(folder, "ploop"))
        [store] = backend.native_templates()
        for number in range(templates):
            content = bytes([number]) * 4096
            store.prepare(
                backend.templates.fetch(f"template{number}", lambda target, c=content: Path(target).write_bytes(c))
            )
        assert len(store.list()) == templates
        work = "return templates.prune(templates.policy(native_minimum_age=0))"
        counts[templates] = counting.count(
            "act()", setup=SETUP.format(folder=folder, work=work).replace("qcow2", "ploop")
        )
        assert store.list() == []
        shutil.rmtree(folder)  # the file system is small, and all tests share it
    refuse_quadratic(counts)
