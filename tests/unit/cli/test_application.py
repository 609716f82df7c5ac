# SPDX-License-Identifier: Apache-2.0
"""The top of the command: options, errors, logging, start time."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from imagebackend import exceptions
from imagebackend.cli import session
from imagebackend.cli.application import application
from tests.unit.cli.conftest import MIB, Command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def test_the_start_imports_nothing_heavy() -> None:
    script = (
        "import sys; from imagebackend.cli.application import run; sys.argv = ['imagebackend', '--help']; run();"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))"
    )

    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout

    loaded = set(json.loads(shown.splitlines()[-1].replace("'", '"')))
    assert "click" in loaded
    assert loaded.isdisjoint({"libvirt", "lxml", "urllib3", "oslo_config", "oslo_utils", "ssl", "subprocess"})


@pytest.mark.parametrize("words", [(), ("disk",), ("template",), ("disk", "snapshot")])
def test_no_command_is_wrong_usage_and_shows_the_help(run: CliRunner, words: tuple[str, ...]) -> None:
    result = run.invoke(application, words)

    assert result.exit_code == 2
    assert "Commands:" in result.stderr


@pytest.mark.parametrize("words", [("--nonsense",), ("nonsense",), ("disk", "nonsense"), ("disk", "show", "vm1")])
def test_wrong_usage_is_told_with_the_right_one(run: CliRunner, words: tuple[str, ...]) -> None:
    result = run.invoke(application, words)

    lines = result.stderr.splitlines()
    assert result.exit_code == 2
    assert lines[0].startswith("Usage: imagebackend")
    assert lines[-1].startswith("imagebackend: ")


@pytest.mark.parametrize("words", [("--nonsense",), ("nonsense",), ("disk", "show", "vm1"), ("disk",), ()])
def test_wrong_usage_is_one_json_document_too(run: CliRunner, words: tuple[str, ...]) -> None:
    result = run.invoke(application, ["--json", *words])

    assert result.stderr == ""
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["exit_status"]) == (2, 2)
    assert error["message"]


def test_an_argument_that_looks_like_the_option_is_not_taken_for_it(run: CliRunner) -> None:
    result = run.invoke(application, ["template", "check", "--format", "raw", "--", "--json"])

    assert result.exit_code == 2
    assert result.stdout == ""


def test_an_error_is_one_line_without_a_traceback(command: Command) -> None:
    result = command.run("template", "show", "base")

    assert result.stdout == ""
    message = str(exceptions.TemplateNotFound("base", "add it with 'imagebackend template add'"))
    assert result.stderr == f"imagebackend: {message}\n"


def test_an_error_is_a_json_document_with_its_attributes(command: Command) -> None:
    document = command.json("template", "show", "base")

    message = str(exceptions.TemplateNotFound("base", "add it with 'imagebackend template add'"))
    expected = {"name": "base", "type": "TemplateNotFound", "message": message, "exit_status": 3}
    assert document == {"error": expected}


def test_twice_verbose_shows_the_traceback_and_once_does_not(command: Command) -> None:
    assert "Traceback" not in command.run("-v", "template", "show", "base").stderr
    assert "Traceback" in command.run("-vv", "template", "show", "base").stderr


def test_verbose_logs_what_is_done(command: Command) -> None:
    image = command.raw_image()

    quiet = command.run("template", "add", "--name", "a", image).stderr
    loud = command.run("-v", "template", "add", "--name", "b", image).stderr
    with_json = command.run("-v", "--json", "template", "add", "--name", "c", image)

    assert "INFO imagebackend" not in quiet
    assert "INFO imagebackend.templates.events: template b fetched from file://" in loud
    assert "template c fetched" in with_json.stderr
    assert json.loads(with_json.stdout)["name"] == "c"


def test_logging_is_as_before_afterwards(command: Command) -> None:
    logger = logging.getLogger("imagebackend")
    before = (logger.level, logger.propagate, list(logger.handlers), list(logging.getLogger().handlers))

    command.run("-vv", "template", "list")

    assert (logger.level, logger.propagate, logger.handlers, logging.getLogger().handlers) == before


def test_an_error_that_nobody_foresaw_says_how_to_learn_more(command: Command) -> None:
    @application.command("break")
    def _break() -> None:
        raise RuntimeError("nobody foresaw it")

    try:
        result = command.run("break")
        document = command.json("break")
        loud = command.run("-vv", "break")
    finally:
        del application.commands["break"]

    assert result.exit_code == 1
    assert result.stderr.startswith("imagebackend: unexpected RuntimeError: nobody foresaw it; run it with -vv")
    assert document["error"]["type"] == "RuntimeError"
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[DEFAULT]\nuse_cow_images = perhaps\n", "[DEFAULT] use_cow_images"),
        ("[libvirt]\nimages_type = zfs\n", "[libvirt] images_type: 'zfs' is not one of"),
        ("nonsense[\n", "Failed to parse"),
    ],
)
def test_a_configuration_that_cannot_be_used(command: Command, content: str, message: str) -> None:
    command.ini.write_text(content)

    result = command.run("disk", "create", "vm1", "disk", "--blank", "--size", "1M")

    assert result.exit_code == 7
    assert message in result.stderr


@pytest.mark.parametrize("option", ["--config-file", "--config-dir"])
def test_a_configuration_that_is_not_there_is_wrong_usage(run: CliRunner, option: str) -> None:
    result = run.invoke(application, [option, "nowhere", "template", "list"])

    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_unknown_options_are_ignored(command: Command) -> None:
    command.configure("rpc_backend = rabbit", "[neutron]", "url = x")

    assert command.json("template", "list") == {"templates": [], "damaged": []}


def test_a_later_file_and_a_folder_override_an_earlier_file(command: Command, run: CliRunner) -> None:
    later, folder = command.folder / "later.conf", command.folder / "conf.d"
    later.write_text(f"[DEFAULT]\ninstances_path = {command.folder}/later\n")
    words = ["disk", "create", "vm1", "disk", "--blank", "--size", "1M", "--type", "raw"]

    run.invoke(application, ["--config-file", str(command.ini), "--config-file", str(later), *words])
    folder.mkdir()
    (folder / "1.conf").write_text(f"[DEFAULT]\ninstances_path = {command.folder}/folder\n")
    run.invoke(application, ["--config-file", str(command.ini), "--config-dir", str(folder), *words])

    sizes = [(command.folder / each / "vm1" / "disk").stat().st_size for each in ("later", "folder")]
    assert sizes == [MIB, MIB]
    assert not command.instances.exists()


def test_the_default_configuration_is_read_if_it_is_there(
    command: Command, run: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.done("template", "add", "--name", "base", command.raw_image())
    monkeypatch.setattr(session, "DEFAULT_CONFIG_FILE", str(command.ini))

    result = run.invoke(application, ["template", "show", "base"])

    assert result.exit_code == 0, result.output


def test_names_are_completed_with_what_is_there(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command.done("template", "add", "--name", "debian", command.raw_image())
    command.done("disk", "create", "vm1", "disk", "--template", "debian")
    words = f"imagebackend --config-file {command.ini}"

    def complete(rest: str) -> set[str]:
        line = f"{words} {rest}"
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        monkeypatch.setenv("_IMAGEBACKEND_COMPLETE", "bash_complete")
        return set(CliRunner().invoke(application).stdout.split())

    assert complete("te") == {"plain,template"}
    assert complete("template show d") == {"plain,debian"}
    assert complete("template show x") == set()
    assert complete("disk show ") == {"plain,vm1"}
    assert complete("disk show vm1 ") == {"plain,disk"}
    assert complete("disk create --template ") == {"plain,debian"}
    assert complete("template check --format v") == {"plain,vmdk", "plain,vdi", "plain,vpc", "plain,vhdx"}
    command.ini.write_text("nonsense[")
    assert complete("template show d") == set()
