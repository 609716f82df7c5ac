# SPDX-License-Identifier: Apache-2.0
"""``imagebackend doctor``: is this host fit for its disks?

In each module, what looks at the host and what judges the facts are apart.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from imagebackend.cli import exit_status, output
from imagebackend.cli.session import Session

if TYPE_CHECKING:
    from oslo_config import cfg

    from imagebackend.cli.doctor.finding import Finding

__all__ = ["doctor"]


@click.command
@click.option("--connect", metavar="URI", help="The hypervisor to try. Default: the system's, by [libvirt] virt_type.")
@click.pass_obj
def doctor(session: Session, connect: str | None) -> None:
    """Tell whether this host is fit for its disks.

    And if not, what to do about it. Looks at the configuration, the tools, the folders and their file system, libvirt,
    and the Ceph pool if disks are in one. What it tries leaves nothing behind. Exit status 0: nothing is wrong, though
    there may be warnings. 1: something is wrong.
    """
    from imagebackend.cli.doctor.finding import Severity, worst

    findings = _examine(session, connect)
    status = worst(findings)
    document = {
        "status": status,
        "findings": [
            {"check": each.check, "status": each.status, "message": each.message, "advice": each.advice}
            for each in findings
        ],
    }
    session.show(document, output.printable("\n".join(_lines(findings))))
    if status is Severity.ERROR:
        raise click.exceptions.Exit(exit_status.FAILED)


def _examine(session: Session, uri: str | None) -> list[Finding]:
    from imagebackend.cli import hypervisor
    from imagebackend.cli.doctor import configuration, libvirt_host, logical_volumes, tools

    conf, findings = configuration.examine(session.files, session.config_dirs)
    findings += tools.judge_tools(tools.find_tools(tools.TOOLS), conf.default_ephemeral_format)
    findings += _examine_folders(conf)
    if conf.libvirt.images_type == "lvm":
        findings += logical_volumes.judge_group(logical_volumes.look_at_group(conf), conf)
    virt_type = conf.libvirt.virt_type
    host = libvirt_host.look_at_host(uri or hypervisor.default_uri(virt_type), virt_type)
    findings += libvirt_host.judge_host(host, virt_type, demanded=uri is not None)
    if conf.libvirt.images_type == "rbd":
        findings += _examine_ceph(conf, host.uri if host.version else None)
    return findings


def _examine_ceph(conf: cfg.ConfigOpts, uri: str | None) -> list[Finding]:
    """Look at what disks in Ceph need; ``uri`` is that of a libvirt that can be reached."""
    from imagebackend.cli.doctor import ceph_pool

    findings = ceph_pool.judge_pool(ceph_pool.look_at_pool(conf))
    findings.append(ceph_pool.judge_driver(is_there=ceph_pool.look_at_driver()))
    return findings + (ceph_pool.judge_secret(ceph_pool.look_at_secret(conf, uri)) if uri else [])


def _examine_folders(conf: cfg.ConfigOpts) -> list[Finding]:
    from imagebackend import exceptions
    from imagebackend.backend import Backend
    from imagebackend.cli.doctor import folders
    from imagebackend.cli.doctor.configuration import makes_raw_disks
    from imagebackend.cli.doctor.finding import error

    home = folders.look_at_folder(os.path.abspath(conf.instances_path))
    others = {
        "[image_cache] subdirectory_name": Backend(conf).templates.folder,
        "lock files": f"{home.path}/locks",
        "[libvirt] snapshots_directory": os.path.abspath(conf.libvirt.snapshots_directory),
    }
    user = os.geteuid()
    findings = [folders.judge_folder("[DEFAULT] instances_path", home, user)]
    findings += [folders.judge_folder(name, folders.look_at_folder(path), user) for name, path in others.items()]
    if home.failure is not None:
        return findings
    try:
        found = folders.look_at_file_system(home.nearest)
    except (OSError, exceptions.ImageBackendError) as failure:
        return [
            *findings,
            error("file system", f"{home.nearest}: {failure}", "repair it, or configure another folder"),
        ]
    return findings + folders.judge_file_system(found, conf.reflink, copies=makes_raw_disks(conf))


def _lines(findings: list[Finding]) -> list[str]:
    lines = []
    for each in findings:
        lines.append(f"{each.status:8} {each.check}: {each.message}")
        if each.advice:
            lines.append(f"{'':8} -> {each.advice}")
    counts = [sum(each.status == status for each in findings) for status in ("error", "warning")]
    return [*lines, "", f"errors: {counts[0]}, warnings: {counts[1]}"]
