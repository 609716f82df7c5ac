# SPDX-License-Identifier: Apache-2.0
"""Names and sizes: what gets in, and that nothing else does."""

from __future__ import annotations

import os
import string
import types
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagebackend import exceptions, names

ALPHABET = string.ascii_letters + string.digits + "._-"
MAX_SIZE = 1 << 62

GOOD = [
    "a",
    "0",
    "disk",
    "disk.local",
    "disk.eph0",
    "debian-12",
    "A_b",
    "5" * 128,
    "x.",
    "x-",
    "x..y",
    str(uuid.UUID(int=1)),
]

HOSTILE = {
    "empty": "",
    "parent": "..",
    "here": ".",
    "out of the folder": "../x",
    "absolute": "/etc/passwd",
    "inner slash": "a/b",
    "backslash": "a\\b",
    "hidden": ".x",
    "option": "-x",
    "long option": "--help",
    "underscore first": "_base",
    "protocol": "rbd:x",
    "driver options": "json:{}",
    "drive": "c:x",
    "comma": "a,b",
    "equals": "a=b",
    "space": "a b",
    "space first": " a",
    "newline inside": "a\nb",
    "newline at the end": "a\n",
    "carriage return": "a\r",
    "zero": "a\0b",
    "escape": "a\x1b[2J",
    "delete": "a\x7f",
    "shell": "$(id)",
    "wildcard": "a*",
    "percent": "a%2fb",
    "home": "~root",
    "quote": "a'b",
    "129 characters": "x" * 129,
    "300 characters": "x" * 300,
    "not UTF-8": "a\udcff",
    "letter of another script": "di\u0455k",  # reads as disk
    "accented": "é",
    "full width": "\uff41",  # a
    "Arabic digit": "a\u0663",
    "superscript": "a\u00b2",
    "line separator": "a\u2028",
    "right to left": "a\u202eb",
}


@pytest.mark.parametrize("name", GOOD)
def test_safe_names_are_taken_as_they_are(name):
    assert names.check_name("disk", name) is name
    assert names.instance_id(name) is name


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_refused(name):
    with pytest.raises(exceptions.InvalidName) as caught:
        names.check_name("template", name)
    assert (caught.value.kind, caught.value.name) == ("template", name)
    # The error can be shown and logged anywhere: one line that can be encoded, and not endless.
    assert str(caught.value).isprintable()
    assert str(caught.value).encode()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", [None, 7, True, 1.5, b"disk", ["disk"], object])
def test_names_that_are_no_strings_are_refused(name):
    with pytest.raises(exceptions.InvalidName, match="a string is needed, not "):
        names.check_name("disk", name)
    with pytest.raises(exceptions.InvalidName):
        names.instance_id(name)


@given(st.text(ALPHABET, min_size=1, max_size=140))
def test_names_of_the_alphabet_are_judged_by_length_and_first_letter(name):
    if name[0].isalnum() and len(name) <= 128:
        assert names.check_name("disk", name) == name
    else:
        with pytest.raises(exceptions.InvalidName):
            names.check_name("disk", name)


@given(st.text(st.characters(codec=None), max_size=200))
def test_what_is_taken_cannot_mean_anything_else(name):
    try:
        names.check_name("disk", name)
    except exceptions.InvalidName:
        assert not name or len(name) > 128 or not name[0].isalnum() or set(name) - set(ALPHABET)
        return
    assert name == os.path.basename(name) == os.path.normpath(name)
    assert not set(name) - set(ALPHABET)
    assert not name.startswith((".", "-"))


@pytest.mark.parametrize("safe", ["disk", "x" * 128])
@given(st.characters(exclude_characters=ALPHABET, codec=None), st.integers(min_value=0, max_value=128))
def test_one_bad_character_anywhere_is_enough(safe, bad, place):
    with pytest.raises(exceptions.InvalidName):
        names.check_name("disk", (safe[:place] + bad + safe[place:])[:128] if place < 128 else "x" + bad)


def test_an_instance_is_its_uuid_or_a_string():
    assert names.instance_id(types.SimpleNamespace(uuid="i-1")) == "i-1"
    with pytest.raises(exceptions.InvalidName, match=r"instance name '\.\./x'"):
        names.instance_id(types.SimpleNamespace(uuid="../x"))
    with pytest.raises(exceptions.InvalidName, match="not UUID"):
        names.instance_id(types.SimpleNamespace(uuid=uuid.UUID(int=1)))
    with pytest.raises(exceptions.InvalidName, match="not SimpleNamespace"):
        names.instance_id(types.SimpleNamespace(name="i-1"))


@pytest.mark.parametrize("size", [512, 1024, 1 << 30, 64 << 40, (1 << 40) + 512, MAX_SIZE])
def test_sizes_that_a_disk_can_have(size):
    assert names.check_size(size) == size


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (0, "at least one sector"),
        (-512, "at least one sector"),
        (1, "512 is the next"),
        (511, "512 is the next"),
        ((1 << 30) + 1, f"{(1 << 30) + 512} is the next"),
        (MAX_SIZE + 512, f"at most {MAX_SIZE}"),
        (MAX_SIZE + 1, f"at most {MAX_SIZE}"),
        (1 << 63, f"at most {MAX_SIZE}"),
        (None, "not NoneType"),
        (True, "not bool"),
        (512.0, "not float"),
        (float("nan"), "not float"),
        ("512", "not str"),
        ("٥١٢", "not str"),
        (b"512", "not bytes"),
    ],
)
def test_sizes_that_no_disk_can_have(size, reason):
    with pytest.raises(exceptions.InvalidSize, match=reason) as caught:
        names.check_size(size)
    assert caught.value.size is size
    assert len(str(caught.value)) < 250


def test_numbers_that_python_refuses_to_write_are_refused_too():
    huge = 10**100000
    for size, reason in ((huge, "at most"), (huge + 1, "at most"), (-huge, "at least one sector")):
        with pytest.raises(exceptions.InvalidSize, match=reason):
            names.check_size(size)
    with pytest.raises(exceptions.InvalidName, match="not int"):
        names.check_name("disk", huge)


@given(st.integers())
def test_a_size_is_taken_or_the_next_one_is_named(size):
    try:
        assert names.check_size(size) == size
    except exceptions.InvalidSize as error:
        if "is the next" in error.reason:
            following = int(error.reason.split("; ")[1].split()[0])
            assert names.check_size(following) == following
            assert 0 < following - size < names.SECTOR
        else:
            assert not 0 < size <= MAX_SIZE
    else:
        assert 0 < size <= MAX_SIZE
        assert size % names.SECTOR == 0
