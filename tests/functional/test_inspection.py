# SPDX-License-Identifier: Apache-2.0
"""The inspector against images that real tools made, good ones and spoiled ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagebackend import exceptions
from imagebackend.templates import inspection
from tests.functional.hostile_images import HOSTILE_IMAGES, HostileImage


def inspect(path: Path, claimed_format: str | None) -> inspection.Verdict:
    with path.open("rb") as image:
        return inspection.inspect(image.fileno(), path.name, claimed_format)


@pytest.mark.parametrize("image", HOSTILE_IMAGES, ids=lambda image: image.name)
def test_hostile_image_is_refused(image: HostileImage, tmp_path: Path) -> None:
    path = tmp_path / "image"
    image.build(path)
    with pytest.raises(exceptions.ImageUnacceptable, match=image.reason) as refusal:
        inspect(path, image.claimed_format)
    assert refusal.value.image == "image"
