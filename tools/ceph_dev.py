# SPDX-License-Identifier: Apache-2.0
"""A small Ceph cluster on this machine, with a pool for disks, while a command runs or until it is interrupted.

The command finds the cluster by itself, as does all that reads $CEPH_CONF: ``tools/ceph-dev rbd ls vms``. What the
cluster stores is in memory, and gone with it. The machine's own Ceph, if there is one, is left alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

from tools import private_ceph

POOL, USER = "vms", "imagebackend"

INI = """\
[libvirt]
images_type = rbd
images_rbd_pool = {pool}
images_rbd_ceph_conf = {configuration}
"""

INI_CEPHX = """\
rbd_user = {user}
rbd_secret_uuid = {secret}
"""

SECRET = """\
<secret ephemeral="yes" private="yes">
  <uuid>{secret}</uuid>
  <usage type="ceph"><name>client.{user}</name></usage>
</secret>
"""


def main() -> int:
    options = _parse()
    # The daemons are ended on the way out, however this is told to end.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(128 + signal.SIGTERM))
    with (
        tempfile.TemporaryDirectory(prefix="ceph-dev-") as folder,
        private_ceph.run(Path(folder), options.auth) as cluster,
        cluster.pool(POOL),
    ):
        print(INI.format(pool=POOL, configuration=cluster.configuration), end="")
        if options.auth == "cephx":
            secret = str(uuid.uuid4())
            key = cluster.user(USER, mon="profile rbd", osd=f"profile rbd pool={POOL}")
            print(INI_CEPHX.format(user=USER, secret=secret))
            print(f"For libvirt, with the value {key}:\n{SECRET.format(user=USER, secret=secret)}", end="")
        print(f"\nCEPH_CONF={cluster.configuration}; logs are beside it.", flush=True)
        if options.command:
            environment = {**os.environ, "CEPH_CONF": str(cluster.configuration)}
            return subprocess.run(options.command, env=environment, check=False).returncode
        print("It runs until it is interrupted.", flush=True)
        threading.Event().wait()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/ceph-dev", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--auth", choices=private_ceph.AUTHENTICATIONS, default="none", help="default: none")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run; by default nothing")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
