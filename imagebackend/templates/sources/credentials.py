# SPDX-License-Identifier: Apache-2.0
"""Names and passwords for web servers, from a file in the form of ~/.netrc that the operator keeps for this."""

from __future__ import annotations

import base64
import netrc
import os
import stat

from oslo_config import cfg

from imagebackend import exceptions

__all__ = ["authorization", "basic", "read"]

_OPTION = "[image_cache] fetch_credentials_file"


def read(conf: cfg.ConfigOpts) -> netrc.netrc | None:
    """Return what the file has; None if neither the option nor the environment's ``NETRC`` names one.

    :raises InvalidConfiguration: it cannot be read, is not in the form of ~/.netrc, or others may read it.
    """
    path = conf.image_cache.fetch_credentials_file or os.environ.get("NETRC")
    if not path:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise exceptions.InvalidConfiguration(_OPTION, f"{path}: {error.strerror}") from error
    try:
        _check(path, os.fstat(descriptor))
        # The same file that was looked at.
        return netrc.netrc(f"/dev/fd/{descriptor}")
    except netrc.NetrcParseError as error:
        # Neither its text nor chained: it shows what it could not understand, which may be a password.
        raise exceptions.InvalidConfiguration(_OPTION, f"{path}, line {error.lineno}: not as in ~/.netrc") from None
    except (OSError, UnicodeError):
        raise exceptions.InvalidConfiguration(_OPTION, f"{path}: it cannot be read as text") from None
    finally:
        os.close(descriptor)


def authorization(conf: cfg.ConfigOpts, host: str, port: int) -> dict[str, str]:
    """Return the header field with the credentials for a server, if the file has any.

    ``machine HOST:PORT`` is for that port alone. ``default`` is not used: anybody's server could be meant.

    :raises InvalidConfiguration: as :func:`read` says.
    """
    found = read(conf)
    hosts = {} if found is None else found.hosts
    for machine in (f"{host}:{port}", host):
        if machine in hosts:
            login, _, password = hosts[machine]
            return basic(login.encode(), (password or "").encode())
    return {}


def basic(login: bytes, password: bytes) -> dict[str, str]:
    """Return the header field of HTTP's Basic authentication (RFC 7617)."""
    return {"Authorization": "Basic " + base64.b64encode(login + b":" + password).decode()}


def _check(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise exceptions.InvalidConfiguration(_OPTION, f"{path}: not a regular file")
    if found.st_mode & 0o077:
        raise exceptions.InvalidConfiguration(_OPTION, f"{path}: others may read or write it; chmod 600")
    if found.st_uid not in (0, os.geteuid()):
        raise exceptions.InvalidConfiguration(_OPTION, f"{path}: it belongs to another user")
