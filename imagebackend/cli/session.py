# SPDX-License-Identifier: Apache-2.0
"""What one run of the command knows: its options, the configuration, the backend."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from imagebackend import exceptions
from imagebackend.cli import output
from imagebackend.cli.exit_status import status_of
from imagebackend.cli.interruption import Interruption
from imagebackend.cli.progress import Progress

if TYPE_CHECKING:
    from oslo_config import cfg

    from imagebackend.backend import Backend

__all__ = ["DEFAULT_CONFIG_FILE", "Session", "Tally"]

#: Read if no ``--config-file`` is given and it is there.
DEFAULT_CONFIG_FILE = "/etc/imagebackend/imagebackend.conf"


@dataclass
class Session:
    """The state that commands share.

    :ivar json: print one JSON document instead of text.
    :ivar verbosity: how many ``-v`` there were.
    :ivar config_files, config_dirs: what ``--config-file`` and ``--config-dir`` named.
    :ivar interruption: Ctrl-C and SIGTERM.
    """

    json: bool = False
    verbosity: int = 0
    config_files: Sequence[str] = ()
    config_dirs: Sequence[str] = ()
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def files(self) -> list[str]:
        """The ini files to read."""
        if self.config_files or not os.path.exists(DEFAULT_CONFIG_FILE):
            return list(self.config_files)
        return [DEFAULT_CONFIG_FILE]

    @functools.cached_property
    def conf(self) -> cfg.ConfigOpts:
        """The configuration.

        :raises InvalidConfiguration: it cannot be used.
        """
        from imagebackend.conf import load_config

        return load_config(self.files, self.config_dirs)

    @functools.cached_property
    def backend(self) -> Backend:
        """The disks and templates of that configuration."""
        from imagebackend.backend import Backend

        return Backend(self.conf)

    def show(self, document: Any, text: str) -> None:
        """Print the result: the document with ``--json``, the text without; nothing if that is empty."""
        if self.json:
            click.echo(output.to_json(document))
        elif text:
            click.echo(text)

    def end_if_failed(self, failed: Sequence[tuple[str, exceptions.ImageBackendError]]) -> None:
        """Say what failed, unless the document does, and end with the exit status of the first failure; if any did."""
        if not self.json:
            for what, error in failed:
                click.echo(f"imagebackend: {output.printable(f'{what}: {output.message(error)}')}", err=True)
        if failed:
            raise click.exceptions.Exit(status_of(failed[0][1]))

    def progress(self, label: str, *, lines: bool = False) -> contextlib.AbstractContextManager[Progress]:
        """Give what shows the progress of the work in the block, and ends it when the user wants that.

        :param lines: show no bar: others are shown at a time.
        """
        return Progress(label, self.interruption, silent=self.json, lines=lines).shown()


def failures_document(failed: Sequence[tuple[str, exceptions.ImageBackendError]]) -> list[dict[str, Any]]:
    """Return what a document says of what failed, of which the names are known."""
    return [{"name": what, "error": output.error_document(error, status_of(error))} for what, error in failed]


class Tally:
    """The results of one operation on several things, each of which may fail by itself."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._entries: list[dict[str, Any]] = []
        self._exit_status = 0

    @contextlib.contextmanager
    def one(self, name: str, done: str, facts: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Note whether the block succeeded with ``name``; say ``done`` if so, and the error at once if not.

        :param facts: what else the document says of it.

        Cancelling is for all of them, and propagates.
        """
        try:
            yield
        except exceptions.Cancelled:
            raise
        except exceptions.ImageBackendError as error:
            status = status_of(error)
            self._exit_status = self._exit_status or status
            self._entries.append({**(facts or {}), "name": name, "error": output.error_document(error, status)})
            if not self._session.json:
                click.echo(f"imagebackend: {output.printable(output.message(error))}", err=True)
        else:
            self._entries.append({**(facts or {}), "name": name})
            if not self._session.json:
                click.echo(done)

    def finish(self, kind: str) -> None:
        """Print the document, and end with the exit status of the first failure."""
        self._session.show({kind: self._entries}, "")
        if self._exit_status:
            raise click.exceptions.Exit(self._exit_status)
