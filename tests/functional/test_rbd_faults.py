# SPDX-License-Identifier: Apache-2.0
"""What a Ceph cluster can do to a disk that is being made: it is made, or an error says why and nothing is left."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imagebackend import exceptions, faults
from imagebackend.images.rbd import Rbd
from imagebackend.storage import ceph as storage
from tests.functional.ceph import Contents, rbd_backend, read
from tools import deadline, private_ceph
from tools.private_ceph import Cluster

MIB = 1 << 20
SIZE = 32 * MIB

# One process that makes a disk, on a host of its own: only the pool is shared.
MAKE = """
import sys
from pathlib import Path
from imagebackend import exceptions, faults
from tests.functional.ceph import rbd_backend, Contents
from tools.private_ceph import Cluster

ceph, pool, folder, instance, template = sys.argv[1:]
cluster = Cluster(Path(ceph), "none", "memstore")
backend = rbd_backend(cluster, pool, Path(folder))
fetch = Contents(Path(template), b"").fetch
steps = []
faults.arm(steps.append)
print("ready", flush=True)
sys.stdin.readline()
def progress(done, total):
    print("progress", done, flush=True)
    {progress}
try:
    image = backend.image(instance, "disk")
    image.cache(lambda target, progress: fetch(target), "template", 32 << 20, progress=progress)
except exceptions.ImageBackendError as error:
    steps.append(type(error).__name__)
print("steps", *steps, flush=True)
"""


@pytest.fixture
def durable_ceph(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of the test's own whose OSD comes back with what it stored."""
    folder = tmp_path / "ceph"
    folder.mkdir()
    with private_ceph.run(folder, object_store="bluestore") as cluster:
        yield cluster


@pytest.fixture
def durable_pool(durable_ceph: Cluster) -> Iterator[str]:
    with durable_ceph.pool() as name:
        yield name


def images(cluster: Cluster, pool: str) -> list[str]:
    """Return everything that is in a pool."""
    import rbd

    with cluster.connect() as connection, connection.open_ioctx(pool) as context:
        return sorted(rbd.RBD().list(context))


def once(act: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a progress callback that does something when half is done."""
    done = []

    def progress(part: int, total: int) -> None:
        if not done and part >= total // 2:
            done.append(part)
            act()

    return progress


def ignore(done: int, total: int) -> None:
    """Be a progress callback that does nothing."""


@contextlib.contextmanager
def armed(act: Callable[[str], object]) -> Iterator[None]:
    """Have something done at each fault point that is passed in the block."""
    faults.arm(act)
    try:
        yield
    finally:
        faults.arm(None)


def test_without_a_monitor_there_is_an_error_in_time_and_afterwards_a_disk(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    with own_ceph.pool() as pool:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances", rbd_connect_timeout=1)
        image = backend.image("guest", "disk")
        with own_ceph.stopped("mon.a"):
            with pytest.raises(exceptions.StorageTimeout):
                image.cache(template.fetch, "template", SIZE)
            with pytest.raises(exceptions.StorageTimeout):
                image.exists()
        assert images(own_ceph, pool) == []

        image.cache(template.fetch, "template", SIZE)
        assert read(image, tmp_path / "copy")[: len(template.content)] == template.content


def test_a_connection_outlives_the_monitor(own_ceph: Cluster, template: Contents, tmp_path: Path) -> None:
    with own_ceph.pool() as pool:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances")
        first, second = backend.image("first", "disk"), backend.image("second", "disk")
        first.cache(template.fetch, "template", SIZE)
        described = first.libvirt_info("virtio", "vda", "disk", "none", {}).to_xml()
        with own_ceph.stopped("mon.a"):
            # Data and directories are the OSD's; the monitors' addresses were asked for a moment ago.
            second.cache(template.fetch, "template", SIZE)
            assert first.libvirt_info("virtio", "vda", "disk", "none", {}).to_xml() == described
        assert read(second, tmp_path / "copy")[: len(template.content)] == template.content
        first.remove()
        assert not first.exists()


def test_a_monitor_that_is_lost_for_a_while_does_not_disturb_an_import(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    lost = []

    def lose() -> None:
        if "template.import.locked" in steps and not lost:
            lost.append(True)
            with own_ceph.stopped("mon.a"):
                pass

    steps: list[str] = []
    with own_ceph.pool() as pool, armed(steps.append):
        image = rbd_backend(own_ceph, pool, tmp_path / "instances").image("guest", "disk")
        image.cache(template.fetch, "template", SIZE, progress=lambda done, total: lose())

        assert lost
        assert read(image, tmp_path / "copy")[: len(template.content)] == template.content
        assert images(own_ceph, pool) == ["guest_disk", "template:template"]


def test_a_monitor_that_is_lost_during_an_import_and_stays_away_is_an_error_in_time(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    with own_ceph.pool() as pool, contextlib.ExitStack() as lost:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances", rbd_operation_timeout=2)
        image = backend.image("guest", "disk")

        def lose(step: str) -> None:
            if step == "template.import.locked":
                lost.enter_context(own_ceph.stopped("mon.a"))

        with armed(lose), pytest.raises(exceptions.StorageTimeout):
            # The data are the OSD's; but it is a monitor that numbers snapshots.
            image.cache(lambda target, progress: template.fetch(target), "template", SIZE, progress=ignore)
        lost.close()

        assert not image.exists()
        assert images(own_ceph, pool) == []
        image.cache(template.fetch, "template", SIZE)
        assert read(image, tmp_path / "copy")[: len(template.content)] == template.content


def test_an_osd_that_is_killed_while_a_template_is_imported_loses_nothing(
    durable_ceph: Cluster, durable_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend = rbd_backend(durable_ceph, durable_pool, tmp_path / "instances")
    image = backend.image("guest", "disk")
    restarted = []

    def restart() -> None:
        with durable_ceph.stopped("osd.0"):
            restarted.append(True)

    image.import_file("guest", str(template.path), "another")  # so that the pool is in use before
    backend.templates.fetch("template", lambda target, **_: template.fetch(target))
    image.cache(template.fetch, "template", SIZE, progress=once(restart))

    assert restarted
    assert read(image, tmp_path / "copy")[: len(template.content)] == template.content
    assert "partial:template:template" not in images(durable_ceph, durable_pool)


def test_clones_made_while_the_osd_is_killed_are_all_whole(
    durable_ceph: Cluster, durable_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend = rbd_backend(durable_ceph, durable_pool, tmp_path / "instances")
    backend.image("first", "disk").cache(template.fetch, "template", SIZE)
    disks = [backend.image(f"guest{number}", "disk") for number in range(24)]
    with ThreadPoolExecutor(4) as threads:
        made = [threads.submit(disk.cache, template.fetch, "template", SIZE) for disk in disks[:20]]
        made[3].result()
        with durable_ceph.stopped("osd.0"):
            late = [threads.submit(disk.cache, template.fetch, "template", SIZE) for disk in disks[20:]]
            assert not any(each.done() for each in late)
        for each in made + late:
            each.result()

    assert images(durable_ceph, durable_pool) == sorted(
        ["first_disk", "template:template", *(f"guest{number}_disk" for number in range(24))]
    )
    for disk in disks:
        assert disk.get_disk_size(disk.path) == SIZE
    assert read(disks[7], tmp_path / "copy")[: len(template.content)] == template.content


def test_an_osd_that_stays_away_is_an_error_in_time_and_nothing_is_left(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    with own_ceph.pool() as pool:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances", rbd_operation_timeout=2)
        first, second = backend.image("first", "disk"), backend.image("second", "disk")
        first.cache(template.fetch, "template", SIZE)
        with own_ceph.paused("osd.0"), pytest.raises(exceptions.StorageTimeout):
            second.cache(template.fetch, "template", SIZE)

        assert not second.exists()
        second.cache(template.fetch, "template", SIZE)
        assert read(second, tmp_path / "copy")[: len(template.content)] == template.content
        assert images(own_ceph, pool) == ["first_disk", "second_disk", "template:template"]


def test_an_image_is_not_unacceptable_because_the_osd_does_not_answer(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    with own_ceph.pool() as pool:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances", rbd_operation_timeout=2)
        first, second = backend.image("first", "disk"), backend.image("second", "disk")
        first.cache(template.fetch, "template", SIZE)
        location = first.direct_snapshot(None, "snap", "raw", "published", "")

        def pause(step: str) -> None:
            if step == "disk.create.clone_intended":
                paused.enter_context(own_ceph.paused("osd.0"))

        with contextlib.ExitStack() as paused, armed(pause), pytest.raises(exceptions.StorageTimeout):
            second.clone(None, location)

        second.clone(None, location)
        assert images(own_ceph, pool) == ["first_disk", "published", "second_disk", "template:template"]


def test_a_flatten_whose_osd_stays_away_ends_in_time_and_can_be_done_again(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    with own_ceph.pool() as pool, contextlib.ExitStack() as stack:
        options = {"rbd_operation_timeout": 1, "images_rbd_object_size": 65536}
        image = rbd_backend(own_ceph, pool, tmp_path / "instances", **options).image("guest", "disk")
        image.cache(template.fetch, "template", SIZE)

        with pytest.raises(exceptions.StorageTimeout):
            image.flatten(progress=once(lambda: stack.enter_context(own_ceph.paused("osd.0"))))
        stack.close()

        assert read(image, tmp_path / "copy")[: len(template.content)] == template.content
        image.flatten()
        assert read(image, tmp_path / "copy")[: len(template.content)] == template.content
        assert images(own_ceph, pool) == ["guest_disk", "template:template"]


def test_an_image_that_cannot_be_closed_is_left_alone_with_its_connection(
    own_ceph: Cluster, template: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """librbd waits for ever at times, as after a flatten that failed; here it is given less time than it needs."""
    with own_ceph.pool() as pool:
        options = {
            "rbd_operation_timeout": 1,
            "rbd_destroy_volume_retries": 60,
            "rbd_destroy_volume_retry_interval": 1,
        }
        image = rbd_backend(own_ceph, pool, tmp_path / "instances", **options).image("guest", "disk")
        image.cache(template.fetch, "template", SIZE)
        assert isinstance(image, Rbd)
        monkeypatch.setattr(storage, "_REQUESTS_TO_CLOSE", 0.5)

        def pause(stack: contextlib.ExitStack) -> None:
            with image.pool.open("guest_disk") as opened:
                opened.write(b"x" * 512, 0)
                stack.enter_context(own_ceph.paused("osd.0"))

        with contextlib.ExitStack() as stack, pytest.raises(exceptions.StorageTimeout):
            pause(stack)
        monkeypatch.undo()

        assert image.get_disk_size(image.path) == SIZE
        # The image is closed now that the OSD is back.
        image.remove()
        assert images(own_ceph, pool) == ["template:template"]


def test_a_client_that_the_cluster_has_cut_off_connects_again(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    image = rbd_backend(ceph, rbd_pool, tmp_path / "instances").image("guest", "disk")
    image.cache(template.fetch, "template", SIZE)
    assert isinstance(image, Rbd)
    with image.pool.open("guest_disk"):
        (watcher,) = image.pool.watchers("guest_disk")
    with ceph.connect() as connection:
        connection.blocklist_add(watcher.address, 3600)
        connection.wait_for_latest_osdmap()

    def is_cut_off() -> bool:
        try:
            image.exists()
        except exceptions.StorageError:
            return True
        return False

    deadline.wait_for(is_cut_off, seconds=30, what="end of the connection")
    assert image.exists()
    image.resize_image(2 * SIZE)
    image.remove()
    assert images(ceph, rbd_pool) == ["template:template"]


def test_a_pool_that_is_not_there_is_named(ceph: Cluster, template: Contents, tmp_path: Path) -> None:
    image = rbd_backend(ceph, "no-such-pool", tmp_path).image("guest", "disk")
    with pytest.raises(exceptions.InvalidConfiguration, match="no-such-pool"):
        image.cache(template.fetch, "template", SIZE)
    with pytest.raises(exceptions.InvalidConfiguration, match="no-such-pool"):
        image.exists()


def test_a_pool_over_its_quota_takes_nothing_and_keeps_what_it_has(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    own_ceph.start_manager()
    with own_ceph.pool() as pool:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances")
        first, second = backend.image("first", "disk"), backend.image("second", "disk")
        first.cache(template.fetch, "template", SIZE)
        before = images(own_ceph, pool)
        own_ceph.command("osd pool set-quota", pool=pool, field="max_bytes", val=str(MIB))
        deadline.wait_for(lambda: is_full(own_ceph, pool), seconds=60, what="full pool")
        for make in (
            lambda: second.cache(template.fetch, "template", SIZE),
            lambda: second.create_from_func(lambda target: Path(target).write_bytes(bytes(SIZE)), SIZE),
            lambda: second.import_file("second", str(template.path), "disk"),
            lambda: backend.image("third", "disk").cache(template.fetch, "other", SIZE),
        ):
            with pytest.raises(exceptions.InsufficientSpace):
                make()
            assert images(own_ceph, pool) == before
        assert not second.exists()
        assert read(first, tmp_path / "copy")[: len(template.content)] == template.content

        # librbd cannot remove anything either, and says that it was not there.
        with pytest.raises(exceptions.InsufficientSpace, match="quota"):
            first.remove()
        assert not first.exists()
        own_ceph.command("osd pool set-quota", pool=pool, field="max_bytes", val="0")
        deadline.wait_for(lambda: not is_full(own_ceph, pool), seconds=60, what="room in the pool")
        first.remove()
        assert images(own_ceph, pool) == ["template:template"]
        second.cache(template.fetch, "template", SIZE)


def test_a_pool_that_becomes_full_during_an_import_is_an_error_and_the_part_is_swept(
    own_ceph: Cluster, template: Contents, tmp_path: Path
) -> None:
    own_ceph.start_manager()
    with own_ceph.pool() as pool:
        backend = rbd_backend(own_ceph, pool, tmp_path / "instances")
        image = backend.image("guest", "disk")
        backend.image("first", "disk").import_file("first", str(template.path), "disk")

        def fill(step: str) -> None:
            if step == "template.import.locked":
                own_ceph.command("osd pool set-quota", pool=pool, field="max_bytes", val=str(MIB))
                deadline.wait_for(lambda: is_full(own_ceph, pool), seconds=60, what="full pool")

        with armed(fill), pytest.raises(exceptions.InsufficientSpace, match="quota"):
            image.cache(template.fetch, "template", SIZE)
        assert not image.exists()
        # A full pool does not let go of anything either.
        own_ceph.command("osd pool set-quota", pool=pool, field="max_bytes", val="0")
        deadline.wait_for(lambda: not is_full(own_ceph, pool), seconds=60, what="room in the pool")
        store = Rbd.native_templates(backend.conf)
        assert store.list() == []
        deadline.wait_for(lambda: store.sweep() == [], seconds=30, what="end of the sweep")
        assert images(own_ceph, pool) == ["first_disk"]
        image.cache(template.fetch, "template", SIZE)


def is_full(cluster: Cluster, pool: str) -> bool:
    pools = {each["pool_name"]: each["flags_names"].split(",") for each in cluster.command("osd dump")["pools"]}
    return "full_quota" in pools[pool]


def test_a_user_who_may_not_write_is_told_so(ceph_cephx: Cluster, template: Contents, tmp_path: Path) -> None:
    with ceph_cephx.pool() as pool:
        user = f"reader-{pool}"
        ceph_cephx.user(user, mon="profile rbd", osd=f"profile rbd-read-only pool={pool}")
        options = {"rbd_user": user, "rbd_secret_uuid": "11111111-2222-3333-4444-555555555555"}
        image = rbd_backend(ceph_cephx, pool, tmp_path / "instances", **options).image("guest", "disk")
        with pytest.raises(exceptions.PermissionDenied, match="profile rbd"):
            image.cache(template.fetch, "template", SIZE)
        assert images(ceph_cephx, pool) == []


def test_an_image_in_a_pool_that_may_not_be_read_is_unacceptable(
    ceph_cephx: Cluster, template: Contents, tmp_path: Path
) -> None:
    with ceph_cephx.pool() as pool, ceph_cephx.pool() as parents:
        owner = rbd_backend(ceph_cephx, parents, tmp_path / "parents").image("image", "disk")
        owner.cache(template.fetch, "template")
        location = owner.direct_snapshot(None, "snap", "raw", "published", "")
        user = f"guests-{pool}"
        ceph_cephx.user(user, mon="profile rbd", osd=f"profile rbd pool={pool}")
        options = {"rbd_user": user, "rbd_secret_uuid": "11111111-2222-3333-4444-555555555555"}
        image = rbd_backend(ceph_cephx, pool, tmp_path / "instances", **options).image("guest", "disk")

        with pytest.raises(exceptions.ImageUnacceptable, match="denies"):
            image.clone(None, location)
        assert not image.exists()
        assert images(ceph_cephx, pool) == []


def test_without_a_key_there_is_an_error(ceph_cephx: Cluster, template: Contents, tmp_path: Path) -> None:
    options = {"rbd_user": "nobody", "rbd_secret_uuid": "11111111-2222-3333-4444-555555555555"}
    image = rbd_backend(ceph_cephx, "pool", tmp_path, **options).image("guest", "disk")
    with pytest.raises(exceptions.InvalidConfiguration, match="rbd_user"):
        image.cache(template.fetch, "template", SIZE)


class Host:
    """A process that makes a disk, on a host of its own."""

    def __init__(self, cluster: Cluster, pool: str, folder: Path, instance: str, template: Path, act: str) -> None:
        arguments = [cluster.folder, pool, folder, instance, template]
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAKE.format(progress=act), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.expect("ready")

    def expect(self, word: str) -> str:
        """Return the next line that begins with a word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise AssertionError(f"it ended without {word!r}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> int:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
        return self.process.returncode


def test_killed_while_importing_the_part_is_never_taken_for_the_template(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    # The template is fetched and hashed first, which progress tells of too.
    wait = "'template.import.locked' in steps and done and done < total and sys.stdin.readline()"
    host = Host(ceph, rbd_pool, tmp_path / "killed", "guest", template.path, wait)
    host.go()
    deadline.wait_for(
        lambda: "partial:template:template" in images(ceph, rbd_pool), seconds=30, what="part of the template"
    )
    host.process.send_signal(signal.SIGKILL)
    assert host.end() == -signal.SIGKILL
    assert images(ceph, rbd_pool) == ["partial:template:template"]

    # Another host: it waits until the cluster has noticed that the first one is gone.
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    image = backend.image("guest", "disk")
    assert not image.exists()
    image.cache(template.fetch, "template", SIZE)
    assert read(image, tmp_path / "copy")[: len(template.content)] == template.content
    assert images(ceph, rbd_pool) == ["guest_disk", "template:template"]


def test_two_hosts_that_want_a_template_at_the_same_time_import_it_once(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    hosts = [
        Host(ceph, rbd_pool, tmp_path / name, name, template.path, "pass") for name in ("one", "two", "three", "four")
    ]
    for host in hosts:
        host.go()
    steps = [host.expect("steps").split() for host in hosts]

    assert [host.end() for host in hosts] == [0, 0, 0, 0]
    assert sum("template.import.renamed" in passed for passed in steps) == 1
    assert images(ceph, rbd_pool) == ["four_disk", "one_disk", "template:template", "three_disk", "two_disk"]
    for name in ("one", "four"):
        image = rbd_backend(ceph, rbd_pool, tmp_path / name).image(name, "disk")
        assert read(image, tmp_path / "copy")[: len(template.content)] == template.content


def test_two_processes_that_make_the_same_disk_make_one(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    hosts = [Host(ceph, rbd_pool, tmp_path / "host", "guest", template.path, "pass") for _ in range(3)]
    for host in hosts:
        host.go()
    steps = [host.expect("steps").split() for host in hosts]

    assert [host.end() for host in hosts] == [0, 0, 0]
    assert sum("disk.create.cloned" in passed for passed in steps) == 1
    assert images(ceph, rbd_pool) == ["guest_disk", "template:template"]


def test_a_host_from_which_another_took_its_disk_does_not_say_that_it_made_it(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    slow, quick = (rbd_backend(ceph, rbd_pool, tmp_path / name) for name in ("slow", "quick"))
    quick.conf.set_override("host", "another")
    done = []

    def overtake(step: str) -> None:
        if step == "disk.create.cloned" and not done:
            done.append(step)
            quick.image("guest", "disk").cache(template.fetch, "template", SIZE)

    with armed(overtake), pytest.raises(exceptions.DiskInUse, match="another host"):
        slow.image("guest", "disk").cache(template.fetch, "template", SIZE)

    image = slow.image("guest", "disk")
    assert isinstance(image, Rbd)
    assert image.pool.intents() == {}
    assert images(ceph, rbd_pool) == ["guest_disk", "template:template"]
    assert read(image, tmp_path / "copy")[: len(template.content)] == template.content
    slow.image("guest", "disk").cache(template.fetch, "template", SIZE)


def test_hosts_that_make_the_same_disk_at_the_same_time_make_one_whole_disk(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    hosts = [Host(ceph, rbd_pool, tmp_path / str(number), "guest", template.path, "pass") for number in range(4)]
    for host in hosts:
        host.go()
    results = [host.expect("steps").split()[1:] or ["made"] for host in hosts]
    assert [host.end() for host in hosts] == [0] * 4

    image = rbd_backend(ceph, rbd_pool, tmp_path / "instances").image("guest", "disk")
    assert isinstance(image, Rbd)
    if not image.exists():  # each took it from another
        image.cache(template.fetch, "template", SIZE)
    assert {result[-1] for result in results} <= {"made", "disk.create.cloned", "DiskInUse", "DiskExists"}, results
    assert image.pool.intents() == {}
    assert images(ceph, rbd_pool) == ["guest_disk", "template:template"]
    assert read(image, tmp_path / "copy")[: len(template.content)] == template.content


def test_a_template_with_clones_goes_with_the_last_of_them(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    first, second = backend.image("first", "disk"), backend.image("second", "disk")
    first.cache(template.fetch, "template", SIZE)
    second.cache(template.fetch, "template", SIZE)
    Rbd.native_templates(backend.conf).retire("template")

    assert "template:template" not in images(ceph, rbd_pool)
    assert len(images(ceph, rbd_pool)) == 3
    assert read(second, tmp_path / "copy")[: len(template.content)] == template.content
    first.remove()
    assert len(images(ceph, rbd_pool)) == 2
    second.remove()
    assert images(ceph, rbd_pool) == []


def test_a_disk_that_is_open_elsewhere_is_not_removed(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    import rbd

    backend = rbd_backend(ceph, rbd_pool, tmp_path / "instances")
    image = backend.image("guest", "disk")
    image.cache(template.fetch, "template", SIZE)
    with (
        ceph.connect() as connection,
        connection.open_ioctx(rbd_pool) as context,
        rbd.Image(context, "guest_disk") as opened,
    ):
        opened.write(b"x" * 512, 0)
        for change in (
            image.remove,
            lambda: image.resize_image(64 * MIB),
            lambda: image.create_snap("one"),
            lambda: image.import_file("guest", str(template.path), "disk"),
        ):
            with pytest.raises(exceptions.DiskInUse):
                change()
    assert images(ceph, rbd_pool) == ["guest_disk", "template:template"]
    assert image.get_disk_size(image.path) == SIZE
    image.remove()
    assert images(ceph, rbd_pool) == ["template:template"]


def test_a_disk_in_use_is_asked_for_again_until_it_is_free(
    ceph: Cluster, rbd_pool: str, template: Contents, tmp_path: Path
) -> None:
    import rbd

    options = {"rbd_destroy_volume_retries": 30, "rbd_destroy_volume_retry_interval": 1}
    image = rbd_backend(ceph, rbd_pool, tmp_path / "instances", **options).image("guest", "disk")
    image.cache(template.fetch, "template", SIZE)
    with ThreadPoolExecutor(1) as threads, ceph.connect() as connection, connection.open_ioctx(rbd_pool) as context:
        opened = rbd.Image(context, "guest_disk")
        opened.write(b"x" * 512, 0)
        removing = threads.submit(image.remove)
        assert removing.running()
        assert not removing.done()
        opened.close()
        removing.result()
    assert images(ceph, rbd_pool) == ["template:template"]
