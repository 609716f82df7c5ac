# SPDX-License-Identifier: Apache-2.0
"""Is the configuration right? Every option is looked at, not only up to the first that is wrong."""

from __future__ import annotations

import difflib
import glob
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions, guest
from imagebackend.backend import ENTRY_POINTS, Backend
from imagebackend.cli.doctor.finding import Finding, error, fine
from imagebackend.conf import list_opts, load_config, register_opts
from imagebackend.storage import mkfs

__all__ = ["examine", "judge_options", "makes_raw_disks", "unknown_options"]

_SOURCE_ENTRY_POINTS = "imagebackend.sources"
_SMALLEST_EXTENDED = 16 << 10
_CHECK = "configuration"


def examine(files: Sequence[str], directories: Sequence[str]) -> tuple[cfg.ConfigOpts, list[Finding]]:
    """Return the configuration, with defaults in place of what cannot be used, and what was found."""
    conf = cfg.ConfigOpts()
    register_opts(conf)
    try:
        conf([], project="imagebackend", default_config_files=list(files), default_config_dirs=list(directories))
    except (cfg.Error, OSError, UnicodeDecodeError) as failure:
        advice = "correct the file; everything below is said of the defaults"
        return load_config(), [error(_CHECK, str(failure), advice)]
    read = [*files, *(file for folder in directories for file in sorted(glob.glob(f"{glob.escape(folder)}/*.conf")))]
    findings = [fine(_CHECK, f"read from {', '.join(read)}" if read else "no file: every option has its default")]
    findings += _examine_values(conf)
    findings += [hint for file in read for hint in _examine_unknown(file)]
    findings += judge_options(conf)
    findings += [*_examine_type(conf), *_examine_entry_points()]
    return conf, findings


def judge_options(conf: cfg.ConfigOpts) -> list[Finding]:
    """Return what is wrong with values that are right by their type."""
    libvirt = conf.libvirt
    findings = []
    findings += _refused("[libvirt] disk_cachemodes", lambda: guest.parse_disk_cachemodes(libvirt.disk_cachemodes))
    findings += _refused("[DEFAULT] virt_mkfs", lambda: mkfs.parse_commands(conf.virt_mkfs))
    findings += _refused(
        "[DEFAULT] default_ephemeral_format",
        lambda: mkfs.filesystem_for(None, default=conf.default_ephemeral_format),
    )
    size = libvirt.images_qcow2_cluster_size
    name = "[libvirt] images_qcow2_cluster_size"
    if size < _SMALLEST_EXTENDED and (libvirt.images_qcow2_extended_l2 or conf.preallocate_images == "space"):
        reason = f"{size} is too small for extended L2 entries, which images_qcow2_extended_l2 and preallocation need"
        findings.append(error(name, reason, f"set {_SMALLEST_EXTENDED} or more"))
    return findings


def makes_raw_disks(conf: cfg.ConfigOpts) -> bool:
    """Return whether disks are copies of their templates."""
    images_type = conf.libvirt.images_type
    return images_type in ("raw", "flat") or (images_type == "default" and not conf.use_cow_images)


def unknown_options(sections: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return hints at options that this library does not have, in the groups that it has.

    :param sections: the options of an ini file by group.
    """
    findings = []
    for group, options in list_opts():
        known = {name for option in options for name in (option.name, option.dest)}
        for name in sorted(sections.get(group, {}).keys() - known):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            findings.append(fine(f"[{group}] {name}", f"not an option of imagebackend, ignored{hint}"))
    return findings


def _examine_values(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    wrong = 0
    for group, options in list_opts():
        for option in options:
            try:
                section = conf if group == "DEFAULT" else conf[group]
                section[option.dest]
            except (cfg.Error, ValueError) as failure:
                wrong += 1
                # What comes before is the option's name and where oslo.config keeps its value.
                reason = str(failure).rpartition("is not valid: ")[2]
                yield error(f"[{group}] {option.name}", reason, "correct it, or remove the line for the default")
                conf.set_override(option.dest, option.default, group=None if group == "DEFAULT" else group)
    if not wrong:
        yield fine("options", "every value is of its option's type")


def _examine_unknown(file: str) -> list[Finding]:
    sections: dict[str, dict[str, list[str]]] = {}
    cfg.ConfigParser(file, sections).parse()
    return unknown_options(sections)


def _examine_type(conf: cfg.ConfigOpts) -> Iterator[Finding]:
    name = "[libvirt] images_type"
    try:
        yield fine(name, f"{conf.libvirt.images_type}: {Backend(conf).backend().__name__} disks")
    except exceptions.InvalidConfiguration as failure:
        yield error(name, failure.reason, "set one of these, or install the package that adds it")
    except (ImportError, AttributeError) as failure:
        yield error(name, f"{conf.libvirt.images_type} cannot be loaded: {failure}", "repair the package that adds it")


def _examine_entry_points() -> Iterator[Finding]:
    for group in (ENTRY_POINTS, _SOURCE_ENTRY_POINTS):
        for entry in importlib.metadata.entry_points(group=group):
            check = f"entry point {group} {entry.name}"
            try:
                entry.load()
            # What another package does when it is imported is beyond us.
            except Exception as failure:
                message = f"{entry.value} cannot be loaded: {failure}"
                yield error(check, message, "install the package again, or remove it")
            else:
                yield fine(check, entry.value)


def _refused(name: str, use: Callable[[], object]) -> list[Finding]:
    try:
        use()
    except exceptions.InvalidConfiguration as failure:
        return [error(name, failure.reason, "correct it, or remove the line for the default")]
    return []
