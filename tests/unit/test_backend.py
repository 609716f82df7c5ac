# SPDX-License-Identifier: Apache-2.0
"""Which Image for which disk."""

from __future__ import annotations

import json
import logging
import os
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import imagebackend
from imagebackend import exceptions
from imagebackend.images.base import Image
from imagebackend.images.ploop import Ploop
from imagebackend.images.qcow2 import Qcow2
from imagebackend.images.raw import Raw
from tests import counting
from tests.contract.conftest import configured

MIB = 1 << 20


@pytest.fixture
def backend(tmp_path: Path) -> imagebackend.Backend:
    return imagebackend.Backend(configured(tmp_path / "instances", "default"))


def make(backend: imagebackend.Backend, instance: str, disk: str, image_type: str | None = None) -> Image:
    image = backend.image(instance, disk, image_type)
    image.create_from_func(lambda target: None, MIB)
    return image


@pytest.mark.parametrize(
    ("images_type", "use_cow_images", "image_type", "expected"),
    [
        ("default", True, None, Qcow2),
        ("default", False, None, Raw),
        ("qcow2", False, None, Qcow2),
        ("raw", True, None, Raw),
        ("flat", True, None, Raw),
        ("raw", True, "qcow2", Qcow2),
        ("qcow2", True, "raw", Raw),
        ("qcow2", True, "flat", Raw),
        ("ploop", True, None, Ploop),
        ("raw", True, "default", Qcow2),
        ("qcow2", False, "default", Raw),
        ("no such type", True, "raw", Raw),
        ("raw", True, "", Raw),
    ],
)
def test_the_type_decides_which_class(backend, images_type, use_cow_images, image_type, expected):
    backend.conf.set_override("images_type", images_type, group="libvirt")
    backend.conf.set_override("use_cow_images", use_cow_images)
    assert backend.backend(image_type) is expected
    assert type(backend.image("instance", "disk", image_type)) is expected


@pytest.mark.parametrize("image_type", ["no-such-type", "RAW", "qcow", "raw ", "imagebackend.images.raw:Raw"])
def test_an_unknown_type_is_an_error_that_lists_the_known_ones(backend, image_type):
    for act in (
        lambda: backend.backend(image_type),
        lambda: backend.image("instance", "disk", image_type),
        lambda: backend.snapshot("/srv/instance/disk", image_type),
    ):
        with pytest.raises(
            exceptions.InvalidConfiguration, match=r"is not one of default, flat, lvm, ploop, qcow2, raw"
        ) as caught:
            act()
        assert caught.value.option == "[libvirt] images_type"
        assert repr(image_type) in caught.value.reason


class Installed:
    """A folder on sys.path where packages are installed that add image types."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, code: str, value: str | None = None) -> None:
        module = f"imagebackend_test_{name.replace('-', '_')}"
        (self.folder / f"{module}.py").write_text(code)
        metadata = self.folder / f"{module}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        entry = value or f"{module}:Added"
        (metadata / "entry_points.txt").write_text(f"[imagebackend.backends]\n{name} = {entry}\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return Installed(folder)


def test_another_package_adds_a_type(backend, installed):
    installed.add("added", "from imagebackend.images.raw import Raw\nclass Added(Raw):\n    pass\n")
    assert backend.backend("added").__name__ == "Added"
    image = backend.image("instance", "disk", "added")
    assert isinstance(image, Raw)
    with pytest.raises(exceptions.InvalidConfiguration, match="added, default, flat"):
        backend.backend("other")


def test_a_package_does_not_replace_a_type_that_is_built_in(backend, installed):
    installed.add("raw", "raise RuntimeError('imported')")
    assert backend.backend("raw") is Raw


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import imagebackend_test_no_such_module", None),
        ("Another = 1", None),
        ("", "imagebackend_test_no_such_module:Added"),
        ("Added = 1", None),
        ("class Added:\n    pass\n", None),
        ("def Added(*arguments):\n    pass\n", None),
    ],
)
def test_a_broken_package_is_named(backend, installed, tmp_path, code, value):
    name = tmp_path.name  # each its own, since modules stay imported
    installed.add(name, code, value)
    with pytest.raises(exceptions.InvalidConfiguration, match="cannot be used: ") as caught:
        backend.backend(name)
    assert caught.value.option == f"entry point {name} of imagebackend.backends"


def test_making_a_backend_and_an_image_does_no_input_or_output(tmp_path):
    setup = f"""
import imagebackend
conf = imagebackend.load_config()
conf.set_override("instances_path", {str(tmp_path / "instances")!r})
imagebackend.Backend(conf).image("instance", "disk", "qcow2")
imagebackend.Backend(conf).image("instance", "disk", "raw")
"""
    script = f"""
backend = imagebackend.Backend(conf)
backend.image("instance", "disk", "qcow2")
backend.snapshot({str(tmp_path / "instances/instance/disk")!r}, "raw")
"""
    assert counting.count(script, setup=setup).total <= 4  # memory, and os.getcwd for no path
    assert not (tmp_path / "instances").exists()


def test_an_instance_is_anything_with_a_uuid_or_a_string(backend):
    paths = {
        backend.image(instance, "disk").path
        for instance in ("i-1", types.SimpleNamespace(uuid="i-1"), types.SimpleNamespace(uuid="i-1", name="other"))
    }
    assert paths == {f"{os.path.abspath(backend.conf.instances_path)}/i-1/disk"}
    assert backend.by_name("i-1", "disk").path in paths


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "-x", ".x", "rbd:x", "json:{}", "a,b", "a\n", "x" * 300, None]
)
def test_hostile_names_are_refused_wherever_they_enter(backend, name: Any):
    for act in (
        lambda: backend.image(name, "disk"),
        lambda: backend.image(types.SimpleNamespace(uuid=name), "disk"),
        lambda: backend.image("instance", name),
        lambda: list(backend.disks(types.SimpleNamespace(uuid=name))),
        lambda: backend.by_libvirt_path(name, "/srv/instance/disk"),
    ):
        with pytest.raises(exceptions.InvalidName):
            act()


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("instance", "disk", "kind"),
    [
        ("instance", "disk.info", "disk"),
        ("locks", "disk", "instance"),
        ("snapshots", "disk", "instance"),
        ("_base", "disk", "instance"),
        ("templates", "disk", "instance"),
    ],
)
def test_names_that_stand_for_something_else_are_refused(backend, tmp_path, image_type, instance, disk, kind):
    if instance == "templates":
        backend.conf.set_override("subdirectory_name", "templates", group="image_cache")
    (tmp_path / "local").write_bytes(bytes(MIB))
    image = backend.image("other", "disk", image_type)
    for act in (
        lambda: backend.image(instance, disk, image_type),
        lambda: backend.image(types.SimpleNamespace(uuid=instance), disk, image_type),
        lambda: backend.snapshot(f"{tmp_path}/instances/{instance}/{disk}", image_type),
        lambda: image.import_file(instance, str(tmp_path / "local"), disk),
    ):
        with pytest.raises(exceptions.InvalidName) as caught:
            act()
        assert caught.value.kind == kind
    assert not (tmp_path / "instances").exists()


def test_a_path_of_libvirt_names_instance_and_disk(backend, tmp_path):
    path = f"{tmp_path}/instances/i-1/disk.local"
    for image in (backend.snapshot(path), backend.by_libvirt_path("i-1", path)):
        assert (image.path, image.instance, image.disk_name) == (path, "i-1", "disk.local")


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
@pytest.mark.parametrize("path", ["/srv/elsewhere/i-1/disk", "{}/i-1/i-1/disk", "{}x/i-1/disk", "{}/../i-1/disk"])
def test_a_path_elsewhere_is_no_disk(backend, tmp_path, image_type, path):
    path = path.format(tmp_path / "instances")
    with pytest.raises(exceptions.InvalidName):
        backend.snapshot(path, image_type)


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_a_path_that_is_another_instances_names_no_disk_of_this_one(backend, tmp_path, image_type):
    path = f"{tmp_path}/instances/i-1/disk"
    with pytest.raises(exceptions.InvalidName, match="instances/i-2/disk") as caught:
        backend.by_libvirt_path("i-2", path, image_type)
    assert (caught.value.kind, caught.value.name) == ("disk", path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "disk",
        "instance/disk",
        "/",
        "/disk",
        "/srv/i/",
        "/srv/i/../disk",
        "/srv/./i/disk",
        "/srv//i/disk",
        "//srv/i/disk",
        "/srv/i/a,b",
        "/srv/i/.disk",
        "/srv/i/-x",
        "/srv/i/disk\n",
        "/srv/i j/disk",
        "rbd:pool/image",
    ],
)
def test_other_paths_are_refused(backend, path):
    with pytest.raises(exceptions.InvalidName):
        backend.snapshot(path)


@given(st.one_of(st.text("/.-,:ab\n", max_size=12), st.text("/.-,:ab\n", max_size=6).map("/a/".__add__)))
def test_a_path_is_taken_as_it_is_or_refused(path):
    backend = imagebackend.Backend(configured(Path("/a"), "raw"))
    try:
        image = backend.snapshot(path)
    except exceptions.InvalidName:
        return
    assert image.path == path == os.path.normpath(path)
    assert path == f"/a/{image.instance}/{image.disk_name}"


def test_disks_are_listed_as_what_they_are_on_record(backend):
    paths = [
        make(backend, "i-1", "disk", "raw").path,
        make(backend, "i-1", "disk.local", "qcow2").path,
        make(backend, "i-2", "disk", "qcow2").path,
    ]
    # The listing asks the record, not the option that new disks are made by.
    backend.conf.set_override("images_type", "raw", group="libvirt")
    assert [(image.path, type(image)) for image in backend.disks()] == list(
        zip(paths, (Raw, Qcow2, Qcow2), strict=True)
    )
    assert [image.path for image in backend.disks("i-2")] == paths[2:]
    assert list(backend.disks("i-3")) == []
    backend.image("i-1", "disk.local", "qcow2").remove()
    assert [image.path for image in backend.disks("i-1")] == paths[:1]


def test_nothing_is_listed_where_there_is_nothing(backend, tmp_path):
    assert list(backend.disks()) == []
    instances = tmp_path / "instances"
    (instances / "empty").mkdir(parents=True)
    (instances / "file").touch()
    assert list(backend.disks()) == []
    assert sorted(os.listdir(instances)) == ["empty", "file"]


@pytest.mark.parametrize(
    ("folder", "record"),
    [
        ("i-0", "{"),
        ("i-0", "[]"),
        ("i 0", '{{"{folder}/disk": "raw"}}'),
        ("i-0", '{{"{folder}/a,b": "raw"}}'),
        (".i-0", '{{"{folder}/disk": "raw"}}'),
    ],
)
def test_one_damaged_record_hides_no_other_instance(backend, tmp_path, caplog, folder, record):
    path = make(backend, "i-1", "disk").path
    place = tmp_path / "instances" / folder
    place.mkdir()
    for name in ("disk", "a,b"):
        (place / name).touch()
    (place / "disk.info").write_text(record.format(folder=place) if "folder" in record else record)
    caplog.set_level(logging.WARNING, "imagebackend")
    assert [image.path for image in backend.disks()] == [path]
    assert f"the disks of {folder} are left out" in caplog.text


def test_a_record_names_no_file_outside_its_instance(backend, tmp_path):
    victim = make(backend, "i-1", "disk", "raw").path
    place = tmp_path / "instances" / "i-2"
    place.mkdir()
    (place / "disk").touch()
    for path in (victim, "/etc/passwd", f"{place}/../i-1/disk", "i-1/disk", ""):
        (place / "disk.info").write_text(json.dumps({path: "raw", f"{place}/disk": "lvm"}))
        assert [image.path for image in backend.disks()] == [victim]
