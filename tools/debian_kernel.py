# SPDX-License-Identifier: Apache-2.0
"""Debian's kernel and its modules, unpacked and not installed, for the guests that the tests boot."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imagebackend import locks

__all__ = ["CACHE", "Kernel", "make_initramfs", "run", "unpack", "write_script"]

#: Where everything that takes long to make is kept between runs.
CACHE = Path(__file__).resolve().parent.parent / ".cache"

_BUSYBOX = "/bin/busybox"
_LOCK_TIMEOUT = 300.0
_DOWNLOAD_TIMEOUT = 240.0
_TOOL_TIMEOUT = 60.0

# Nine tenths of the package are drivers of hardware that no guest of ours has.
_KEPT = (
    "arch",
    "block",
    "crypto",
    "drivers/block",
    "drivers/char",
    "drivers/crypto",
    "drivers/md",
    "drivers/virtio",
    "fs",
    "lib",
    "net/9p",
    "virt",
)


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel.

    :ivar image: an ELF image, which QEMU starts by PVH without unpacking it first.
    :ivar version: the version of the package.
    :ivar release: what ``uname -r`` says in the guest.
    :ivar folder: has ``lib/modules/RELEASE``, as modprobe(8) takes it.
    """

    image: Path
    version: str
    release: str
    folder: Path

    def modules(self, names: Sequence[str]) -> list[Path]:
        """Return the files of modules and of all that they need, in the order in which they are to be loaded.

        Those that the kernel has built in are not among them.
        """
        found: dict[Path, None] = {}
        for name in names:
            options = ("--dirname", self.folder, "--set-version", self.release, "--show-depends")
            for line in run("modprobe", *options, name).splitlines():
                kind, path = line.split()[:2]
                if kind == "insmod":
                    found[Path(path)] = None
        return list(found)


def unpack() -> Kernel:
    """Return the kernel, unpacked unless it is in the cache: once, however many processes ask at the same time.

    :raises subprocess.CalledProcessError: a tool failed; it has said why on stderr.
    """
    package, version = _package()
    folder = CACHE / "kernel" / version
    if not folder.exists():
        with locks.hold(str(CACHE / "kernel" / "lock"), timeout=_LOCK_TIMEOUT):
            if not folder.exists():
                _unpack(folder, package)
    (modules,) = (folder / "lib" / "modules").iterdir()
    return Kernel(folder / "vmlinux", version, modules.name, folder)


def make_initramfs(target: Path, modules: Sequence[Path], init: str, root: Path) -> None:
    """Pack an initial RAM file system of busybox, modules in ``/modules``, and an init that loads them by itself.

    :param init: a script for ``/bin/busybox sh``; ``/modules/order`` lists the modules.
    :param root: an empty folder to work in.
    """
    for name in ("bin", "dev", "proc", "sys", "root", "modules"):
        (root / name).mkdir()
    shutil.copy(_BUSYBOX, root / "bin")
    for module in modules:
        shutil.copy(module, root / "modules")
    (root / "modules" / "order").write_text("\n".join(module.name for module in modules))
    write_script(root / "init", init)
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    run("cpio", "--create", "--format=newc", "--quiet", "--owner=0:0", "--file", target, cwd=root, stdin=names)


def write_script(path: Path, text: str) -> None:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)


def run(*command: str | Path, cwd: Path | None = None, stdin: str = "", timeout: float = _TOOL_TIMEOUT) -> str:
    """Run a tool to its end and return what it wrote.

    :raises subprocess.CalledProcessError: it failed; it has said why on stderr.
    """
    return subprocess.run(
        command, cwd=cwd, input=stdin, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout
    ).stdout


def _package() -> tuple[str, str]:
    """Return name and version of the package that Debian's metapackage for kernels depends on."""
    command = ("apt-cache", "show", "--no-all-versions", "linux-image-amd64")
    try:
        shown = run(*command)
    except subprocess.CalledProcessError:
        _update_package_lists()
        shown = run(*command)
    fields = dict(line.split(": ", 1) for line in shown.splitlines() if ": " in line)
    return fields["Depends"].split()[0], fields["Version"]


def _update_package_lists() -> None:
    subprocess.run(["apt-get", "-qq", "update"], stdin=subprocess.DEVNULL, check=True, timeout=_DOWNLOAD_TIMEOUT)


def _unpack(folder: Path, package: str) -> None:
    for old in folder.parent.iterdir():
        if old.is_dir():
            shutil.rmtree(old)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = Path(work) / "made"
        made.mkdir()
        wanted = [f"./lib/modules/*/kernel/{kept}" for kept in _KEPT]
        command = (
            "tar",
            "--extract",
            "--directory",
            made,
            "--wildcards",
            "./boot/vmlinuz-*",
            "./lib/modules/*/modules.*",
        )
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", _download(package, Path(work))], stdout=subprocess.PIPE
        ) as unpacking:
            subprocess.run([*command, *wanted], stdin=unpacking.stdout, check=True, timeout=_TOOL_TIMEOUT)
        if unpacking.returncode:
            raise subprocess.CalledProcessError(unpacking.returncode, "dpkg-deb")
        (packed,) = (made / "boot").glob("vmlinuz-*")
        (made / "vmlinux").write_bytes(_elf_kernel(packed.read_bytes()))
        shutil.rmtree(made / "boot")
        run("depmod", "--basedir", made, packed.name.removeprefix("vmlinuz-"))
        made.rename(folder)


def _download(package: str, folder: Path) -> Path:
    # As root: apt's own user cannot write into a folder of ours.
    command = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download")
    try:
        run(*command, package, cwd=folder, timeout=_DOWNLOAD_TIMEOUT)
    except subprocess.CalledProcessError:
        # What apt knows of may no longer be in the archive.
        _update_package_lists()
        package, _ = _package()
        run(*command, package, cwd=folder, timeout=_DOWNLOAD_TIMEOUT)
    return next(folder.glob(f"{package}_*.deb"))


def _elf_kernel(bzimage: bytes) -> bytes:
    """Return the uncompressed kernel within a bzImage: an emulated CPU takes 3 s to uncompress it.

    Source: Documentation/arch/x86/boot.rst of Linux (``setup_sects``, ``payload_offset``, ``payload_length``).
    """
    protected_mode = (bzimage[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = protected_mode + offset
    # Not lzma.decompress(), which takes the size that follows the compressed data for another stream.
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(bzimage[start : start + length])
