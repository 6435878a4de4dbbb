# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels as distributions lay them out, as trees of small files; archives and images in them are real ones."""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

LayOut = Callable[..., object]
"""Lays out one version below a root."""
DRIVERS = {"device_dax", "dax_pmem", "nd_pmem", "libnvdimm", "nfit"}
"""Of the guests' memory."""
CONFIG = """\
CONFIG_64BIT=y
CONFIG_MODULES=y
CONFIG_RD_GZIP=y
CONFIG_RD_BZIP2=y
CONFIG_RD_LZMA=y
CONFIG_RD_XZ=y
CONFIG_RD_LZO=y
CONFIG_RD_LZ4=y
CONFIG_RD_ZSTD=y
CONFIG_EXT4_FS=m
CONFIG_VIRTIO_BLK=m
CONFIG_ACPI_NFIT=m
CONFIG_LIBNVDIMM=m
CONFIG_BLK_DEV_PMEM=m
CONFIG_DEV_DAX=m
CONFIG_DEV_DAX_PMEM=y
# CONFIG_VIRTIO_PMEM is not set
"""
DEPENDS = """\
kernel/drivers/acpi/nfit/nfit.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/drivers/nvdimm/libnvdimm.ko.xz:
kernel/drivers/nvdimm/nd_pmem.ko.xz: kernel/drivers/nvdimm/libnvdimm.ko.xz
kernel/drivers/dax/device-dax.ko.xz:
kernel/drivers/dax/dax_pmem.ko.xz:
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko.xz
kernel/drivers/virtio/virtio_ring.ko.xz:
kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/fs/mbcache.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/fs/mbcache.ko.xz:
"""
ROOT_MODULES = ("virtio_blk", "virtio_ring", "ext4", "jbd2", "mbcache")
COMPRESSORS = {
    "none": ("cat",),
    "gzip": ("gzip", "-9"),
    "bzip2": ("bzip2",),
    "xz": ("xz", "--check=crc32"),
    "lzma": ("lzma", "-9"),
    "zstd": ("zstd", "-q"),
    "lz4": ("lz4", "-q", "-l", "-9"),
    "lzo": ("lzop", "-q", "-9"),
}
"""As initramfs-tools, dracut and mkinitcpio run them."""


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cpio(files: Mapping[str, bytes]) -> bytes:
    """An archive as cpio(1) makes it."""
    with tempfile.TemporaryDirectory() as top:
        for name, content in files.items():
            write(Path(top, name), content)
        listed = "\n".join(name for name in files for name in [*map(str, reversed(Path(name).parents[:-1])), name])
        made = subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet"],
            input=listed.encode(),
            cwd=top,
            capture_output=True,
            check=True,
        )
    return made.stdout


def compressed(data: bytes, how: str) -> bytes:
    return subprocess.run(
        [*COMPRESSORS[how], "-c"] if how != "none" else ["cat"], input=data, capture_output=True, check=True
    ).stdout


@functools.cache
def initrd(
    version: str, how: str = "zstd", modules: Iterable[str] = ROOT_MODULES, *, init: bool = True, early: bool = False
) -> bytes:
    """An initrd with these modules of a kernel; ``early`` puts the processor's microcode before it."""
    files = {"init": b"#!/bin/sh\n" * 200} if init else {}
    files |= {f"usr/lib/modules/{version}/kernel/x/{module}.ko.xz": module.encode() * 300 for module in modules}
    main = compressed(cpio(files), how)
    return (cpio({"kernel/x86/microcode/GenuineIntel.bin": b"microcode" * 500}) if early else b"") + main


def bzimage(
    version: str = "", *, protocol: int = 0x20F, loadflags: int = 1, xloadflags: int = 3, magic: bytes = b"HdrS"
) -> bytes:
    """The header of an x86 kernel (boot.rst), and a body that is as long as the header says."""
    image = bytearray(8192)
    image[0x1F1] = 4  # setup_sects
    struct.pack_into("<I", image, 0x1F4, (len(image) - 5 * 512) // 16)  # syssize
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = magic
    struct.pack_into("<H", image, 0x206, protocol)
    image[0x211] = loadflags
    struct.pack_into("<H", image, 0x236, xloadflags)
    if version:
        struct.pack_into("<H", image, 0x20E, 0x300)
        image[0x500:0x580] = f"{version} (somebody@example.org) #1 SMP".encode().ljust(0x80, b"\0")
    return bytes(image)


def uki(sections: Mapping[str, bytes]) -> bytes:
    """A PE image with these sections, aligned as ukify(1) aligns them."""
    head = bytearray(b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + b"PE\0\0")
    head += struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 0xF0, 0x22E) + bytes(0xF0)
    at = (len(head) + 40 * len(sections) + 511) // 512 * 512
    body = b""
    for name, content in sections.items():
        raw = (len(content) + 511) // 512 * 512
        entry = name.encode().ljust(8, b"\0") + struct.pack("<IIII", len(content), 0x1000, raw, at + len(body))
        head += entry.ljust(40, b"\0")
        body += content.ljust(raw, b"\0")
    return bytes(head).ljust(at, b"\0") + body


def modules(root: Path, version: str, depends: str = DEPENDS, builtin: Iterable[str] = ("dax",)) -> Path:
    """/usr/lib/modules/VERSION, as depmod(8) leaves it."""
    directory = root / "usr/lib/modules" / version
    write(directory / "modules.dep", depends)
    write(directory / "modules.builtin", "".join(f"kernel/x/{name}.ko\n" for name in builtin))
    write(directory / "modules.alias", "alias fs-ext4 ext4\nalias fs-ext3 ext4\nalias virtio:d00000002v* virtio_blk\n")
    for line in depends.splitlines():
        write(directory / line.partition(":")[0], "a module")
    return directory


def host(root: Path, running: str, kind: str = "ext4", line: str = "root=UUID=4c4f ro memmap=4G!8G") -> Path:
    """A host that runs this version, with its root on the first partition of a virtio disk."""
    write(root / "proc/cmdline", f"BOOT_IMAGE=/boot/vmlinuz-{running} {line}\n")
    write(root / "proc/self/mountinfo", mounted("/dev/vda1", kind=kind))
    write(root / "proc/sys/kernel/osrelease", f"{running}\n")
    write(root / "proc/sys/kernel/kexec_load_disabled", "0\n")
    write(root / "proc/sys/kernel/kexec_load_limit_reboot", "-1\n")
    write(root / "sys/kernel/kexec_loaded", "0\n")
    write(root / "sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
    device(root, "pci0000:00", "0000:00:02.0", driver="virtio-pci")
    device(root, "pci0000:00", "0000:00:02.0", "virtio1", driver="virtio_blk", module="virtio_blk")
    block(root, "254:1", "vda1", "pci0000:00/0000:00:02.0/virtio1/block/vda/vda1")
    return root


def mounted(source: str, at: str = "/", kind: str = "ext4", device: str = "254:1") -> str:
    return f"1 0 254:9 / / rw - tmpfs none rw\n22 1 {device} / {at} rw,relatime shared:1 - {kind} {source} rw\n"


def device(root: Path, *path: str, driver: str, module: str = "", **files: str) -> Path:
    """A device of /sys with its driver; ``module`` is the driver's, where that is one."""
    where = root / "sys/devices" / Path(*path)
    where.mkdir(parents=True, exist_ok=True)
    top = "/".join(".." for _ in path)
    of_driver = root / "sys/bus/x/drivers" / driver
    of_driver.mkdir(parents=True, exist_ok=True)
    (where / "driver").symlink_to(f"{top}/../bus/x/drivers/{driver}")
    if module:
        (of_driver / "module").symlink_to(f"../../../../module/{module}")
    for name, content in files.items():
        write(where / name, content)
    return where


def block(root: Path, number: str, name: str, path: str) -> Path:
    """A block device of /sys, by its number and by its name."""
    where = root / "sys/devices" / path
    where.mkdir(parents=True, exist_ok=True)
    for link in (root / "sys/dev/block" / number, root / "sys/class/block" / name):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../devices/{path}")
    return where


# -- as distributions have them ---------------------------------------------------------------------------------------


def debian(root: Path, version: str, made: bytes | None = b"") -> None:
    """Also Ubuntu and Proxmox. ``made`` is the initrd, b"" a good one, None none."""
    write(root / f"boot/vmlinuz-{version}", bzimage(version))
    write(root / f"boot/config-{version}", CONFIG)
    modules(root, version)
    if made is not None:
        write(root / f"boot/initrd.img-{version}", made or initrd(version))


MACHINE = "0123456789abcdef0123456789abcdef"


def fedora(root: Path, version: str, made: bytes | None = b"") -> None:
    """Also RHEL and its kin: /boot is a partition, and GRUB reads entries; the image is among the modules as well."""
    directory = modules(root, version)
    write(directory / "vmlinuz", bzimage(version))
    write(directory / "config", CONFIG)
    write(root / f"boot/vmlinuz-{version}", bzimage(version))
    write(root / f"boot/config-{version}", CONFIG)
    if made is not None:
        write(root / f"boot/initramfs-{version}.img", made or initrd(version, early=True))
    write(
        root / f"boot/loader/entries/{MACHINE}-{version}.conf",
        f"title Fedora Linux ({version})\nversion {version}\nlinux /vmlinuz-{version}\n"
        f"initrd /initramfs-{version}.img $tuned_initrd\noptions root=UUID=4c4f ro $tuned_params\n"
        "grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class fedora\n",
    )


def arch(root: Path, version: str, package: str = "linux", made: bytes | None = b"") -> None:
    """Names without versions; mkinitcpio copies the image to /boot."""
    directory = modules(root, version)
    write(directory / "vmlinuz", bzimage(version))
    write(directory / "pkgbase", f"{package}\n")
    write(root / f"boot/vmlinuz-{package}", bzimage(version))
    write(root / "boot/intel-ucode.img", cpio({"kernel/x86/microcode/GenuineIntel.bin": b"x" * 100}))
    if made is not None:
        write(root / f"boot/initramfs-{package}.img", made or initrd(version))
        write(root / f"boot/initramfs-{package}-fallback.img", made or initrd(version))


def opensuse(root: Path, version: str, made: bytes | None = b"") -> None:
    """The image is among the modules, and /boot has links."""
    directory = modules(root, version)
    write(directory / "vmlinuz", bzimage(version))
    write(directory / "config", CONFIG)
    link = root / f"boot/vmlinuz-{version}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(f"../usr/lib/modules/{version}/vmlinuz")
    (root / "boot/vmlinuz").unlink(missing_ok=True)
    (root / "boot/vmlinuz").symlink_to(link.name)
    if made is not None:
        write(root / f"boot/initrd-{version}", made or initrd(version, "xz"))


def systemd_boot(root: Path, version: str, boot: str = "boot/efi", made: bytes | None = b"") -> None:
    """As kernel-install(8) fills the EFI system partition."""
    directory = modules(root, version)
    write(directory / "vmlinuz", bzimage(version))
    write(directory / "config", CONFIG)
    write(root / f"{boot}/{MACHINE}/{version}/linux", bzimage(version))
    if made is not None:
        write(root / f"{boot}/{MACHINE}/{version}/initrd", made or initrd(version))
    write(
        root / f"{boot}/loader/entries/{MACHINE}-{version}.conf",
        f"# Boot Loader Specification type#1 entry\ntitle\tFedora\nversion    {version}\nmachine-id {MACHINE}\n"
        f"sort-key   fedora\noptions    root=UUID=4c4f ro\nlinux      /{MACHINE}/{version}/linux\n"
        + (f"initrd     /{MACHINE}/{version}/initrd\n" if made is not None else ""),
    )


def unified(root: Path, version: str, boot: str = "boot/efi", made: bytes | None = b"", name: str = "") -> Path:
    """A unified kernel image, as Fedora's kernel-uki-virt and kernel-install(8) place it."""
    directory = modules(root, version)
    write(directory / "config", CONFIG)
    sections = {
        ".osrel": b"ID=fedora\n",
        ".cmdline": b"root=UUID=4c4f ro",
        ".uname": version.encode(),
        ".linux": bzimage(version),
    }
    if made is not None:
        sections[".initrd"] = made or initrd(version)
    return write(root / f"{boot}/EFI/Linux/{name or f'{MACHINE}-{version}'}.efi", uki(sections))


LAYOUTS: dict[str, tuple[LayOut, str, str]] = {
    "Debian 12": (debian, "6.1.0-40-amd64", "6.1.0-41-amd64"),
    "Debian 13": (debian, "6.12.100+deb13-amd64", "6.12.117+deb13-amd64"),
    "Ubuntu 24.04": (debian, "6.8.0-9-generic", "6.8.0-88-generic"),
    "Proxmox VE 8": (debian, "6.8.12-15-pve", "6.14.8-2-bpo12-pve"),
    "Fedora 43": (fedora, "6.16.3-200.fc42.x86_64", "6.17.8-300.fc43.x86_64"),
    "RHEL 9": (fedora, "5.14.0-503.40.1.el9_5.x86_64", "5.14.0-570.1.1.el9_6.x86_64"),
    "openSUSE": (opensuse, "6.4.0-150600.23.60-default", "6.4.0-150600.23.100-default"),
    "systemd-boot": (systemd_boot, "6.16.3-200.fc42.x86_64", "6.17.8-300.fc43.x86_64"),
    "UKI": (unified, "6.16.3-200.fc42.x86_64", "6.17.8-300.fc43.x86_64"),
}
"""What lays a kernel out, and two versions of it."""
