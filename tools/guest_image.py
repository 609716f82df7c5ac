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
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from imagebackend import locks
from tools import debian_kernel
from tools.debian_kernel import CACHE, Kernel

__all__ = ["CACHE", "ROOT_SAYS", "SIZE_SAYS", "GuestImage", "build"]

#: What the guest says once it has mounted its root, and about its disk's size: regular expressions with one group.
ROOT_SAYS = r"imagebackend-guest: root=(\S+ \S+)"
SIZE_SAYS = r"imagebackend-guest: size=(\d+)"

_MIB = 1 << 20
_BUSYBOX = "/bin/busybox"
_LOCK_TIMEOUT = 300.0
_MODULES = ("virtio_pci", "virtio_blk", "ext4")

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
    kernel = debian_kernel.unpack()
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / "guest" / f"{kernel.version}-{recipe}"
    if not folder.exists():
        with locks.hold(str(CACHE / "guest" / "lock"), timeout=_LOCK_TIMEOUT):
            if not folder.exists():
                _build(folder, kernel)
    return GuestImage(kernel=kernel.image, initrd=folder / "initrd", disk=folder / "disk.raw")


def _build(folder: Path, kernel: Kernel) -> None:
    for old in folder.parent.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made, initramfs, root = (Path(work) / name for name in ("made", "initramfs", "root"))
        made.mkdir()
        initramfs.mkdir()
        modules = kernel.modules(_MODULES)
        debian_kernel.make_initramfs(made / "initrd", modules, _INITRAMFS_INIT, initramfs)
        _make_disk(made / "disk.raw", root, size=64 * _MIB)
        made.rename(folder)


def _make_disk(target: Path, root: Path, *, size: int) -> None:
    for name in ("bin", "sbin", "dev", "proc", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin")
    (root / "bin" / "sh").symlink_to("busybox")
    debian_kernel.write_script(root / "sbin" / "init", _INIT)
    with open(target, "wb") as disk:
        disk.truncate(size)
    debian_kernel.run("sfdisk", "--quiet", target, stdin="start=1MiB, type=83, bootable\n")
    options = ("-E", f"offset={_MIB},nodiscard", "-d", root)
    debian_kernel.run("mke2fs", "-q", "-F", "-t", "ext4", *options, target, f"{(size - _MIB) // 1024}k")
