# SPDX-License-Identifier: Apache-2.0
"""The record of a template: what it says is trusted, so nothing damaged may pass for it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.templates import record
from tests import counting


class Place:
    """A template's file and its record."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "template"
        self.file.write_bytes(b"content")
        self.record = folder / "records" / "template.json"
        found = self.file.stat()
        self.template = record.Template(
            name="template",
            path=str(self.file),
            format="raw",
            virtual_size=4096,
            size=found.st_size,
            modified=found.st_mtime_ns,
            sha256="ab" * 32,
            digest="sha256:" + "ab" * 32,
            source="https://example.org/é",
            source_format="qcow2",
            inspector=1,
            notes=("gpt", "zstd"),
            fetched="2026-01-01T00:00:00+00:00",
            file="template",
            etag='W/"x"',
            last_modified="Thu, 01 Jan 2026 00:00:00 GMT",
            compression="xz",
            content_sha256="cd" * 32,
            min_disk=8192,
            labels={"os": "debian"},
            pinned=True,
            history=(record.Happening("fetched", "2026-01-01T00:00:00+00:00", "https://example.org/é"),),
        )

    def write(self, template: record.Template | None = None) -> None:
        record.write(str(self.record), template or self.template, durable=False)

    def read(self, **options: Any) -> record.Template | None:
        return record.read(str(self.record), str(self.file.parent), **options)

    def change(self, **fields: Any) -> None:
        """Write the record as it is, but for some fields; None: without it."""
        self.write()
        content = {**json.loads(self.record.read_text()), **fields}
        self.record.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_written_is_read(place):
    assert place.read() is None
    place.write()
    assert place.read() == place.template
    assert place.record.stat().st_mode & 0o777 == 0o600
    assert os.listdir(place.record.parent) == ["template.json"]


def test_people_can_read_it(place):
    place.write()
    content = json.loads(place.record.read_text())
    assert content["version"] == 2
    assert "path" not in content  # the folder may be mounted elsewhere
    assert content["notes"] == ["gpt", "zstd"]
    assert place.record.read_text().count("\n") > len(content)


def test_the_folder_may_be_mounted_elsewhere(place, tmp_path):
    place.write()
    other = tmp_path / "elsewhere" / "template"
    other.parent.mkdir()
    place.file.rename(other)
    assert record.read(str(place.record), str(other.parent)) == dataclasses.replace(place.template, path=str(other))


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(0, 1 << 62),
    source=st.text(st.characters(exclude_categories=["Cs"])),
    notes=st.lists(st.text(max_size=9), max_size=4),
    labels=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=4),
)
def test_any_value_comes_back(tmp_path_factory, size, source, notes, labels):
    place = Place(tmp_path_factory.mktemp("record"))
    template = dataclasses.replace(
        place.template, virtual_size=size, size=size, source=source, notes=tuple(notes), labels=labels
    )
    place.write(template)
    assert place.read(check_file=False) == template


def test_fields_that_a_later_release_adds_are_passed_over(place):
    place.change(sha512="cd" * 64)
    assert place.read() == place.template


def test_the_first_version_is_read(place):
    """As it was written before there was a second one."""
    place.write()
    content = json.loads(place.record.read_text())
    first = ("name", "format", "virtual_size", "size", "modified", "sha256", "digest", "source", "source_format")
    kept = {name: content[name] for name in (*first, "inspector", "notes", "fetched")}
    # What it did not know it passed over.
    place.record.write_text(json.dumps({"version": 1, **kept, "pinned": "perhaps"}))

    template = place.read()

    unknown = dict.fromkeys(("etag", "last_modified", "compression", "content_sha256"), "")
    assert template == dataclasses.replace(place.template, **unknown, min_disk=0, labels={}, pinned=False)
    assert template.history == place.template.history
    place.write(template)
    assert place.read() == template


def test_a_history_keeps_how_it_began_and_what_came_last(place):
    template = place.template
    for number in range(100):
        template = template.after("verified", str(number), pinned=False)
    assert not template.pinned
    assert len(template.history) == 20
    assert template.history[0].event == "fetched"
    assert [each.detail for each in template.history[1:]] == [str(number) for number in range(81, 100)]
    assert template.history[-1].time >= template.history[1].time > template.history[0].time
    place.write(template)
    assert place.read().history == template.history


def test_what_could_not_be_read_again_is_not_written(place):
    place.write()
    with pytest.raises(exceptions.InvalidArgument, match=r"labels and notes take too much: \d+ bytes, 65535 at most"):
        place.write(dataclasses.replace(place.template, labels={"x": "x" * (64 << 10)}))
    assert place.read() == place.template


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("template", "template"),
        ("template", "template@0123456789abcdef"),
        ("template@0123456789abcdef", "template"),
        ("template@0123456789abcdef", "template@0123456789abcdef"),
    ],
)
def test_a_name_that_was_taken_by_another_keeps_its_file(place, name, file):
    template = dataclasses.replace(place.template, name=name, file=file, path=str(place.file.with_name(file)))
    place.record = place.record.with_name(f"{name}.json")
    place.write(template)
    assert place.read(check_file=False) == template


@pytest.mark.parametrize("name", ["a@0123456789abcdef", "a"])
def test_what_may_mean_a_template(name):
    assert record.check_reference(name) == name
    assert record.base_name(name) == "a"
    assert record.check_reference(record.generation(name, "sha256-1m:" + "ab" * 32)) == "a@abababababababab"


@pytest.mark.parametrize(
    "name",
    ["a@", "@0123456789abcdef", "a@0123456789abcde", "a@0123456789abcdef0", "a@0123456789ABCDEF", "a@../../x", 1],
)
def test_what_means_none(name):
    with pytest.raises(exceptions.InvalidName):
        record.check_reference(name)


@pytest.mark.parametrize(
    "fields",
    [
        *({field.name: None} for field in dataclasses.fields(record.Template) if field.name != "path"),
        {"virtual_size": "4096"},
        {"virtual_size": 4096.0},
        {"virtual_size": True},
        {"virtual_size": -1},
        {"size": -1},
        {"modified": "now"},
        {"format": 1},
        {"format": ""},
        {"format": "vmdk"},
        {"format": "json:{}"},
        {"name": "another"},
        {"notes": "gpt"},
        {"notes": {"gpt": 1}},
        {"notes": [1]},
        {"notes": [None]},
        {"sha256": ["ab"]},
        {"digest": "ab" * 32},
        {"digest": "md5:" + "ab" * 16},
        {"inspector": "1"},
        {"fetched": 0},
        {"fetched": "yesterday"},
        {"fetched": ""},
        {"fetched": "2026-01-01T00:00:00"},
        {"superseded": "later"},
        {"file": "another"},
        {"file": ".."},
        {"file": "../template"},
        {"file": "template@"},
        {"file": "template@0123456789abcdeX"},
        {"file": "template@0123456789abcdef/x"},
        {"min_disk": -1},
        {"pinned": 1},
        {"labels": []},
        {"labels": {"x": 1}},
        {"history": {}},
        {"history": [[]]},
        {"history": [{"event": "fetched", "time": "now"}]},
        {"history": [{"event": "fetched", "time": "now", "detail": 1}]},
        {"version": None},
    ],
    ids=repr,
)
def test_what_no_template_can_be_is_a_damaged_record(place, fields):
    place.change(**fields)
    content = place.record.read_bytes()
    with pytest.raises(exceptions.CorruptRecord, match="remove the template and add it again") as caught:
        place.read()
    assert caught.value.path == str(place.record)
    assert place.record.read_bytes() == content


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, [1], False])
def test_a_version_that_cannot_be_is_named(place, version):
    place.change(version=version)
    with pytest.raises(exceptions.CorruptRecord, match="no record has version"):
        place.read()


@pytest.mark.parametrize("version", [3, 1 << 70])
def test_a_record_of_a_newer_release_is_refused_and_says_so(place, version):
    place.change(version=version)
    with pytest.raises(record.NewerRecord, match=r"written by a newer release .*update this host"):
        place.read()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(700),
        b"null",
        b"[]",
        b'"version"',
        b"{}",
        b"1",
        b"\xff\xfe",
        b"{" * 100,
        b"[" * 60_000,
        b'{"version": 1}' * 2,
        b'{"version": ' + b"1" * 5000 + b"}",
        b'{"version": 1, "x": "' + b"x" * (64 << 10) + b'"}',
    ],
    ids=range(13),
)
def test_what_is_no_record_is_a_damaged_record(place, content):
    place.write()
    place.record.write_bytes(content)
    with pytest.raises(exceptions.CorruptRecord, match=r"remove the template and add it again"):
        place.read()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_record_that_was_cut_short_is_damaged_wherever(tmp_path_factory, data):
    place = Place(tmp_path_factory.mktemp("record"))
    place.write()
    whole = place.record.read_bytes().rstrip()
    place.record.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(exceptions.CorruptRecord):
        place.read()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_byte_that_changed_gives_a_template_or_a_damaged_record(tmp_path_factory, data):
    place = Place(tmp_path_factory.mktemp("record"))
    place.write()
    content = bytearray(place.record.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    place.record.write_bytes(content)
    try:
        found = place.read(check_file=False)
    except exceptions.CorruptRecord:
        return
    assert found is not None
    assert (found.name, found.format) == ("template", "raw")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.mkdir(), exceptions.StorageError),
        (lambda path: path.symlink_to("/etc/hostname"), exceptions.StorageError),
        (os.mkfifo, exceptions.CorruptRecord),
    ],
    ids=["folder", "link", "FIFO"],
)
def test_what_is_not_a_file_is_an_error_and_no_wait(place, make, expected):
    place.record.parent.mkdir()
    make(place.record)
    with pytest.raises(expected):
        place.read()


def rewritten(file: Path) -> None:
    file.write_bytes(b"another")


def touched(file: Path) -> None:
    os.utime(file, ns=(0, 0))


def longer(file: Path) -> None:
    times = file.stat()
    with file.open("ab") as stream:
        stream.write(b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def link(file: Path) -> None:
    file.rename(file.with_suffix(".moved"))
    file.symlink_to(file.with_suffix(".moved"))


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("change", [rewritten, touched, longer, link, folder])
def test_a_file_that_changed_is_not_the_template(place, change):
    place.write()
    change(place.file)
    with pytest.raises(exceptions.CorruptRecord, match="the file has changed since it was recorded") as caught:
        place.read()
    assert caught.value.path == str(place.file)
    assert place.read(check_file=False) == place.template


def test_a_file_that_is_gone_is_said_to_be(place):
    place.write()
    place.file.unlink()
    with pytest.raises(exceptions.CorruptRecord, match="the template's file is gone, its record is there"):
        place.read()


def test_the_cost_of_reading(place):
    place.write()
    setup = f"from imagebackend.templates import record\narguments = {str(place.record)!r}, {str(place.file.parent)!r}"
    counts = counting.count("record.read(*arguments)", setup=setup + "\nrecord.read(*arguments)")
    assert counts.total <= 5  # open, read, close, stat
