# SPDX-License-Identifier: Apache-2.0
"""The figures of disks in Ceph, on a cluster of one node that keeps its data in memory."""

from __future__ import annotations

import functools
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.bench import environment, peers
from tests.bench.figures import NOVA, Bench, Contender, CountRow, Figure, Row, row, worker_in
from tests.bench.report import OWN
from tests.bench.worker import Timing, spread
from tools import private_ceph
from tools.private_ceph import Cluster

__all__ = ["FIGURES"]

_GIB = 1 << 30
_TEMPLATE = "template"
_BARE = "librbd, connected"
_TOOL = "rbd import"


class _Pool:
    """A cluster, a pool with a template as an image service would put it there, and one for our own templates."""

    def __init__(self, bench: Bench, template: str, cluster: Cluster, service: str, own: str) -> None:
        self.bench = bench
        self.template = template
        self.cluster = cluster
        self.service = service
        self.own = own
        self.location = f"rbd://{cluster.fsid}/{service}/{_TEMPLATE}/snap"
        self.rbd("import", "--no-progress", template, f"{service}/{_TEMPLATE}")
        self.rbd("snap", "create", "--no-progress", f"{service}/{_TEMPLATE}@snap")
        self.rbd("snap", "protect", f"{service}/{_TEMPLATE}@snap")

    def rbd(self, *arguments: str) -> None:
        subprocess.run(self.command(*arguments), check=True, stdin=subprocess.DEVNULL)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of rbd(8)."""
        return ["rbd", "--conf", str(self.cluster.configuration), *arguments]

    @contextmanager
    def workers(self) -> Iterator[dict[str, peers.Worker]]:
        """Start every side; our own has the template in its cache and in its pool."""
        with ExitStack() as stack:
            workers = {}
            for side, pool in (("own", self.own), ("nova", self.service)):
                if side in self.bench.sides:
                    folder = f"{self.bench.folder}/{side}-rbd"
                    options = {"images_rbd_pool": pool, "images_rbd_ceph_conf": str(self.cluster.configuration)}
                    configuration = peers.write_configuration(folder, "rbd", libvirt=options)
                    workers[side] = stack.enter_context(worker_in(side, configuration, folder))
            self.bench.adopt(workers["own"], self.template)
            yield workers


@contextmanager
def _pool(bench: Bench, template: str) -> Iterator[_Pool]:
    with (
        environment.scratch_folder(bench.folder) as folder,
        private_ceph.run(Path(folder)) as cluster,
        cluster.pool() as service,
        cluster.pool() as own,
    ):
        yield _Pool(bench, template, cluster, service, own)


def clones(bench: Bench, figure: str) -> list[Row | CountRow]:
    rows: list[Row | CountRow] = []
    count = 5 if bench.quick else 20
    sizes = {"warm rbd disk": bench.virtual_size, "warm rbd disk that is larger than its template": 4 * _GIB}
    with _pool(bench, bench.light_template) as pool, pool.workers() as workers, _bare(pool) as bare:
        for (what, size), nova in zip(sizes.items(), (5, 3.5), strict=True):
            # Only the first disk of a size waits for the template to get a snapshot of that size.
            workers["own"].call("cache", template=_TEMPLATE, instances=[f"first-{size}"], size=size)
            title = f"{what}, {count} in turn"
            contenders: dict[str, Contender] = {
                OWN: functools.partial(_make, workers["own"], count, size),
                _BARE: functools.partial(bare, count, size),
            }
            if "nova" in workers:
                contenders[NOVA] = functools.partial(_clone_by_nova, workers["nova"], pool.location, count, size)
            commands = {_BARE: "rbd.RBD().clone(…), and rbd.Image(…).resize(…) if it grows, on an open rados.Ioctx"}
            results = bench.interleave(title, contenders)
            rows.append(row(figure, title, "ms a disk", results, {NOVA: nova, _BARE: 1 / 1.5}, commands=commands))
    return rows


def description(bench: Bench, figure: str) -> list[Row | CountRow]:
    times = 20 if bench.quick else 100
    with _pool(bench, bench.light_template) as pool, pool.workers() as workers:
        workers["own"].call("cache", template=_TEMPLATE, instances=["described"], size=bench.virtual_size)
        contenders: dict[str, Contender] = {
            name: functools.partial(workers[side].call, "describe", instance="described", times=few, anew=True)
            for name, side, few in ((OWN, "own", times), (NOVA, "nova", max(2, times // 20)))
            if side in workers
        }
        title = "Backend.by_name(), libvirt_info() and to_xml() of an rbd disk"
        return [row(figure, title, "µs", bench.interleave(title, contenders), {NOVA: 200}, limit=1000)]


def import_of_template(bench: Bench, figure: str) -> list[Row | CountRow]:
    with _pool(bench, bench.template) as pool, pool.workers() as workers:
        contenders: dict[str, Contender] = {
            OWN: functools.partial(_import, workers["own"], bench.virtual_size),
            _TOOL: functools.partial(_import_by_tool, pool),
        }
        title = f"first rbd disk: import of a raw template, {bench.data_size >> 20} MiB of data in 2 GiB"
        commands = {_TOOL: "rbd import TEMPLATE POOL/IMAGE"}
        results = bench.interleave(title, contenders)
        return [row(figure, title, "s", results, {_TOOL: 1 / 0.6}, commands=commands)]


FIGURES = (
    Figure("rbd-clone", "disks in Ceph from a template that is in the pool", clones),
    Figure("rbd-xml", "the XML of a disk in Ceph", description),
    Figure("rbd-import", "a first disk in Ceph, its template imported from the cache", import_of_template),
)


def _make(worker: peers.Worker, count: int, size: int) -> Timing:
    instances = _instances(count)
    timing: Timing = worker.call("cache", template=_TEMPLATE, instances=instances, size=size)
    worker.call("remove", instances=instances)
    return timing


def _clone_by_nova(worker: peers.Worker, location: str, count: int, size: int) -> Timing:
    instances = _instances(count)
    timing: Timing = worker.call("clone", location=location, instances=instances, size=size)
    worker.call("remove_stored", instances=instances)
    return timing


def _import(worker: peers.Worker, size: int) -> Timing:
    worker.call("forget_stored", template=_TEMPLATE)
    return _make(worker, 1, size)


def _import_by_tool(pool: _Pool) -> Timing:
    image = f"{pool.service}/{uuid.uuid4()}"
    timing = peers.run_tool([pool.command("import", "--no-progress", pool.template, image)])
    pool.rbd("rm", "--no-progress", image)
    return timing


@contextmanager
def _bare(pool: _Pool) -> Iterator[Any]:
    """Give a function that clones the template with nothing but librbd, over one connection."""
    import rbd

    with pool.cluster.connect() as connection, connection.open_ioctx(pool.service) as context:

        def clone(name: str, size: int) -> None:
            rbd.RBD().clone(context, _TEMPLATE, "snap", context, name)
            if size != pool.bench.virtual_size:
                with rbd.Image(context, name) as image:
                    image.resize(size)

        def run(count: int, size: int) -> Timing:
            names = _instances(count)
            timing = spread(lambda name: clone(name, size), names, 1)
            for name in names:
                rbd.RBD().remove(context, name)
            return timing

        yield run


def _instances(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]
