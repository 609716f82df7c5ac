# SPDX-License-Identifier: Apache-2.0
"""Templates are pulled from a real web server while real disks depend on what had their names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.templates.sources import open_source
from tests.contract.conftest import MIB, Store
from tests.functional import web

# Of different lengths, since nginx makes an ETag of length and second.
ONE, TWO = b"one!" * MIB, b"two!" * (MIB + 128)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, "qcow2", {"image_cache.fetch_retries": 0})


def transferred(server: web.Nginx) -> int:
    """Return how often the image was asked for, and given."""
    count = sum(status in ("200", "206") for status, *_ in server.requests())
    server.start()
    return count


def test_a_web_server_is_asked_what_it_has_and_nothing_is_fetched_twice(store: Store, tmp_path: Path) -> None:
    with web.nginx(tmp_path / "nginx") as server:
        server.put("image", ONE)
        source = open_source(f"{server.url}/image", store.conf)
        first = store.backend.templates.pull("template", source, "newer")
        assert first.etag
        before = transferred(server)

        assert store.backend.templates.pull("template", source, "newer") == first
        assert store.backend.templates.pull("template", source) == first
        bodies = transferred(server) - before
        assert bodies <= 1  # a HEAD request, which has a status of its own and no body

        sha256 = server.put("image", TWO)
        assert store.backend.templates.pull("template", source, "newer").sha256 == sha256
        server.kill()
        with web.refusing_port() as port:
            gone = open_source(f"http://127.0.0.1:{port}/image", store.conf)
            assert store.backend.templates.pull("template", gone, "newer").sha256 == sha256
            with pytest.raises(exceptions.FetchFailed):
                store.backend.templates.pull("template", gone, "always")


def test_a_disk_reads_what_it_was_made_from_whatever_is_pulled(store: Store) -> None:
    image = store.sources / "image"
    image.write_bytes(ONE)
    source = open_source(str(image), store.conf)
    templates = store.backend.templates
    templates.pull("template", source)
    old = store.make(None, "disk.old")
    store.write(old, 0, 65536, 7)

    image.write_bytes(TWO)
    templates.pull("template", source, "always")
    new = store.make(None, "disk.new")

    assert store.content(old) == b"\7" * 65536 + ONE[65536:]
    assert store.content(new) == TWO
    (former,) = (name for name in templates.names(former=True) if "@" in name)
    assert [lease.owner.path for lease in templates.leases(former)] == [old.path]
    assert [lease.owner.path for lease in templates.leases("template")] == [new.path]
    for name in (former, "template"):
        with pytest.raises(exceptions.TemplateInUse):
            templates.remove(name)

    old.rebase("template")  # type: ignore[attr-defined]
    assert store.content(old) == b"\7" * 65536 + ONE[65536:]
    templates.remove(former)
    assert store.content(old) == b"\7" * 65536 + ONE[65536:]
    for disk in (old, new):
        store.check(disk)
        disk.flatten()
    templates.remove("template")
    assert [path.name for path in Path(templates.folder).iterdir() if path.is_file()] == []
    assert store.content(new) == TWO


def test_a_damaged_template_is_mended_under_the_disks_that_depend_on_it(store: Store) -> None:
    image = store.sources / "image"
    image.write_bytes(ONE)
    source = open_source(str(image), store.conf)
    template = store.backend.templates.pull("template", source)
    disk = store.make(None)
    with open(template.path, "r+b") as file:
        file.write(b"damaged")
    with pytest.raises(exceptions.CorruptRecord):
        store.make(None, "disk.other")

    store.backend.templates.pull("template", source, "newer")

    assert store.content(disk) == ONE
    assert store.content(store.make(None, "disk.other")) == ONE
    subprocess.run(["qemu-img", "check", "-f", "qcow2", disk.path], check=True, capture_output=True)
    shutil.rmtree(store.folder)
