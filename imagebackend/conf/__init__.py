# SPDX-License-Identifier: Apache-2.0
"""Every option, once.

Names, groups, types and defaults are Nova's where Nova has the option, so that an operator's ini file means here
what it meant there. The sample file ``etc/imagebackend/imagebackend.conf.sample`` is generated from this folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import default, ephemeral_storage_encryption, image_cache, libvirt, lvm

__all__ = ["list_opts", "load_config", "register_opts"]

_GROUPS: tuple[tuple[str, Sequence[cfg.Opt]], ...] = (
    ("DEFAULT", default.OPTIONS),
    ("libvirt", (*libvirt.OPTIONS, *lvm.OPTIONS)),
    ("image_cache", image_cache.OPTIONS),
    ("ephemeral_storage_encryption", ephemeral_storage_encryption.OPTIONS),
)


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """Return every option by group, for oslo-config-generator (entry point ``oslo.config.opts``)."""
    return [(group, list(options)) for group, options in _GROUPS]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register every option of this library with ``conf``, an agent's own configuration object.

    :raises oslo_config.cfg.DuplicateOptError: the agent registered an option of that name with another meaning.
    """
    for group, options in _GROUPS:
        conf.register_opts(options, group=None if group == "DEFAULT" else group)


def load_config(files: Sequence[str] = (), directories: Sequence[str] = ()) -> cfg.ConfigOpts:
    """Return a configuration read from ini files, every value of it checked.

    Options that this library does not know are ignored, so that a nova.conf loads.

    :param files: ini files; a later one overrides an earlier one.
    :param directories: folders whose ``*.conf`` files are read after them, in sorted order.
    :raises InvalidConfiguration: a file or folder cannot be read or parsed, or a value is not of its option's type.
    """
    conf = cfg.ConfigOpts()
    register_opts(conf)
    try:
        # oslo.config passes over folders that are not there.
        for directory in directories:
            os.listdir(directory)
        # Without a project name oslo.config would look for files of its own choosing.
        conf([], project="imagebackend", default_config_files=list(files), default_config_dirs=list(directories))
    except (cfg.Error, OSError, UnicodeDecodeError) as error:
        raise exceptions.InvalidConfiguration("configuration files", str(error)) from error
    check(conf)
    return conf


def check(conf: cfg.ConfigOpts) -> None:
    """Read every value once, since oslo.config reports a bad one only when it is used.

    :raises InvalidConfiguration: a value is not of its option's type.
    """
    for group, options in _GROUPS:
        for option in options:
            try:
                section = conf if group == "DEFAULT" else conf[group]
                value = section[option.dest]
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{value} is not a number of seconds")
            except (cfg.Error, ValueError) as error:
                raise exceptions.InvalidConfiguration(f"[{group}] {option.name}", _reason(error)) from error


def _reason(error: Exception) -> str:
    # What oslo.config raises for everything but a bad value; what was wrong, such as a $name of nothing, it hides.
    if isinstance(error, cfg.NoSuchOptError) and error.__context__ is not None:
        return str(error.__context__)
    # What comes before is the option's name and the last file read, whichever file had the value.
    return str(error).rpartition(" is not valid: ")[2]
