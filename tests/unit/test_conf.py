# SPDX-License-Identifier: Apache-2.0
"""The options: that an operator's file means what it meant, and that a wrong one is refused by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from oslo_config import cfg

import imagebackend
from imagebackend import exceptions

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "etc" / "imagebackend"

#: Nova's group, name, class of the option, default and choices, as of Nova 34.
NOVA: list[tuple[str, str, str, Any, tuple[str, ...] | None]] = [
    ("DEFAULT", "instances_path", "StrOpt", "$state_path/instances", None),
    ("DEFAULT", "use_cow_images", "BoolOpt", True, None),
    ("DEFAULT", "force_raw_images", "BoolOpt", True, None),
    ("DEFAULT", "preallocate_images", "StrOpt", "none", ("none", "space")),
    ("DEFAULT", "default_ephemeral_format", "StrOpt", None, None),
    ("DEFAULT", "virt_mkfs", "MultiStrOpt", [], None),
    ("libvirt", "images_type", "StrOpt", "default", None),
    ("libvirt", "virt_type", "StrOpt", "kvm", ("kvm", "lxc", "qemu", "parallels")),
    ("libvirt", "hw_disk_discard", "StrOpt", None, ("ignore", "unmap")),
    ("libvirt", "disk_cachemodes", "ListOpt", [], None),
    ("libvirt", "snapshot_image_format", "StrOpt", None, ("raw", "qcow2", "vmdk", "vdi")),
    ("libvirt", "snapshot_compression", "BoolOpt", False, None),
    ("libvirt", "snapshots_directory", "StrOpt", "$instances_path/snapshots", None),
    ("libvirt", "images_cpu_time_limit", "IntOpt", 30, None),
    ("libvirt", "images_address_space_limit", "IntOpt", 2, None),  # gibibytes
    ("image_cache", "subdirectory_name", "StrOpt", "_base", None),
    ("image_cache", "manager_interval", "IntOpt", 2400, None),
    ("image_cache", "remove_unused_base_images", "BoolOpt", True, None),
    ("image_cache", "remove_unused_original_minimum_age_seconds", "IntOpt", 86400, None),
    ("image_cache", "remove_unused_resized_minimum_age_seconds", "IntOpt", 3600, None),
    ("image_cache", "precache_concurrency", "IntOpt", 1, None),
    ("libvirt", "images_rbd_pool", "StrOpt", "rbd", None),
    ("libvirt", "images_rbd_ceph_conf", "StrOpt", "", None),
    ("libvirt", "rbd_user", "StrOpt", None, None),
    ("libvirt", "rbd_secret_uuid", "StrOpt", None, None),
    ("libvirt", "rbd_connect_timeout", "IntOpt", 5, None),
    ("libvirt", "rbd_destroy_volume_retries", "IntOpt", 12, None),
    ("libvirt", "rbd_destroy_volume_retry_interval", "IntOpt", 5, None),
    ("libvirt", "images_volume_group", "StrOpt", None, None),
    ("libvirt", "sparse_logical_volumes", "BoolOpt", False, None),
    ("libvirt", "volume_clear_size", "IntOpt", 0, None),  # mebibytes
    ("ephemeral_storage_encryption", "enabled", "BoolOpt", False, None),
    ("ephemeral_storage_encryption", "cipher", "StrOpt", "aes-xts-plain64", None),
    ("ephemeral_storage_encryption", "key_size", "IntOpt", 512, None),
]
#: Those that Nova does not have, or has with another meaning for a good reason.
OWN = {
    ("DEFAULT", "state_path"),  # the folder of a service; Nova's is that of its own package
    ("DEFAULT", "host"),  # Nova's type refuses the names that some machines have
    ("DEFAULT", "durable_writes"),
    ("DEFAULT", "reflink"),
    ("DEFAULT", "lock_timeout"),
    ("DEFAULT", "root_helper"),
    ("ephemeral_storage_encryption", "default_format"),  # Nova makes "plain", and lists "luks" only
    ("libvirt", "images_thin_pool"),
    ("libvirt", "images_thin_pool_data_limit"),
    ("libvirt", "images_thin_pool_metadata_limit"),
    ("libvirt", "images_thin_pool_size"),
    ("libvirt", "images_tool_timeout"),
    ("libvirt", "images_volume_group_zeroed"),
    ("libvirt", "images_volume_raid_type"),
    ("libvirt", "images_volume_stripes"),
    ("libvirt", "images_volume_tags"),
    ("libvirt", "volume_clear"),  # Nova's values, and "discard"
    ("libvirt", "images_qcow2_cluster_size"),
    ("libvirt", "images_qcow2_extended_l2"),
    ("libvirt", "images_qcow2_lazy_refcounts"),
    ("libvirt", "images_qcow2_compression_type"),
    ("image_cache", "checksum_keyring"),
    ("image_cache", "fetch_cafile"),
    ("image_cache", "fetch_credentials_file"),
    ("image_cache", "fetch_timeout"),
    ("image_cache", "free_space_target"),
    ("image_cache", "total_size_limit"),
    ("image_cache", "fetch_retries"),
    ("image_cache", "max_virtual_size"),
    ("libvirt", "images_rbd_clone_format"),
    ("libvirt", "images_rbd_data_pool"),
    ("libvirt", "images_rbd_features"),
    ("libvirt", "images_rbd_max_clone_depth"),
    ("libvirt", "images_rbd_encrypted_clones"),
    ("libvirt", "images_rbd_namespace"),
    ("libvirt", "images_rbd_object_size"),
    ("libvirt", "images_rbd_trash_delay"),
    ("libvirt", "rbd_operation_timeout"),
}

NOVA_CONF = """
# A compute node's file, cut down.
[DEFAULT]
my_ip = 10.0.0.11
transport_url = rabbit://openstack:secret@controller
state_path = /srv/nova
use_cow_images = no
force_raw_images = False
virt_mkfs = linux=mkfs.ext4 -L %(fs_label)s -F %(target)s
virt_mkfs = windows=mkfs.ntfs --force --fast --label %(fs_label)s %(target)s
timeout_nbd = 10

[libvirt]
virt_type = qemu
images_type = rbd
images_rbd_pool = vms
hw_disk_discard = unmap
disk_cachemodes = file=directsync,network=writeback
images_address_space_limit = 4
num_pcie_ports = 16

[image_cache]
manager_interval = -1
remove_unused_base_images = True

[neutron]
auth_type = password

[placement]
region_name = RegionOne
"""


def options() -> dict[tuple[str, str], cfg.Opt]:
    return {(group, option.name): option for group, found in imagebackend.list_opts() for option in found}


def load(folder: Path, content: str | bytes) -> cfg.ConfigOpts:
    path = folder / "imagebackend.conf"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return imagebackend.load_config([str(path)])


def test_every_option_is_documented():
    assert [name for name, option in options().items() if len((option.help or "").split()) < 5] == []
    assert [name for name, option in options().items() if not option.help.strip().endswith((".", "%(target)s"))] == []


def test_every_option_is_novas_or_our_own():
    assert options().keys() == {(group, name) for group, name, _, _, _ in NOVA} | OWN
    assert len(options()) == len(NOVA) + len(OWN)


@pytest.mark.parametrize(("group", "name", "kind", "default", "choices"), NOVA)
def test_novas_options_have_novas_types_and_defaults(group, name, kind, default, choices):
    option = options()[group, name]
    assert type(option).__name__ == kind
    assert option.default == default
    assert (tuple(option.type.choices) if getattr(option.type, "choices", None) else None) == choices


def test_the_sample_is_what_the_generator_makes(tmp_path):
    """If not: .venv/bin/oslo-config-generator --config-file etc/imagebackend/config-generator.conf"""
    generator = Path(sysconfig.get_path("scripts")) / "oslo-config-generator"
    made = tmp_path / "sample"
    command = [generator, "--config-file", FOLDER / "config-generator.conf", "--output-file", made]
    subprocess.run(command, check=True, cwd=ROOT, timeout=60)
    assert (FOLDER / "imagebackend.conf.sample").read_text() == made.read_text()


def test_the_sample_names_every_option_once_and_loads_as_the_defaults(tmp_path):
    sample = (FOLDER / "imagebackend.conf.sample").read_text()
    lines = [line for line in sample.splitlines() if re.match(r"#\w+ =", line)]
    assert sorted(line[1:].partition(" =")[0] for line in lines) == sorted(name for _, name in options())
    unset = ("<None>", "<current_hostname>")
    written = "\n".join(
        line[1:] if line in lines and not line.endswith(unset) else line for line in sample.splitlines()
    )
    conf, default = load(tmp_path, written), imagebackend.load_config()
    for group, name in options():
        found, expected = (values[name] if group == "DEFAULT" else values[group][name] for values in (conf, default))
        assert (found or None) == (expected or None) or name == "virt_mkfs", name


def test_without_files_every_option_has_its_default():
    conf = imagebackend.load_config()
    assert conf.instances_path == "/var/lib/imagebackend/instances"
    assert conf.libvirt.snapshots_directory == "/var/lib/imagebackend/instances/snapshots"
    assert conf.host == os.uname().nodename
    assert (conf.libvirt.images_type, conf.use_cow_images, conf.durable_writes) == ("default", True, True)


def test_a_nova_conf_means_what_it_meant(tmp_path):
    conf = load(tmp_path, NOVA_CONF)
    assert conf.instances_path == "/srv/nova/instances"
    assert (conf.use_cow_images, conf.force_raw_images) == (False, False)
    assert [line.partition("=")[0] for line in conf.virt_mkfs] == ["linux", "windows"]
    libvirt = conf.libvirt
    assert (libvirt.virt_type, libvirt.images_type, libvirt.hw_disk_discard) == ("qemu", "rbd", "unmap")
    assert libvirt.disk_cachemodes == ["file=directsync", "network=writeback"]
    assert libvirt.images_address_space_limit == 4
    assert libvirt.images_rbd_pool == "vms"
    assert not hasattr(libvirt, "num_pcie_ports")


def test_a_later_file_overrides_and_folders_come_after_files_in_sorted_order(tmp_path):
    for name, value in {"a.conf": "a", "b.conf": "b", "d/2.conf": "2", "d/1.conf": "1", "e/0.conf": "0"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"[DEFAULT]\nstate_path = /{value}\n")
    (tmp_path / "d" / "3.txt").write_text("not ini")
    paths = {name: str(tmp_path / name) for name in ("a.conf", "b.conf", "d", "e")}

    def state_path(files: list[str], folders: list[str]) -> str:
        found: str = imagebackend.load_config(
            [paths[name] for name in files], [paths[name] for name in folders]
        ).state_path
        return found

    assert state_path(["a.conf", "b.conf"], []) == "/b"
    assert state_path(["b.conf", "a.conf"], []) == "/a"
    assert state_path(["a.conf"], ["d"]) == "/2"
    assert state_path(["a.conf"], ["d", "e"]) == "/0"
    assert state_path(["a.conf"], ["e", "d"]) == "/2"


def test_no_file_is_read_but_those_that_are_named(tmp_path):
    for place in (".imagebackend", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "imagebackend.conf").write_text("[DEFAULT]\nstate_path = /not/named\n")
    script = "import imagebackend; print(imagebackend.load_config().state_path)"
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "/var/lib/imagebackend\n"


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("[DEFAULT] use_cow_images", "perhaps", "perhaps"),
        ("[DEFAULT] preallocate_images", "full", "none, space"),
        ("[DEFAULT] reflink", "sometimes", "auto, always, never"),
        ("[DEFAULT] lock_timeout", "-1", "greater than or equal to 0"),
        ("[DEFAULT] lock_timeout", "soon", "soon"),
        ("[DEFAULT] lock_timeout", "nan", "nan is not a number of seconds"),
        ("[DEFAULT] lock_timeout", "inf", "inf is not a number of seconds"),
        ("[DEFAULT] instances_path", "$no_such_option/x", "no_such_option"),
        ("[libvirt] virt_type", "xen", "kvm"),
        ("[libvirt] hw_disk_discard", "on", "unmap"),
        ("[libvirt] snapshot_image_format", "vhdx", "qcow2"),
        ("[libvirt] images_cpu_time_limit", "0", "greater than or equal to 1"),
        ("[libvirt] images_cpu_time_limit", "30s", "30s"),
        ("[libvirt] images_address_space_limit", "0", "greater than or equal to 1"),
        ("[libvirt] images_qcow2_cluster_size", "256", "greater than or equal to 512"),
        ("[libvirt] images_qcow2_cluster_size", "4194304", "less than or equal to 2"),
        ("[libvirt] images_qcow2_cluster_size", "65535", "65535 is not a power of two"),
        ("[libvirt] images_qcow2_cluster_size", "3072", "3072 is not a power of two"),
        ("[libvirt] images_qcow2_compression_type", "lz4", "zlib, zstd"),
        ("[image_cache] fetch_timeout", "0", "greater than or equal to 0.001"),
        ("[image_cache] fetch_retries", "-1", "greater than or equal to 0"),
        ("[image_cache] max_virtual_size", "10G", "10G"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_option(tmp_path, option, value, reason):
    group, name = option[1:].split("] ")
    with pytest.raises(exceptions.InvalidConfiguration) as caught:
        load(tmp_path, f"[{group}]\n{name} = {value}\n")
    assert caught.value.option == option
    assert reason in caught.value.reason
    assert "LocationInfo" not in caught.value.reason  # which names the last file, whichever had the value
    assert str(caught.value).startswith(f"{option}: ")


@pytest.mark.parametrize("bits", range(9, 22))
def test_every_cluster_size_that_qcow2_knows_is_taken(tmp_path, bits):
    conf = load(tmp_path, f"[libvirt]\nimages_qcow2_cluster_size = {1 << bits}\n")
    assert conf.libvirt.images_qcow2_cluster_size == 1 << bits


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[DEFAULT]\ninstances_path = /sr\xe9\n", "can't decode"),
        (b"\xff\xfe[\x00D\x00", "can't decode"),
        (b"[DEFAULT\ninstances_path = /x\n", "parse"),
        (b"[]\n", "parse"),
        (b"no value\n", "parse"),
    ],
)
def test_a_file_that_is_no_ini_file_is_refused(tmp_path, content, reason):
    with pytest.raises(exceptions.InvalidConfiguration, match=reason) as caught:
        load(tmp_path, content)
    assert caught.value.option == "configuration files"


def test_files_and_folders_that_are_not_there_or_something_else_are_refused(tmp_path):
    (tmp_path / "file").touch()
    for files, folders in [
        ([tmp_path / "missing"], []),
        ([tmp_path], []),
        ([tmp_path / "file", tmp_path / "missing"], []),
        ([], [tmp_path / "missing"]),
        ([], [tmp_path / "file"]),
    ]:
        with pytest.raises(exceptions.InvalidConfiguration, match=str(tmp_path)):
            imagebackend.load_config([str(path) for path in files], [str(path) for path in folders])


def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "imagebackend.conf"
    path.write_text("[DEFAULT]\n")
    path.chmod(0o600)
    script = """
import os, sys
import imagebackend
from imagebackend import exceptions
imagebackend.load_config([sys.argv[1]])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for files, folders in ([sys.argv[1]], []), ([], [os.path.dirname(sys.argv[1])]):
    try:
        imagebackend.load_config(files, folders)
    except exceptions.InvalidConfiguration as error:
        print(os.path.dirname(sys.argv[1]) in str(error))
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")


def test_options_live_in_an_agents_own_configuration(tmp_path):
    path = tmp_path / "agent.conf"
    path.write_text("[DEFAULT]\nagent_name = a\nuse_cow_images = no\n[libvirt]\nimages_type = raw\nuri = qemu:///x\n")
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.StrOpt("agent_name"))
    conf.register_opt(cfg.StrOpt("uri"), group="libvirt")
    imagebackend.register_opts(conf)
    imagebackend.register_opts(conf)
    conf(["--config-file", str(path)], project="agent")
    assert (conf.agent_name, conf.libvirt.uri, conf.use_cow_images, conf.libvirt.images_type) == (
        "a",
        "qemu:///x",
        False,
        "raw",
    )
    assert imagebackend.Backend(conf).backend().__name__ == "Raw"


def test_an_option_of_the_same_name_with_another_meaning_is_not_hidden():
    conf = cfg.ConfigOpts()
    conf.register_opt(cfg.IntOpt("reflink"))
    with pytest.raises(cfg.DuplicateOptError):
        imagebackend.register_opts(conf)


def test_two_configurations_know_nothing_of_each_other(tmp_path):
    one, other = load(tmp_path, "[libvirt]\nimages_type = raw\n"), imagebackend.load_config()
    one.set_override("durable_writes", False)
    assert (one.libvirt.images_type, other.libvirt.images_type, other.durable_writes) == ("raw", "default", True)


def test_the_global_configuration_object_is_left_alone():
    script = """
import pkgutil, importlib
from oslo_config import cfg
before = (dict(cfg.CONF._opts), dict(cfg.CONF._groups))
import imagebackend
for module in pkgutil.walk_packages(imagebackend.__path__, "imagebackend."):
    importlib.import_module(module.name)
imagebackend.Backend(imagebackend.load_config())
names = {option.dest for _, options in imagebackend.list_opts() for option in options}
assert not names & cfg.CONF._opts.keys(), cfg.CONF._opts.keys()
assert not {"libvirt", "image_cache"} & cfg.CONF._groups.keys()
assert cfg.CONF._namespace is None
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("name", ["compute_1", "12345", "a" * 63, "node.example.org"])
def test_what_a_machine_is_called_keeps_nobody_from_loading_the_options(name):
    script = f"""
import socket
socket.sethostname({name!r})
import imagebackend
print(imagebackend.load_config().host)
"""
    command = ["unshare", "--uts", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"{name}\n", "")
