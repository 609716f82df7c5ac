# SPDX-License-Identifier: Apache-2.0
"""Sizes and formats as people write them."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagebackend.cli.parameters import parse_format, parse_size
from tests.unit.cli.conftest import Command


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("0", 0), ("1K", 1024), ("1M", 1 << 20), ("20G", 20 << 30), ("64T", 64 << 40), ("0010K", 10240)],
)
def test_a_size_is_a_number_of_bytes_or_of_units_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "G", "-1", "+1", "1.5G", "1 G", " 1G", "1G ", "1G\n", "20GB", "20GiB", "1g", "1P", "1e3", "0x10", "٢",
     "1_000", "1" * 20, "1" * 5000],
)  # fmt: skip
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="whole number of bytes"):
        parse_size(text)


@given(st.text())
def test_any_text_is_a_size_or_wrong_usage(text: str) -> None:
    try:
        size = parse_size(text)
    except click.BadParameter:
        return
    assert size >= 0


@pytest.mark.parametrize("size", ["0", "1", "513", "9999999999999999999T"])
def test_a_size_that_no_disk_can_have_is_wrong_usage(command: Command, size: str) -> None:
    result = command.run("disk", "create", "vm", "disk", "--blank", "--size", size)

    assert result.exit_code == 2
    assert "size" in result.stderr
    assert not command.instances.exists()


@pytest.mark.parametrize("word", ["raw", "qcow2", "vmdk", "vhd", "vpc", "luks", "qed"])
def test_a_format_is_a_word_that_qemu_or_glance_knows(word: str) -> None:
    assert parse_format(word) == word


@pytest.mark.parametrize("word", ["", "qcwo2", "RAW", "raw,qcow2", "json:{}"])
def test_another_word_is_no_format(word: str) -> None:
    with pytest.raises(click.BadParameter, match="a format is needed"):
        parse_format(word)
