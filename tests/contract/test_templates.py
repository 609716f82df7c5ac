# SPDX-License-Identifier: Apache-2.0
"""The templates that a store has of its own, beside those of the cache: made ahead, and pruned by the same rules."""

from __future__ import annotations

import pytest

from imagebackend.images.base import Image
from imagebackend.templates.native import NativeTemplate
from imagebackend.templates.precaching import Wanted
from imagebackend.templates.sources import open_source
from tests.contract.conftest import MIB, TEMPLATE_SIZE, Store, template_content


def natives(store: Store) -> list[NativeTemplate]:
    return [each for kept in store.backend.native_templates() for each in kept.list()]


def is_whole(store: Store, image: Image) -> bool:
    return store.content(image)[:TEMPLATE_SIZE] == template_content()


def test_what_is_made_ahead_is_what_the_first_disk_is_made_from(store: Store) -> None:
    stores = store.backend.native_templates()
    wanted = Wanted("template", open_source(str(store.raw_template), store.conf))

    [made] = store.backend.templates.precache([wanted], stores)

    assert (made.error, made.stores) == (None, tuple(each.image_type for each in stores))
    ahead = natives(store)
    # One of ploop is only kept where disks can share its blocks.
    assert [each.name for each in ahead] == ["template" for _ in stores] or store.image_type == "ploop"
    image = store.image()
    image.cache(lambda target: pytest.fail("fetched again"), "template", 8 * MIB)
    assert [each.made for each in natives(store)] == [each.made for each in ahead]
    assert is_whole(store, image)


def test_a_template_of_the_store_goes_when_nobody_needs_it_and_no_disk_notices(store: Store) -> None:
    templates = store.backend.templates
    image = store.make()
    policy = templates.policy(native_minimum_age=0)

    def removed() -> list[str]:
        report = templates.prune(policy)
        assert report.failed == []
        assert {each.store for each in report.removed} <= {store.image_type}
        return [each.name for each in report.removed]

    assert templates.prune().removed == []  # it is too young
    templates.catalogue.pin("template")
    assert removed() == []
    templates.catalogue.pin("template", pinned=False)
    unused = [each.name for each in natives(store) if not each.users]
    assert removed() == unused
    assert is_whole(store, image)

    image.remove()
    rest = [each.name for each in natives(store)]
    assert removed() == rest
    assert natives(store) == []
    assert is_whole(store, store.make())
    assert len(store.fetches) == 1
