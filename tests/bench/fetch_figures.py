# SPDX-License-Identifier: Apache-2.0
"""The figure of a template that is fetched as it is: nothing is converted, so that transfer, digest and disk show."""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack

from tests.bench import environment, peers
from tests.bench.figures import Bench, Contender, CountRow, Figure, Row, row, worker_in
from tests.bench.report import OWN
from tests.bench.worker import Timing

__all__ = ["FIGURES"]

_MIB = 1 << 20
_TEMPLATE = "template"
_PIPE, _FILE, _CONVERT = "curl | sha256sum", "curl, sha256sum", "qemu-img convert"


def fetch(bench: Bench, figure: str) -> list[Row | CountRow]:
    size = (64 if bench.quick else 1024) * _MIB
    with ExitStack() as stack:
        web = stack.enter_context(environment.scratch_folder(bench.folder))
        os.mkdir(f"{web}/images")
        environment.random_data(f"{web}/images/image.raw", size)
        url = f"{stack.enter_context(environment.web_server(web, {}))}/image.raw"
        title = f"fetch: {size // _MIB} MiB raw over HTTP, hashed, inspected, on record"
        copy = f"{web}/copy"
        commands = {
            _PIPE: "curl -sS $URL | sha256sum",
            _FILE: "curl -sS -o $COPY $URL; sha256sum $COPY",
            _CONVERT: "qemu-img convert -f raw -O raw $IMAGE $COPY",
        }
        synced = {f"{name}, fdatasync": f"{commands[name]}; sync -d $COPY" for name in (_FILE, _CONVERT)}
        places = f"URL={url} COPY={copy} IMAGE={web}/images/image.raw"
        rows: list[Row | CountRow] = []
        # The pipe keeps nothing, so that it can be neither durable nor slowed down by a disk.
        for durable, tools, targets in (
            (True, {_PIPE: commands[_PIPE], **synced}, {f"{_FILE}, fdatasync": 1.0}),
            (False, commands, {_PIPE: 0.8, _FILE: 1.0}),
        ):
            folder = f"{bench.folder}/own-fetch"
            configuration = peers.write_configuration(folder, "raw", durable=durable)
            with worker_in("own", configuration, folder) as worker:
                contenders: dict[str, Contender] = {OWN: functools.partial(_pull, worker, url)}
                for name, command in tools.items():
                    contenders[name] = functools.partial(_run, f"{places}; {command}", copy)
                shown = title if durable else f"{title}, durable_writes = false"
                rows.append(row(figure, shown, "s", bench.interleave(shown, contenders), targets, commands=tools))
        return rows


FIGURES = (Figure("fetch", "a template fetched over HTTP, beside curl, sha256sum and qemu-img convert", fetch),)


def _pull(worker: peers.Worker, url: str) -> Timing:
    timing: Timing = worker.call("pull", template=_TEMPLATE, source=url)
    worker.call("forget", template=_TEMPLATE)
    return timing


def _run(command: str, copy: str) -> Timing:
    timing = peers.run_tool([["bash", "-o", "pipefail", "-ec", f"exec >/dev/null; {command}"]])
    if os.path.exists(copy):
        os.unlink(copy)
    return timing
