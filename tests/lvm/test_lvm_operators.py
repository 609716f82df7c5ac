# SPDX-License-Identifier: Apache-2.0
"""What operators do with a volume group: the command's templates, pruning, and a helper that is root for an agent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import imagebackend
from imagebackend import exceptions
from imagebackend.cli.application import application
from imagebackend.cli.doctor.logical_volumes import judge_group, look_at_group
from tests.contract.conftest import MIB, TEMPLATE_SIZE, LvmStore, template_content
from tests.lvm.volume_groups import POOL, run, with_lvm_conf

NOBODY = 65534


@pytest.fixture
def store(opened: Callable[..., LvmStore]) -> LvmStore:
    return opened("lvm-thin")


@pytest.fixture
def command(store: LvmStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """Run the command on the store, in this process; return its exit status and what it printed."""
    ini = tmp_path / "imagebackend.conf"
    ini.write_text(
        f"[DEFAULT]\ninstances_path = {store.folder}\n"
        f"[libvirt]\nimages_type = lvm\nimages_volume_group = {store.group.name}\nimages_thin_pool = {POOL}\n"
    )

    def run_command(*words: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            application.main(["--config-file", str(ini), *map(str, words)])
        return left.value.code, capsys.readouterr().out

    return run_command


def test_templates_of_a_pool_are_prepared_listed_removed_and_pruned(
    store: LvmStore, command: Callable[..., tuple[object, str]]
) -> None:
    def listed() -> list[str]:
        status, said = command("--json", "template", "native", "list")
        assert status == 0
        return [each["name"] for each in json.loads(said)["templates"]]

    store.backend.templates.fetch("debian", store.fetch)
    assert listed() == []
    assert command("template", "native", "prepare", "debian")[0] == 0
    assert listed() == ["debian"]
    image = store.image()
    image.cache(lambda target: pytest.fail("fetched again"), "debian", 8 * MIB)

    assert command("template", "native", "remove", "debian")[0] == 0
    assert listed() == []
    assert command("template", "native", "remove", "debian")[0] == 3

    assert command("template", "native", "prepare", "debian")[0] == 0
    status, said = command("template", "prune", "--older-than", "0h")
    assert (status, listed()) == (0, []), said
    # No disk needs the volume that it is a snapshot of.
    assert store.content(image)[:TEMPLATE_SIZE] == template_content()


@pytest.fixture
def everybodys_folder() -> Iterator[Path]:
    """A folder into which every user can go."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def as_nobody(act: Callable[[], object]) -> int:
    """Do ``act`` in a child process that is not root; return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        act()
        code = 0
    except exceptions.PermissionDenied:
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def test_an_agent_that_is_not_root_works_on_disks_through_its_helper(store: LvmStore, everybodys_folder: Path) -> None:
    store.backend.templates.fetch("template", store.fetch)
    store.make(disk_name="another")
    shutil.move(store.folder, everybodys_folder / "instances")
    run("chown", "-R", NOBODY, everybodys_folder / "instances")
    # What sudo does, where nobody configures it.
    helper = shutil.copy("/usr/bin/setpriv", everybodys_folder / "setpriv")
    os.chmod(helper, 0o4755)
    store.conf.set_override("instances_path", str(everybodys_folder / "instances"))
    backend, instance = imagebackend.Backend(store.conf), store.image().instance

    def work() -> None:
        image = backend.image(instance, "disk")
        image.cache(lambda target: pytest.fail("fetched again"), "template", 8 * MIB)
        image.create_snap("one")
        image.resize_image(16 * MIB)
        image.rollback_to_snap("one")
        image.libvirt_info("virtio", "vda", "disk", "none", {})
        assert image.get_disk_size(image.path) == 8 * MIB

    assert as_nobody(work) == 2
    assert not store.image().exists()
    store.conf.set_override("root_helper", f"{helper} --reuid=0 --regid=0 --clear-groups")
    assert as_nobody(work) == 0
    assert store.image().exists()
    assert as_nobody(lambda: backend.image(instance, "disk").remove()) == 0
    assert not store.image().exists()


def test_the_tags_of_the_operator_are_on_all_volumes(store: LvmStore) -> None:
    store.conf.set_override("images_volume_tags", ["tier1", "backup=no"], group="libvirt")
    image = store.make()
    image.create_snap("one")
    image.rollback_to_snap("one")

    volumes = {volume.name: volume for volume in store.group.report() if volume.name != POOL}
    assert len(volumes) == 3  # with the template and the snapshot
    assert Path(image.path).name in volumes
    assert all(volume.tags >= {"tier1", "backup=no"} for volume in volumes.values())


def test_the_doctor_finds_nothing_wrong_with_a_good_group(command: Callable[..., tuple[object, str]]) -> None:
    findings = {each["check"]: each for each in json.loads(command("--json", "doctor")[1])["findings"]}

    group, pool = findings["[libvirt] images_volume_group"], findings["[libvirt] images_thin_pool"]
    assert (group["status"], pool["status"]) == ("ok", "ok")
    assert "1 volumes" in group["message"]
    assert "0.0 % of its data" in pool["message"]


def test_the_doctor_says_what_to_do_about_a_group_that_cannot_be_asked(store: LvmStore) -> None:
    def diagnose(said: str, advice: str) -> None:
        (finding,) = judge_group(look_at_group(store.conf), store.conf)
        assert finding.status == "error"
        assert said in finding.message
        assert advice in finding.advice

    assert as_nobody(lambda: diagnose("lvs needs root: run as root, or set [DEFAULT] root_helper", "root_helper")) == 0
    store.conf.set_override("images_volume_group", "nosuchgroup", group="libvirt")
    diagnose("there is no volume group nosuchgroup", "vgcreate")


def test_a_group_that_the_operator_hides_from_lvm_is_missing(
    store: LvmStore, session_device: str, tmp_path: Path
) -> None:
    def filtered(*patterns: str) -> None:
        words = ", ".join(f'"{pattern}"' for pattern in patterns)
        helper = with_lvm_conf(tmp_path / "lvm", f"devices {{ global_filter = [ {words} ] }}")
        store.conf.set_override("root_helper", " ".join(helper))

    store.make()
    filtered(f"r|^{session_device}$|")
    for act in (store.image().exists, store.image().remove, lambda: store.make(disk_name="other")):
        with pytest.raises(exceptions.InvalidConfiguration, match=f"there is no volume group {store.group.name}"):
            act()
    (finding,) = judge_group(look_at_group(store.conf), store.conf)
    assert "lvm.conf" in finding.advice

    filtered(f"a|^{session_device}$|", "r|.*|")
    assert store.image().exists()
