# SPDX-License-Identifier: Apache-2.0
"""What a checksum may look like, and what is found in a publisher's file of checksums."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oslo_config import cfg

from imagebackend import exceptions
from imagebackend.conf import load_config
from imagebackend.templates.sources import open_source
from imagebackend.templates.sources.checksum import Checksum, find_checksum, parse_checksum

SHA256, OTHER = "a1" * 32, "b2" * 32
SHA512, SHA1, MD5 = "c3" * 64, "d4" * 20, "e5" * 16
#: As gpg writes it, of Fedora's kind.
CLEARSIGNED = f"""\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

# image.qcow2: 123 bytes
SHA256 (image.qcow2) = {SHA256}
- -dashes = escaped
-----BEGIN PGP SIGNATURE-----

iQIzBAEBCAAdFiEE
-----END PGP SIGNATURE-----
"""


@pytest.fixture
def conf() -> cfg.ConfigOpts:
    return load_config([])


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512", "sha1", "md5"])
@given(data=st.binary())
def test_checksum(algorithm: str, data: bytes) -> None:
    digits = hashlib.new(algorithm, data).hexdigest()
    for text in (f"{algorithm}:{digits}", f"{algorithm.upper()}:{digits.upper()}"):
        assert parse_checksum(text) == Checksum(algorithm, digits)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "0" * 64,
        "sha256:",
        "sha256:" + "0" * 63,
        "sha256:" + "0" * 65,
        "sha256:" + "g" * 64,
        "sha256:" + "\N{ARABIC-INDIC DIGIT ZERO}" * 64,
        "sha256: " + "0" * 63,
        "sha256:" + "0" * 64 + "\n",
        "sha512:" + "0" * 64,
        "sha3_256:" + "0" * 64,
        "crc32:" + "0" * 8,
        "sha256=" + "0" * 64,
    ],
)
@pytest.mark.parametrize("url", ["/path", "http://host/path"])
def test_malformed_checksum(conf: cfg.ConfigOpts, url: str, text: str) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="sha512 \\(128 digits\\)"):
        open_source(url, conf, checksum=text)


@pytest.mark.parametrize("algorithm", ["sha1", "md5"])
def test_weak_checksum_is_warned_of(algorithm: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_checksum(f"{algorithm}:{hashlib.new(algorithm).hexdigest()}")
    assert "stops no attacker" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{SHA256}  image.qcow2\n", f"sha256:{SHA256}"),
        (f"{SHA256} *image.qcow2\r\n", f"sha256:{SHA256}"),
        (f"{SHA256.upper()}  ./image.qcow2", f"sha256:{SHA256}"),
        (f"{OTHER}  other\n\n{SHA256}  image.qcow2\n{OTHER}  image.qcow2.zip\n", f"sha256:{SHA256}"),
        (f"{SHA512}  image.qcow2\n", f"sha512:{SHA512}"),
        (f"{MD5}  image.qcow2\n{SHA1}  image.qcow2\n", f"sha1:{SHA1}"),
        (f"{SHA512}  image.qcow2\n{SHA256}  image.qcow2\n", f"sha256:{SHA256}"),
        (f"SHA256 (image.qcow2) = {SHA256}\n", f"sha256:{SHA256}"),
        (f"SHA512 (image.qcow2) = {SHA512}\nMD5 (image.qcow2) = {MD5}\n", f"sha512:{SHA512}"),
        (f"SHA2-256(image.qcow2)= {SHA256}\n", f"sha256:{SHA256}"),
        (f"SHA256(image.qcow2)= {SHA256}\n", f"sha256:{SHA256}"),
        (CLEARSIGNED, f"sha256:{SHA256}"),
        (f"{SHA256}\n", f"sha256:{SHA256}"),
        (f"{SHA256}  amd64/image.qcow2\n", f"sha256:{SHA256}"),
        (f"{OTHER}  arm64/image.qcow2\n{SHA256}  image.qcow2\n", f"sha256:{SHA256}"),
        (f"{SHA256}  image.qcow2\n{SHA256}  image.qcow2\n", f"sha256:{SHA256}"),
    ],
)
def test_found(text: str, expected: str) -> None:
    assert str(find_checksum(text, "image.qcow2", "source")) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no checksum of 'image.qcow2'"),
        ("<html>Not found</html>", "no checksum"),
        (f"{SHA256}  Image.qcow2\n", "no checksum"),
        (f"{SHA256}  image.qcow2.sig\n{SHA256}\n", "no checksum"),
        (f"{SHA256[:-2]}  image.qcow2\n", "no checksum"),
        (f"{SHA256}image.qcow2\n", "no checksum"),
        (f"SHA512 (image.qcow2) = {SHA256}\n", "no checksum"),
        (f"SHA3-256 (image.qcow2) = {SHA256}\n", "no checksum"),
        (f"BLAKE2b (image.qcow2) = {SHA512}\n", "no checksum"),
        (f"SHA256 () = {SHA256}\n", "no checksum"),
        (f"{SHA256}  image.qcow2\n{OTHER}  image.qcow2\n", "more than one sha256"),
        (f"{SHA256}  a/image.qcow2\n{OTHER}  b/image.qcow2\n", "more than one sha256"),
    ],
)
def test_not_found(text: str, reason: str) -> None:
    with pytest.raises(exceptions.FetchFailed, match=reason) as caught:
        find_checksum(text, "image.qcow2", "https://host/SHA256SUMS")
    assert caught.value.source == "https://host/SHA256SUMS"


@given(text=st.text(alphabet=st.sampled_from("aA0 *()=./\\\n\r\x85SH2568-é"), max_size=300))
def test_anything_else_is_no_checksum(text: str) -> None:
    with pytest.raises(exceptions.FetchFailed):
        find_checksum(text, "image.qcow2", "source")


def test_a_weak_one_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    find_checksum(f"{MD5}  image.qcow2", "image.qcow2", "source")
    assert "stops no attacker" in caplog.text
