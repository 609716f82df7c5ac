# SPDX-License-Identifier: Apache-2.0
"""Trees of files out of archives that mean no good, and good ones."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagebackend import exceptions
from imagebackend.storage import tree

CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> bytes:
    """Return the member of an archive, its content included."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(content), 0o755 if kind == tarfile.DIRTYPE else 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    data = content + bytes(-len(content) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + data


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> bytes:
    return member(name, kind, linkname=to)


def forged(header: bytes, offset: int, field: bytes) -> bytes:
    """Return a header with another field, and the checksum that goes with it."""
    header = header[:offset] + field + header[offset + len(field) :]
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header[:512]) + header[156:]


END = bytes(2 * tarfile.BLOCKSIZE)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder to fill, in one that nothing else may get into."""
    (tmp_path / "outer" / "root").mkdir(parents=True)
    (tmp_path / "outside").write_text("secret")
    return tmp_path / "outer" / "root"


def extract(root: Path, content: bytes, **options: object) -> None:
    with open(root.parent / "archive", "w+b") as archive:
        archive.write(content)
        archive.flush()
        tree.extract(archive.fileno(), str(root), "archive", **options)  # type: ignore[arg-type]
    os.unlink(root.parent / "archive")


def test_what_was_packed_is_unpacked(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    content = b"".join(
        [
            member("./", tarfile.DIRTYPE),
            member("./tmp", tarfile.DIRTYPE, mode=0o1777),
            member("./closed", tarfile.DIRTYPE, mode=0o500, uid=3, gid=4, mtime=1_000_000_000),
            member("./closed/file", content=b"\0" * 300_000 + b"end", uid=1, gid=2, mode=0o4755, mtime=1_100_000_000),
            link("./closed/link", "/etc/passwd"),
            link("./up", "../../outside"),
            link("./hard", "./closed/file", tarfile.LNKTYPE),
            member("missing/below/file", content=b"x"),
            member("./ż\udcff", content=b"any bytes but / and NUL"),
            member("./ping", pax_headers={"SCHILY.xattr.security.capability": CAPABILITY.decode()}),
            member("./plain", pax_headers={"SCHILY.xattr.trusted.overlay.opaque": "y"}),
            END,
        ]
    )
    extract(root, content, progress=lambda done, total: seen.append((done, total)))

    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    closed, file = (root / "closed").stat(), (root / "closed" / "file").stat()
    assert (stat.S_IMODE(closed.st_mode), closed.st_uid, closed.st_gid) == (0o500, 3, 4)
    assert (stat.S_IMODE(file.st_mode), file.st_uid, file.st_gid, file.st_nlink) == (0o4755, 1, 2, 2)
    assert (closed.st_mtime, file.st_mtime) == (1_000_000_000, 1_100_000_000)
    assert (root / "hard").read_bytes() == b"\0" * 300_000 + b"end"
    assert os.readlink(root / "closed" / "link") == "/etc/passwd"
    assert os.readlink(root / "up") == "../../outside"
    assert (root / "missing" / "below" / "file").read_bytes() == b"x"
    assert os.fsencode("ż\udcff") in os.listdir(os.fsencode(root))
    assert os.getxattr(root / "ping", "security.capability") == CAPABILITY
    assert os.listxattr(root / "plain") == []
    assert seen[-1] == (len(content), len(content))
    assert sorted(seen) == seen
    measured = tree.measure(str(root), "tree")
    # Twelve inodes: five folders, two files of one block each, and one of 300 003 bytes that has two names.
    assert measured == tree.Measured(12, 5 * 4096 + 2 * 4096 + 303_104, 5 * 4096 + 2 * 4096 + 303_104, 303_104)


def test_a_sparse_file_stays_sparse(root: Path) -> None:
    packed = root.parent / "packed"
    with open(root.parent / "big", "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"middle")
    command = ["tar", "--sparse", "--format=gnu", "-C", root.parent, "-cf", packed, "big"]
    assert os.spawnvp(os.P_WAIT, "tar", [str(word) for word in command]) == 0
    extract(root, packed.read_bytes())
    assert (root / "big").stat().st_size == 1 << 30
    assert (root / "big").stat().st_blocks * 512 < 1 << 22


HOSTILE: dict[str, tuple[bytes, str]] = {
    "absolute": (member("/etc/passwd"), "absolute path '/etc/passwd'"),
    "up": (member("../outside"), "lead out of the tree"),
    "up-inside": (member("a/../../outside"), "lead out of the tree"),
    "folder-up": (member("..", tarfile.DIRTYPE), "lead out of the tree"),
    "through-a-link": (link("way", "..") + member("way/outside"), "below 'way', which is no folder"),
    "through-an-absolute-link": (link("way", "/tmp") + member("way/file"), "below 'way', which is no folder"),
    "over-a-link": (link("file", "../../outside") + member("file", content=b"gone"), "there twice"),
    "folder-over-a-link": (link("way", "..") + member("way", tarfile.DIRTYPE, mode=0o777), "below 'way'"),
    "twice": (member("file") + member("./file"), "there twice"),
    "below-a-file": (member("file") + member("file/below"), "below 'file', which is no folder"),
    "link-out": (link("hard", "../../outside", tarfile.LNKTYPE), "lead out of the tree"),
    "link-to-absolute": (link("hard", "/etc/passwd", tarfile.LNKTYPE), "absolute path '/etc/passwd'"),
    "link-through-a-link": (
        link("way", "../..") + link("hard", "way/outside", tarfile.LNKTYPE), "below 'way', which is no folder"
    ),
    "link-to-a-link": (
        link("file", "../../outside") + link("hard", "file", tarfile.LNKTYPE), "a link to 'file', which is no file"
    ),
    "link-to-nothing": (link("hard", "later", tarfile.LNKTYPE), "a link to 'later'"),
    "link-to-the-root": (link("hard", ".", tarfile.LNKTYPE), "a link to '.'"),
    "character-device": (member("dev/mem", tarfile.CHRTYPE, devmajor=1, devminor=1), "is a device"),
    "block-device": (member("dev/sda", tarfile.BLKTYPE, devmajor=8), "is a device"),
    "fifo": (member("fifo", tarfile.FIFOTYPE), "is a FIFO"),
    "root-as-file": (member(".", content=b"x"), "the root itself"),
    "not-tar": (b"#!/bin/sh\n" * 200, "not a whole tar archive"),
    "empty": (b"", "not a whole tar archive"),
    "cut": (member("file", content=b"x" * 100_000)[:50_000], "not a whole tar archive"),
    "cut-header": (member("a") + member("b")[:300], "cut off, or damaged, at 512"),
    "damaged-header": (member("a") + member("b").replace(b"ustar", b"ustaX") + END, "cut off, or damaged, at 512"),
    "no-end": (member("a"), "cut off, or damaged, at 512"),
    "negative-size": (forged(member("file"), 124, b"\xff" * 11 + b"\x00") + END, "not a whole tar archive|understood"),
    "header-of-gigabytes": (forged(member("x", tarfile.XHDTYPE), 124, b"77777777777\0"), "a header of"),
    "absurd-owner": (forged(member("file"), 108, b"\x80" + b"\xff" * 7), "cannot be understood"),
    "absurd-time": (member("file", pax_headers={"mtime": "nan"}) + END, "cannot be understood"),
    "very-sparse": (
        member(
            "file",
            pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 60)},
        ),
        "is sparse, and",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_an_archive_that_means_no_good_is_refused_and_nothing_outside_is_touched(case: str, root: Path) -> None:
    content, reason = HOSTILE[case]
    outer = root.parent.parent
    before = (outer / "outside").stat()
    with pytest.raises(exceptions.ImageUnacceptable, match=reason):
        extract(root, content if case.startswith(("cut", "no-")) or case == "empty" else content + END)
    assert (outer / "outside").read_text() == "secret"
    assert (outer / "outside").stat().st_nlink == before.st_nlink == 1
    assert sorted(path.name for path in outer.iterdir()) == ["outer", "outside"]
    assert sorted(path.name for path in root.parent.iterdir()) == ["archive", "root"]
    assert not any(stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFBLK, stat.S_IFCHR) for path in outer.rglob("*"))


GOOD = b"".join(
    [member("a", tarfile.DIRTYPE), member("a/file", content=b"content"), link("a/link", "/"), member("x" * 200), END]
)


@given(changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=12)), max_size=4))
@settings(max_examples=150)
def test_a_damaged_archive_is_refused_or_unpacked_inside(
    changes: list[tuple[int, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("damaged") / "root"
    root.mkdir()
    content = bytearray(GOOD)
    for offset, piece in changes:
        content[offset : offset + len(piece)] = piece
    try:
        extract(root, bytes(content))
    except (exceptions.ImageUnacceptable, exceptions.StorageError):
        return
    assert {path.name for path in root.parent.iterdir()} == {"root"}


def make_fifo(path: Path) -> None:
    os.mkfifo(path / "fifo")


def make_device(path: Path) -> None:
    os.mknod(path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))


@pytest.mark.parametrize("spoil", [make_fifo, make_device])
def test_a_folder_with_what_no_container_needs_is_refused(spoil: Callable[[Path], None], root: Path) -> None:
    (root / "below").mkdir()
    spoil(root / "below")
    with pytest.raises(exceptions.ImageUnacceptable, match=r"'below/\w+' is a device, a FIFO or a socket"):
        tree.measure(str(root), "tree")


def test_a_mount_in_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(exceptions.ImageUnacceptable, match="another file system"):
        tree.measure("/", "tree")


def test_members_are_not_kept(root: Path) -> None:
    """Archives have as many members as they like."""
    archive = io.BytesIO()
    for number in range(2000):
        archive.write(member(f"{number:04}"))
    extract(root, archive.getvalue() + END)
    assert len(os.listdir(root)) == 2000
