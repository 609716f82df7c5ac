# SPDX-License-Identifier: Apache-2.0
"""Encrypted disks on a real dm-crypt: what is on the volume, whose key opens it, and what of the key is used."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.backend import Backend
from tests.contract.conftest import MIB, TEMPLATE_SIZE, LvmStore, open_store, template_content

KEY = bytes(range(64))


def opened(request: pytest.FixtureRequest, default_format: str, key: bytes | None = KEY) -> LvmStore:
    store = open_store("lvm-encrypted", request)
    assert isinstance(store, LvmStore)
    store.conf.set_override("default_format", default_format, group="ephemeral_storage_encryption")
    store.backend = Backend(store.conf, keys=None if key is None else lambda instance, disk: key)
    return store


@pytest.mark.parametrize("default_format", ["luks", "plain"])
def test_only_the_whole_key_shows_what_is_on_the_volume(request: pytest.FixtureRequest, default_format: str) -> None:
    store = opened(request, default_format)
    image = store.make()

    assert store.content(image)[:TEMPLATE_SIZE] == template_content()
    volume = Path(image.path).read_bytes()
    assert b"first" * 100 not in volume
    assert volume.startswith(b"LUKS") == (default_format == "luks")

    subprocess.run(["cryptsetup", "close", Path(store.device(image)).name], check=True)
    # The last byte of the key counts; Nova's way would have ignored the second half.
    store.backend = Backend(store.conf, keys=lambda instance, disk: KEY[:-1] + b"x")
    other = store.image()
    if default_format == "luks":
        with pytest.raises(exceptions.InvalidArgument, match="not that of"):
            store.content(other)
    else:
        assert template_content()[:MIB] != store.content(other)[:MIB]


def test_an_encrypted_disk_stays_one_when_the_options_change(request: pytest.FixtureRequest) -> None:
    store = opened(request, "plain")
    image = store.make()
    store.conf.set_override("enabled", False, group="ephemeral_storage_encryption")

    again = store.backend.snapshot(f"/dev/mapper/{Path(image.path).name}-dmcrypt")
    assert again.path == image.path
    again.resize_image(16 * MIB)
    assert store.content(again) == template_content() + bytes(16 * MIB - TEMPLATE_SIZE)
    again.remove()
    assert not image.exists()


@pytest.mark.parametrize(
    ("key", "error", "reason"),
    [
        (None, exceptions.InvalidConfiguration, "the agent must give keys"),
        (b"x" * 63, exceptions.InvalidArgument, "504 bits, and plain dm-crypt uses exactly 512"),
    ],
)
def test_a_key_that_will_not_do_makes_no_disk(
    request: pytest.FixtureRequest, key: bytes | None, error: type[Exception], reason: str
) -> None:
    store = opened(request, "plain", key)

    with pytest.raises(error, match=reason):
        store.make()

    assert not [volume for volume in store.group.report() if volume.kind == "linear"]
