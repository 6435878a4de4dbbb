# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels: which are installed, what speaks against them, and what kexec says."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.errors import KernelRefused
from cpr_agent.host.kernels import InstalledKernels, version_key
from cpr_agent.host.kernels.versions import flavour
from tests.kernel_trees import (
    CONFIG,
    DEPENDS,
    DRIVERS,
    block,
    bzimage,
    cpio,
    debian,
    device,
    fedora,
    host,
    initrd,
    modules,
    mounted,
    systemd_boot,
    uki,
    unified,
    write,
)

VERSION = "6.12.9-amd64"
EARLY = cpio({"kernel/x86/microcode/GenuineIntel.bin": b"microcode"})
KEXEC = """\
#!/bin/sh
printf '%s\\n' "$@" >{root}/called
case $1 in --load) echo 1 ;; *) echo 0 ;; esac >{root}/sys/kernel/kexec_loaded
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with one good kernel."""
    debian(tmp_path, VERSION)
    return host(tmp_path, VERSION)


def the_kernel(root: Path) -> Kernel:
    return InstalledKernels(root).installed()[0]


def findings(root: Path, drivers: set[str] = DRIVERS, kernel: Kernel | None = None) -> list[Finding]:
    return InstalledKernels(root).findings(kernel or the_kernel(root), drivers)


def codes(root: Path, drivers: set[str] = DRIVERS) -> list[str]:
    return [finding.code for finding in findings(root, drivers)]


# -- which there are --------------------------------------------------------------------------------------------------


def test_versions_are_ordered_as_people_read_them() -> None:
    versions = ["6.9", "6.12-rc1", "6.12-rc2", "6.12", "6.12.9", "6.12.10", "6.12.10+deb13", "6.100"]
    assert sorted(set(versions), key=version_key) == versions
    assert version_key("6.12~rc6-amd64") < version_key("6.12-amd64") < version_key("6.12.0-amd64")
    assert version_key("6.18.0-rc4-amd64") < version_key("6.18~rc7-amd64") < version_key("6.18.0-amd64")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("6.1.0-28-amd64", "6.12.117+deb13-amd64"),
        ("6.12.12+bpo-rt-amd64", "6.12.117+deb13-rt-amd64"),
        ("6.8.0-9-generic", "6.18.0-061800rc4-generic"),
        ("6.14.8-2-bpo12-pve", "6.14.11-1-pve"),
        ("6.17.8-300.fc43.x86_64", "6.16.3-200.fc42.x86_64"),
        ("5.14.0-503.el9_5.x86_64+debug", "5.14.0-570.1.1.el9_6.x86_64+debug"),
        ("6.17.9-arch1-1", "6.18.1-arch2-1"),
        ("6.18.0-rc4-00123-g0123abcd", "6.18.1"),
    ],
)
def test_a_flavour_stays_over_versions_and_releases(one: str, other: str) -> None:
    assert flavour(one) == flavour(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("6.12.9-amd64", "6.12.9-cloud-amd64"),
        ("6.12.9-arm64", "6.12.9-arm64-16k"),
        ("5.14.0-570.el9_6.x86_64", "5.14.0-570.el9_6.x86_64+rt"),
        ("5.15.0-300.el9.x86_64", "5.15.0-300.el9uek.x86_64"),
        ("6.8.0-88-generic", "6.8.0-88-lowlatency"),
        ("6.17.9-arch1-1", "6.12.58-1-lts"),
    ],
)
def test_flavours_differ(one: str, other: str) -> None:
    assert flavour(one) != flavour(other)


def test_kernels_are_listed_newest_first_with_their_files(root: Path) -> None:
    write(root / "boot/vmlinuz-6.12.10-amd64")
    assert InstalledKernels(root).installed() == [
        Kernel(version="6.12.10-amd64", image=f"{root}/boot/vmlinuz-6.12.10-amd64"),
        Kernel(
            version=VERSION,
            image=f"{root}/boot/vmlinuz-{VERSION}",
            initrd=f"{root}/boot/initrd.img-{VERSION}",
            config=f"{root}/boot/config-{VERSION}",
        ),
    ]


@pytest.mark.parametrize(
    ("running", "first"),
    [
        ("6.12.8-amd64", ["6.13.0-amd64", "6.12.9-amd64"]),
        ("6.12.8-rt-amd64", ["6.13.0-rt-amd64", "6.12.9-rt-amd64"]),
        ("6.12.8-cloud-amd64", ["6.12.9-cloud-amd64", "6.13.0-amd64"]),
    ],
)
def test_the_newest_of_the_running_flavour_comes_first(tmp_path: Path, running: str, first: list[str]) -> None:
    versions = ["6.12.9-amd64", "6.12.9-cloud-amd64", "6.12.9-rt-amd64", "6.13.0-amd64", "6.13.0-rt-amd64"]
    for version in versions:
        write(tmp_path / f"boot/vmlinuz-{version}")
    write(tmp_path / "proc/sys/kernel/osrelease", f"{running}\n")
    listed = [kernel.version for kernel in InstalledKernels(tmp_path).installed()]
    assert listed[:2] == first
    assert sorted(listed) == versions


def test_without_one_of_the_running_flavour_those_for_a_purpose_come_last(tmp_path: Path) -> None:
    for version in ("6.12.9-amd64", "6.13.0-rt-amd64", "6.13.0-amd64+debug"):
        write(tmp_path / f"boot/vmlinuz-{version}")
    write(tmp_path / "proc/sys/kernel/osrelease", "6.6.1-ownmade\n")
    listed = [kernel.version for kernel in InstalledKernels(tmp_path).installed()]
    assert listed == ["6.12.9-amd64", "6.13.0-rt-amd64", "6.13.0-amd64+debug"]


def test_a_kernel_of_fedora_is_found_where_its_package_put_it(tmp_path: Path) -> None:
    modules = tmp_path / "lib/modules/6.16.3-200.fc42.x86_64"
    image, config = write(modules / "vmlinuz"), write(modules / "config")
    initrd = write(tmp_path / "boot/initramfs-6.16.3-200.fc42.x86_64.img")
    found = the_kernel(tmp_path)
    assert (found.version, found.image, found.initrd) == ("6.16.3-200.fc42.x86_64", str(image), str(initrd))
    assert found.config == str(config)
    copy = write(tmp_path / "boot/vmlinuz-6.16.3-200.fc42.x86_64")
    assert [kernel.image for kernel in InstalledKernels(tmp_path).installed()] == [str(copy)]


@pytest.mark.parametrize(
    "version",
    [
        "6.12.9-amd64.old",
        "6.12.9.dpkg-new",
        "6.12.9-x.dpkg-bak",
        "6.12.9.rpmsave",
        "6.12.9~",
        "0-rescue-1f",
        "linux",
        "a;0f0f0f0f",
    ],
)
def test_leftovers_are_no_kernels(root: Path, version: str) -> None:
    write(root / f"boot/vmlinuz-{version}")
    assert [kernel.version for kernel in InstalledKernels(root).installed()] == [VERSION]


def test_the_command_line_is_given_without_the_boot_loader(root: Path) -> None:
    assert InstalledKernels(root).command_line() == "root=UUID=4c4f ro memmap=4G!8G"


# -- what speaks against one ------------------------------------------------------------------------------------------


def test_nothing_speaks_against_a_good_kernel(root: Path) -> None:
    assert findings(root) == []


def test_nothing_speaks_against_the_kernels_of_debian() -> None:
    command = [f"{Path(__file__).parents[2]}/scripts/host-vm", "root"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("scripts/host-vm root: there is no image of the host VM")
    root = Path(shown.stdout.strip())
    kernels = InstalledKernels(root).installed()
    if not kernels:
        pytest.skip(f"{root} has no kernels")
    assert {kernel.version: InstalledKernels(root).findings(kernel, DRIVERS) for kernel in kernels} == {
        kernel.version: [] for kernel in kernels
    }
    nameless = [replace(kernel, version="", config="") for kernel in kernels]
    assert [InstalledKernels(root).findings(kernel, DRIVERS) for kernel in nameless] == [[] for _ in kernels]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "is empty"),
        (b"MZ" + bytes(2000), "is neither a bzImage nor a unified kernel image: it is not a PE image"),
        (b"ELF" + bytes(2000), "is not a bzImage"),
        (bzimage()[:-1], "is cut off: it has 8191 bytes of 8192"),
        (bzimage(magic=b"HdrT"), "is not a bzImage"),
        (bzimage()[:700], "is not a bzImage"),
        (bzimage(protocol=0x20B), "speaks boot protocol 2.11, and a kexec needs 2.12"),
        (bzimage(loadflags=0), "is not a 64-bit bzImage"),
        (bzimage(xloadflags=2), "is not a 64-bit bzImage"),
        (bzimage(xloadflags=1), "can't be loaded above 4 GiB"),
    ],
)
def test_an_image_that_kexec_would_not_take_is_an_error(
    root: Path, image: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.uname", lambda: type("uname", (), {"machine": "x86_64"}))
    (root / f"boot/vmlinuz-{VERSION}").write_bytes(image)
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "kernel-image")
    assert finding.what.endswith(said)


@pytest.mark.parametrize(
    ("path", "said"),
    [("/nonexistent", "can't be read: No such file or directory"), ("/dev/null", "is not a regular file")],
)
def test_a_file_that_is_missing_or_no_file_is_an_error(root: Path, path: str, said: str) -> None:
    kernel = the_kernel(root)
    for bad, code in (replace(kernel, image=path), "kernel-image"), (replace(kernel, initrd=path), "initrd"):
        (finding,) = findings(root, kernel=bad)
        assert (finding.severity, finding.code) == ("error", code)
        assert finding.what.endswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (bytes(512), "has nothing but zeros in it"),
        (b"a text", "is neither a cpio archive nor compressed in a way that a kernel knows"),
        (cpio({}), "holds no files"),
        (
            EARLY,
            "has no /init to start: it is a part of one alone, such as the processor's microcode",
        ),
        (initrd("6.12.8-amd64"), "has the modules of 6.12.8-amd64, and none of this kernel's"),
        (initrd(VERSION)[:-40], "is cut off: its compressed part ends early"),
    ],
)
def test_a_broken_initrd_is_an_error(root: Path, content: bytes, said: str) -> None:
    path = write(root / f"boot/initrd.img-{VERSION}", content)
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "initrd")
    assert finding.what == f"the initrd of kernel {VERSION}, {path}, {said}"


def test_an_initrd_must_be_compressed_as_the_kernel_was_built_for(root: Path) -> None:
    write(root / f"boot/config-{VERSION}", CONFIG.replace("CONFIG_RD_ZSTD=y", "# CONFIG_RD_ZSTD is not set"))
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "initrd")
    assert "CONFIG_RD_ZSTD" in finding.what
    write(root / f"boot/initrd.img-{VERSION}", initrd(VERSION, "gzip"))
    assert findings(root) == []


# -- without an initrd ------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(root: Path) -> Path:
    """A host without any initrd, whose kernel has all of the root's drivers built in, and finds it by itself."""
    (root / f"boot/initrd.img-{VERSION}").unlink()
    modules(root, VERSION, builtin=("dax", "ext4", "jbd2", "mbcache", "virtio_blk", "virtio_ring"))
    write(root / "proc/cmdline", "root=/dev/vda1 ro\n")
    return root


def test_a_host_that_does_without_initrds_gets_a_warning(bare: Path) -> None:
    write(bare / f"boot/config-{VERSION}", CONFIG.replace("EXT4_FS=m", "EXT4_FS=y").replace("VIRTIO_BLK=m", "VIRTIO_BLK=y"))
    (finding,) = findings(bare)
    assert (finding.severity, finding.code) == ("warning", "initrd-none")


def test_a_kernel_without_the_initrd_that_others_have_is_an_error(bare: Path) -> None:
    debian(bare, "6.12.8-amd64")
    (finding,) = findings(bare)
    assert (finding.severity, finding.code) == ("error", "initrd-none")
    assert finding.what == f"kernel {VERSION} has no initrd: kernel 6.12.8-amd64 has one"
    assert f"update-initramfs -c -k {VERSION}" in finding.remedy


@pytest.mark.parametrize("said", ["sys/kernel/boot_params/data", "proc/cmdline"])
def test_a_kernel_without_the_initrd_that_the_running_one_had_is_an_error(bare: Path, said: str) -> None:
    parameters = bytearray(4096)
    parameters[0x21C:0x220] = b"\0\0\x74\0"
    write(bare / said, bytes(parameters) if "data" in said else "root=/dev/vda1 initrd=\\x\\initrd\n")
    (finding,) = findings(bare)
    assert (finding.severity, finding.code) == ("error", "initrd-none")
    assert finding.what.endswith("the running kernel has one")


@pytest.mark.parametrize("word", ["root=UUID=4c4f", "root=LABEL=system", "root=/dev/mapper/vg-root", "root=zfs:rpool"])
def test_a_root_that_only_an_initrd_finds_makes_it_an_error(bare: Path, word: str) -> None:
    write(bare / "proc/cmdline", f"quiet {word} ro\n")
    (finding,) = findings(bare)
    assert (finding.severity, finding.code) == ("error", "initrd-none")


def test_a_driver_that_is_not_built_in_makes_it_an_error(bare: Path) -> None:
    modules(bare, VERSION)
    (finding,) = findings(bare)
    assert (finding.severity, finding.code) == ("error", "initrd-none")
    assert "ext4, which the file system of / (ext4) needs, is not built into it" in finding.what


# -- modules that are half unpacked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no modules.dep", "missing", "empty", "directory"])
def test_modules_that_are_not_all_there_are_an_error(root: Path, how: str) -> None:
    directory = root / f"usr/lib/modules/{VERSION}"
    module = directory / "kernel/drivers/dax/dax_pmem.ko.xz"
    match how:
        case "no modules.dep":
            (directory / "modules.dep").unlink()
        case "missing":
            module.unlink()
        case "empty":
            module.write_bytes(b"")
        case "directory":
            directory.rename(directory.with_name("6.12.8-amd64"))
    found = {finding.code: finding for finding in findings(root)}
    assert found["modules-incomplete"].severity == "error"
    assert (str(module) if how in ("missing", "empty") else str(directory)) in found["modules-incomplete"].what
    assert "dpkg --configure -a" in found["modules-incomplete"].remedy


def test_a_link_to_a_module_of_a_kernel_that_is_gone_is_none_of_them(root: Path) -> None:
    """As weak-modules of RHEL leaves it."""
    directory = root / f"usr/lib/modules/{VERSION}"
    write(directory / "modules.dep", f"{DEPENDS}weak-updates/kmod.ko.xz:\n")
    (directory / "weak-updates").mkdir()
    (directory / "weak-updates/kmod.ko.xz").symlink_to("/lib/modules/6.12.1-amd64/extra/kmod.ko.xz")
    assert findings(root) == []


@pytest.mark.parametrize("name", ["dax_pmem.ko.xz.dpkg-new", "dax_pmem.ko.xz;5f3a0c1d"])
def test_files_that_a_package_manager_left_half_way_are_an_error(root: Path, name: str) -> None:
    left = write(root / f"usr/lib/modules/{VERSION}/kernel/drivers/dax/{name}", "x")
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "modules-incomplete")
    assert finding.what == f"the modules of kernel {VERSION} are being replaced: {left} is there"


@pytest.mark.parametrize("state", ["half-configured", "unpacked", "half-installed"])
def test_a_package_that_dpkg_did_not_finish_is_an_error(root: Path, state: str) -> None:
    others = f"Package: linux-image-6.12.8-amd64\nStatus: install ok {state}\n\n"
    others += f"Package: linux-headers-{VERSION}\nStatus: install ok {state}\n\n"
    write(root / "var/lib/dpkg/status", f"{others}Package: linux-image-{VERSION}\nStatus: install ok installed\n\n")
    assert findings(root) == []
    write(
        root / "var/lib/dpkg/status", f"{others}Package: linux-image-{VERSION}\nStatus: install ok {state}\nPriority: x\n"
    )
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "modules-incomplete")
    assert f"linux-image-{VERSION}" in finding.what


def test_a_kernel_without_modules_is_one_where_its_config_says_so(root: Path) -> None:
    directory = root / f"usr/lib/modules/{VERSION}"
    directory.rename(directory.with_name("elsewhere"))
    write(
        root / f"boot/config-{VERSION}",
        "".join(f"CONFIG_{name}=y\n" for name in ("RD_ZSTD", "EXT4_FS", "VIRTIO_BLK", "DEV_DAX")),
    )
    assert findings(root, {"device_dax"}) == []


# -- the root's drivers -----------------------------------------------------------------------------------------------


def missing(root: Path) -> dict[str, str]:
    """The modules that findings name as missing, with what they say of them."""
    found = [finding for finding in findings(root) if finding.code == "driver-not-in-initrd"]
    assert all(finding.severity == "error" for finding in found)
    return {re.split(r"(?:module|driver) ", finding.what)[1].split(",")[0]: finding.what for finding in found}


@pytest.mark.parametrize(
    ("there", "lacks"),
    [
        (("virtio_blk", "virtio_ring", "ext4", "jbd2"), {"mbcache"}),
        (("virtio_blk", "virtio_ring"), {"ext4", "jbd2", "mbcache"}),
        (("ext4", "jbd2", "mbcache"), {"virtio_blk", "virtio_ring"}),
    ],
)
def test_what_the_root_needs_must_be_in_the_initrd(root: Path, there: tuple[str, ...], lacks: set[str]) -> None:
    write(root / f"boot/initrd.img-{VERSION}", initrd(VERSION, "gzip", there))
    assert missing(root).keys() == lacks


def test_what_is_built_in_need_not_be_in_the_initrd(root: Path) -> None:
    write(root / f"boot/initrd.img-{VERSION}", initrd(VERSION, "gzip", ()))
    modules(root, VERSION, builtin=("dax", "ext4", "virtio_blk"))
    assert missing(root) == {}


def test_a_driver_that_the_new_kernel_does_not_have_at_all_is_an_error(root: Path) -> None:
    lines = [line for line in DEPENDS.splitlines(keepends=True) if "virtio" not in line]
    debian(root, "6.12.10-amd64", initrd("6.12.10-amd64", modules=("ext4", "jbd2", "mbcache")))
    modules(root, "6.12.10-amd64", "".join(lines))
    write(root / "boot/config-6.12.10-amd64", CONFIG.replace("CONFIG_VIRTIO_BLK=m\n", ""))
    assert "neither the kernel nor" in missing(root)["virtio_blk"]


def test_a_driver_that_never_is_a_module_is_not_missed(root: Path) -> None:
    """Where the running kernel's modules say that there is no such module."""
    device(root, "pci0000:00", driver="pci-host", module="pci_host")
    assert findings(root) == []


@pytest.mark.parametrize("kind", ["ext3", "ext4"])
def test_a_file_system_is_mounted_by_the_module_that_says_so(root: Path, kind: str) -> None:
    write(root / "proc/self/mountinfo", mounted("/dev/vda1", kind=kind))
    assert findings(root) == []
    write(root / f"boot/initrd.img-{VERSION}", initrd(VERSION, modules=("virtio_blk", "virtio_ring")))
    assert f"the file system of / ({kind})" in missing(root)["ext4"]


STACK = (
    DEPENDS
    + """\
kernel/drivers/md/dm-mod.ko.xz:
kernel/drivers/md/dm-crypt.ko.xz: kernel/drivers/md/dm-mod.ko.xz
kernel/drivers/md/md-mod.ko.xz:
kernel/drivers/md/raid1.ko.xz: kernel/drivers/md/md-mod.ko.xz
kernel/drivers/nvme/host/nvme.ko.xz: kernel/drivers/nvme/host/nvme-core.ko.xz
kernel/drivers/nvme/host/nvme-core.ko.xz:
kernel/drivers/scsi/sd_mod.ko.xz:
kernel/drivers/ata/ahci.ko.xz:
kernel/fs/btrfs/btrfs.ko.xz:
"""
)


def test_a_stack_of_devices_is_followed_to_its_disks(root: Path) -> None:
    """ext4 on LUKS on RAID 1 over a disk of NVMe (with its multipath) and one of SATA behind a bridge."""
    modules(root, VERSION, STACK)
    block(root, "253:0", "dm-0", "virtual/block/dm-0")
    crypt = root / "sys/devices/virtual/block/dm-0"
    write(crypt / "dm/uuid", "CRYPT-LUKS2-4c4f-root\n")
    write(crypt / "dm/name", "root_crypt\n")
    raid = block(root, "9:0", "md0", "virtual/block/md0")
    write(raid / "md/level", "raid1\n")
    for name, below in (("md0", crypt), ("nvme0n1p2", raid), ("sda2", raid)):
        (below / "slaves").mkdir(exist_ok=True)
        (below / f"slaves/{name}").symlink_to(f"../../../../../class/block/{name}")
    device(root, "pci0000:00", "0000:00:03.0", driver="nvme", module="nvme")
    (root / "sys/devices/pci0000:00/0000:00:03.0/nvme/nvme0").mkdir(parents=True)
    subsystem = block(root, "259:2", "nvme0n1p2", "virtual/nvme-subsystem/nvme-subsys0/nvme0n1/nvme0n1p2").parents[1]
    (subsystem / "nvme0").symlink_to("../../../pci0000:00/0000:00:03.0/nvme/nvme0")
    device(root, "pci0000:00", "0000:00:1c.0", driver="pcieport", module="pcieportdrv", **{"class": "0x060400\n"})
    device(root, "pci0000:00", "0000:00:1c.0", "0000:01:00.0", driver="ahci", module="ahci", **{"class": "0x010601\n"})
    path = "pci0000:00/0000:00:1c.0/0000:01:00.0/ata1/host0/target0:0:0/0:0:0:0"
    device(root, *path.split("/"), driver="sd", module="sd_mod")
    block(root, "8:2", "sda2", f"{path}/block/sda/sda2")
    write(root / "proc/self/mountinfo", mounted("/dev/mapper/root_crypt", device="253:0"))
    assert missing(root).keys() == {"dm_mod", "dm_crypt", "md_mod", "raid1", "nvme", "nvme_core", "sd_mod", "ahci"}
    write(root / "proc/self/mountinfo", mounted("/dev/mapper/root_crypt", device="0:31", kind="btrfs"))
    assert missing(root).keys() >= {"btrfs", "dm_crypt", "ahci"}  # found by its name


def test_devices_that_lead_back_to_themselves_are_looked_at_once(root: Path) -> None:
    loop = block(root, "253:0", "dm-0", "virtual/block/dm-0")
    (loop / "slaves").mkdir()
    (loop / "slaves/dm-0").symlink_to("..")
    (loop / "slaves/out").symlink_to("/")
    write(root / "proc/self/mountinfo", mounted("/dev/dm-0", device="253:0"))
    assert findings(root) == []


# -- the boot loader's entries ----------------------------------------------------------------------------------------

FEDORA = "6.17.8-300.fc43.x86_64"


def entry_of(root: Path) -> Path:
    (entry,) = (root / "boot/loader/entries").glob("*.conf")
    return entry


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    """A host of Fedora with one kernel."""
    fedora(tmp_path, FEDORA)
    return host(tmp_path, FEDORA)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"linux /vmlinuz\xff\n", "it is not UTF-8"),
        (b"title nothing\n", "it names no kernel (linux, uki or efi)"),
        (b"linux /../../etc/shadow\n", "'/../../etc/shadow' is no path within a file system"),
        (b"linux /vmlinuz\ninitrd /\x1b[2J\n", "is no path within a file system"),
        (b"# " + bytes(70_000), "it has more than 64 KiB"),
    ],
)
def test_an_entry_of_no_use_is_passed_over_and_said(entries: Path, content: bytes, said: str) -> None:
    entry_of(entries).write_bytes(content)
    (finding,) = findings(entries)
    assert (finding.severity, finding.code) == ("warning", "boot-entry")
    assert finding.what.startswith(f"the boot loader's entry {entry_of(entries)} is of no use: ")
    assert finding.what.endswith(said)


def test_an_entry_is_not_read_through_a_link_nor_from_a_pipe(entries: Path) -> None:
    entry = entry_of(entries)
    entry.rename(entries / "elsewhere")
    entry.symlink_to(entries / "elsewhere")
    assert "Too many levels of symbolic links" in findings(entries)[0].what
    entry.unlink()
    os.mkfifo(entry)
    assert "not a regular file" in findings(entries)[0].what


def test_an_initrd_that_an_entry_names_must_be_there(tmp_path: Path) -> None:
    host(tmp_path, FEDORA)
    systemd_boot(tmp_path, FEDORA)
    initrd = next((tmp_path / "boot/efi").glob("*/*/initrd"))
    initrd.unlink()
    (finding,) = findings(tmp_path)
    assert (finding.severity, finding.code) == ("error", "initrd")
    assert finding.what.endswith(f"{initrd}, can't be read: No such file or directory")


def test_entries_of_another_system_are_not_looked_at(tmp_path: Path) -> None:
    host(tmp_path, FEDORA)
    systemd_boot(tmp_path, FEDORA)
    unified(tmp_path, "6.18.0-300.fc43.x86_64")
    assert len(InstalledKernels(tmp_path).installed()) == 2
    write(tmp_path / "etc/machine-id", "f" * 32 + "\n")
    found = InstalledKernels(tmp_path).installed()
    assert [kernel.image for kernel in found] == [f"{tmp_path}/usr/lib/modules/{FEDORA}/vmlinuz"]


def test_a_kernel_that_the_boot_loader_has_given_up_is_an_error(entries: Path) -> None:
    newer = "6.17.9-300.fc43.x86_64"
    unified(entries, newer, name=f"fedora-{newer}+0-3")
    (finding,) = findings(entries)
    assert (finding.severity, finding.code) == ("error", "boot-entry")
    assert f"fedora-{newer}+0-3.efi has no tries left" in finding.what
    write(entries / "proc/sys/kernel/osrelease", f"{newer}\n")
    assert findings(entries) == []


def test_of_several_initrds_the_main_one_is_taken(entries: Path) -> None:
    write(entries / "boot/intel-ucode.img", cpio({"kernel/x86/microcode/GenuineIntel.bin": b"x"}))
    write(entries / "boot/extra.img", cpio({"etc/extra": b"x"}))
    kernel = the_kernel(entries)
    for image in (entries / f"boot/vmlinuz-{FEDORA}", entries / f"usr/lib/modules/{FEDORA}/vmlinuz"):
        image.unlink()
    write(entries / "boot/linux", bzimage(FEDORA))
    main = Path(kernel.initrd).rename(entries / "boot/main.img")
    text = "linux /boot/linux\ninitrd /intel-ucode.img\ninitrd /main.img $tuned_initrd\n"
    entry_of(entries).write_text(text)
    assert (the_kernel(entries).initrd, findings(entries)) == (str(main), [])
    entry_of(entries).write_text(f"{text}initrd /extra.img\n")
    assert the_kernel(entries).initrd == str(main)
    (finding,) = findings(entries)
    assert (finding.severity, finding.code) == ("warning", "initrd-several")


# -- unified kernel images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"MZ" + bytes(4000), "it is not a PE image"),
        (uki({".linux": bzimage(FEDORA)})[:200], "it ends within its headers"),
        (uki({".cmdline": b"quiet"}), "it has no kernel in it (no section .linux)"),
        (
            uki({".linux": bzimage(FEDORA), ".initrd": b"x" * 5000})[:-4096],
            "it is cut off: its section .initrd goes on to byte",
        ),
        (uki({".linux": b"MZ" + bytes(2000)}), "has a kernel in it that is not a bzImage"),
        (uki({".linux": bzimage(FEDORA)[:4000]}), "has a kernel in it that is cut off: it has 4000 bytes of 8192"),
    ],
)
def test_a_unified_image_that_is_not_whole_is_an_error(tmp_path: Path, content: bytes, said: str) -> None:
    host(tmp_path, FEDORA)
    image = unified(tmp_path, FEDORA)
    image.write_bytes(content)
    finding = findings(tmp_path)[0]
    assert (finding.severity, finding.code) == ("error", "kernel-image")
    assert finding.what.startswith(f"the image of kernel {FEDORA}, {image}, ")
    assert said in finding.what


@pytest.mark.parametrize(
    ("made", "code"),
    [(initrd(FEDORA)[:-9], "initrd"), (initrd(FEDORA, modules=()), "driver-not-in-initrd"), (None, "initrd-none")],
)
def test_the_initrd_in_a_unified_image_is_looked_at_as_any_other(tmp_path: Path, made: bytes | None, code: str) -> None:
    host(tmp_path, FEDORA)
    unified(tmp_path, FEDORA, made=made)
    assert {(finding.severity, finding.code) for finding in findings(tmp_path)} == {("error", code)}


# -- a boot that takes no kernel, and the guests' memory ----------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("kexec_load_disabled", "1\n"), ("kexec_load_limit_reboot", "0\n")])
def test_a_boot_that_takes_no_kernel_is_an_error(root: Path, name: str, value: str) -> None:
    write(root / "proc/sys/kernel" / name, value)
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "kexec-disabled")


def test_lockdown_is_a_warning(root: Path) -> None:
    write(root / "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("warning", "lockdown")


def test_a_driver_that_was_not_built_is_an_error(root: Path) -> None:
    (finding,) = findings(root, {"virtio_pmem", "nfit"})
    assert (finding.severity, finding.code) == ("error", "driver-not-configured")
    assert finding.what == f"kernel {VERSION} lacks the driver virtio_pmem: it was built without CONFIG_VIRTIO_PMEM"


def test_a_driver_that_another_package_holds_is_an_error(root: Path) -> None:
    lines = [line for line in DEPENDS.splitlines(keepends=True) if not re.search(r"nd_pmem|device-dax", line)]
    write(root / f"usr/lib/modules/{VERSION}/modules.dep", "".join(lines))
    assert codes(root) == ["driver-not-installed", "driver-not-installed"]
    assert {"device_dax.ko", "nd_pmem.ko"} == {finding.what.split()[-4] for finding in findings(root)}


def test_a_module_or_one_that_it_needs_must_be_there_as_a_file(root: Path) -> None:
    (root / f"usr/lib/modules/{VERSION}/kernel/drivers/nvdimm/libnvdimm.ko.xz").unlink()
    assert codes(root, {"nfit"}) == ["modules-incomplete", "driver-not-installed"]
    assert codes(root, {"device_dax"}) == ["modules-incomplete"]


def test_modules_are_needed_where_the_config_says_so(root: Path) -> None:
    (root / f"usr/lib/modules/{VERSION}/modules.dep").unlink()
    assert codes(root, {"dax_pmem"}) == ["modules-incomplete"]
    assert codes(root, {"dax_pmem", "nfit"}) == ["modules-incomplete", "driver-not-installed"]


def test_without_a_config_the_modules_are_looked_at(root: Path) -> None:
    (root / f"boot/config-{VERSION}").unlink()
    assert codes(root, {"nfit", "dax"}) == []
    assert codes(root, {"virtio_pmem"}) == ["driver-not-installed"]


def test_without_config_and_modules_one_warning_says_so(root: Path) -> None:
    (root / f"boot/config-{VERSION}").unlink()
    directory = root / f"usr/lib/modules/{VERSION}"
    directory.rename(directory.with_name("elsewhere"))
    (finding,) = findings(root, {"nfit", "nd_pmem"})
    assert (finding.severity, finding.code) == ("warning", "drivers-not-checked")
    assert finding.what.endswith("nd_pmem, nfit")


def test_an_unknown_driver_is_looked_for_among_the_modules_only(root: Path) -> None:
    write(root / f"usr/lib/modules/{VERSION}/modules.builtin", "kernel/drivers/virtio/virtio-thing.ko\n")
    assert codes(root, {"virtio_thing"}) == []
    (finding,) = findings(root, {"new_pmem"})
    assert (finding.severity, finding.code) == ("warning", "driver-not-found")


def test_a_kernel_without_a_version_is_known_by_what_its_image_says(root: Path) -> None:
    kernel = replace(the_kernel(root), version="", config="")
    write(Path(kernel.image), bzimage())
    assert [finding.code for finding in findings(root, kernel=kernel)] == ["drivers-not-checked"]
    write(Path(kernel.image), bzimage(VERSION))
    assert findings(root, kernel=kernel) == []


def test_an_image_of_another_version_than_its_name_says_is_an_error(root: Path) -> None:
    image = write(root / f"boot/vmlinuz-{VERSION}", bzimage("6.12.8-amd64"))
    (finding,) = findings(root)
    assert (finding.severity, finding.code) == ("error", "kernel-version")
    assert finding.what == f"{image} is no kernel {VERSION}: it says that it is 6.12.8-amd64"


# -- a root file system on persistent memory --------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["/", "/usr"])
def test_what_a_root_on_persistent_memory_needs_must_be_in_the_initrd(root: Path, at: str) -> None:
    write(root / "proc/self/mountinfo", mounted("/dev/pmem0p1", at, device="259:0"))
    there = ("ext4", "jbd2", "mbcache")
    write(root / f"boot/initrd.img-{VERSION}", initrd(VERSION, modules=(*there, "nfit", "nd_pmem", "libnvdimm")))
    assert findings(root) == []
    write(root / f"boot/initrd.img-{VERSION}", initrd(VERSION, modules=there))
    found = {finding.what.split()[4]: finding.severity for finding in findings(root)}
    assert found == {"libnvdimm,": "error", "nd_pmem,": "error", "nfit,": "warning"}
    assert set(codes(root)) == {"driver-not-in-initrd"}


def test_other_file_systems_get_their_drivers_from_the_root(root: Path) -> None:
    write(root / "proc/self/mountinfo", mounted("/dev/vda1") + "23 1 259:0 / /srv rw - xfs /dev/pmem0 rw\n")
    assert findings(root) == []


# -- kexec ------------------------------------------------------------------------------------------------------------


def kexec(root: Path, script: str = KEXEC, timeout_s: float = 60) -> InstalledKernels:
    program = write(root / "kexec", script.format(root=root))
    program.chmod(0o755)
    return InstalledKernels(root, str(program), timeout_s)


def test_a_kernel_is_loaded_and_unloaded(root: Path) -> None:
    kernels, kernel = kexec(root), the_kernel(root)
    assert not kernels.loaded()
    asyncio.run(kernels.load(kernel, 'root=/dev/vda1 a="b c"'))
    assert kernels.loaded()
    assert (root / "called").read_text().splitlines() == [
        "--load",
        "--kexec-file-syscall",
        kernel.image,
        f"--initrd={kernel.initrd}",
        '--command-line=root=/dev/vda1 a="b c"',
    ]
    asyncio.run(kernels.unload())
    assert not kernels.loaded()
    assert (root / "called").read_text().splitlines() == ["--unload", "--kexec-file-syscall"]


def test_a_kernel_without_an_initrd_is_loaded_without(root: Path) -> None:
    asyncio.run(kexec(root).load(replace(the_kernel(root), initrd=""), "quiet"))
    assert "--initrd" not in (root / "called").read_text()


def test_of_a_unified_image_kexec_is_given_the_parts(root: Path) -> None:
    made = initrd(FEDORA)
    unified(root, FEDORA, made=made)
    script = (
        '#!/bin/sh\ncat "$3" >{root}/image; cat "${{4#--initrd=}}" >{root}/initrd; echo 1 >{root}/sys/kernel/kexec_loaded\n'
    )
    kernel = next(one for one in InstalledKernels(root).installed() if one.version == FEDORA)
    before = {*Path("/proc/self/fd").iterdir()}
    asyncio.run(kexec(root, script).load(kernel, "quiet"))
    assert ((root / "image").read_bytes(), (root / "initrd").read_bytes()) == (bzimage(FEDORA), made)
    assert {*Path("/proc/self/fd").iterdir()} == before


def test_what_kexec_said_is_passed_on_with_what_to_do(root: Path) -> None:
    kernels = kexec(
        root, "#!/bin/sh\nprintf 'a\\n\\nkexec_file_load failed: Required key not available\\n' >&2\nexit 255\n"
    )
    with pytest.raises(KernelRefused, match="could not be loaded: a; kexec_file_load failed: Required key") as refused:
        asyncio.run(kernels.load(the_kernel(root), ""))
    assert refused.value.left == "no kernel is loaded for a kexec"
    assert "signed" in refused.value.remedy


def test_a_failed_load_says_that_another_kernel_is_still_loaded(root: Path) -> None:
    write(root / "sys/kernel/kexec_loaded", "1\n")
    with pytest.raises(KernelRefused, match="kexec ended with 1") as refused:
        asyncio.run(kexec(root, "#!/bin/sh\nexit 1\n").load(the_kernel(root), ""))
    assert refused.value.left == "a kexec would start the kernel that is loaded now"


def test_a_kexec_that_did_nothing_is_not_believed(root: Path) -> None:
    kernels = kexec(root, "#!/bin/sh\n")
    with pytest.raises(KernelRefused, match="but the running kernel has none"):
        asyncio.run(kernels.load(the_kernel(root), ""))
    write(root / "sys/kernel/kexec_loaded", "1\n")
    with pytest.raises(KernelRefused, match="still has one"):
        asyncio.run(kernels.unload())


def test_a_missing_kexec_is_reported(root: Path) -> None:
    with pytest.raises(KernelRefused, match="No such file or directory") as refused:
        asyncio.run(InstalledKernels(root, f"{root}/nonexistent").load(the_kernel(root), ""))
    assert refused.value.remedy == "install kexec-tools"


def test_a_kexec_that_hangs_is_ended(root: Path) -> None:
    kernels = kexec(root, "#!/bin/sh\necho $$ >{root}/pid\nexec sleep 1000\n", timeout_s=0.5)
    with pytest.raises(KernelRefused, match=r"did not end within 0\.5 s"):
        asyncio.run(kernels.unload())
    assert not Path("/proc", (root / "pid").read_text().strip()).exists()


def test_a_load_that_is_cancelled_again_and_again_waits_for_the_end_of_kexec(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the kernel may still take the image, though kexec was killed: a look whether it has one is too early."""
    kernels = kexec(root, "#!/bin/sh\nexec sleep 1000\n")
    started, waiting, go = asyncio.Event(), asyncio.Event(), asyncio.Event()
    wait = asyncio.subprocess.Process.wait

    async def talk_long(process: asyncio.subprocess.Process) -> None:  # noqa: ARG001 - it never ends
        started.set()
        await asyncio.Event().wait()

    async def wait_long(process: asyncio.subprocess.Process) -> int:
        waiting.set()
        await go.wait()
        return await wait(process)

    async def cancel() -> None:
        monkeypatch.setattr(asyncio.subprocess.Process, "communicate", talk_long)
        monkeypatch.setattr(asyncio.subprocess.Process, "wait", wait_long)
        load = asyncio.ensure_future(kernels.unload())
        await started.wait()
        load.cancel()
        await waiting.wait()
        for _ in range(2):
            load.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not load.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await load

    asyncio.run(cancel())
