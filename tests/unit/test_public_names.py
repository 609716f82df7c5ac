# SPDX-License-Identifier: Apache-2.0
"""The public names, and that importing them costs next to nothing."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
import types
from typing import Any

import pytest

import imagebackend

#: What takes long to load, and is not needed by everybody.
HEAVY = {
    "click",
    "libvirt",
    "lxml",
    "oslo_utils.imageutils",
    "rados",
    "rbd",
    "requests",
    "rich",
    "ssl",
    "tqdm",
    "urllib3",
}
MIB = 1 << 20


def fresh(script: str) -> Any:
    """Run Python in a fresh interpreter and return what it printed as JSON."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def imported(script: str) -> set[str]:
    """Return the modules that a script adds to those of a bare interpreter."""
    listing = "import sys, json\nbefore = set(sys.modules)\n{}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    return set(fresh(listing.format(script)))


def heavy(modules: set[str]) -> set[str]:
    return {name for name in HEAVY if name in modules}


def test_importing_the_package_imports_nothing_else():
    modules = imported("import imagebackend")
    others = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert {name for name in others if not name.startswith("_")} == {"imagebackend"}
    assert {name for name in modules if name.startswith("imagebackend")} == {"imagebackend"}
    assert len(modules) <= 10


def test_a_backend_needs_nothing_heavy():
    script = "import imagebackend; imagebackend.Backend(imagebackend.load_config()).image('instance', 'disk')"
    assert heavy(imported(script)) == set()


def test_a_file_source_needs_nothing_heavy():
    script = "import imagebackend; imagebackend.open_source('/srv/image', imagebackend.load_config())"
    assert heavy(imported(script)) == set()
    script = script.replace("/srv/image", "http://localhost/image")
    assert heavy(imported(script)) >= {"urllib3"}


def test_the_errors_need_nothing_at_all():
    modules = imported("from imagebackend import exceptions")
    assert {name for name in modules if name.startswith("imagebackend")} == {"imagebackend", "imagebackend.exceptions"}
    assert heavy(modules) == set()


def test_the_memory_of_an_import_is_small():
    # Not ru_maxrss, which also counts what the process was before it became this interpreter.
    script = """
import imagebackend
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024)
"""
    assert fresh(script) < 30 * MIB
    assert fresh(script.replace("import imagebackend", "x = bytes(b'x' * (40 << 20))")) > 40 * MIB


@pytest.mark.parametrize("name", imagebackend.__all__)
def test_every_name_resolves_to_the_thing_itself(name):
    value = getattr(imagebackend, name)
    if isinstance(value, types.ModuleType):
        assert value.__name__ == f"imagebackend.{name}"
    else:
        assert value.__name__ == name
        assert value.__module__.startswith("imagebackend.")
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert value.__doc__
    assert getattr(imagebackend, name) is value


@pytest.mark.parametrize("name", imagebackend.__all__)
def test_every_name_is_the_first_that_a_program_may_use(name):
    assert fresh(f"import imagebackend; imagebackend.{name}; print(1)") == 1
    assert fresh(f"from imagebackend import {name}; print(1)") == 1


def test_names_are_listed_before_they_are_used():
    assert set(fresh("import imagebackend, json; print(json.dumps(dir(imagebackend)))")) >= set(imagebackend.__all__)
    assert fresh("from imagebackend import *; print(len(Backend.__name__))") == len("Backend")


def test_the_homes_are_those_of_the_names_that_are_public():
    assert sorted(imagebackend.__all__) == sorted([*imagebackend._HOMES, "exceptions"])
    assert len(imagebackend.__all__) == len(set(imagebackend.__all__))


@pytest.mark.parametrize("name", ["no_such_name", "__wrapped__", "backend_", ""])
def test_other_names_are_attribute_errors(name):
    with pytest.raises(AttributeError, match=f"module 'imagebackend' has no attribute '{name}'"):
        getattr(imagebackend, name)
    assert not hasattr(imagebackend, name)


def test_the_package_carries_its_types():
    assert importlib.resources.files(imagebackend).joinpath("py.typed").is_file()


@pytest.mark.parametrize("use", ["import imagebackend", "import imagebackend; imagebackend.Backend"])
def test_importing_leaves_the_process_as_it_was(use):
    """No logging is set up, no signal is handled, nothing is printed, no thread is started."""
    script = f"""
import json, logging, signal, threading, warnings
handlers = [signal.getsignal(number) for number in signal.valid_signals()]
filters = list(warnings.filters)
{use}
print(json.dumps([
    logging.getLogger().handlers == [], logging.getLogger().level == logging.WARNING,
    logging.getLogger("imagebackend").handlers == [], threading.active_count() == 1,
    handlers == [signal.getsignal(number) for number in signal.valid_signals()],
]))
"""
    assert fresh(script) == [True] * 5
