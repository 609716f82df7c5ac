# SPDX-License-Identifier: Apache-2.0
"""Run a command of this machine on another kernel: Debian's, in a guest that lives as long as the command.

The guest's root is this machine's, read-only by 9p, under a file system in memory: the command finds everything where
it is here, and what it writes is gone afterwards, except in the folders that it shares. There is no udev: device nodes
are the kernel's, and libdevmapper is told to do without.

KVM runs it where that works; QEMU emulates it elsewhere, in which Python takes ten times as long.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from imagebackend import locks
from tools import boot, debian_kernel, guest_image
from tools.debian_kernel import CACHE, Kernel

__all__ = ["run"]

_LOCK_TIMEOUT = 300.0
# All else is loaded when something asks for it, from the kernel's folder in the cache.
_MODULES = ("virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay")
_KVM = ("kvm-amd", "kvm-intel")

_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev; $b mount -t proc proc /proc; $b mount -t sysfs sys /sys
for m in $($b cat /modules/order); do $b insmod /modules/$m; done
$b mkdir /lower /upper
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose root /lower
$b mount -t tmpfs -o size=75% upper /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work root /root
for d in dev proc sys; do $b mount --move /$d /root/$d; done
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts devpts /root/dev/pts
$b mount -t tmpfs shm /root/dev/shm
$b mount -t tmpfs run /root/run
$b mkdir -p /root/run/lock
for word in $($b cat /proc/cmdline); do case $word in second=*) second=${word#second=};; esac; done
exec $b chroot /root /bin/bash "$second"
"""

# Loads what udev would at boot: the kernel cannot be asked for it by its device nodes while they are not there.
_SECOND_STAGE = """\
export PATH={path} HOME={home} LANG=C.UTF-8 TERM=dumb DM_DISABLE_UDEV=1
{mounts}
mkdir -p /lib/modules
mount --bind {modules} /lib/modules
modprobe --all --quiet loop dm-mod {more_modules}
# Half of the time of each command of LVM's: nothing is watched for, and there is nothing to restore.
echo 'activation {{ monitoring=0 }} backup {{ backup=0 archive=0 }}' 2>/dev/null >/etc/lvm/lvmlocal.conf
ip link set lo up
for port in /sys/class/virtio-ports/vport*; do
    case $(cat $port/name) in
    output) output=/dev/${{port##*/}};;
    status) status=/dev/${{port##*/}};;
    esac
done
cd {folder}
{command} </dev/null >$output 2>&1
echo $? >$status
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


def run(
    command: Sequence[str | Path],
    *,
    shared: Sequence[Path] = (),
    memory: int = 1024,
    nested: bool = False,
    on_line: Callable[[str], object] = print,
    timeout: float,
) -> int:
    """Run a command as root on a kernel of its own, in the folder that this is called in; return its exit status.

    :param shared: folders, absolute, in which what it writes stays.
    :param memory: MiB, of which three quarters can be files.
    :param nested: let it run guests by KVM itself.
    :param on_line: called with each line that it writes.
    :param timeout: seconds, after which the guest is killed.
    :raises RuntimeError: the guest ended without an exit status; says what was on its console.
    """
    kernel = debian_kernel.unpack()
    with tempfile.TemporaryDirectory(prefix="linux-guest-") as work:
        folder = Path(work)
        console, status, second = folder / "console", folder / "status", folder / "second-stage"
        second.write_text(_second_stage(command, kernel, shared, _KVM if nested else ()))
        machine = _machine(nested)
        system = ("-kernel", kernel.image, "-initrd", _initramfs(kernel))
        # What is emulated stays translated only where it is found at the same addresses again: commands start in half
        # the time. And there is nobody to be protected from.
        line = f"console=ttyS0 quiet panic=-1 norandmaps mitigations=off second={second}"
        with subprocess.Popen(
            ["timeout", "--signal=KILL", str(timeout), "qemu-system-x86_64", "-nodefaults", "-no-user-config",
             *machine, "-m", str(memory), "-no-reboot", "-display", "none", "-monitor", "none",
             "-serial", f"file:{console}", *system, "-append", line,
             *_folders([Path("/"), *shared]), "-device", "virtio-serial-pci",
             *_port("output", "/proc/self/fd/1"), *_port("status", str(status))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as machine_process:  # fmt: skip
            assert machine_process.stdout is not None
            for said in machine_process.stdout:
                on_line(said.rstrip("\r\n"))
        with contextlib.suppress(OSError, ValueError):
            return int(status.read_text())
        how = f"QEMU ended with {machine_process.returncode}"
        last = console.read_text(errors="replace")[-2000:] if console.exists() else ""
        raise RuntimeError(f"the guest died ({how}); its console said:\n{last}")


def _machine(nested: bool) -> tuple[str, ...]:
    if boot.virt_type(guest_image.build()) == "kvm":
        return ("-machine", "pc,accel=kvm", "-cpu", "host")
    # The plain one is quicker than one with everything; and what encrypts is several times quicker with AES.
    return ("-machine", "pc,accel=tcg", "-cpu", "max" if nested else "qemu64,+aes,+ssse3,+sse4.1,+pclmulqdq")


def _initramfs(kernel: Kernel) -> Path:
    recipe = hashlib.sha256(f"{_MODULES} {_INIT}".encode()).hexdigest()[:12]
    made = CACHE / "linux-guest" / f"{kernel.version}-{recipe}"
    with locks.hold(str(CACHE / "linux-guest" / "lock"), timeout=_LOCK_TIMEOUT):
        if not made.exists():
            for old in made.parent.glob("*-*"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=made.parent) as work:
                partial, root = Path(work) / "initramfs", Path(work) / "root"
                root.mkdir()
                debian_kernel.make_initramfs(partial, kernel.modules(_MODULES), _INIT, root)
                partial.rename(made)
    return made


def _second_stage(
    command: Sequence[str | Path], kernel: Kernel, shared: Sequence[Path], more_modules: Sequence[str]
) -> str:
    options = "rw,trans=virtio,version=9p2000.L,msize=512000,cache=mmap"
    mounts = [
        f"mount -t 9p -o {options} folder{number} {shlex.quote(str(folder))}"
        for number, folder in enumerate(shared, start=1)
    ]
    return _SECOND_STAGE.format(
        path=shlex.quote(os.environ["PATH"]),
        home=shlex.quote(str(Path.home())),
        mounts="\n".join(mounts),
        modules=shlex.quote(str(kernel.folder / "lib" / "modules")),
        more_modules=" ".join(more_modules),
        folder=shlex.quote(os.getcwd()),
        command=shlex.join(str(word) for word in command),
    )


def _folders(folders: Sequence[Path]) -> list[str]:
    """Return the options for the folders, of which the first is not written to."""
    options = []
    for number, folder in enumerate(folders):
        tag = f"folder{number}" if number else "root"
        access = "" if number else ",readonly=on"
        # QEMU splits options at commas, except where they are doubled.
        path = str(folder).replace(",", ",,")
        options += ["-fsdev", f"local,id={tag},path={path},security_model=none,multidevs=remap{access}"]
        options += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    return options


def _port(name: str, path: str) -> tuple[str, ...]:
    chardev = f"file,id={name},path={path},append=on" if name == "output" else f"file,id={name},path={path}"
    return ("-chardev", chardev, "-device", f"virtserialport,chardev={name},name={name}")
