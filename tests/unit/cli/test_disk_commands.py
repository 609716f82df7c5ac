# SPDX-License-Identifier: Apache-2.0
"""``imagebackend disk`` on real disks; what needs qemu-img is in tests/functional."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.unit.cli.conftest import MIB, Command


@pytest.fixture
def cached(command: Command) -> Command:
    """The command, with the template ``base`` in its cache."""
    command.done("template", "add", "--name", "base", command.raw_image())
    return command


@pytest.mark.parametrize("image_type", ["qcow2", "raw"])
def test_a_disk_is_made_from_a_template(cached: Command, image_type: str) -> None:
    made = cached.json("disk", "create", "vm1", "disk", "--template", "base", "--size", "20M", "--type", image_type)

    path = cached.instances / "vm1" / "disk"
    assert path.is_file()
    assert (made["path"], made["type"], made["format"], made["size"]) == (str(path), image_type, image_type, 20 * MIB)
    assert made["template"] == ("base" if image_type == "qcow2" else None)
    assert made["in_use"] is False
    # Found again by its record, whatever type is configured.
    assert cached.json("disk", "show", "vm1", "disk") == made
    assert cached.json("disk", "list", "vm1") == {"disks": [made]}


def test_a_disk_is_as_large_as_its_template_unless_told(cached: Command) -> None:
    assert cached.json("disk", "create", "vm1", "disk", "--template", "base")["size"] == MIB


def test_the_type_is_as_configured_unless_told(cached: Command) -> None:
    cached.configure("use_cow_images = false")

    assert cached.json("disk", "create", "vm1", "disk", "--template", "base")["format"] == "raw"


def test_a_template_that_is_not_in_the_cache_is_fetched_if_told_from_where(command: Command) -> None:
    image = command.raw_image("debian-12.raw")

    command.done("disk", "create", "vm1", "disk", "--from", image)
    command.done("disk", "create", "vm1", "disk2", "--template", "other", "--from", image, "--format", "raw")

    names = [each["name"] for each in command.json("template", "list")["templates"]]
    assert names == ["debian-12", "other"]


def test_a_template_that_is_in_the_cache_is_not_fetched(cached: Command) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base", "--from", cached.folder / "no-such-file")


def test_a_blank_raw_disk_reads_as_zeros(command: Command) -> None:
    command.done("disk", "create", "vm1", "data", "--blank", "--size", "1M", "--type", "raw")

    assert (command.instances / "vm1" / "data").read_bytes() == bytes(MIB)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--template", "missing"), 3, "add it with 'imagebackend template add', or say --from"),
        (("--template", "base", "--size", "512K"), 1, "at least 1048576 bytes needed"),
        (("--template", "base", "--size", "1G", "--type", "zfs"), 7, "'zfs' is not one of"),
        (("--template", "../base"), 2, "template name '../base'"),
        (("--template", "other", "--from", "no-such-file"), 1, "No such file"),
        (("--template", "other", "--from", "image.raw", "--checksum", "md5:" + "0" * 32), 1, "md5 is"),
        (("--template", "base", "--blank", "--size", "1M"), 2, "without a template"),
        (("--template", "base", "--checksum", "md5:0"), 2, "for --from"),
        (("--template", "base", "--label", "x"), 2, "--label for"),
        (("--swap", "--size", "1M", "--filesystem", "ext4"), 2, "--filesystem is for"),
        (("--blank",), 2, "needs a --size"),
        (("--size", "1M"), 2, "one of --template, --from, --blank, --ephemeral, --swap is needed"),
        (("--ephemeral", "--filesystem", "zfs", "--size", "1M"), 2, "'zfs'"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(
    cached: Command, words: tuple[str, ...], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cached.folder)
    before = cached.files()

    result = cached.run("disk", "create", "vm1", "disk", *words)

    assert result.exit_code == status
    assert message in result.stderr
    assert cached.files() == before
    assert cached.json("template", "show", "base")["users"] == []


@pytest.mark.parametrize("name", ["../x", "x/y", "rbd:x", "json:{}", "a,b", "a\nb", "x" * 300, "\udcff", ""])
def test_a_hostile_name_is_wrong_usage_everywhere(command: Command, name: str) -> None:
    for words in (
        ("create", name, "disk", "--blank", "--size", "1M"),
        ("create", "vm1", name, "--blank", "--size", "1M"),
        ("show", name, "disk"),
        ("show", "vm1", name),
        ("list", name),
        ("remove", "vm1", name),
        ("xml", "vm1", name),
        ("snapshot", "list", "vm1", name),
    ):
        result = command.run("disk", *words)
        assert result.exit_code == 2, words
        assert "imagebackend: " in result.stderr
        assert "Traceback" not in result.stderr
    assert not command.instances.exists()


def test_a_disk_is_not_made_twice(cached: Command) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base")

    for words in (("--template", "base"), ("--blank", "--size", "2M")):
        result = cached.run("disk", "create", "vm1", "disk", *words)
        assert result.exit_code == 4
        assert "exists already" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("show", "vm1", "disk"),
        ("xml", "vm1", "disk"),
        ("resize", "vm1", "disk", "1G"),
        ("flatten", "vm1", "disk"),
        ("extract", "vm1", "disk", "/tmp/out"),
        ("remove", "vm1", "disk"),
        ("snapshot", "create", "vm1", "disk", "s"),
        ("snapshot", "list", "vm1", "disk"),
        ("snapshot", "rollback", "vm1", "disk", "s"),
        ("snapshot", "remove", "vm1", "disk", "s"),
    ],
)
def test_a_disk_that_is_not_there_is_not_found(command: Command, words: tuple[str, ...]) -> None:
    result = command.run("disk", *words)

    assert result.exit_code == 3
    assert f"imagebackend: disk {command.instances}/vm1/disk does not exist" in result.stderr
    assert command.json("disk", *words)["error"]["type"] == "DiskNotFound"


def test_disks_are_listed_by_instance_and_name(cached: Command) -> None:
    for instance, disk in (("vm2", "disk"), ("vm1", "disk.swap"), ("vm1", "disk")):
        cached.done("disk", "create", instance, disk, "--template", "base", "--size", "2M")

    lines = [line.split() for line in cached.done("disk", "list").splitlines()]

    assert lines[0] == ["INSTANCE", "DISK", "FORMAT", "SIZE", "ALLOCATED", "TEMPLATE"]
    assert [line[:2] for line in lines[1:]] == [["vm1", "disk"], ["vm1", "disk.swap"], ["vm2", "disk"]]
    assert [each["instance"] for each in cached.json("disk", "list", "vm2")["disks"]] == ["vm2"]


def test_no_disks_are_an_empty_list(command: Command) -> None:
    assert command.json("disk", "list") == {"disks": []}
    assert command.json("disk", "list", "vm1") == {"disks": []}


def test_a_damaged_disk_does_not_hide_the_others(cached: Command) -> None:
    for disk in ("a", "b"):
        cached.done("disk", "create", "vm1", disk, "--template", "base")
    (cached.instances / "vm1" / "a").write_bytes(b"QFI\xfb" + b"\xff" * 200)

    listed = cached.json("disk", "list")["disks"]

    assert [(each["disk"], "error" in each) for each in listed] == [("a", True), ("b", False)]
    assert "unacceptable" in cached.done("disk", "list").splitlines()[1]


def test_the_xml_is_what_libvirt_takes(cached: Command) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base")
    options = ["--bus", "scsi", "--dev", "sdb", "--cache-mode", "writeback", "--boot-order", "1", "--unit", "3"]
    options += ["--serial", "S1", "--extra-spec", "quota:disk_read_iops_sec=500"]

    text = cached.done("disk", "xml", *options, "vm1", "disk")

    disk = ElementTree.fromstring(text)
    values = {
        "driver/@cache": "writeback",
        "target/@bus": "scsi",
        "target/@dev": "sdb",
        "boot/@order": "1",
        "address/@unit": "3",
        "source/@file": str(cached.instances / "vm1" / "disk"),
    }
    found = {path: disk.find(path.split("/@")[0]).get(path.split("/@")[1]) for path in values}  # type: ignore[union-attr]
    assert found == values
    assert disk.findtext("serial") == "S1"
    assert disk.findtext("iotune/read_iops_sec") == "500"
    assert cached.json("disk", "xml", *options, "vm1", "disk")["xml"].rstrip("\n") == text.rstrip("\n")


@pytest.mark.parametrize(
    "option",
    [
        ("--bus", "nvme2"),
        ("--cache-mode", "fast"),
        ("--boot-order", "0"),
        ("--extra-spec", "quota"),
        ("--extra-spec", "quota:disk_read_iops_sec=many"),
    ],
)
def test_what_libvirt_would_refuse_is_wrong_usage(cached: Command, option: tuple[str, str]) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base")

    assert cached.run("disk", "xml", *option, "vm1", "disk").exit_code == 2


def test_a_raw_disk_grows_and_never_shrinks(cached: Command) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base", "--type", "raw")

    assert cached.json("disk", "resize", "vm1", "disk", "4M")["size"] == 4 * MIB
    assert cached.json("disk", "resize", "vm1", "disk", "4M")["size"] == 4 * MIB
    error = cached.json("disk", "resize", "vm1", "disk", "2M")["error"]
    assert (error["type"], error["size"], error["required"]) == ("DiskTooSmall", 2 * MIB, 4 * MIB)
    assert (cached.instances / "vm1" / "disk").stat().st_size == 4 * MIB


def test_a_connection_without_a_domain_is_wrong_usage(cached: Command) -> None:
    assert cached.run("disk", "resize", "--connect", "qemu:///system", "vm1", "disk", "4M").exit_code == 2


def test_a_raw_disk_is_extracted_whole(cached: Command) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base", "--type", "raw")
    target = cached.folder / "out.raw"

    document = cached.json("disk", "extract", "vm1", "disk", target)

    assert document == {"target": str(target), "file_size": MIB}
    assert target.read_bytes() == (cached.folder / "image.raw").read_bytes()


def test_a_disk_is_removed_with_everything_that_was_kept_of_it(cached: Command) -> None:
    before = cached.files()
    made = cached.json("disk", "create", "vm1", "disk", "--template", "base")

    assert cached.json("disk", "remove", "vm1", "disk") == {"removed": made["path"]}

    assert cached.files() == before
    assert not (cached.instances / "vm1").exists()
    cached.done("template", "remove", "base")


def test_removing_a_disk_that_is_gone_gives_up_its_lease(cached: Command) -> None:
    made = cached.json("disk", "create", "vm1", "disk", "--template", "base")
    Path(made["path"]).unlink()
    assert cached.run("template", "remove", "base").exit_code == 5

    assert cached.run("disk", "remove", "vm1", "disk").exit_code == 3

    cached.done("template", "remove", "base")


def test_a_record_that_cannot_be_read_is_told_with_the_way_out(cached: Command) -> None:
    cached.done("disk", "create", "vm1", "disk", "--template", "base")
    record = cached.instances / "vm1" / "disk.info"
    record.write_text(json.dumps([]))

    result = cached.run("disk", "show", "vm1", "disk")

    assert result.exit_code == 1
    assert f"{record}: not an object of strings; write it anew" in result.stderr


def test_a_storage_without_snapshots_does_not_pretend(command: Command, tmp_path: Path) -> None:
    # Reflink switched off is a storage without snapshots, on every file system.
    command.configure("reflink = never")
    command.done("disk", "create", "vm1", "disk", "--blank", "--size", "1M", "--type", "raw")

    for words in (("create", "s"), ("rollback", "s"), ("remove", "s")):
        result = command.run("disk", "snapshot", words[0], "vm1", "disk", words[1])
        assert result.exit_code == 1
        assert "a snapshot is not supported" in result.stderr
    assert command.json("disk", "snapshot", "list", "vm1", "disk") == {"snapshots": []}
