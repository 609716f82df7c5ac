# SPDX-License-Identifier: Apache-2.0
"""A template cache of the test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagebackend.templates.cache import Template, TemplateCache
from imagebackend.templates.leases import Owner
from imagebackend.templates.sources import Source, open_source
from tests.contract.conftest import configured
from tests.functional.image_building import converted, make_disk

MIB = 1 << 20
OWNER = Owner("instance", "disk", "host", "/srv/instance/disk")


class Cache:
    """A template cache in a folder, and images to fill it with."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder / "instances"
        self.conf = configured(self.folder, "raw", **options)
        self.cache = TemplateCache(self.conf)
        self.sources = folder / "sources"
        self.sources.mkdir()
        self.disk = self.sources / "disk.raw"
        make_disk(self.disk)
        self.fetches = 0

    def fetcher(self, source: Path | None = None) -> Callable[..., None]:
        def fetch(target: str, **kwargs: Any) -> None:
            self.fetches += 1
            shutil.copyfile(source or self.disk, target)

        return fetch

    def fetch(self, name: str = "template", source: Path | None = None, **options: Any) -> Template:
        return self.cache.fetch(name, self.fetcher(source), **options)

    def image(self, image_format: str, *options: str) -> Path:
        """Return the disk in another format."""
        path = self.sources / f"disk.{image_format}"
        converted(image_format, *options)(path)
        return path

    def source(self, name: str, content: bytes | None = None, **options: Any) -> Source:
        """Return the source of a file, which is written if there is a content."""
        path = self.sources / name
        if content is not None:
            path.write_bytes(content)
        return open_source(str(path), self.conf, **options)

    def generations(self) -> list[str]:
        """Return the names of the templates that had a name before."""
        return [name for name in sorted(self.records()) if "@" in name]

    def records(self) -> list[str]:
        return [path.stem for path in (self.folder / "_base" / ".records").glob("*.json")]

    def files(self) -> list[str]:
        """Return everything that is there, lock files and folders that stay included."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir())


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)
