# SPDX-License-Identifier: Apache-2.0
"""``imagebackend template`` on a real cache; what needs qemu-img is in tests/functional."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import click
import pytest

from imagebackend.cli.template import default_name
from tests.unit.cli.conftest import MIB, Command


def test_a_good_file_is_acceptable_and_nothing_is_touched(command: Command) -> None:
    image = command.raw_image()
    command.ini.write_text("[DEFAULT]\ninstances_path = /proc/nowhere\n")
    before = image.stat()

    document = command.json("template", "check", "--format", "raw", image)

    after = image.stat()
    assert document["acceptable"] is True
    assert (document["format"], document["virtual_size"]) == ("raw", MIB)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert sorted(os.listdir(command.folder)) == ["image.raw", "imagebackend.conf"]


def test_a_check_reads_no_configuration(command: Command) -> None:
    command.configure("use_cow_images = perhaps")

    assert command.run("template", "check", "--format", "raw", command.raw_image()).exit_code == 0


def test_a_file_that_is_not_what_it_is_said_to_be_is_refused_with_the_reason(command: Command) -> None:
    result = command.run("template", "check", "--format", "qcow2", command.raw_image())

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("imagebackend: image ")
    assert "claimed to be qcow2, but it is raw" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("claimed", ["luks", "qed", "parallels", "docker"])
def test_a_format_that_is_no_template_is_refused(command: Command, claimed: str) -> None:
    assert command.run("template", "check", "--format", claimed, command.raw_image()).exit_code == 1


def test_a_folder_and_a_fifo_are_refused_at_once(command: Command) -> None:
    os.mkfifo(command.folder / "fifo")

    for path in (command.folder, command.folder / "fifo"):
        result = command.run("template", "check", "--format", "raw", path)
        assert result.exit_code == 1
        assert "not a regular file" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "raw", "no-such-file"),
        ("--format", "raw", "x" * 300),
        ("--format", "nonsense", "image.raw"),
        ("--format", "raw"),
        ("image.raw",),
        ("--format", "raw", "image.raw", "another"),
        ("--nonsense", "--format", "raw", "image.raw"),
    ],
)
def test_what_cannot_be_checked_is_wrong_usage(
    command: Command, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    command.raw_image()
    monkeypatch.chdir(command.folder)

    result = command.run("template", "check", *words)

    assert result.exit_code == 2
    assert "Usage: imagebackend template check" in result.stderr
    assert "\nimagebackend: " in result.stderr


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("debian-12.qcow2", "debian-12"),
        ("/srv/images/debian-12.img", "debian-12"),
        ("./a:b/debian-12", "debian-12"),
        ("file:///srv/debian%2D12.raw", "debian-12"),
        ("https://user:secret@images.example/debian-12-amd64.qcow2?signature=a/b.c#part", "debian-12-amd64"),
        ("HTTP://images.example/debian-12.raw", "debian-12"),
        ("debian-12.tar.gz", "debian-12.tar.gz"),
        ("https://host/debian-12.raw.xz", "debian-12"),
        ("/images/debian-12.qcow2.zst", "debian-12"),
        ("rbd:images/debian-12@snap", "debian-12"),
        ("rbd:images/tenant/debian-12", "debian-12"),
        ("RBD://43ba3e63-fd79-4af3-9a49-74db8899da9e/images/debian-12/snap", "debian-12"),
        ("glance:cloud/debian-12", "debian-12"),
        ("glance:debian%2D12", "debian-12"),
    ],
)
def test_a_template_is_called_after_its_source(url: str, name: str) -> None:
    assert default_name(url) == name


@pytest.mark.parametrize(
    "url", ["https://images.example/", "/srv/-x.qcow2", "/srv/.qcow2", "a,b", "rbd:", "glance:", "x" * 200, "é", ""]
)
def test_a_source_with_no_usable_name_needs_one(url: str) -> None:
    with pytest.raises(click.UsageError, match="give a --name"):
        default_name(url)


def test_the_life_of_a_template(command: Command) -> None:
    image = command.raw_image("debian-12.raw")
    sha256 = hashlib.sha256(image.read_bytes()).hexdigest()

    added = command.json("template", "add", "--format", "raw", "--checksum", f"sha256:{sha256}", image)
    assert (added["name"], added["sha256"], added["virtual_size"]) == ("debian-12", sha256, MIB)
    assert Path(added["path"]).read_bytes() == image.read_bytes()

    listed = command.json("template", "list")
    assert [each["name"] for each in listed["templates"]] == ["debian-12"]
    assert listed["damaged"] == []
    assert command.done("template", "list").splitlines()[1].split()[:4] == ["debian-12", "raw", "1", "MiB"]

    shown = command.json("template", "show", "debian-12")
    assert (shown | added, shown["users"]) == (shown, [])
    assert f"sha256 of source: {sha256}" in command.done("template", "show", "debian-12")

    assert command.json("template", "verify", "debian-12") == {"templates": [{"name": "debian-12"}]}
    assert command.done("template", "remove", "debian-12") == "template debian-12 removed\n"
    assert command.json("template", "list")["templates"] == []
    assert command.files() == set()


def test_a_template_is_not_added_twice(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.raw_image())

    result = command.run("template", "add", "--name", "base", command.raw_image("other.raw", 2 * MIB))

    assert result.exit_code == 4
    assert "template base exists already" in result.stderr
    assert command.json("template", "show", "base")["virtual_size"] == MIB


def test_a_template_is_pulled_as_the_policy_says(command: Command) -> None:
    image = command.raw_image("base.raw")
    assert command.json("template", "pull", image)["pulled"] is True
    assert command.done("template", "pull", image) == "template base is there: raw, 1 MiB\n"
    assert command.done("template", "pull", "--policy", "newer", image) == "template base is up to date: raw, 1 MiB\n"
    first = command.json("template", "show", "base")

    command.raw_image("base.raw", 2 * MIB)
    assert command.json("template", "pull", "--policy", "never", image)["pulled"] is False
    assert command.done("template", "pull", "--policy", "newer", image) == "template base pulled: raw, 2 MiB\n"
    assert command.json("template", "show", f"base@{first['sha256'][:16]}")["file"] == first["file"] == "base"

    image.unlink()
    result = command.run("template", "pull", "--policy", "newer", image)
    assert (result.exit_code, result.stdout) == (0, "template base is up to date: raw, 2 MiB\n")
    assert "template base stays as it is: cannot fetch file://" in result.stderr
    assert command.run("template", "pull", "--policy", "always", image).exit_code == 1
    assert command.run("template", "pull", "--policy", "never", "--name", "other", image).exit_code == 3
    assert command.run("template", "pull", "--policy", "perhaps", image).exit_code == 2


def test_several_images_are_pulled_at_a_time_and_one_that_fails_does_not_keep_the_others(command: Command) -> None:
    images = [command.raw_image(f"image{number}.raw") for number in range(3)]
    images[1].unlink()

    result = command.run("template", "pull", "--at-once", "2", *images)

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"template image{number} pulled: raw, 1 MiB" for number in (0, 2)]
    assert "imagebackend: cannot fetch file://" in result.stderr
    document = command.json("template", "pull", *images)["templates"]
    assert [each["name"] for each in document] == ["image0", "image1", "image2"]
    assert [each.get("pulled") for each in document] == [False, None, False]
    assert document[1]["error"]["type"] == "FetchFailed"


def test_what_is_pulled_is_called_something_of_its_own(command: Command) -> None:
    image = command.raw_image("base.raw")
    for words in ((image, image), ("--name", "x", image, "other.raw"), ("--checksum", "md5:0", image, "other.raw")):
        assert command.run("template", "pull", *words).exit_code == 2
    assert command.run("template", "pull", "--at-once", "0", image).exit_code == 2
    assert command.run("template", "pull", "--for-backend", "nothing", image).exit_code != 0
    assert command.json("template", "pull", "--for-backend", "qcow2", image)["stores"] == []


def test_a_disk_is_made_from_a_template_by_its_tag(command: Command) -> None:
    command.done("template", "add", "--name", "base-1", command.raw_image())
    assert command.done("template", "tag", "base-1", "stable") == "template base-1 is stable, too\n"
    assert command.json("disk", "create", "vm1", "disk", "--template", "stable")["size"] == MIB
    assert command.json("template", "show", "base-1")["users"][0]["instance"] == "vm1"
    assert command.json("template", "untag", "stable", "oldest")["tags"][1]["error"]["exit_status"] == 3
    assert command.run("disk", "create", "vm2", "disk", "--template", "stable").exit_code == 3


def test_templates_are_listed_by_what_is_asked_for(command: Command) -> None:
    image = command.raw_image("first.raw")
    command.done("template", "add", image)
    command.done("template", "add", command.raw_image("second.raw"))
    command.done("disk", "create", "vm1", "disk", "--template", "first")
    assert (
        command.done("template", "label", "first", "os=debian", "x=y") == "labels of template first: os=debian, x=y\n"
    )
    assert command.json("template", "label", "first", "--remove", "x")["labels"] == {"os": "debian"}
    command.raw_image("first.raw", 2 * MIB)
    command.done("template", "pull", "--policy", "newer", image)

    def listed(*options: str) -> list[str]:
        return [each["name"].partition("@")[0] + "@" * each["dangling"] for each in found(*options)]

    def found(*options: str) -> list[dict[str, Any]]:
        templates: list[dict[str, Any]] = command.json("template", "list", *options)["templates"]
        return templates

    assert listed() == ["first", "first@", "second"]
    assert listed("--in-use") == ["first@"]
    assert listed("--unused") == ["first", "second"]
    assert listed("--dangling") == ["first@"]
    assert listed("--label", "os") == listed("--label", "os=debian") == ["first", "first@"]
    assert listed("--label", "os=fedora") == []
    assert listed("--format", "qcow2") == []
    assert listed("--format", "raw", "--backend", "qcow2") == ["first", "first@", "second"]
    assert listed("--before", "2020-01-01") == listed("--since", "2100-01-01T12:00") == []
    assert listed("--since", "2020-01-01", "--before", "2100-01-01") == ["first", "first@", "second"]
    assert listed("--before", "first@" + found("--dangling")[0]["sha256"][:16]) == []
    assert command.run("template", "list", "--before", "no-such-template").exit_code == 3
    assert command.run("template", "list", "--backend", "nonsense").exit_code == 7
    assert command.done("template", "list").splitlines()[0].split()[-1] == "NOTES"


def test_everything_that_is_known_can_be_inspected(command: Command) -> None:
    image = command.raw_image("base.raw")
    command.done("template", "add", image)
    command.done("template", "pin", "base")
    (inspected,) = command.json("template", "inspect", "base")["templates"]
    assert [each["event"] for each in inspected["history"]] == ["fetched", "pinned"]
    assert inspected["etag"]
    text = command.done("template", "inspect", "base", "base")
    assert text.count(f"history:           {inspected['history'][0]['time']} fetched ({image.as_uri()})") == 2
    assert "pinned:            yes" in text
    command.done("template", "unpin", "base")
    assert "pinned:            no" in command.done("template", "inspect", "base")
    assert command.run("template", "inspect", "base", "none").exit_code == 3


def test_what_the_cache_takes_is_told(command: Command) -> None:
    assert command.json("template", "du")["parts"]["templates"]["count"] == 0
    command.done("template", "add", "--name", "base", command.raw_image())
    usage = command.json("template", "du")
    assert usage["parts"]["templates"]["reclaimable"] == usage["parts"]["templates"]["own"] > 0
    assert command.done("template", "du").splitlines()[1].split()[:2] == ["templates", "1"]


def test_every_template_is_verified_at_a_rate(command: Command) -> None:
    for name in ("first", "second"):
        command.done("template", "add", "--name", name, command.raw_image())
    said = ["template first is sound", "template second is sound"]
    assert command.done("template", "verify", "--all", "--rate", "1G").splitlines() == said
    for words in ((), ("--all", "first"), ("--rate", "fast", "first")):
        assert command.run("template", "verify", *words).exit_code == 2


def test_a_damaged_template_is_shown_with_what_is_wrong(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.raw_image())
    path = command.instances / "_base" / "base"
    before = path.stat()
    path.write_bytes(b"x" * MIB)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert command.run("template", "verify", "base").exit_code == 1
    assert "quarantined 20" in command.json("template", "show", "base")["damage"]
    assert "damage:           the template is damaged" in command.done("template", "show", "base")
    assert [each["name"] for each in command.json("template", "list")["damaged"]] == ["base"]
    assert command.run("disk", "create", "vm1", "disk", "--template", "base").exit_code == 1


def test_what_would_be_pruned_is_shown_with_the_reason_for_each(command: Command) -> None:
    for name in ("old", "used", "pinned"):
        command.done("template", "add", "--name", name, command.raw_image())
    command.done("disk", "create", "vm1", "disk", "--template", "used")
    command.done("template", "pin", "pinned")

    planned = command.json("template", "prune", "--dry-run", "--older-than", "0")
    reasons = {each["name"]: (each["remove"], each["reason"]) for each in planned["decisions"]}
    assert reasons["used"] == (False, "in use by 1 disk")
    assert reasons["pinned"] == (False, "pinned")
    assert reasons["old"][0] is True
    assert (planned["dry_run"], planned["removed"], planned["reclaimed"]) == (True, [], 0)
    lines = command.done("template", "prune", "--dry-run", "--older-than", "0s").splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["remove", "old"], ["keep", "pinned"], ["keep", "used"]]
    assert lines[-1].startswith("would remove 1 of 3 templates, ")
    assert command.done("template", "prune").splitlines()[-1] == "removed 0 of 3 templates, 0 B"

    pruned = command.json("template", "prune", "--older-than", "0")
    assert [each["name"] for each in pruned["removed"]] == ["old"]
    assert pruned["reclaimed"] == pruned["removed"][0]["own"] > 0
    assert [each["name"] for each in command.json("template", "list")["templates"]] == ["pinned", "used"]


def test_pruning_is_off_unless_somebody_asks_for_it(command: Command) -> None:
    command.configure("[image_cache]", "remove_unused_base_images = false")
    command.done("template", "add", "--name", "base", command.raw_image())
    assert command.json("template", "prune")["removed"] == []
    assert len(command.json("template", "prune", "--total-size", "1")["removed"]) == 1


@pytest.mark.parametrize("age", ["", "1w", "-1", "1.5h", "h", "1 d"])
def test_an_age_that_is_none_is_wrong_usage(command: Command, age: str) -> None:
    assert command.run("template", "prune", "--older-than", age).exit_code == 2


def test_what_cannot_be_pruned_is_told_and_does_not_keep_the_rest(command: Command) -> None:
    for name in ("first", "second"):
        command.done("template", "add", "--name", name, command.raw_image())
    (command.instances / "_base" / "first").unlink()
    (command.instances / "_base" / "first").mkdir()
    result = command.run("template", "prune", "--older-than", "0")
    assert result.exit_code == 1
    assert "imagebackend: first: " in result.stderr
    assert result.stdout.splitlines()[-1].startswith("removed 1 of 2 templates, ")
    assert [line.split()[0] for line in result.stdout.splitlines()[1:-1]] == ["kept", "remove"]
    document = command.json("template", "prune", "--older-than", "0")
    assert document["failed"][0]["error"]["type"] == "StorageError"


def test_progress_of_adding_is_told_in_lines_on_stderr(command: Command) -> None:
    result = command.run("template", "add", "--name", "base", command.raw_image())

    assert result.stdout == "template base added: raw, 1 MiB\n"
    assert result.stderr.splitlines()[-1] == "Fetching base: 100 % of 1 MiB"


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--checksum", "sha256:" + "0" * 64, "image.raw"), 1, "sha256 is"),
        (("--checksum", "nonsense", "image.raw"), 2, "nonsense"),
        (("--name", "../x", "image.raw"), 2, "template name '../x'"),
        (("--name", "-x", "image.raw"), 2, "template name '-x'"),
        (("--name", "x" * 300, "image.raw"), 2, "template name"),
        (("--format", "qcow2", "image.raw"), 1, "claimed to be qcow2"),
        (("--name", "x", "rbd:pool"), 2, "rbd:POOL/IMAGE@SNAPSHOT"),
        (("--name", "x", "json:{}"), 2, "json:"),
        (("no-such-file",), 1, "No such file"),
    ],
)
def test_what_cannot_be_added_leaves_nothing(
    command: Command, words: tuple[str, ...], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.raw_image()
    monkeypatch.chdir(command.folder)

    result = command.run("template", "add", *words)

    assert result.exit_code == status
    assert message in result.stderr
    assert command.files() == set()


def test_a_root_file_system_becomes_a_template(command: Command) -> None:
    root = command.folder / "root"
    (root / "etc").mkdir(parents=True)
    assert "not a regular file" in command.run("template", "add", "--name", "root", root).stderr

    command.done("template", "add", "--tree", "--tree-size", "64M", "--name", "root", root)
    command.done("template", "pull", "--tree", "--format", "raw", "--name", "other", root)
    command.done("template", "add", "--tree", "--tree-filesystem", "xfs", "--name", "xfs", root)

    assert command.json("template", "show", "root")["virtual_size"] == 64 * MIB
    assert command.json("template", "show", "other")["virtual_size"] < 64 * MIB
    assert Path(command.json("template", "show", "xfs")["path"]).read_bytes().startswith(b"XFSB")


def test_a_folder_of_ploop_becomes_a_template(command: Command) -> None:
    command.done("disk", "create", "--type", "ploop", "--from", command.raw_image(), "guest", "disk")
    folder = command.instances / "guest" / "disk"

    command.done("template", "add", "--format", "ploop", "--name", "again", folder)

    shown = command.json("template", "show", "again")
    assert (shown["virtual_size"], shown["source"]) == (MIB, folder.as_uri())
    assert Path(shown["path"]).read_bytes() == (command.folder / "image.raw").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tree-size", "64M"), "--tree-size goes with --tree"),
        (("--tree-filesystem", "xfs"), "--tree-filesystem goes with --tree"),
        (("--tree", "--tree-filesystem", "btrfs"), "'btrfs' is not one of 'ext4', 'xfs'"),
        (("--tree", "--format", "qcow2"), "--tree makes a raw disk, and not qcow2"),
        (("--tree", "--tree-size", "0"), "size"),
    ],
)
def test_a_root_file_system_is_asked_for_in_one_way(command: Command, words: tuple[str, ...], message: str) -> None:
    result = command.run("template", "add", "--name", "root", *words, command.folder)
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_a_damaged_template_is_found_and_does_not_hide_the_others(command: Command) -> None:
    for name in ("first", "second", "third"):
        command.done("template", "add", "--name", name, command.raw_image())
    path = command.instances / "_base" / "second"
    stamp = path.stat()
    path.write_bytes(b"x" * MIB)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    result = command.run("template", "verify", "first", "second", "third", "fourth")

    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["template first is sound", "template third is sound"]
    assert "second: the template is damaged" in result.stderr
    assert "imagebackend: template fourth does not exist\n" in result.stderr
    entries = command.json("template", "verify", "fourth", "first")["templates"]
    assert entries[0]["error"]["exit_status"] == 3
    assert "error" not in entries[1]


def test_a_template_with_a_damaged_record_is_listed_as_such(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.raw_image())
    (command.instances / "_base" / ".records" / "base.json").write_text("nonsense")

    assert [each["name"] for each in command.json("template", "list")["damaged"]] == ["base"]
    assert command.done("template", "list").splitlines()[1].split()[:2] == ["base", "damaged"]


def test_a_template_in_use_is_kept_and_its_users_are_named(command: Command) -> None:
    command.done("template", "add", "--name", "base", command.raw_image())
    command.done("disk", "create", "vm1", "disk", "--template", "base")

    result = command.run("template", "remove", "base")

    path = command.instances / "vm1" / "disk"
    assert result.exit_code == 5
    assert str(path) in result.stderr
    error = command.json("template", "remove", "base")["templates"][0]["error"]
    assert (error["type"], error["exit_status"]) == ("TemplateInUse", 5)
    assert [user.endswith(f":{path}") for user in error["users"]] == [True]
    assert command.json("template", "show", "base")["users"][0]["path"] == str(path)
    assert "user: " in command.done("template", "show", "base")


@pytest.mark.parametrize("subcommand", ["show", "verify", "remove"])
def test_a_template_that_is_not_there_is_not_found(command: Command, subcommand: str) -> None:
    result = command.run("template", subcommand, "base")

    assert result.exit_code == 3
    assert "imagebackend: template base does not exist" in result.stderr
