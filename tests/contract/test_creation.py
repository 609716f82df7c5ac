# SPDX-License-Identifier: Apache-2.0
"""Disks made from templates, and without."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from imagebackend import exceptions
from tests.contract.conftest import MIB, TEMPLATE_SIZE, Store, template_content


def test_a_disk_holds_the_template_and_has_the_size_asked_for(store: Store) -> None:
    image = store.make(size=8 * MIB)

    assert store.content(image) == template_content() + bytes(8 * MIB - TEMPLATE_SIZE)
    assert image.get_disk_size(image.path) == 8 * MIB
    store.check(image)


def test_without_a_size_a_disk_is_as_large_as_its_template(store: Store) -> None:
    image = store.make(size=None)

    assert image.get_disk_size(image.path) == store.rounded(TEMPLATE_SIZE)
    assert store.content(image) == template_content() + bytes(store.rounded(TEMPLATE_SIZE) - TEMPLATE_SIZE)


def test_the_template_is_fetched_once_for_any_number_of_disks(store: Store) -> None:
    for number in range(3):
        store.make(disk_name=f"disk{number}")

    assert len(store.fetches) == 1


def test_nothing_is_fetched_or_changed_for_a_disk_that_exists(store: Store) -> None:
    image = store.make()
    store.write(image, MIB, 4096, 7)
    content = store.content(image)

    image.cache(store.fetch, "template", 8 * MIB)
    image.cache(store.fetch, "another", 64 * MIB)

    assert len(store.fetches) == 1
    assert store.content(image) == content


def test_threads_that_race_for_one_disk_make_it_once(store: Store) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        try:
            barrier.wait()
            store.make()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(store.fetches) == 1
    assert store.content(store.image())[:TEMPLATE_SIZE] == template_content()


def test_create_image_is_the_whole_of_it(store: Store) -> None:
    image = store.image()

    image.create_image(store.fetch, store.backend.templates.path("template"), 16 * MIB)

    assert image.get_disk_size(image.path) == 16 * MIB
    assert store.content(image)[:TEMPLATE_SIZE] == template_content()


def test_arguments_reach_the_function_that_fetches(store: Store) -> None:
    seen: list[object] = []

    def fetch(*args: object, target: str, **kwargs: object) -> None:
        seen.extend([args, kwargs])
        store.fetch(target)

    store.image().cache(fetch, "template", 8 * MIB, "one", image_id=2)

    assert seen == [("one",), {"image_id": 2}]


def test_a_size_below_the_template_is_refused_and_leaves_nothing(store: Store) -> None:
    with pytest.raises(exceptions.DiskTooSmall) as caught:
        store.make(size=4 * MIB)

    assert (caught.value.size, caught.value.required) == (4 * MIB, TEMPLATE_SIZE)
    assert not store.image().exists()
    assert not {name for name in store.files() if "template" in name}


def test_a_template_in_the_cache_that_is_too_large_is_refused_and_stays(store: Store) -> None:
    store.make(disk_name="other")
    before = store.files()

    with pytest.raises(exceptions.DiskTooSmall):
        store.make(size=4 * MIB)

    assert store.files() == before


def test_sizes_that_no_disk_has_are_refused(store: Store, subtests: pytest.Subtests) -> None:
    sizes: tuple[Any, ...] = (0, -512, 1, 8 * MIB + 1, 1 << 63, True, "8", 1.5)
    for size in sizes:
        with subtests.test(size=size), pytest.raises(exceptions.InvalidSize):
            store.make(size=size)
    assert store.fetches == []


def test_what_a_failing_fetch_raises_propagates_and_nothing_stays(store: Store) -> None:
    class Refused(Exception):
        pass

    def fetch(target: str) -> None:
        store.fetch(target)
        raise Refused

    with pytest.raises(Refused):
        store.image().cache(fetch, "template", 8 * MIB)
    assert not store.image().exists()

    store.make()
    assert len(store.fetches) == 2


def test_an_unacceptable_template_is_refused_and_leaves_nothing(store: Store) -> None:
    def fetch(target: str) -> None:
        store.run("qemu-img", "create", "-f", "qcow2", "-b", store.raw_template, "-F", "raw", target)

    with pytest.raises(exceptions.ImageUnacceptable, match="backing"):
        store.image().cache(fetch, "template", 8 * MIB)

    assert not store.image().exists()
    assert not {name for name in store.files() if "template" in name}


def test_verify_base_size_knows_no_limit_without_a_size(store: Store) -> None:
    image = store.make()
    base = store.backend.templates.path("template")

    image.verify_base_size(base, None)
    image.verify_base_size(base, 0)
    image.verify_base_size(base, TEMPLATE_SIZE)
    image.verify_base_size(base, 4096, base_size=4096)
    with pytest.raises(exceptions.DiskTooSmall):
        image.verify_base_size(base, TEMPLATE_SIZE - 512)
    with pytest.raises(exceptions.DiskTooSmall):
        image.verify_base_size(base, 4096, base_size=4608)


def test_a_disk_without_a_template_is_filled_in_place(store: Store) -> None:
    def fill(target: str) -> None:
        with open(target, "r+b") as file:
            assert file.read() == bytes(4 * MIB)
            file.seek(MIB)
            file.write(b"swap")

    image = store.image("disk.swap")
    image.create_from_func(fill, 4 * MIB)

    assert store.content(image) == bytes(MIB) + b"swap" + bytes(3 * MIB - 4)
    assert store.fetches == []
    store.check(image)


def test_a_disk_that_cannot_be_filled_is_not_made(store: Store) -> None:
    def fill(target: str) -> None:
        raise RuntimeError("no")

    def shorten(target: str) -> None:
        os.truncate(target, 512)

    image = store.image("disk.swap")
    with pytest.raises(RuntimeError):
        image.create_from_func(fill, 4 * MIB)
    if image.source_type != "block":  # which nobody can shorten
        with pytest.raises(exceptions.StorageError, match="512 bytes after it was filled"):
            image.create_from_func(shorten, 4 * MIB)

    assert not image.exists()
    assert not {name for name in store.files() if "swap" in name}


def test_an_existing_disk_is_not_filled_again(store: Store) -> None:
    image = store.make()

    image.create_from_func(lambda target: pytest.fail("called"), 4 * MIB)

    assert image.get_disk_size(image.path) == 8 * MIB


HOSTILE_NAMES: tuple[Any, ...] = (
    *("", "../x", "/x", ".x", "-x", "a/b", "rbd:x", "json:{}", "a,b", "a\nb", "a\n", "é", "x" * 129, "\udcff"),
    *(None, 7),
)


def test_hostile_names_are_refused(store: Store, subtests: pytest.Subtests) -> None:
    for name in HOSTILE_NAMES:
        with subtests.test(name=ascii(name)):
            with pytest.raises(exceptions.InvalidName):
                store.image(disk_name=name)
            with pytest.raises(exceptions.InvalidName):
                store.image(instance=name)
            with pytest.raises(exceptions.InvalidName):
                store.image().cache(store.fetch, name, 8 * MIB)
    assert store.fetches == []


def test_names_too_long_for_the_shortest_store_are_refused(store: Store) -> None:
    with pytest.raises(exceptions.InvalidName, match="together"):
        store.image(disk_name="d" * 100, instance="i" * 100)


def test_removing_leaves_nothing_and_may_be_repeated(store: Store) -> None:
    store.make(disk_name="other").remove()
    before = store.files()
    image = store.make()

    image.remove()
    image.remove()

    assert not image.exists()
    assert store.files() == before
    assert list(store.backend.templates.leases("template")) == []


def test_a_disk_made_again_after_removal_is_fresh(store: Store) -> None:
    image = store.make()
    store.write(image, 0, 4096, 9)
    image.remove()

    image = store.make()

    assert store.content(image)[:TEMPLATE_SIZE] == template_content()


def test_clone_says_why_not(store: Store) -> None:
    reason = "not of the form" if store.image().capabilities.clone else "not cloned"
    with pytest.raises(exceptions.ImageUnacceptable, match=reason):
        store.image().clone(None, "rbd://fsid/pool/image/snap")


def test_direct_snapshots_are_refused_and_cleaning_up_none_is_fine(store: Store) -> None:
    image = store.make()
    image_format = "qcow2" if image.capabilities.direct_snapshot else "raw"

    with pytest.raises(exceptions.Unsupported):
        image.direct_snapshot(None, "name", image_format, "id", "base")
    image.cleanup_direct_snapshot(None)
