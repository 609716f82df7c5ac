# SPDX-License-Identifier: Apache-2.0
"""Sphinx."""

from importlib.metadata import version as _version

project = "imagebackend"
copyright = "the imagebackend authors"
release = _version("imagebackend")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
