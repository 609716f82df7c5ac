# SPDX-License-Identifier: Apache-2.0
"""A libvirtd of one's own, with the QEMU and LXC drivers, beside whatever the machine runs.

It lives in a mount namespace, where the folders that libvirt insists on are its own, and in a process namespace, so
that it and every guest it started end with it, and it ends with the process that started it. It needs root, and no
systemd, D-Bus or polkit. Clients stay outside and connect to its socket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt

from tools import deadline, guest_image

__all__ = ["connect", "run", "uri"]

_START_TIMEOUT = 60.0
_CAPABILITIES = guest_image.CACHE / "libvirt"

# By libvirt's own names for them; the key is the subfolder of ours that takes the place.
_FOLDERS = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
    "etc": "/etc/libvirt",
}

_LIBVIRTD_CONF = """\
unix_sock_dir = "{socket}"
unix_sock_group = "root"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
"""

_QEMU_CONF = """\
# Disks keep the owner that they have, and need not let in anybody else.
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
# In a chroot libvirt leaves a guest's own /dev empty, and a QEMU that finds no /dev/null gives up locking its disks.
namespaces = []
# Those of a guest that is killed would stay.
cgroup_controllers = []
# Not through a virtlogd.
stdio_handler = "file"
"""

# A hybrid cgroup hierarchy (v1 with v2 beside it) stops libvirt's LXC driver from starting.
_INNER = """\
set -e
folder=$1; shift
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
for pair; do mkdir -p "${pair#*:}"; mount --bind "$folder/${pair%%:*}" "${pair#*:}"; done
libvirtd --pid-file /run/libvirt/libvirtd.pid &
wait $!
"""


@contextlib.contextmanager
def run(folder: Path) -> Iterator[Path]:
    """Run a libvirtd in the block; it and its guests are gone afterwards.

    :param folder: an empty folder for its state, which must have a short path: it holds Unix sockets.
    :returns: the folder to give to :func:`uri`.
    :raises RuntimeError: it ended, or did not get ready in time.
    """
    _prepare(folder)
    namespaces = ("--mount", "--propagation", "slave", "--pid", "--mount-proc", "--fork", "--kill-child=KILL")
    pairs = [f"{name}:{place}" for name, place in _FOLDERS.items()]
    with open(folder / "libvirtd.log", "wb") as log:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "sh", "-c", _INNER, "sh", folder, *pairs],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with daemon:
        try:
            _wait_until_ready(folder, daemon)
            yield folder
        finally:
            _end(daemon)
    _keep_capabilities(folder)


def uri(folder: Path, driver: str) -> str:
    """Return the URI of the libvirtd that runs in ``folder``.

    :param driver: ``qemu`` or ``lxc``.
    """
    return f"{driver}+unix:///system?socket={folder}/socket/libvirt-sock"


@contextlib.contextmanager
def connect(name: str) -> Iterator[libvirt.virConnect]:
    """Hold a connection in the block, one that does not print its errors, since it raises them."""
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    connection = libvirt.open(name)
    try:
        yield connection
    finally:
        connection.close()


def _prepare(folder: Path) -> None:
    for name in ("socket", *_FOLDERS):
        (folder / name).mkdir(parents=True)
    (folder / "etc" / "libvirtd.conf").write_text(
        _LIBVIRTD_CONF.format(socket=folder / "socket", host_uuid=uuid.uuid4())
    )
    (folder / "etc" / "qemu.conf").write_text(_QEMU_CONF)
    # Probing QEMU takes seconds, and libvirt checks for itself whether what it found last time still holds.
    if _CAPABILITIES.exists():
        shutil.copytree(_CAPABILITIES, folder / "cache" / "qemu" / "capabilities")


def _end(daemon: subprocess.Popen[bytes]) -> None:
    """Kill the first process of the namespace: when that has been waited for, none of the others is left."""
    if daemon.poll() is not None:
        return
    first = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
    if first:
        os.kill(int(first[0]), signal.SIGKILL)
    else:
        daemon.kill()


def _keep_capabilities(folder: Path) -> None:
    _CAPABILITIES.mkdir(parents=True, exist_ok=True)
    for made in (folder / "cache" / "qemu" / "capabilities").glob("*.xml"):
        copy = _CAPABILITIES / f".{made.name}.{os.getpid()}"
        shutil.copy2(made, copy)
        copy.replace(_CAPABILITIES / made.name)


def _wait_until_ready(folder: Path, daemon: subprocess.Popen[bytes]) -> None:
    path = str(folder / "socket" / "libvirt-sock")
    try:
        deadline.wait_for(
            lambda: _answers(path) or daemon.poll() is not None, seconds=_START_TIMEOUT, what="libvirtd's socket"
        )
    except TimeoutError as error:
        raise RuntimeError(f"{error}; it said:\n{_said(folder)}") from error
    if daemon.poll() is not None:
        raise RuntimeError(f"libvirtd ended; it said:\n{_said(folder)}")


def _answers(path: str) -> bool:
    """Return whether somebody listens at a socket, which is there before that."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
    return True


def _said(folder: Path) -> str:
    return (folder / "libvirtd.log").read_text(errors="replace")[-2000:]
