# SPDX-License-Identifier: Apache-2.0
"""The figures: what each side does in a round, and what is read from it."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests import counting
from tests.bench import environment, peers
from tests.bench.report import OWN, CountRow, Row, progress
from tests.bench.worker import Timing

__all__ = [
    "FIGURES",
    "NOVA",
    "Bench",
    "Contender",
    "CountRow",
    "Figure",
    "Row",
    "copy",
    "creators",
    "row",
    "sync_file",
    "worker_in",
]

_GIB, _MIB = 1 << 30, 1 << 20
_TEMPLATE = "template"
NOVA = "Nova 34.0.0"
_REFLINK, _REFLINK_SYNC = "cp --reflink=always", "cp --reflink=always, fsync"
_SCALES = {"s": 1, "ms": 1e3, "µs": 1e6}
_SIDES = {"own": OWN, "nova": NOVA}

Contender = Callable[[], Timing]


@dataclass(frozen=True)
class Bench:
    """What the figures share.

    :ivar folder: the scratch folder.
    :ivar xfs: a folder on a file system with reflinks, or None.
    :ivar rounds: how often each side has its turn.
    :ivar quick: smaller and fewer, to see that it works.
    :ivar sides: ``own``, and ``nova`` if it is installed.
    """

    folder: str
    xfs: str | None
    rounds: int
    quick: bool
    sides: tuple[str, ...]

    @property
    def virtual_size(self) -> int:
        return 2 * _GIB

    @property
    def data_size(self) -> int:
        return (64 if self.quick else 563) * _MIB

    @functools.cached_property
    def template(self) -> str:
        """The raw disk that templates are copied from where it matters how much data they have."""
        path = f"{self.folder}/template.raw"
        environment.raw_template(path, self.virtual_size, self.data_size)
        return path

    @functools.cached_property
    def light_template(self) -> str:
        """The same with little data, in as many places: it is sooner in each side's cache."""
        path = f"{self.folder}/light.raw"
        environment.raw_template(path, self.virtual_size, 64 * _MIB)
        return path

    @contextmanager
    def workers(self, images_type: str, place: str, image_service: str = "") -> Iterator[dict[str, peers.Worker]]:
        """Start every side, each in a folder of its own under ``place``, which is removed in the end."""
        with ExitStack() as stack:
            workers = {}
            for side in self.sides:
                folder = f"{place}/{side}-{images_type}"
                configuration = peers.write_configuration(folder, images_type, image_service=image_service)
                workers[side] = stack.enter_context(worker_in(side, configuration, folder))
            yield workers

    @contextmanager
    def warm_workers(self, images_type: str, place: str, template: str = "") -> Iterator[dict[str, peers.Worker]]:
        """The same, with a template in each side's cache: the light one, or another."""
        with self.workers(images_type, place) as workers:
            for worker in workers.values():
                self.adopt(worker, template or self.light_template)
            yield workers

    @contextmanager
    def hasty_worker(self, images_type: str, place: str) -> Iterator[peers.Worker]:
        """Start this side with ``durable_writes`` switched off, the template in its cache."""
        folder = f"{place}/own-{images_type}-hasty"
        configuration = peers.write_configuration(folder, images_type, durable=False)
        with worker_in("own", configuration, folder) as worker:
            self.adopt(worker, self.light_template)
            yield worker

    def adopt(self, worker: peers.Worker, template: str) -> None:
        """Put a template into a side's cache."""
        worker.call("adopt", template=_TEMPLATE, path=template, size=self.virtual_size)

    def interleave(self, title: str, contenders: Mapping[str, Contender]) -> dict[str, list[Timing]]:
        """Give each contender its turn in each round, another one first each time."""
        results: dict[str, list[Timing]] = {name: [] for name in contenders}
        order = list(contenders)
        for number in range(self.rounds):
            for name in order[number % len(order) :] + order[: number % len(order)]:
                progress(f"{title}: round {number + 1} of {self.rounds}, {name}")
                # What one leaves to be written must not slow down the next.
                os.sync()
                results[name].append(contenders[name]())
        progress("")
        return results


@contextmanager
def worker_in(side: str, configuration: str, folder: str) -> Iterator[peers.Worker]:
    try:
        worker = peers.Worker(side, configuration)
        try:
            yield worker
        finally:
            worker.close()
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Figure:
    """A figure by its name, with what it shows in one line."""

    name: str
    about: str
    run: Callable[[Bench, str], list[Row | CountRow]]


def warm_qcow2(bench: Bench, figure: str) -> list[Row | CountRow]:
    tool, count = "qemu-img create -b", 5 if bench.quick else 20
    with bench.warm_workers("qcow2", bench.folder) as workers:
        contenders = creators(bench, workers, count)
        contenders[tool] = functools.partial(_qemu_img_create, bench, count)
        title = f"warm qcow2 disk, {count} in turn"
        results = bench.interleave(title, contenders)
    commands = {tool: "qemu-img create -q -f qcow2 -F raw -b TEMPLATE DISK SIZE"}
    return [row(figure, title, "ms a disk", results, {NOVA: 60, tool: 4}, commands=commands)]


def warm_qcow2_threads(bench: Bench, figure: str) -> list[Row | CountRow]:
    rows: list[Row | CountRow] = []
    count = 16 if bench.quick else 64
    with bench.warm_workers("qcow2", bench.folder) as workers:
        for threads in (8, 32):
            title = f"warm qcow2 disk, {count} by {threads} threads"
            results = bench.interleave(title, creators(bench, workers, count, threads))
            rows.append(row(figure, f"{title}: throughput", "ms a disk", results, {NOVA: 60}))
            middle = _each(results, lambda each: statistics.median(each) * 1e3)
            late = _each(results, lambda each: statistics.quantiles(each, n=10)[8] * 1e3)
            tail = _each(results, lambda each: statistics.quantiles(each, n=10)[8] / statistics.median(each))
            rows += [
                Row(figure, f"{title}: latency, median", "ms", middle),
                Row(figure, f"{title}: latency, 90th percentile", "ms", late),
                Row(figure, f"{title}: latency, 90th percentile / median", "times", tail, limit=3),
            ]
    return rows


def raw_reflink(bench: Bench, figure: str) -> list[Row | CountRow]:
    if bench.xfs is None:
        raise RuntimeError("needs root, to mount an XFS")
    count = 5 if bench.quick else 20
    source = f"{bench.xfs}/source.raw"
    subprocess.run(["cp", "--sparse=always", bench.light_template, source], check=True)
    commands = {
        _REFLINK: "cp --reflink=always TEMPLATE DISK",
        _REFLINK_SYNC: "the same, then fsync(2) of DISK and folder",
    }
    tools: dict[str, Contender] = {
        _REFLINK: functools.partial(copy, source, count, _REFLINK.split(), None),
        _REFLINK_SYNC: functools.partial(copy, source, count, _REFLINK.split(), _sync_file_and_folder),
    }
    with bench.warm_workers("raw", bench.xfs) as workers, bench.hasty_worker("raw", bench.xfs) as hasty:
        title = f"warm raw disk on XFS, {count} in turn"
        contenders = {**creators(bench, workers, count), **tools}
        durable = bench.interleave(title, contenders)
        # So short that one moment in which the machine did something else would show: more of them.
        without = f"warm raw disk on XFS, {5 * count} in turn, durable_writes = false"
        contenders = creators(bench, {"own": hasty}, 5 * count)
        contenders[_REFLINK] = functools.partial(copy, source, 5 * count, _REFLINK.split(), None)
        not_durable = bench.interleave(without, contenders)
    os.unlink(source)
    return [
        # cp leaves a copy that a power cut takes back: it is no measure for one that stays.
        row(figure, title, "ms a disk", durable, {NOVA: 60, _REFLINK_SYNC: 1}, commands=commands),
        row(figure, without, "ms a disk", not_durable, {_REFLINK: 3}),
    ]


def raw_copy(bench: Bench, figure: str) -> list[Row | CountRow]:
    tool, bare = "cp, fdatasync", "cp"
    kind = subprocess.check_output(["findmnt", "-no", "FSTYPE", "-T", bench.folder], text=True).strip()
    with bench.warm_workers("raw", bench.folder, bench.template) as workers:
        contenders = creators(bench, workers, 1)
        contenders[tool] = functools.partial(copy, bench.template, 1, ["cp"], sync_file)
        contenders[bare] = functools.partial(copy, bench.template, 1, ["cp"], None)
        title = f"warm raw disk on {kind}, {bench.data_size // _MIB} MiB of data"
        results = bench.interleave(title, contenders)
    commands = {tool: "cp TEMPLATE DISK, then fdatasync(2)", bare: "cp TEMPLATE DISK, not durable"}
    return [row(figure, title, "ms a disk", results, {tool: 1}, commands=commands)]


def existing_disk(bench: Bench, figure: str) -> list[Row | CountRow]:
    count = 5 if bench.quick else 20
    with bench.warm_workers("qcow2", bench.folder) as workers:
        arguments = {"template": _TEMPLATE, "instances": _instances(count), "size": bench.virtual_size}
        contenders = {}
        for side, worker in workers.items():
            worker.call("cache", **arguments)
            contenders[_SIDES[side]] = functools.partial(worker.call, "cache", **arguments)
        title = "cache() on an existing qcow2 disk"
        results = bench.interleave(title, contenders)
    return [row(figure, title, "ms", results, {NOVA: 300}, limit=1)]


def disk_xml(bench: Bench, figure: str) -> list[Row | CountRow]:
    rows: list[Row | CountRow] = []
    times = 200 if bench.quick else 2000
    with bench.warm_workers("qcow2", bench.folder) as workers:
        for worker in workers.values():
            worker.call("cache", template=_TEMPLATE, instances=["described"], size=bench.virtual_size)
        for title, anew in (
            ("libvirt_info() and to_xml() of an Image that is at hand", False),
            ("Backend.by_name(), libvirt_info() and to_xml(), as Nova's driver calls them", True),
        ):
            contenders = {
                _SIDES[side]: functools.partial(worker.call, "describe", instance="described", times=times, anew=anew)
                for side, worker in workers.items()
            }
            rows.append(row(figure, title, "µs", bench.interleave(title, contenders), {NOVA: 1}))
    return rows


def cold_http(bench: Bench, figure: str) -> list[Row | CountRow]:
    return _cold(bench, figure, "uncompressed", environment.random_data, [])


def cold_http_zlib(bench: Bench, figure: str) -> list[Row | CountRow]:
    return _cold(bench, figure, "zlib-compressed", environment.compressible_data, ["-c"])


def import_cost(bench: Bench, figure: str) -> list[Row | CountRow]:
    memory = "print(*(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    use = "import imagebackend; imagebackend.Backend(imagebackend.load_config())"
    programs = {
        OWN: ("own", "import imagebackend"),
        "imagebackend, Backend made": ("own", use),
        "bare python": ("own", "pass"),
        NOVA: ("nova", "import nova.virt.libvirt.imagebackend"),
    }
    if "nova" not in bench.sides:
        del programs[NOVA]
    commands = {name: [peers.interpreter(s), "-W", "ignore", "-c", program] for name, (s, program) in programs.items()}
    contenders = {name: functools.partial(peers.run_tool, [command]) for name, command in commands.items()}
    title = "import in a fresh interpreter"
    results = bench.interleave(title, contenders)
    sizes: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(bench.rounds):
        for name, command in commands.items():
            printed = subprocess.check_output([*command[:-1], f"{command[-1]}\n{memory}"], text=True)
            sizes[name].append(int(printed) / 1024)
    shown = {name: f"python -c '{program}'" for name, (_, program) in programs.items()}
    return [
        row(figure, f"{title}: wall time", "ms", results, {}, limit=150, commands=shown),
        Row(figure, f"{title}: largest resident size", "MiB", sizes, limit=30, commands=shown),
    ]


def counts(bench: Bench, figure: str) -> list[Row | CountRow]:
    rows: list[Row | CountRow] = []
    for images_type, place in (("qcow2", bench.folder), ("raw", bench.xfs)):
        if place is None:
            continue
        with bench.warm_workers(images_type, place) as workers:
            for side, worker in workers.items():
                rows += _count_side(bench, figure, side, images_type, place)
                worker.call("remove", instances=["first", "counted"])
    return rows


FIGURES = (
    Figure("warm-qcow2", "qcow2 disks from a cached template, one after another", warm_qcow2),
    Figure("warm-qcow2-threads", "the same by 8 and by 32 threads", warm_qcow2_threads),
    Figure("raw-reflink", "raw disks from a cached template, on XFS", raw_reflink),
    Figure("raw-copy", "a raw disk from a cached template, on the scratch folder's file system", raw_copy),
    Figure("existing-disk", "cache() where the disk is there already", existing_disk),
    Figure("xml", "the disk's XML for libvirt", disk_xml),
    Figure("cold-http", "a first disk, its template fetched over HTTP and converted to raw", cold_http),
    Figure("cold-http-zlib", "the same from a compressed template", cold_http_zlib),
    Figure("import", "import time and memory", import_cost),
    Figure("counts", "processes, threads, syncs, system calls and bytes written, by strace", counts),
)


def _cold(
    bench: Bench, figure: str, kind: str, write_data: Callable[[str, int], None], options: list[str]
) -> list[Row | CountRow]:
    size = (50 if bench.quick else 500) * _MIB
    image = f"{figure}.qcow2"
    contenders: dict[str, Contender] = {}
    with ExitStack() as stack:
        web = stack.enter_context(environment.scratch_folder(bench.folder))
        progress(f"{figure}: making the image")
        transferred = _make_image(web, image, size, write_data, options) // _MIB
        title = f"cold: {size // _MIB} MiB qcow2, {kind} ({transferred} MiB), over HTTP, to raw, first disk"
        url = stack.enter_context(environment.web_server(web, {image: size}))
        for side, worker in stack.enter_context(bench.workers("qcow2", bench.folder, url)).items():
            if side == "own":
                contenders[OWN] = functools.partial(_fetch, worker, f"{url}/{image}", size)
                continue
            for algorithm in environment.GLANCE_ALGORITHMS:
                source = f"{image}-{algorithm}"
                contenders[f"{NOVA}, {algorithm}"] = functools.partial(_fetch, worker, source, size)
        results = bench.interleave(title, contenders)
    return [row(figure, title, "s", results, {f"{NOVA}, {environment.GLANCE_ALGORITHMS[0]}": 1 / 0.6})]


def _make_image(web: str, image: str, size: int, write_data: Callable[[str, int], None], options: list[str]) -> int:
    os.mkdir(f"{web}/images")
    write_data(f"{web}/data.raw", size)
    convert = ["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2"]
    subprocess.run([*convert, f"{web}/data.raw", f"{web}/images/{image}"], check=True)
    os.unlink(f"{web}/data.raw")
    return os.stat(f"{web}/images/{image}").st_size


def _fetch(worker: peers.Worker, source: str, size: int) -> Timing:
    timing: Timing = worker.call("fetch", template=_TEMPLATE, source=source, instance="cold", size=size)
    worker.call("remove", instances=["cold"])
    worker.call("forget", template=_TEMPLATE)
    return timing


def creators(bench: Bench, workers: dict[str, peers.Worker], count: int, threads: int = 1) -> dict[str, Contender]:
    def create(worker: peers.Worker) -> Timing:
        instances = _instances(count)
        arguments = {"template": _TEMPLATE, "size": bench.virtual_size, "threads": threads}
        timing: Timing = worker.call("cache", instances=instances, **arguments)
        worker.call("remove", instances=instances)
        return timing

    return {_SIDES[side]: functools.partial(create, worker) for side, worker in workers.items()}


def _qemu_img_create(bench: Bench, count: int) -> Timing:
    disks = [f"{bench.folder}/overlay-{number}" for number in range(count)]
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", bench.light_template]
    timing = peers.run_tool([[*command, disk, str(bench.virtual_size)] for disk in disks])
    for disk in disks:
        os.unlink(disk)
    return timing


def copy(source: str, count: int, command: list[str], sync: Callable[[str], None] | None) -> Timing:
    disks = [f"{source}.copy-{number}" for number in range(count)]
    after = (lambda number: sync(disks[number])) if sync else (lambda number: None)
    timing = peers.run_tool([[*command, source, disk] for disk in disks], after)
    for disk in disks:
        os.unlink(disk)
    return timing


def sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.close(descriptor)


def _sync_file_and_folder(path: str) -> None:
    for each in (path, os.path.dirname(path)):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _count_side(bench: Bench, figure: str, side: str, images_type: str, place: str) -> list[Row | CountRow]:
    setup = (
        f"import sys; sys.path.insert(0, {peers.ROOT!r}); from tests.bench import {side}_peer\n"
        f"peer = {side}_peer.Peer({f'{place}/{side}-{images_type}/bench.conf'!r})\n"
        f"peer.make({_TEMPLATE!r}, 'first', {bench.virtual_size})\n"
    )
    script = f"peer.make({_TEMPLATE!r}, 'counted', {bench.virtual_size})"
    rows: list[Row | CountRow] = []
    for title, before in ((f"warm {images_type} disk", ""), (f"cache() on an existing {images_type} disk", script)):
        progress(f"{title}: counting {_SIDES[side]}")
        found = counting.count(script, setup=setup + before, interpreter=peers.interpreter(side), timeout=300)
        rows.append(CountRow(figure, title, _SIDES[side], found))
    return rows


def _instances(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def row(
    figure: str,
    title: str,
    unit: str,
    results: dict[str, list[Timing]],
    targets: dict[str, float],
    *,
    limit: float | None = None,
    commands: dict[str, str] | None = None,
) -> Row:
    scale = _SCALES[unit.partition(" ")[0]]
    wall, cpu = (
        {name: [t[clock] / t["count"] * scale for t in timings] for name, timings in results.items()}
        for clock in ("wall", "cpu")
    )
    return Row(figure, title, unit, wall, targets, limit, commands or {}, cpu)


def _each(results: dict[str, list[Timing]], read: Callable[[list[float]], float]) -> dict[str, list[float]]:
    return {name: [read(timing["each"]) for timing in timings] for name, timings in results.items()}
