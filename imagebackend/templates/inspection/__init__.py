# SPDX-License-Identifier: Apache-2.0
"""What every image passes before any tool, or the kernel, opens it.

Accepted: raw (a disk, a file system, an ISO image), qcow2, vmdk, vpc, vhdx, vdi and parallels (ploop), each alone in
its file: no backing file, no parent, no extent or data elsewhere, no encryption. Everything else that QEMU would
recognise is refused by name, also where it is claimed to be raw.

One module a format; :mod:`.detection` says which, :mod:`.second_reading` asks oslo.utils whether it agrees.
"""

from __future__ import annotations

from imagebackend.templates.inspection.inspector import INSPECTOR_VERSION, inspect
from imagebackend.templates.inspection.subject import Verdict

__all__ = ["INSPECTOR_VERSION", "Verdict", "inspect"]
