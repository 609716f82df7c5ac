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
from tests.contract.conftest import MIB, TEMPLATE_SIZE, LvmStore, template_content
from tests.lvm.volume_groups import POOL, run

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
