# SPDX-License-Identifier: Apache-2.0
"""Images from a real Glance, behind a real Keystone."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.templates.cache import TemplateCache
from imagebackend.templates.sources import open_source
from tests.functional import web
from tests.functional.ceph import rbd_backend
from tools import private_openstack
from tools.private_ceph import Cluster
from tools.private_openstack import Cloud

MIB = 1 << 20
CONTENT = random.Random(0).randbytes(3 * MIB)


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with private_openstack.run(tmp_path_factory.mktemp("cloud")) as cloud:
        yield cloud


@pytest.fixture(autouse=True)
def surroundings(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's cloud, and nothing else, is known."""
    for name in list(os.environ):
        if name.startswith("OS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(cloud.clouds))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def service(cloud: Cloud) -> Iterator[Any]:
    """A connection of the administrator's, to make images."""
    with cloud.connect() as connection:
        yield connection.image


def upload(service: Any, content: bytes = CONTENT, **options: Any) -> Any:
    options = {"name": f"image {uuid.uuid4()}", "disk_format": "raw", "container_format": "bare", **options}
    return service.create_image(data=content, **options)


def url_of(image: Any) -> str:
    return f"glance:test/{image.name.replace(' ', '%20')}"


def fetch(url: str, conf: cfg.ConfigOpts, folder: Path, **options: Any) -> Any:
    target = folder / "target"
    target.write_bytes(b"")
    fetched = open_source(url, conf, **options).fetch(str(target))
    assert hashlib.sha256(target.read_bytes()).hexdigest() == (fetched.content_sha256 or fetched.sha256)
    return fetched


@pytest.fixture(scope="session")
def vhd(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What Glance calls vhd; it looks at what it is given."""
    folder = tmp_path_factory.mktemp("vhd")
    (folder / "raw").write_bytes(CONTENT)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "force_size", "raw", "vhd"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return (folder / "vhd").read_bytes()


@pytest.mark.parametrize("form", ["id", "name", "id within a cloud"])
def test_whole_image(
    service: Any, conf: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vhd: bytes, form: str
) -> None:
    image = upload(service, vhd, disk_format="vhd", min_disk=2)
    url = {"id": f"glance://{image.id}", "name": url_of(image), "id within a cloud": f"glance:test/{image.id}"}[form]
    if form == "id":
        monkeypatch.setenv("OS_CLOUD", "test")
    fetched = fetch(url, conf, tmp_path)
    assert (fetched.source, fetched.size) == (url.replace("//", ""), len(vhd))
    assert fetched.sha256 == hashlib.sha256(vhd).hexdigest()
    assert (fetched.disk_format, fetched.min_disk, fetched.compression) == ("vpc", 2 << 30, None)
    found = open_source(url, conf).metadata()
    assert found.checksum == f"sha512:{hashlib.sha512(vhd).hexdigest()}"
    assert (found.size, found.disk_format, found.min_disk) == (len(vhd), "vpc", 2 << 30)
    assert found.etag == fetched.etag == f'"{image.id}"'


def test_as_a_template(service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    image = upload(service, min_disk=1)
    cache = TemplateCache(conf)
    template = cache.fetch("image", open_source(url_of(image), conf).fetch)
    assert Path(template.path).read_bytes() == CONTENT
    assert (template.source, template.min_disk, template.etag) == (url_of(image), 1 << 30, f'"{image.id}"')
    cache.verify("image")


def test_what_has_the_name_today(service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    image = upload(service)
    source = open_source(url_of(image), conf)
    fetched = fetch(url_of(image), conf, tmp_path)
    then = {"sha256": fetched.sha256, "etag": fetched.etag, "last_modified": fetched.last_modified}
    assert source.unchanged_since(**then)
    service.delete_image(image)
    with pytest.raises(exceptions.FetchFailed, match="there is no such image"):
        source.unchanged_since(**then)
    upload(service, CONTENT[:-512], name=image.name)
    assert not source.unchanged_since(**then)
    upload(service, name=image.name)
    with pytest.raises(exceptions.FetchFailed, match="several images have that name"):
        source.metadata()


def stored(cloud: Cloud, image: Any) -> Path:
    """The file in which Glance keeps an image."""
    return cloud.clouds.parent / "files" / image.id


def test_damaged_in_its_store(cloud: Cloud, service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    image = upload(service)
    with stored(cloud, image).open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(exceptions.ChecksumMismatch) as caught:
        fetch(url_of(image), conf, tmp_path)
    assert caught.value.algorithm == "sha512"


def test_checksum_of_the_callers_own(service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    image = upload(service)
    checksum = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
    assert open_source(url_of(image), conf, checksum=checksum).metadata().checksum == checksum
    fetch(url_of(image), conf, tmp_path, checksum=checksum)
    with pytest.raises(exceptions.ChecksumMismatch):
        fetch(url_of(image), conf, tmp_path, checksum="sha256:" + "0" * 64)


def test_goes_on_in_another_fetch(
    cloud: Cloud, service: Any, conf: cfg.ConfigOpts, caplog: pytest.LogCaptureFixture
) -> None:
    """Glance's file became shorter than the image for a while, so that the transfer breaks off."""
    caplog.set_level(logging.INFO)
    image = upload(service)
    stored(cloud, image).write_bytes(CONTENT[: 2 * MIB])
    cache = TemplateCache(conf)
    with pytest.raises(exceptions.FetchFailed):
        cache.fetch("image", open_source(url_of(image), conf).fetch)
    stored(cloud, image).write_bytes(CONTENT)
    template = cache.fetch("image", open_source(url_of(image), conf).fetch)
    assert Path(template.path).read_bytes() == CONTENT
    assert f"going on after {2 * MIB} bytes of {3 * MIB}" in caplog.text
    assert "starting over" not in caplog.text


def test_compressed(service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    compressed = subprocess.run(["gzip", "-c"], input=CONTENT, check=True, capture_output=True, timeout=60).stdout
    image = upload(service, compressed, container_format="compressed")
    assert fetch(url_of(image), conf, tmp_path).compression == "gzip"
    assert (tmp_path / "target").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"container_format": "ova"}, exceptions.ImageUnacceptable, "container format is ova"),
        ({"disk_format": "aki", "container_format": "aki"}, exceptions.ImageUnacceptable, "container format is aki"),
        ({"disk_format": "ploop"}, exceptions.ImageUnacceptable, "its format is ploop"),
    ],
)
def test_unacceptable(
    service: Any, conf: cfg.ConfigOpts, tmp_path: Path, options: dict[str, str], error: type[Exception], reason: str
) -> None:
    image = upload(service, **options)
    with pytest.raises(error, match=reason):
        fetch(url_of(image), conf, tmp_path)


def test_not_ready(service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
    image = service.create_image(name=f"queued {uuid.uuid4()}", disk_format="raw", container_format="bare")
    with pytest.raises(exceptions.FetchFailed, match="its status is queued"):
        fetch(url_of(image), conf, tmp_path)
    image = upload(service)
    service.deactivate_image(image)
    with pytest.raises(exceptions.FetchFailed, match="its status is deactivated"):
        fetch(url_of(image), conf, tmp_path)


class TestClouds:
    """What clouds.yaml and the environment say, and what becomes of it."""

    @pytest.fixture
    def change(self, cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Have clouds.yaml say something else."""

        def change(auth: dict[str, str] | None = None, **options: Any) -> None:
            configuration = json.loads(cloud.clouds.read_text())
            configuration["clouds"]["test"]["auth"] |= auth or {}
            configuration["clouds"]["test"] |= options
            (tmp_path / "clouds.yaml").write_text(json.dumps(configuration))
            monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))

        return change

    @pytest.fixture(params=["password", "token"])
    def environment(
        self, request: pytest.FixtureRequest, cloud: Cloud, service: Any, monkeypatch: pytest.MonkeyPatch
    ) -> list[str]:
        """The credentials are in the environment, and nowhere else; which of them are secret."""
        monkeypatch.delenv("OS_CLIENT_CONFIG_FILE")
        token = service.session.get_token()
        user = {"USERNAME": "admin", "USER_DOMAIN_ID": "default", "PASSWORD": private_openstack.PASSWORD}
        given = user if request.param == "password" else {"AUTH_TYPE": "v3token", "TOKEN": token}
        scope = {"AUTH_URL": cloud.keystone, "PROJECT_NAME": "admin", "PROJECT_DOMAIN_ID": "default"}
        for name, value in {**scope, **given}.items():
            monkeypatch.setenv(f"OS_{name}", value)
        return [private_openstack.PASSWORD, token]

    def test_wrong_password(self, change: Callable[..., None], conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        change({"password": "wrongsecret"})
        with pytest.raises(exceptions.FetchDenied) as caught:
            fetch("glance:test/image", conf, tmp_path)
        assert "wrongsecret" not in str(caught.value)

    @pytest.mark.parametrize("url", ["glance:elsewhere/image", "glance:image", "glance://image"])
    def test_unknown_cloud(
        self, conf: cfg.ConfigOpts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        if "elsewhere" not in url:  # the only one of a file would be meant
            monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "absent"))
        with pytest.raises(exceptions.InvalidConfiguration, match=r"clouds\.yaml"):
            fetch(url, conf, tmp_path)

    def test_nobody_listens(self, change: Callable[..., None], service: Any, conf: cfg.ConfigOpts) -> None:
        image = upload(service)
        cache = TemplateCache(conf)
        source = open_source(url_of(image), conf)
        template = cache.pull("image", source, "newer")
        with web.refusing_port() as port:
            change({"auth_url": f"http://127.0.0.1:{port}/v3"})
            with pytest.raises(exceptions.FetchFailed):
                source.metadata()
            assert cache.pull("image", source, "newer") == template

    def test_nobody_answers(self, change: Callable[..., None], conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        conf.set_override("fetch_timeout", 1, group="image_cache")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            change({"auth_url": f"http://127.0.0.1:{silent.getsockname()[1]}/v3"})
            with pytest.raises(exceptions.FetchTimeout):
                fetch("glance:test/image", conf, tmp_path)

    def test_environment(self, environment: list[str], service: Any, conf: cfg.ConfigOpts, tmp_path: Path) -> None:
        image = upload(service)
        assert fetch(f"glance://{image.id}", conf, tmp_path).size == len(CONTENT)

    def test_nobody_sees_the_credentials(
        self, environment: list[str], service: Any, conf: cfg.ConfigOpts, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        image = upload(service)
        template = TemplateCache(conf).fetch("image", open_source(f"glance:{image.id}", conf).fetch)
        record = (Path(template.path).parent / ".records" / "image.json").read_text()
        assert not any(secret in caplog.text + record + repr(template) for secret in environment)

    def test_certificate_that_is_trusted(
        self, change: Callable[..., None], cloud: Cloud, service: Any, conf: cfg.ConfigOpts, tmp_path: Path
    ) -> None:
        image = upload(service)
        certificate = web.make_certificate(tmp_path)
        with web.nginx(tmp_path / "nginx", tls=certificate, behind=cloud.glance) as nginx:
            change(image_endpoint_override=f"{nginx.url}/behind", cacert=str(certificate[0]))
            assert fetch(url_of(image), conf, tmp_path).size == len(CONTENT)
            assert f"/behind/v2/images/{image.id}/file" in {line[4] for line in nginx.requests()}

    def test_certificate_that_is_not_trusted(
        self, change: Callable[..., None], cloud: Cloud, conf: cfg.ConfigOpts, tmp_path: Path
    ) -> None:
        with web.nginx(tmp_path / "nginx", tls=web.make_certificate(tmp_path), behind=cloud.keystone) as nginx:
            change({"auth_url": f"{nginx.url}/behind"})
            with pytest.raises(exceptions.FetchFailed, match="certificate verify failed"):
                fetch("glance:test/image", conf, tmp_path)


def test_a_file_of_another_host_is_no_location(service: Any, conf: cfg.ConfigOpts) -> None:
    image = upload(service)
    assert service.get_image(image.id).direct_url.startswith("file://")
    assert list(open_source(url_of(image), conf).locations()) == []


def test_locations_in_ceph(
    ceph: Cluster, rbd_pool: str, tmp_path: Path, conf: cfg.ConfigOpts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Glance that keeps its images in the pool where the disks are: they are cloned there."""
    (tmp_path / "cloud").mkdir()
    with private_openstack.run(tmp_path / "cloud", ceph_conf=ceph.configuration, pool=rbd_pool) as own:
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(own.clouds))
        with own.connect() as connection:
            image = upload(connection.image)
        source = open_source(url_of(image), conf)
        assert list(source.locations()) == [f"rbd://{ceph.fsid}/{rbd_pool}/{image.id}/snap"]
        assert fetch(url_of(image), conf, tmp_path).size == len(CONTENT)
        disk = rbd_backend(ceph, rbd_pool, tmp_path / "instances").image("instance", "disk")
        disk.clone(None, source.locations()[0])
        disk.snapshot_extract(str(tmp_path / "extract"), "raw")
        assert (tmp_path / "extract").read_bytes() == CONTENT


def test_not_installed() -> None:
    script = (
        "import sys; sys.modules['openstack'] = None\n"
        "from imagebackend import exceptions, load_config, open_source\n"
        "try: open_source('glance:test/image', load_config([]))\n"
        "except exceptions.Unsupported as error: print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)
    assert "install imagebackend[glance]" in output.stdout
