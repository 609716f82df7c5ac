# SPDX-License-Identifier: Apache-2.0
"""Templates from OpenStack's image service, found and described through openstacksdk.

openstacksdk takes the cloud and the credentials from clouds.yaml or from the environment, as every client of OpenStack
does. The image itself comes as from any web server, with progress, limits of time, and going on where it ended.

Sources: https://docs.openstack.org/openstacksdk/latest/user/config/configuration.html and
https://docs.openstack.org/api-ref/image/v2/.
"""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.templates.sources import Fetched, Metadata, Progress, Source
from imagebackend.templates.sources.checksum import Checksum, parse_checksum
from imagebackend.templates.sources.expectation import Expectation
from imagebackend.templates.sources.http_resource import Resource
from imagebackend.templates.sources.http_transfer import Transfer
from imagebackend.templates.sources.sink import Sink

__all__ = ["GlanceSource"]

LOG = logging.getLogger(__name__)

# What Glance calls formats, and QEMU does not.
_FORMATS = {"iso": "raw", "ami": "raw", "vhd": "vpc"}
_KNOWN = ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc")
#: What an image may be wrapped in: nothing, or what is decompressed.
_CONTAINERS = ("bare", "compressed")
_CLOUD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_VERSION = re.compile(r"/v\d[\d.]*$", re.ASCII)
# Locations that can be cloned. Those of object stores hold credentials, and files are of another host.
_LOCATION = "rbd://"
_MOST_GIB = 1 << 23


class GlanceSource(Source):
    """An image in Glance: ``glance:CLOUD/IMAGE``, or ``glance:IMAGE`` in the cloud that the environment names.

    IMAGE is an id or a name, percent-encoded; ``glance://`` is the same. Other arguments are those of
    :func:`imagebackend.templates.sources.open_source`; without a checksum, Glance's own counts (``os_hash_value``).

    :param wait: called with seconds to wait between attempts.
    :raises InvalidArgument: the URL or the checksum cannot be used.
    :raises Unsupported: openstacksdk is not installed.
    """

    resumable = True

    def __init__(
        self,
        url: str,
        conf: cfg.ConfigOpts,
        *,
        checksum: str | None = None,
        disk_format: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cloud, self._image = _parse(url)
        named = urllib.parse.quote(self._image, safe="")
        self._source = f"glance:{self._cloud}/{named}" if self._cloud else f"glance:{named}"
        self._expected = Expectation(checksum, self._image, conf, wait=wait)
        self._disk_format = disk_format
        self._conf = conf
        self._wait = wait
        _load()

    def metadata(self) -> Metadata:
        checksum = self._expected.checksum()
        with self._connected() as connection:
            return self._metadata_of(self._find(connection), checksum)

    def fetch(self, target: str, progress: Progress | None = None, *, resume: bool = False) -> Fetched:
        started = time.monotonic()
        LOG.info("fetching %s", self._source)
        checksum = self._expected.checksum(progress)
        with self._connected() as connection:
            image = self._find(connection)
            found = self._metadata_of(image, checksum)
            expected = parse_checksum(found.checksum) if found.checksum else None
            largest = self._conf.image_cache.max_virtual_size
            with Sink(target, self._source, expected, progress, part=resume, largest=largest) as sink:
                transfer = Transfer(
                    self._data_of(connection, image),
                    sink,
                    record=target if resume else None,
                    # An image's data never change; so the id does as an ETag, if the digest is checked at the end.
                    identity=found.etag if expected else None,
                )
                transfer.run()
                sha256 = sink.finish()
                LOG.info("fetched %s: %d bytes in %.1f s", self._source, sink.size, time.monotonic() - started)
                return Fetched(
                    self._source, sink.size, sha256, found.disk_format, found.etag, None, sink.compression,
                    sink.content_sha256, found.min_disk,
                )  # fmt: skip

    def locations(self) -> Sequence[str]:
        with self._connected() as connection:
            image = self._find(connection)
            urls = [image.direct_url, *(each.get("url") for each in image.locations or ())]
        return list(dict.fromkeys(url for url in urls if isinstance(url, str) and url.startswith(_LOCATION)))

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Give a connection to the cloud; what goes wrong with it in the block is translated."""
        openstack, keystone = _load()
        sdk = openstack.exceptions
        timeout = self._conf.image_cache.fetch_timeout
        try:
            with openstack.connect(cloud=self._cloud or None, app_name="imagebackend", api_timeout=timeout) as cloud:
                yield cloud
        except (sdk.ConfigException, keystone.AuthPluginException) as error:
            where = f"cloud {self._cloud!r}" if self._cloud else "the environment (OS_CLOUD, OS_AUTH_URL, …)"
            raise exceptions.InvalidConfiguration("clouds.yaml", f"{where}: {_text(error)}") from error
        except (keystone.Unauthorized, keystone.Forbidden, sdk.ForbiddenException) as error:
            raise exceptions.FetchDenied(self._source, _text(error)) from error
        except keystone.ConnectTimeout as error:
            raise exceptions.FetchTimeout(self._source, timeout) from error
        except sdk.NotFoundException as error:
            raise exceptions.FetchFailed(self._source, "there is no such image") from error
        except sdk.DuplicateResource as error:
            raise exceptions.FetchFailed(self._source, "several images have that name; give the id of one") from error
        except (sdk.SDKException, keystone.ClientException) as error:
            if getattr(error, "status_code", None) in (401, 403):
                raise exceptions.FetchDenied(self._source, _text(error)) from error
            raise exceptions.FetchFailed(self._source, _text(error)) from error

    def _find(self, connection: Any) -> Any:
        image = connection.image.find_image(self._image, ignore_missing=False)
        if image.status != "active":
            raise exceptions.FetchFailed(self._source, f"its status is {_text(image.status)}, not active")
        return image

    def _metadata_of(self, image: Any, checksum: Checksum | None) -> Metadata:
        if image.container_format not in _CONTAINERS:
            reason = f"its container format is {_text(image.container_format)}; bare is needed"
            raise exceptions.ImageUnacceptable(self._source, reason)
        disk_format = self._disk_format or _FORMATS.get(image.disk_format, image.disk_format)
        if disk_format not in _KNOWN:
            raise exceptions.ImageUnacceptable(self._source, f"its format is {_text(image.disk_format)}")
        expected = checksum or _checksum_of(image)
        return Metadata(
            self._source,
            image.size if _is_count(image.size) else None,
            disk_format,
            str(expected) if expected else None,
            f'"{urllib.parse.quote(str(image.id))}"',
            None,
            min(image.min_disk, _MOST_GIB) << 30 if _is_count(image.min_disk) else 0,
        )

    def _data_of(self, connection: Any, image: Any) -> Resource:
        endpoint = connection.image.get_endpoint().rstrip("/")
        if not _VERSION.search(endpoint):
            endpoint += "/v2"
        session = connection.session

        def authorize() -> Mapping[str, str]:
            # A new token, if the last one is about to expire.
            headers: Mapping[str, str] = session.get_auth_headers() or {}
            return headers

        url = f"{endpoint}/images/{urllib.parse.quote(str(image.id), safe='')}/file"
        return Resource(
            url, self._conf, wait=self._wait, authorize=authorize, tls=lambda: _tls(session), shown=self._source
        )


def _load() -> tuple[Any, Any]:
    """Return openstacksdk, and the errors of what it logs in with."""
    try:
        import keystoneauth1.exceptions
        import openstack
        import openstack.exceptions
    except ImportError as error:
        raise exceptions.Unsupported(
            "glance: as a source", "openstacksdk is missing; install imagebackend[glance]"
        ) from error
    return openstack, keystoneauth1.exceptions


def _parse(url: str) -> tuple[str, str]:
    """Return the cloud, which may be empty, and the image."""
    cloud, slash, image = url.partition(":")[2].removeprefix("//").rpartition("/")
    if slash and not _CLOUD.fullmatch(cloud):
        # Not shown: it may hold a password.
        raise exceptions.InvalidArgument("a glance URL is needed as in 'glance:CLOUD/IMAGE', CLOUD as in clouds.yaml")
    if "?" in image or "#" in image or "@" in image:
        raise exceptions.InvalidArgument("glance URL: '?', '#' and '@' in an image's name are written %3F, %23, %40")
    name = urllib.parse.unquote(image)
    if not name or not name.isprintable():
        raise exceptions.InvalidArgument("a glance URL is needed as in 'glance:CLOUD/IMAGE', IMAGE being id or name")
    return cloud, name


def _checksum_of(image: Any) -> Checksum | None:
    for text in (f"{image.hash_algo}:{image.hash_value}", f"md5:{image.checksum}"):
        with contextlib.suppress(exceptions.InvalidArgument):
            return parse_checksum(text)
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _tls(session: Any) -> ssl.SSLContext:
    """Return how openstacksdk is told to trust servers: clouds.yaml's ``cacert``, ``verify``, ``cert`` and ``key``."""
    verify, client = session.verify, session.cert
    try:
        context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
        if verify is False:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if client:
            context.load_cert_chain(*((client,) if isinstance(client, str) else client))
    except OSError as error:  # also SSLError
        raise exceptions.InvalidConfiguration("clouds.yaml", f"a certificate cannot be read: {error}") from error
    return context


def _text(said: object) -> str:
    """Return what the other side may have had a part in, fit to be shown."""
    text = " ".join(str(said).split())
    return "".join(sign if sign.isprintable() else "?" for sign in text[:500])
