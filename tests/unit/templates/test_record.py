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
        )

    def write(self, template: record.Template | None = None) -> None:
        record.write(str(self.record), template or self.template, durable=False)

    def read(self, **options: Any) -> record.Template | None:
        return record.read(str(self.record), str(self.file), **options)

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
    assert content["version"] == 1
    assert "path" not in content  # the folder may be mounted elsewhere
    assert content["notes"] == ["gpt", "zstd"]
    assert place.record.read_text().count("\n") > len(content)


def test_the_folder_may_be_mounted_elsewhere(place, tmp_path):
    place.write()
    other = tmp_path / "elsewhere" / "template"
    other.parent.mkdir()
    place.file.rename(other)
    assert record.read(str(place.record), str(other)) == dataclasses.replace(place.template, path=str(other))


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(0, 1 << 62),
    source=st.text(st.characters(exclude_categories=["Cs"])),
    notes=st.lists(st.text(max_size=9), max_size=4),
)
def test_any_value_comes_back(tmp_path_factory, size, source, notes):
    place = Place(tmp_path_factory.mktemp("record"))
    template = dataclasses.replace(place.template, virtual_size=size, size=size, source=source, notes=tuple(notes))
    place.write(template)
    assert place.read(check_file=False) == template


def test_fields_that_a_later_release_adds_are_passed_over(place):
    place.change(pinned=True, sha512="cd" * 64)
    assert place.read() == place.template


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


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, [1], False])
def test_a_version_that_is_not_known_is_named(place, version):
    place.change(version=version)
    with pytest.raises(exceptions.CorruptRecord, match="not known here; it was written by another release"):
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
    with pytest.raises(exceptions.CorruptRecord, match=r"remove the template and add it again|another release"):
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
    setup = f"from imagebackend.templates import record\narguments = {str(place.record)!r}, {str(place.file)!r}"
    counts = counting.count("record.read(*arguments)", setup=setup + "\nrecord.read(*arguments)")
    assert counts.total <= 5  # open, read, close, stat
