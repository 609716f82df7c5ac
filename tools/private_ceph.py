# SPDX-License-Identifier: Apache-2.0
"""A Ceph cluster of one's own on loopback, one monitor and one OSD, beside whatever the machine runs.

It is ready within a second or two, keeps what is stored in memory unless told otherwise, and its daemons end with the
process that started it. It needs neither root nor systemd.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools import deadline

__all__ = ["AUTHENTICATIONS", "Cluster", "run"]

AUTHENTICATIONS = ("none", "cephx")

_START_TIMEOUT = 60.0
_COMMAND_TIMEOUT = 30
_PLACEMENT_GROUPS = 8

# Outside of the range from which Linux takes the ports of outgoing connections (ip_local_port_range).
_MONITOR_PORTS = range(62000, 65000, 2)
_OSD_PORTS = (61000, 61999)

# A real monitor gathers changes for a second before it proposes them, which is most of what a start would take; and a
# real OSD waits half a minute for a client that has an image open and says nothing, which it does every five seconds.
# Daemons answer commands only if their admin socket is theirs, and by default it is the same for all clusters.
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon_host = {monitor}
auth_cluster_required = {authentication}
auth_service_required = {authentication}
auth_client_required = {authentication}
keyring = {folder}/ceph.$name.keyring

[mon]
admin_socket = {folder}/$name.asok
mon_data = {folder}/data.$name
mon_allow_pool_delete = true
mon_allow_pool_size_one = true
mon_data_avail_crit = 0
mon_max_pg_per_osd = 4000
paxos_min_wait = 0.01
paxos_propose_interval = 0.05
osd_crush_chooseleaf_type = 0
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_pool_default_size = 1

[osd]
admin_socket = {folder}/$name.asok
osd_data = {folder}/data.$name
osd_objectstore = {object_store}
memstore_device_bytes = 8589934592
bluestore_block_create = true
bluestore_block_size = 10737418240
ms_bind_port_min = {osd_ports[0]}
ms_bind_port_max = {osd_ports[1]}
osd_client_watch_timeout = 12

[mgr]
admin_socket = {folder}/$name.asok
mgr_data = {folder}/data.$name
mgr_stats_period = 1
"""

_CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
}


class Cluster:
    """A cluster that runs; :func:`run` makes one.

    :ivar folder: where its state is.
    :ivar fsid: its identity.
    :ivar configuration: the ceph.conf for clients; by default they are the user ``admin``, who may do everything.
    """

    def __init__(self, folder: Path, authentication: str, object_store: str) -> None:
        self.folder = folder
        self.fsid = str(uuid.uuid4())
        self.configuration = folder / "ceph.conf"
        self._authentication = authentication
        self._object_store = object_store
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def connect(self, user: str = "admin") -> Any:
        """Return a new connection, a :class:`rados.Rados`; used in a ``with`` statement, it ends with that.

        Nothing that is done with it waits for ever.
        """
        import rados

        names = ("client_mount_timeout", "rados_mon_op_timeout", "rados_osd_op_timeout")
        timeouts = dict.fromkeys(names, str(_COMMAND_TIMEOUT))
        return rados.Rados(conffile=str(self.configuration), rados_id=user, conf=timeouts)

    def command(self, prefix: str, **arguments: Any) -> Any:
        """Have the monitor do what ``ceph PREFIX`` would, and return its answer.

        :raises RuntimeError: it refused.
        """
        with self.connect() as connection:
            asked = json.dumps({"prefix": prefix, "format": "json", **arguments})
            code, answer, reason = connection.mon_command(asked, b"", timeout=_COMMAND_TIMEOUT)
        if code:
            raise RuntimeError(f"{asked}: {reason or os.strerror(abs(code))}")
        return json.loads(answer) if answer else None

    @contextlib.contextmanager
    def pool(self, name: str = "") -> Iterator[str]:
        """Have a new empty pool for RBD images in the block; it is deleted afterwards.

        :param name: what it is called; by default something that no other pool is.
        :returns: its name.
        """
        import rbd

        name = name or f"pool-{uuid.uuid4().hex[:12]}"
        self.command("osd pool create", pool=name, pg_num=_PLACEMENT_GROUPS, pgp_num=_PLACEMENT_GROUPS)
        with self.connect() as connection, connection.open_ioctx(name) as pool:
            rbd.RBD().pool_init(pool, True)
        try:
            yield name
        finally:
            self.command("osd pool delete", pool=name, pool2=name, yes_i_really_really_mean_it=True)

    def user(self, name: str, **capabilities: str) -> str:
        """Make a user who can connect with this configuration.

        :param name: without ``client.``.
        :param capabilities: by kind of daemon, such as ``mon="profile rbd"``.
        :returns: the key, in base64.
        """
        pairs = [text for pair in capabilities.items() for text in pair]
        key = str(self.command("auth get-or-create", entity=f"client.{name}", caps=pairs)[0]["key"])
        _write_keyring(self.folder / f"ceph.client.{name}.keyring", {f"client.{name}": key})
        return key

    @contextlib.contextmanager
    def paused(self, daemon: str) -> Iterator[None]:
        """Keep a daemon, ``mon.a`` or ``osd.0``, from doing anything in the block, as if its host hung."""
        process = self._daemons[daemon]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def stopped(self, daemon: str) -> Iterator[None]:
        """Have a daemon, ``mon.a`` or ``osd.0``, killed in the block; afterwards it runs again, and works.

        An OSD comes back with what it stored only if that is not in memory.
        """
        since = self._osd_up_since()
        self._end(daemon)
        try:
            yield
        finally:
            self._start(daemon)
            deadline.wait_for(
                lambda: self._osd_up_since() > (since if daemon == "osd.0" else 0),
                seconds=_START_TIMEOUT,
                what=f"{daemon} again",
            )

    def start(self) -> None:
        """Make the cluster and wait until it works."""
        self._configure()
        self._tool("ceph-mon", "--mkfs", "--id", "a", "--monmap", self.folder / "monmap")
        self._start("mon.a")
        identity = str(uuid.uuid4())
        self.command("osd new", uuid=identity)
        self._tool("ceph-osd", "--mkfs", "--id", "0", "--osd-uuid", identity)
        self._start("osd.0")
        deadline.wait_for(self._osd_up_since, seconds=_START_TIMEOUT, what="OSD")

    def start_manager(self) -> None:
        """Start a manager, without which nobody counts what is used, and no quota is enforced; it takes seconds."""
        self._start("mgr.x")

        def is_available() -> bool:
            self._check_daemons()
            return bool(self.command("mgr stat").get("available"))

        deadline.wait_for(is_available, seconds=_START_TIMEOUT, what="manager")

    def end(self) -> None:
        """End the daemons."""
        for name in list(self._daemons):
            self._end(name)

    def _configure(self) -> None:
        port = _free_port()
        monitor = f"[v2:127.0.0.1:{port},v1:127.0.0.1:{port + 1}]"
        text = _CONFIGURATION.format(
            fsid=self.fsid,
            monitor=monitor,
            authentication=self._authentication,
            folder=self.folder,
            object_store=self._object_store,
            osd_ports=_OSD_PORTS,
        )
        self.configuration.write_text(text)
        self._tool("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", monitor, self.folder / "monmap")
        keys = {name: _new_key() for name in _CAPABILITIES}
        # A new monitor takes over everyone whom its keyring names.
        _write_keyring(self.folder / "ceph.mon.a.keyring", keys)
        for name in ("client.admin", "mgr.x", "osd.0"):
            _write_keyring(self.folder / f"ceph.{name}.keyring", {name: keys[name]})
        for name in ("mon.a", "mgr.x", "osd.0"):
            (self.folder / f"data.{name}").mkdir()

    def _tool(self, program: str, *arguments: str | Path) -> None:
        command = [program, "--conf", self.configuration, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_START_TIMEOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed with exit status {done.returncode}: {done.stderr[-2000:]}")

    def _start(self, name: str) -> None:
        kind, identifier = name.split(".")
        # Logs go to the output, which is a file of ours.
        program = (f"ceph-{kind}", "--conf", self.configuration.absolute(), "--id", identifier, "-d")
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *program],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",  # as systemd does: Debian's Ceph 18 looks for its classes from there
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.kill()
        process.wait()

    def _osd_up_since(self) -> int:
        """Return the epoch of the map since which the OSD is up, or 0."""
        self._check_daemons()
        osds = self.command("osd dump")["osds"]
        return int(osds[0]["up_from"]) if osds and osds[0]["up"] else 0

    def _check_daemons(self) -> None:
        for name, process in self._daemons.items():
            if process.poll() is not None:
                said = (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{name} ended; it said:\n{said}")


@contextlib.contextmanager
def run(folder: Path, authentication: str = "none", *, object_store: str = "memstore") -> Iterator[Cluster]:
    """Run a cluster in the block; its daemons are gone afterwards.

    :param folder: an empty folder for its state.
    :param authentication: ``none`` or ``cephx``.
    :param object_store: ``memstore``, or ``bluestore``, from which an OSD comes back with what it stored.
    :raises RuntimeError: a daemon or tool of Ceph failed; the text is what it said.
    :raises TimeoutError: it did not get ready in time.
    """
    cluster = Cluster(folder, authentication, object_store)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


def _free_port() -> int:
    """Return a port that is free on loopback, as is the next one."""
    for port in random.sample(_MONITOR_PORTS, len(_MONITOR_PORTS)):
        with contextlib.suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port
    raise RuntimeError(f"no port between {_MONITOR_PORTS.start} and {_MONITOR_PORTS.stop} is free")


def _new_key() -> str:
    # CryptoKey of Ceph: type (1: AES), seconds and nanoseconds of its creation, length, and the secret.
    return base64.b64encode(struct.pack("<hiih", 1, int(time.time()), 0, 16) + os.urandom(16)).decode()


def _write_keyring(path: Path, keys: dict[str, str]) -> None:
    lines: list[str] = []
    for name, key in keys.items():
        capabilities = _CAPABILITIES.get(name, {}).items()
        lines += [f"[{name}]", f"key = {key}", *(f'caps {kind} = "{allowed}"' for kind, allowed in capabilities)]
    path.touch(0o600)
    path.write_text("\n".join(lines) + "\n")
