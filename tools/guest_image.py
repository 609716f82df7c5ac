# SPDX-License-Identifier: Apache-2.0
"""A small real guest: Debian's kernel, and a busybox root on a partitioned ext4 disk.

It is here, beside the commands that use it, because the demo, the functional tests and the benchmarks boot the same
one. Nothing is installed, mounted or attached to build it: the kernel package is downloaded and taken apart, and
mke2fs(8) fills the file system.

The guest says on its first serial port which device its root is, and says the size of /dev/vda again whenever that
changes, until it is told to power off (the word ``poweroff`` on the kernel's command line) or destroyed::

    imagebackend-guest: root=/dev/vda1 ext4
    imagebackend-guest: size=67108864
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from imagebackend import locks

__all__ = ["CACHE", "ROOT_SAYS", "SIZE_SAYS", "GuestImage", "build"]

#: Where everything that takes long to make is kept between runs.
CACHE = Path(__file__).resolve().parent.parent / ".cache"

#: What the guest says once it has mounted its root, and about its disk's size: regular expressions with one group.
ROOT_SAYS = r"imagebackend-guest: root=(\S+ \S+)"
SIZE_SAYS = r"imagebackend-guest: size=(\d+)"

_MIB = 1 << 20
_BUSYBOX = "/bin/busybox"
_LOCK_TIMEOUT = 300.0
_DOWNLOAD_TIMEOUT = 240.0
_TOOL_TIMEOUT = 60.0

# In the order in which they are loaded; one that the kernel has built in is not in the package.
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "crc16",
    "crc32c_generic",
    "mbcache",
    "jbd2",
    "ext4",
)

_INITRAMFS_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for m in $($b cat /modules/order); do $b insmod /modules/$m; done
for word in $($b cat /proc/cmdline); do case $word in root=*) root=${word#root=};; esac; done
tries=0
until $b mount -t ext4 -o rw $root /root 2>/dev/null; do
    tries=$((tries + 1))
    [ $tries -gt 20 ] && { echo "imagebackend-guest: no root $root"; $b poweroff -f; }
    $b sleep 0.1
done
exec $b switch_root /root /sbin/init
"""

_INIT = """\
#!/bin/sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev 2>/dev/null
exec >/dev/ttyS0 2>&1
echo "written by the guest" >/etc/guest-was-here
$b sync
echo "imagebackend-guest: root=$($b awk '$2 == "/" { print $1, $3 }' /proc/mounts)"
while true; do
    size=$($b blockdev --getsize64 /dev/vda)
    [ "$size" != "$said" ] && echo "imagebackend-guest: size=$size"
    said=$size
    $b grep -qw poweroff /proc/cmdline && $b poweroff -f
    $b sleep 0.2
done
"""


@dataclass(frozen=True)
class GuestImage:
    """What it takes to boot the guest.

    :ivar kernel: an ELF image, which QEMU starts by PVH without unpacking it first.
    :ivar initrd: what loads the modules and mounts the root.
    :ivar command_line: the kernel's.
    :ivar disk: a raw disk image of 64 MiB with one partition; a template, not to be written to.
    """

    kernel: Path
    initrd: Path
    disk: Path
    command_line: str = "root=/dev/vda1 console=ttyS0 quiet panic=-1"


def build() -> GuestImage:
    """Return the guest, built unless it is in the cache: once, however many processes ask at the same time.

    :raises subprocess.CalledProcessError: a tool failed; it has said why on stderr.
    """
    package, version = _kernel_package()
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / "guest" / f"{version}-{recipe}"
    if not folder.exists():
        with locks.hold(str(CACHE / "guest" / "lock"), timeout=_LOCK_TIMEOUT):
            if not folder.exists():
                _build(folder, package)
    return GuestImage(kernel=folder / "vmlinux", initrd=folder / "initrd", disk=folder / "disk.raw")


def _build(folder: Path, package: str) -> None:
    for old in folder.parent.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        modules = Path(work) / "modules"
        _unpack_kernel(_download(package, Path(work)), made / "vmlinux", modules)
        _make_initramfs(made / "initrd", modules, Path(work) / "initramfs")
        _make_disk(made / "disk.raw", Path(work) / "root", size=64 * _MIB)
        made.rename(folder)


def _run(*command: str | Path, cwd: Path | None = None, stdin: str = "", timeout: float = _TOOL_TIMEOUT) -> str:
    return subprocess.run(
        command, cwd=cwd, input=stdin, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
    ).stdout


def _kernel_package() -> tuple[str, str]:
    """Return name and version of the package that Debian's metapackage for kernels depends on."""
    command = ("apt-cache", "show", "--no-all-versions", "linux-image-amd64")
    try:
        shown = _run(*command)
    except subprocess.CalledProcessError:
        _update_package_lists()
        shown = _run(*command)
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line)
    return fields["Depends"].split()[0], fields["Version"]


def _download(package: str, folder: Path) -> Path:
    # As root: apt's own user cannot write into a folder of ours.
    command = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download")
    try:
        _run(*command, package, cwd=folder, timeout=_DOWNLOAD_TIMEOUT)
    except subprocess.CalledProcessError:
        # What apt knows of may no longer be in the archive.
        _update_package_lists()
        package, _ = _kernel_package()
        _run(*command, package, cwd=folder, timeout=_DOWNLOAD_TIMEOUT)
    return next(folder.glob(f"{package}_*.deb"))


def _update_package_lists() -> None:
    subprocess.run(["apt-get", "-qq", "update"], stdin=subprocess.DEVNULL, check=True, timeout=_DOWNLOAD_TIMEOUT)


def _unpack_kernel(package: Path, kernel: Path, modules: Path) -> None:
    modules.mkdir()
    wanted = {f"{name}.ko": modules / f"{name}.ko" for name in _MODULES}
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = os.path.basename(member.name)
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and name in wanted:
                wanted[name].write_bytes(content.read())
            elif content is not None and name.startswith("vmlinuz-"):
                kernel.write_bytes(_elf_kernel(content.read()))
    if unpacking.returncode:
        raise subprocess.CalledProcessError(unpacking.returncode, "dpkg-deb")


def _elf_kernel(bzimage: bytes) -> bytes:
    """Return the uncompressed kernel within a bzImage: an emulated CPU takes 3 s to uncompress it.

    Source: Documentation/arch/x86/boot.rst of Linux (``setup_sects``, ``payload_offset``, ``payload_length``).
    """
    protected_mode = (bzimage[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = protected_mode + offset
    # Not lzma.decompress(), which takes the size that follows the compressed data for another stream.
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(bzimage[start : start + length])


def _make_initramfs(target: Path, modules: Path, root: Path) -> None:
    for name in ("bin", "dev", "proc", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin")
    modules.rename(root / "modules")
    present = [f"{name}.ko" for name in _MODULES if (root / "modules" / f"{name}.ko").exists()]
    (root / "modules" / "order").write_text("\n".join(present))
    _write_script(root / "init", _INITRAMFS_INIT)
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    _run("cpio", "--create", "--format=newc", "--quiet", "--owner=0:0", "--file", target, cwd=root, stdin=names)


def _make_disk(target: Path, root: Path, *, size: int) -> None:
    for name in ("bin", "sbin", "dev", "proc", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin")
    (root / "bin" / "sh").symlink_to("busybox")
    _write_script(root / "sbin" / "init", _INIT)
    with open(target, "wb") as disk:
        disk.truncate(size)
    _run("sfdisk", "--quiet", target, stdin="start=1MiB, type=83, bootable\n")
    options = ("-E", f"offset={_MIB},nodiscard", "-d", root)
    _run("mke2fs", "-q", "-F", "-t", "ext4", *options, target, f"{(size - _MIB) // 1024}k")


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
