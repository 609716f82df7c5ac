# SPDX-License-Identifier: Apache-2.0
"""Hosts that share the folder of instances: processes with host names and mount namespaces of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.contract.conftest import template_content

#: argv: the host's name, where the storage is mounted, the image, a file that gets a line for each fetch, what to do.
HOST = """
import json, os, shutil, sys
from imagebackend import Backend, load_config
from imagebackend.storage import qcow2
host, mounted, source, log, work = sys.argv[1:]
conf = load_config()
conf.set_override("instances_path", f"{mounted}/instances")
conf.set_override("host", host)
conf.set_override("lock_timeout", 120.0)
conf.set_override("images_type", "qcow2", group="libvirt")
backend = Backend(conf)
greedy = backend.templates.policy(minimum_age=0, total_size_limit=1)
def fetch(target):
    line = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(line, f"{host}\\n".encode())
    shutil.copyfile(source, target)
made = []
def make(template, number):
    image = backend.image(f"{host}-{number}", "disk")
    image.cache(fetch, template, 8 << 20)
    return image
def prune():
    report = backend.templates.prune(greedy)
    assert not report.failed, report.failed
    return [each.name for each in report.removed], report.swept
answer = eval(work) if not work.startswith("for ") else exec(work)
print(json.dumps(answer, default=str))
"""
#: Make disks and remove them, pruning all that can be pruned in between; those that are left are whole all the while.
CHURN = """
for number in range(12):
    made.append(make(f"template{number % 3}", number))
    prune()
    for image in made:
        assert len(qcow2.backing_chain(image.path)) == 2
    if number % 2:
        made.pop(0).remove()
"""


class Hosts:
    """Storage that every host has mounted at the same place, where nobody else sees it."""

    def __init__(self, folder: Path) -> None:
        self.storage = folder / "storage"
        self.mounted = folder / "mounted"
        self.source = folder / "image.raw"
        self.log = folder / "log"
        for path in (self.storage, self.mounted):
            path.mkdir()
        self.source.write_bytes(template_content())
        self.log.touch()

    def start(self, host: str, work: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOST, host, self.mounted, self.source, self.log, work.strip()]
        mount = 'storage=$1 mounted=$2 name=$3; shift 3; mount --bind "$storage" "$mounted" && hostname "$name"'
        namespaces = ["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c", f'{mount} && exec "$@"']
        return subprocess.Popen(
            [*namespaces, "sh", str(self.storage), str(self.mounted), host, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def all(self, work: dict[str, str]) -> dict[str, Any]:
        """Let hosts do something at a time; return what each answers."""
        processes = {host: self.start(host, each) for host, each in work.items()}
        answers = {}
        for host, process in processes.items():
            output, told = process.communicate(timeout=120)
            assert process.returncode == 0, (host, told)
            answers[host] = json.loads(output)
        return answers

    def one(self, host: str, work: str) -> Any:
        return self.all({host: work})[host]

    def fetches(self) -> Sequence[str]:
        return self.log.read_text().splitlines()

    def check_disks(self) -> int:
        """Make sure that every disk is whole, seen from outside where the storage is elsewhere; return how many."""
        disks = list(self.storage.glob("instances/*-*/disk"))
        for disk in disks:
            base = f"{self.mounted}/instances/_base"
            look = f"qemu-img check -q -f qcow2 {disk} && qemu-img compare -q -f qcow2 -F raw {disk} {self.source}"
            command = f"mount --bind {self.storage} {self.mounted} && test -d {base} && {look}"
            done = subprocess.run(
                ["unshare", "--mount", "--propagation", "private", "sh", "-c", command],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, (disk, done.stdout, done.stderr)
        return len(disks)


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)


def test_hosts_that_want_the_same_template_fetch_it_once(hosts: Hosts) -> None:
    names = ("one", "two", "three", "four")
    hosts.all(dict.fromkeys(names, "[make('template', number).path for number in range(3)]"))

    assert len(hosts.fetches()) == 1
    assert hosts.check_disks() == 12
    assert not list(hosts.mounted.iterdir())


def test_a_host_never_prunes_what_the_disks_of_others_depend_on(hosts: Hosts) -> None:
    hosts.one("one", "make('used', 0).path and make('unused', 1).remove()")

    removed, swept = hosts.one("two", "prune()")
    assert (removed, swept) == (["unused"], [])
    leases = "[(each.owner.host, each.owner.instance) for each in backend.templates.lease_book.leases()]"
    assert hosts.one("two", leases) == [["one", "one-0"]]
    assert hosts.one("two", "[backend.rebuild_leases().dropped, prune()]") == [[], [[], []]]
    # Its disk is in the shared folder, so that it is seen from here, whatever became of its host.
    assert hosts.one("two", "backend.templates.lease_book.drop_host('one')[0]") == []
    assert hosts.check_disks() == 1

    hosts.one("one", "backend.image('one-0', 'disk').remove()")
    assert hosts.one("two", "prune()") == [["used"], []]


def test_hosts_that_make_remove_and_prune_at_a_time_keep_every_disk_whole(hosts: Hosts) -> None:
    hosts.all(dict.fromkeys(("one", "two", "three"), CHURN))

    assert hosts.check_disks() == 3 * 6
    answer = hosts.one("four", "[prune(), backend.rebuild_leases().made, backend.templates.names()]")
    (removed, swept), made, names = answer
    assert (removed, swept, made) == ([], [], [])
    assert names == ["template0", "template1", "template2"]
