# SPDX-License-Identifier: Apache-2.0
"""A Keystone and a Glance of one's own on loopback, of the released packages, beside whatever the machine runs.

Installing them takes half a minute, once: they have a virtual environment in .cache, and databases that are ready to
be copied. Starting both takes a few seconds. They end with the process that started them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openstack

from imagebackend import locks
from tools import deadline, link_debian_modules
from tools.debian_kernel import CACHE

__all__ = ["Cloud", "run"]

#: The password of the administrator, who is called admin.
PASSWORD = "topsecret"

_PACKAGES = ("glance==33.0.0", "keystone==30.0.0", "gunicorn==23.0.0")
_INSTALL_TIMEOUT = 900.0
_START_TIMEOUT = 180.0
_REGION = "RegionOne"
_PLACEHOLDER = "http://keystone.invalid/v3"

_KEYSTONE = """\
[DEFAULT]
use_stderr = true
[database]
connection = sqlite:///{folder}/keystone.db
[fernet_tokens]
key_repository = {folder}/fernet
[credential]
key_repository = {folder}/fernet
[cache]
enabled = true
backend = dogpile.cache.memory
[identity]
# The least that bcrypt takes: nobody guesses it here.
password_hash_rounds = 4
max_password_length = 72
"""

_GLANCE = """\
[DEFAULT]
use_stderr = true
enabled_backends = {stores}
node_staging_uri = file://{folder}/staging
show_image_direct_url = true
show_multiple_locations = true
[database]
connection = sqlite:///{folder}/glance.db
[glance_store]
default_backend = {default_store}
[files]
filesystem_store_datadir = {folder}/files
[ceph]
rbd_store_ceph_conf = {ceph_conf}
rbd_store_user = admin
rbd_store_pool = {pool}
[os_glance_staging_store]
filesystem_store_datadir = {folder}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {folder}/tasks
[paste_deploy]
flavor = keystone
config_file = {paste}
[keystone_authtoken]
auth_type = password
auth_url = {keystone}
www_authenticate_uri = {keystone}
username = admin
password = {password}
project_name = admin
user_domain_id = default
project_domain_id = default
[oslo_policy]
enforce_scope = false
enforce_new_defaults = false
[oslo_concurrency]
lock_path = {folder}
"""

_GUNICORN = """\
wsgi_app = "{name}.wsgi.api:application"
bind = "fd://{descriptor}"
workers = 1
threads = 8
timeout = 600
"""


class Cloud:
    """A Keystone and a Glance that run; :func:`run` makes one.

    :ivar keystone: the URL of Keystone.
    :ivar glance: the URL of Glance.
    :ivar clouds: a clouds.yaml with the cloud ``test``, as its administrator.
    """

    def __init__(self, folder: Path, environment: Path) -> None:
        self.keystone = self.glance = ""
        self.clouds = folder / "clouds.yaml"
        self._folder = folder
        self._environment = environment
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stack = contextlib.ExitStack()

    def connect(self) -> openstack.connection.Connection:
        """Return a new connection of the administrator's; used in a ``with`` statement, it ends with that."""
        config = openstack.config.OpenStackConfig(config_files=[str(self.clouds)], load_envvars=False)
        return openstack.connection.Connection(config=config.get_one("test"))

    def start(self, ceph_conf: Path | None, pool: str) -> None:
        keystone, glance = (self._stack.enter_context(_listening()) for _ in range(2))
        self.keystone = f"http://127.0.0.1:{keystone.getsockname()[1]}/v3"
        self.glance = f"http://127.0.0.1:{glance.getsockname()[1]}"
        with contextlib.closing(sqlite3.connect(self._folder / "keystone.db")) as database, database:
            database.execute("UPDATE endpoint SET url = ?", (self.keystone,))
        (self._folder / "keystone").mkdir()
        (self._folder / "keystone" / "keystone.conf").write_text(_KEYSTONE.format(folder=self._folder))
        stores = "files:file, ceph:rbd" if ceph_conf else "files:file"
        (self._folder / "glance").mkdir()
        (self._folder / "glance" / "glance-api.conf").write_text(
            _GLANCE.format(
                folder=self._folder,
                stores=stores,
                default_store="ceph" if ceph_conf else "files",
                ceph_conf=ceph_conf or "",
                pool=pool,
                paste=self._environment / "etc" / "glance" / "glance-api-paste.ini",
                keystone=self.keystone,
                password=PASSWORD,
            )
        )
        self.clouds.write_text(json.dumps({"clouds": {"test": self._configuration()}}))
        self._launch("keystone", keystone)
        self._launch("glance", glance)
        for url in (self.keystone, f"{self.glance}/versions"):
            look = functools.partial(self._answers, url)
            deadline.wait_for(look, seconds=_START_TIMEOUT, what=f"answer from {url}")
        self._register()

    def end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # it failed
                os.killpg(process.pid, signal.SIGKILL)  # the master and its worker
            process.wait()
        self._stack.close()

    def _configuration(self) -> dict[str, Any]:
        """Return what clouds.yaml says of it, of which JSON is a form."""
        domain = {"user_domain_id": "default", "project_domain_id": "default"}
        user = {"username": "admin", "password": PASSWORD, "project_name": "admin"}
        return {"auth": {"auth_url": self.keystone, **user, **domain}, "region_name": _REGION}

    def _launch(self, name: str, listener: socket.socket) -> None:
        folder = self._folder / name
        descriptor = listener.fileno()
        (folder / "gunicorn.conf.py").write_text(_GUNICORN.format(name=name, descriptor=descriptor))
        # Without arguments: both take those of the command line for their own.
        command = ["setpriv", "--pdeathsig", "KILL", str(self._environment / "bin" / "gunicorn")]
        environment = {**_environment(), f"OS_{name.upper()}_CONFIG_DIR": str(folder)}
        with (folder / "output.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)

    def _answers(self, url: str) -> bool:
        for process, name in zip(self._processes, ("keystone", "glance"), strict=True):
            if process.poll() is not None:
                raise RuntimeError((self._folder / name / "output.log").read_text())
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
                return bool(answer.read())
        except OSError:
            return False

    def _register(self) -> None:
        """Enter Glance into Keystone's catalog."""
        with self.connect() as connection:
            identity: Any = connection.identity
            service = identity.create_service(name="glance", type="image")
            identity.create_endpoint(service_id=service.id, interface="public", url=self.glance, region_id=_REGION)


@contextlib.contextmanager
def run(folder: Path, *, ceph_conf: Path | None = None, pool: str = "") -> Iterator[Cloud]:
    """Run both in the block; they are gone afterwards.

    :param folder: an empty folder for their state.
    :param ceph_conf: the ceph.conf of a cluster that lets everybody in, where Glance keeps the images; None: in files.
    :param pool: the pool there.
    :raises RuntimeError: one of them failed; the text is what it said.
    :raises TimeoutError: it did not get ready in time.
    """
    environment, prepared = _installed()
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    cloud = Cloud(folder, environment)
    try:
        cloud.start(ceph_conf, pool)
        yield cloud
    finally:
        cloud.end()


def _installed() -> tuple[Path, Path]:
    """Return the virtual environment, and the folder with what both need to start, made if they are not there."""
    home = (CACHE / "openstack").resolve()
    environment, prepared = home / "venv", home / "prepared"
    with locks.hold(str(home / "lock"), timeout=_INSTALL_TIMEOUT):
        with _made(environment, "\n".join(_PACKAGES)) as missing:
            if missing:
                _command("/usr/bin/python3", "-m", "venv", environment)
                python = environment / "bin" / "python"
                _command(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_PACKAGES)
                _command(python, Path(link_debian_modules.__file__), "rados", "rbd")
        with _made(prepared, Path(__file__).read_text()) as missing:
            if missing:
                _prepare(environment / "bin", prepared)
    return environment, prepared


@contextlib.contextmanager
def _made(folder: Path, recipe: str) -> Iterator[bool]:
    """Tell whether a folder has to be made in the block, since it is not there or was made by another recipe."""
    stamp = folder.with_suffix(".stamp")
    missing = not stamp.exists() or stamp.read_text() != f"{folder}\n{recipe}"
    if missing:
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    yield missing
    stamp.write_text(f"{folder}\n{recipe}")


def _prepare(programs: Path, folder: Path) -> None:
    """Make the databases and the keys, which are the same for all."""
    folder.mkdir(mode=0o700)
    (folder / "fernet").mkdir(mode=0o700)
    configuration = folder / "keystone.conf"
    configuration.write_text(_KEYSTONE.format(folder=folder))
    manage = (programs / "keystone-manage", "--config-file", configuration)
    _command(*manage, "db_sync")
    _command(*manage, "fernet_setup", "--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid()))
    urls = [f"--bootstrap-{kind}-url={_PLACEHOLDER}" for kind in ("admin", "internal", "public")]
    _command(*manage, "bootstrap", f"--bootstrap-password={PASSWORD}", f"--bootstrap-region-id={_REGION}", *urls)
    configuration.unlink()
    configuration = folder / "glance.conf"
    configuration.write_text(f"[database]\nconnection = sqlite:///{folder}/glance.db\n")
    _command(programs / "glance-manage", "--config-file", configuration, "db_sync")
    configuration.unlink()


@contextlib.contextmanager
def _listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener


def _command(*command: str | Path) -> None:
    done = subprocess.run(
        command, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=_INSTALL_TIMEOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-4000:]}{done.stderr[-4000:]}")


def _environment() -> Mapping[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OS_", "PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": ""}
