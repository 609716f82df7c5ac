# SPDX-License-Identifier: Apache-2.0
"""The manual page and the operators' guide say what the commands are."""

from __future__ import annotations

import importlib.util
import pathlib
import types

import click
import pytest

from imagebackend.cli.application import application
from imagebackend.cli.exit_status import TABLE

DOCS = pathlib.Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def generate() -> types.ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "man" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_not_stale(generate: types.ModuleType) -> None:
    page = (DOCS / "man" / "imagebackend.1").read_text(encoding="utf-8")

    assert page == generate.render(), "run: python docs/man/generate.py"


def test_every_command_option_and_exit_status_is_in_the_page(generate: types.ModuleType) -> None:
    page = generate.render().replace("\\-", "-").replace("\\&", "")

    missing = [status.code for status in TABLE if f".B {status.code}\n{status.meaning}" not in page]
    options = [option for option in application.params if option.opts[0] not in page]
    for words, command in generate.leaves(application):
        section = page.partition(f'.SS "{" ".join(words)} ')[2].partition("\n.SS")[0]
        for parameter in command.params:
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(_ctx(command))
            missing += [] if name in section else [(words, name)]
    assert (missing, options) == ([], [])


def test_every_command_and_exit_status_is_in_the_guide(generate: types.ModuleType) -> None:
    guide = (DOCS / "operators" / "command-line.md").read_text(encoding="utf-8")

    missing = [words for words, _ in generate.leaves(application) if f"`{' '.join(words)}" not in guide]
    missing += [status.code for status in TABLE if f"| {status.code} | {status.meaning} |" not in guide]
    assert missing == []


def _ctx(command: click.Command) -> click.Context:
    return click.Context(command)
