# SPDX-License-Identifier: Apache-2.0
"""Where an image service says that an image is in a Ceph cluster."""

from __future__ import annotations

import pytest

from imagebackend import exceptions
from imagebackend.storage import rbd_url

FSID = "43ba3e63-fd79-4af3-9a49-74db8899da9e"


def test_a_location_is_read_strictly() -> None:
    url = f"rbd://{FSID}/images/an-image/snap"
    found = rbd_url.parse_url(url)
    assert (found.fsid, found.pool, found.image, found.snapshot) == (FSID, "images", "an-image", "snap")
    assert str(found) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "rbd:vms/x",
        f"http://{FSID}/images/image/snap",
        f"rbd://{FSID}/images/image",
        f"rbd://{FSID}/images/image/snap/more",
        f"rbd://{FSID}//image/snap",
        f"rbd://{FSID}/images/image/",
        f"rbd://{FSID.upper()}/images/image/snap",
        "rbd://fsid/images/image/snap",
        f"rbd://{FSID}/images/im%2Fage/snap",
        f"rbd://{FSID}/images/image/snap\n",
        f"rbd://{FSID}/images/-image/snap",
    ],
)
def test_other_locations_are_unacceptable(url: str) -> None:
    with pytest.raises(exceptions.ImageUnacceptable):
        rbd_url.parse_url(url)
