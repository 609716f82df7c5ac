# SPDX-License-Identifier: Apache-2.0
"""Where the benchmark happens: a scratch folder, an XFS, images, a web server; all of it is removed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

__all__ = [
    "GLANCE_ALGORITHMS",
    "compressible_data",
    "random_data",
    "raw_template",
    "scratch_folder",
    "web_server",
    "xfs",
]

_MIB = 1 << 20
_EXTENTS = 9

#: The digests by which Nova's client can check what it downloads: Glance's default, and the one that we use.
GLANCE_ALGORITHMS = ("sha512", "sha256")

_NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; user root;
events {{ worker_connections 64; }}
http {{
  access_log off; sendfile on; default_type application/octet-stream;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port}; root {folder}/images;
    location = /v2/schemas/image {{ default_type application/json; alias {folder}/glance/schema; }}
    {locations}
  }}
}}
"""
_GLANCE_LOCATIONS = """
    location = /v2/images/{id} {{ default_type application/json; alias {folder}/glance/{id}; }}
    location = /v2/images/{id}/file {{ alias {folder}/images/{image}; }}
"""


@contextlib.contextmanager
def scratch_folder(parent: str) -> Iterator[str]:
    """Make a folder that is removed in the end."""
    folder = tempfile.mkdtemp(prefix="imagebackend-bench-", dir=parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def xfs(folder: str, size: int) -> Iterator[str]:
    """Mount a new XFS, which has reflinks, from a file on a loop device; root only."""
    container, mountpoint = f"{folder}/xfs.img", f"{folder}/xfs"
    with open(container, "wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", container], check=True)
    os.mkdir(mountpoint)
    # The kernel frees the loop device with the mount.
    subprocess.run(["mount", "-t", "xfs", "-o", "loop", container, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)
        os.unlink(container)


def raw_template(path: str, virtual_size: int, data_size: int) -> None:
    """Write a raw disk with one partition whose data lie in a few extents between holes."""
    extent = data_size // _EXTENTS // _MIB * _MIB
    with open(path, "wb") as file:
        file.truncate(virtual_size)
        for number in range(_EXTENTS):
            file.seek(_MIB + number * ((virtual_size - _MIB) // _EXTENTS // _MIB) * _MIB)
            _write_random(file.fileno(), extent)
        _write_partition_table(file.fileno(), virtual_size)
        os.fsync(file.fileno())


def random_data(path: str, size: int) -> None:
    """Write a raw disk full of what no compression makes smaller."""
    with open(path, "wb") as file:
        _write_random(file.fileno(), size)
        _write_partition_table(file.fileno(), size)


def compressible_data(path: str, size: int) -> None:
    """Write a raw disk full of programs, libraries and texts: this machine's ``/usr``."""
    with (
        open(path, "wb") as file,
        subprocess.Popen(["tar", "-c", "-C", "/", "usr"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar,
    ):
        assert tar.stdout is not None
        while file.tell() < size and (piece := tar.stdout.read(min(_MIB, size - file.tell()))):
            file.write(piece)
        tar.kill()
        file.truncate(size)
        file.flush()
        _write_partition_table(file.fileno(), size)


@contextlib.contextmanager
def web_server(folder: str, images: dict[str, int]) -> Iterator[str]:
    """Serve ``folder/images`` by nginx, and each qcow2 image in it as Glance would.

    An image ``NAME`` is ``NAME-ALGORITHM`` in Glance, checked by that digest.

    :param images: virtual size by file name.
    :returns: the URL, without a slash at its end.
    """
    os.mkdir(f"{folder}/glance")
    locations = ""
    for image, virtual_size in images.items():
        for algorithm in GLANCE_ALGORITHMS:
            identifier = f"{image}-{algorithm}"
            locations += _GLANCE_LOCATIONS.format(id=identifier, image=image, folder=folder)
            facts = _glance_facts(f"{folder}/images/{image}", algorithm, virtual_size)
            _write_json(f"{folder}/glance/{identifier}", {"id": identifier, **facts})
            schema = {"name": "image", "properties": {name: {} for name in ("id", *facts)}}
            _write_json(f"{folder}/glance/schema", schema)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with open(f"{folder}/nginx.conf", "w") as file:
        file.write(_NGINX.format(folder=folder, port=port, locations=locations))
    command = ["setpriv", "--pdeathsig", "TERM", "nginx", "-p", folder, "-c", f"{folder}/nginx.conf"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as nginx:
        try:
            _wait_for(port, nginx)
            yield f"http://127.0.0.1:{port}"
        finally:
            nginx.terminate()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline or server.poll() is not None:
                raise
            time.sleep(0.02)
        else:
            return


def _glance_facts(path: str, algorithm: str, virtual_size: int) -> dict[str, object]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
        size = file.tell()
    moment = "2026-01-01T00:00:00Z"
    return {
        "name": "bench", "status": "active", "visibility": "public", "owner": "bench", "protected": False, "tags": [],
        "disk_format": "qcow2", "container_format": "bare", "size": size, "virtual_size": virtual_size,
        "min_disk": 0, "min_ram": 0, "created_at": moment, "updated_at": moment, "schema": "/v2/schemas/image",
        "os_hash_algo": algorithm, "os_hash_value": digest,
    }  # fmt: skip


def _write_json(path: str, content: object) -> None:
    with open(path, "w") as file:
        json.dump(content, file)


def _write_random(descriptor: int, size: int) -> None:
    for start in range(0, size, _MIB):
        os.write(descriptor, os.urandom(min(_MIB, size - start)))


def _write_partition_table(descriptor: int, size: int) -> None:
    # An MBR with one Linux partition from 1 MiB to the end, as installers make it.
    entry = bytes([0x80, 0, 2, 0, 0x83, 0, 2, 0]) + (2048).to_bytes(4, "little")
    entry += ((size - _MIB) // 512).to_bytes(4, "little")
    os.pwrite(descriptor, bytes(446) + entry + bytes(48) + b"\x55\xaa", 0)
