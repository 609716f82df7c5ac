# SPDX-License-Identifier: Apache-2.0
"""Keys from castellan, by a key manager of its interface that keeps them in memory."""

from __future__ import annotations

from typing import Any

import pytest
from castellan.common import exception
from castellan.common.objects.symmetric_key import SymmetricKey
from castellan.key_manager.key_manager import KeyManager

import imagebackend
from imagebackend import exceptions

SECRET = bytes(range(64))


class Memory(KeyManager):  # type: ignore[misc]  # castellan has no types
    """Has one key, for one context."""

    def __init__(self) -> None:
        pass

    def get(self, context: Any, managed_object_id: str, metadata_only: bool = False) -> SymmetricKey:
        if (context, managed_object_id) != ("context", "id-of-a-disk"):
            raise exception.ManagedObjectNotFoundError(uuid=managed_object_id)
        return SymmetricKey("AES", 512, SECRET)

    def create_key(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    create_key_pair = store = copy = delete = add_consumer = remove_consumer = list_options_for_discovery = create_key

    def list(self, *args: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError


def test_a_key_is_what_the_manager_has_byte_for_byte() -> None:
    keys = imagebackend.castellan_keys(Memory(), "context", lambda instance, disk: f"id-of-{instance}-{disk}")

    assert keys("a", "disk") == SECRET


def test_a_key_that_the_manager_does_not_have_is_an_error_that_names_it() -> None:
    keys = imagebackend.castellan_keys(Memory(), "context", lambda instance, disk: "another")

    with pytest.raises(exceptions.StorageError, match="it has not given key 'another'"):
        keys("a", "disk")
