# SPDX-License-Identifier: Apache-2.0
"""The command ``imagebackend``.

Nothing heavy is imported before a command needs it: what a module of this package imports at its top is click, the
library's names and errors, and its own neighbours.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> int:
    """Run the command with the process's arguments; return its exit status (entry point ``console_scripts``)."""
    from imagebackend.cli.application import run

    return run()
