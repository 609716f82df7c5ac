# SPDX-License-Identifier: Apache-2.0
"""From a template image to a guest's disk, whatever the storage underneath.

The public names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagebackend import exceptions
    from imagebackend.backend import Backend
    from imagebackend.conf import list_opts, load_config, register_opts
    from imagebackend.images.base import Capabilities, Image, Snapshot
    from imagebackend.images.ephemeral import create_ephemeral, create_swap
    from imagebackend.images.root_folder import clone_root, remove_root
    from imagebackend.keys import castellan_keys
    from imagebackend.templates.cache import Template, TemplateCache
    from imagebackend.templates.sources import open_source, open_tree

__all__ = [
    "Backend",
    "Capabilities",
    "Image",
    "Snapshot",
    "Template",
    "TemplateCache",
    "castellan_keys",
    "clone_root",
    "create_ephemeral",
    "create_swap",
    "exceptions",
    "list_opts",
    "load_config",
    "open_source",
    "open_tree",
    "register_opts",
    "remove_root",
]

_HOMES = {
    "Backend": "imagebackend.backend",
    "Capabilities": "imagebackend.images.base",
    "Image": "imagebackend.images.base",
    "Snapshot": "imagebackend.images.base",
    "Template": "imagebackend.templates.cache",
    "TemplateCache": "imagebackend.templates.cache",
    "castellan_keys": "imagebackend.keys",
    "clone_root": "imagebackend.images.root_folder",
    "create_ephemeral": "imagebackend.images.ephemeral",
    "create_swap": "imagebackend.images.ephemeral",
    "list_opts": "imagebackend.conf",
    "load_config": "imagebackend.conf",
    "open_source": "imagebackend.templates.sources",
    "open_tree": "imagebackend.templates.sources",
    "register_opts": "imagebackend.conf",
    "remove_root": "imagebackend.images.root_folder",
}


def __getattr__(name: str) -> Any:
    if name == "exceptions":
        return importlib.import_module("imagebackend.exceptions")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
