# SPDX-License-Identifier: Apache-2.0
"""The life of templates and disks, by the executable and with the real tools."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.functional import filesystems, web
from tests.functional.cli_command import EXECUTABLE, MIB, Command
from tests.functional.image_building import held
from tools import private_libvirtd
from tools.guest_image import ROOT_SAYS, GuestImage


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def content(path: object, disk_format: str, folder: Path) -> bytes:
    target = folder / "content"
    subprocess.run(["qemu-img", "convert", "-f", disk_format, "-O", "raw", str(path), target], check=True, timeout=60)
    return target.read_bytes()


def write(path: object, disk_format: str, pattern: int) -> None:
    """Write a megabyte to the start of a disk, as a guest would."""
    command = ["qemu-io", "-f", disk_format, "-c", f"write -P {pattern} 0 1M", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_a_template_comes_from_a_web_server_and_becomes_raw(command: Command) -> None:
    image = command.image()
    qcow2 = command.folder / "debian-12.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow2], check=True, timeout=60)
    with web.nginx(command.folder / "nginx") as server:
        sha256 = server.put(qcow2.name, qcow2.read_bytes())
        url = f"{server.url}/{qcow2.name}"
        wrong = command.run("template", "add", "--checksum", f"sha256:{'0' * 64}", url)
        finished = command.run("template", "add", "--format", "qcow2", "--checksum", f"sha256:{sha256}", url)

    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "sha256 is" in wrong.stderr
    assert finished.returncode == 0, finished
    assert finished.stdout == "template debian-12 added: raw, 8 MiB\n"
    assert "Fetching debian-12: 100 % of" in finished.stderr
    assert "Converting debian-12: 100 % of" in finished.stderr
    shown = command.json("template", "show", "debian-12")
    assert (shown["format"], shown["source_format"], shown["sha256"]) == ("raw", "qcow2", sha256)
    assert shown["source"] == url
    assert Path(shown["path"]).read_bytes() == image.read_bytes()
    command.done("template", "verify", "debian-12")


def test_the_life_of_a_qcow2_disk(command: Command) -> None:
    image = command.image()
    command.done("template", "add", "--name", "base", image)
    made = command.json("disk", "create", "vm1", "disk", "--template", "base", "--size", "16M")
    path = made["path"]
    assert content(path, "qcow2", command.folder) == image.read_bytes() + bytes(8 * MIB)

    write(path, "qcow2", 1)
    command.done("disk", "snapshot", "create", "vm1", "disk", "first")
    write(path, "qcow2", 2)
    command.done("disk", "resize", "vm1", "disk", "32M")
    again = command.run("disk", "snapshot", "create", "vm1", "disk", "first")
    assert (again.returncode, again.stdout) == (4, "")
    snapshots = command.json("disk", "snapshot", "list", "vm1", "disk")["snapshots"]
    assert [(each["name"], each["virtual_size"]) for each in snapshots] == [("first", 16 * MIB)]
    assert "first" in command.done("disk", "snapshot", "list", "vm1", "disk")

    command.done("disk", "snapshot", "rollback", "vm1", "disk", "first")
    assert command.json("disk", "show", "vm1", "disk")["size"] == 16 * MIB
    assert content(path, "qcow2", command.folder)[:MIB] == b"\1" * MIB
    command.done("disk", "snapshot", "remove", "vm1", "disk", "first")
    assert command.run("disk", "snapshot", "remove", "vm1", "disk", "first").returncode == 3

    before = content(path, "qcow2", command.folder)
    target = command.folder / "out.vmdk"
    finished = command.run("disk", "extract", "--format", "vmdk", "vm1", "disk", target)
    assert "Extracting disk: 100 % of" in finished.stderr
    assert content(target, "vmdk", command.folder) == before

    assert command.run("template", "remove", "base").returncode == 5
    command.done("disk", "flatten", "vm1", "disk")
    shown = command.json("disk", "show", "vm1", "disk")
    assert (shown["backing_files"], shown["chain_depth"]) == ([], 0)
    command.done("template", "remove", "base")
    assert content(path, "qcow2", command.folder) == before

    command.done("disk", "remove", "vm1", "disk")
    assert command.files() == set()


def test_the_life_of_a_raw_disk_on_a_file_system_that_shares_blocks(xfs_folder: Path, tmp_path: Path) -> None:
    command = Command(tmp_path, xfs_folder / "instances")
    command.configure("use_cow_images = false")
    image = command.image()
    command.done("template", "add", "--name", "base", image)
    made = command.json("disk", "create", "vm1", "disk", "--template", "base", "--size", "16M")
    path = Path(made["path"])
    assert made["format"] == "raw"
    assert filesystems.shared(path) == 4 * MIB

    command.done("disk", "snapshot", "create", "vm1", "disk", "first")
    write(path, "raw", 2)
    command.done("disk", "snapshot", "rollback", "vm1", "disk", "first")

    assert path.read_bytes() == image.read_bytes() + bytes(8 * MIB)
    command.done("disk", "remove", "vm1", "disk")
    assert [name for name in command.files() if name.startswith("vm1")] == []


@pytest.mark.parametrize(
    ("options", "kind"),
    [(("--ephemeral",), "ext4"), (("--ephemeral", "--filesystem", "vfat"), "vfat"), (("--swap",), "swap")],
)
def test_a_disk_is_formatted(command: Command, options: tuple[str, ...], kind: str) -> None:
    options = (*options, "--label", "LABEL1", "--size", "64M", "--type", "raw")
    made = command.json("disk", "create", "vm1", "disk.x", *options)

    blkid = ["blkid", "-p", "-o", "export", made["path"]]
    told = subprocess.run(blkid, check=True, capture_output=True, text=True, timeout=30).stdout
    found = dict(line.split("=", 1) for line in told.splitlines())
    assert (found["TYPE"], found["LABEL"], made["size"]) == (kind, "LABEL1", 64 * MIB)
    assert command.json("template", "list")["templates"] == []


@pytest.mark.parametrize(
    ("option", "template"), [("--ephemeral", "ephemeral_67108864_ext4"), ("--swap", "swap_67108864")]
)
def test_formatted_overlays_share_a_template_as_those_of_an_agent_do(
    command: Command, option: str, template: str
) -> None:
    for instance in ("vm1", "vm2"):
        made = command.json("disk", "create", instance, "disk.x", option, "--size", "64M", "--type", "qcow2")
        assert (made["template"], made["size"]) == (template, 64 * MIB)

    assert [each["name"] for each in command.json("template", "list")["templates"]] == [template]


def test_a_running_guest_sees_its_disk_grow(libvirtd: Path, start_guest, guest: GuestImage, command: Command) -> None:
    command.done("template", "add", "--name", "guest", guest.disk)
    command.done("disk", "create", "vm1", "disk", "--template", "guest", "--size", "128M")
    running = start_guest(command.done("disk", "xml", "vm1", "disk"))
    running.wait_for(ROOT_SAYS)
    domain = ["--connect", private_libvirtd.uri(libvirtd, "qemu"), "--domain"]

    refused = command.run("disk", "resize", "vm1", "disk", "256M")
    unknown = command.run("disk", "resize", *domain, "nobody", "vm1", "disk", "256M")
    grown = command.json("disk", "resize", *domain, running.domain.name(), "vm1", "disk", "256M")

    assert refused.returncode == 5
    assert "stop the guest first" in refused.stderr
    assert (unknown.returncode, "has no such domain" in unknown.stderr) == (3, True)
    assert (grown["size"], grown["in_use"]) == (256 * MIB, True)
    running.wait_for(f"imagebackend-guest: size=({256 * MIB})")
    for words in (("remove",), ("snapshot", "create"), ("flatten",)):
        name = ("s",) if words[0] == "snapshot" else ()
        assert command.run("disk", *words, "vm1", "disk", *name).returncode == 5
    running.domain.destroy()
    command.done("disk", "remove", "vm1", "disk")


def test_a_libvirt_that_is_not_there_is_told(command: Command) -> None:
    command.done("disk", "create", "vm1", "disk", "--blank", "--size", "1M")

    finished = command.run(
        "disk", "resize", "--connect", "qemu:///system?socket=/nowhere", "--domain", "x", "vm1", "disk", "2M"
    )

    assert finished.returncode == 1
    assert finished.stderr.startswith("imagebackend: libvirt cannot be reached at qemu:///system?socket=/nowhere: ")
    assert len(finished.stderr.splitlines()) == 1


@pytest.mark.parametrize("disk_format", ["raw", "qcow2"])
def test_a_disk_in_use_is_left_alone(command: Command, disk_format: str) -> None:
    made = command.json("disk", "create", "vm1", "disk", "--blank", "--size", "8M", "--type", disk_format)
    before = hashlib.sha256(Path(made["path"]).read_bytes()).digest()

    with held(disk_format, made["path"]):
        assert command.json("disk", "show", "vm1", "disk")["in_use"] is True
        for words in (("remove", "vm1", "disk"), ("resize", "vm1", "disk", "16M"), ("extract", "vm1", "disk", "out")):
            error = command.json("disk", *words)["error"]
            assert (error["type"], error["exit_status"], error["name"]) == ("DiskInUse", 5, made["path"])

    assert hashlib.sha256(Path(made["path"]).read_bytes()).digest() == before
    assert not (command.folder / "out").exists()


def test_the_version_is_that_of_the_package() -> None:
    told = subprocess.run([EXECUTABLE, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout

    assert told.startswith("imagebackend ")
    assert told.split()[1][0].isdigit()


def test_bash_completes_commands_and_names(command: Command) -> None:
    command.done("template", "add", "--name", "debian", command.image())
    script = f"""
        PATH={EXECUTABLE.parent}:$PATH
        eval "$(_IMAGEBACKEND_COMPLETE=bash_source imagebackend)"
        complete -p imagebackend >&2
        COMP_WORDS=(imagebackend --config-file {command.ini} template show d)
        COMP_CWORD=5
        _imagebackend_completion imagebackend
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """

    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert told.stdout == "debian\n"
    assert "_imagebackend_completion" in told.stderr


def test_the_manual_page_is_clean() -> None:
    page = Path(__file__).parents[2] / "docs" / "man" / "imagebackend.1"

    # -P-cbou: without colours, boldface and underlining.
    shown = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", page], capture_output=True, text=True, check=True, timeout=60
    )

    assert shown.stderr == ""
    assert "disk snapshot rollback" in shown.stdout
