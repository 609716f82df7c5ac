# SPDX-License-Identifier: Apache-2.0
"""Link C extensions that Debian packages, and PyPI does not have, into the virtual environment that runs this.

``python tools/link_debian_modules.py rados rbd``: only these become visible, unlike with ``--system-site-packages``.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import sysconfig
from pathlib import Path

DEBIAN = Path("/usr/lib/python3/dist-packages")


def main() -> int:
    """Link the modules that the arguments name; return 1 and say why if one is not there for this Python."""
    if sys.prefix == sys.base_prefix:
        sys.stderr.write(f"{sys.executable} is not in a virtual environment\n")
        return 1
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    for name in sys.argv[1:]:
        module = DEBIAN / f"{name}{suffix}"
        if not module.exists():
            sys.stderr.write(f"{module} is missing: apt-get install python3-{name}, and use Debian's own Python\n")
            return 1
        link = Path(sysconfig.get_path("platlib")) / module.name
        partial = link.with_suffix(f".{os.getpid()}")
        partial.symlink_to(module)
        partial.replace(link)
    return 0


if __name__ == "__main__":
    sys.exit(main())
