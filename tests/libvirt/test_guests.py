# SPDX-License-Identifier: GPL-2.0-or-later
"""A Linux guest with what virt-install gives it: disks on a file and on a block device, a network card, VNC, a guest agent;
and one with UEFI and a TPM."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab import until
from tests.libvirt.domains import QCOW2
from tests.libvirt.lab import IMAGES, LibvirtLab

LINUX = f"<kernel>{IMAGES}/vmlinuz</kernel><initrd>{IMAGES}/initrd.img</initrd>"
LINUX += "<cmdline>console=ttyS0 quiet loglevel=1 panic=-1</cmdline>"
UEFI = "<firmware><feature enabled='no' name='secure-boot'/></firmware>"
TPM = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
BLOCK = """<disk type='block' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source dev='{path}'/>
      <target dev='vdb' bus='virtio'/>
    </disk>"""
SIZE_MIB = 512


def bring(lab: LibvirtLab, linux: Path) -> None:
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(linux / name, lab.bed.path(f"{IMAGES}/{name}"))


@contextmanager
def block_device(lab: LibvirtLab) -> Iterator[str]:
    """A loop device; they are the whole machine's."""
    image = lab.root / "block.raw"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    losetup = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    try:
        number = Path(device).stat().st_rdev & 0xFF
        lab.bed.run("mknod", device, "b", "7", str(number))
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_linux_guest_with_disks_network_and_agent(each_lab: LibvirtLab, linux_with_agent: Path) -> None:
    bring(each_lab, linux_with_agent)
    path = f"{IMAGES}/linux.qcow2"
    each_lab.bed.run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    with block_device(each_lab) as device:
        disks = QCOW2.format(path=path) + BLOCK.format(path=device)
        guest = each_lab.running_domain("linux", size_mib=SIZE_MIB, boot=LINUX, disks=disks)
        for _ in range(3):
            guest.save()
            guest.load()
            guest.assert_unbroken()
        until(lambda: "Time:" in guest.virsh("domtime", check=False), "its agent answers")
        guest.assert_whole_to_libvirt()
        guest.virsh("destroy")


def test_a_guest_with_uefi_and_tpm(each_lab: LibvirtLab, linux: Path) -> None:
    bring(each_lab, linux)
    guest = each_lab.running_domain("uefi", size_mib=SIZE_MIB, boot=UEFI + LINUX, more=TPM, firmware="efi")
    for _ in range(2):
        guest.save()
        guest.load()
        guest.assert_unbroken()
    guest.save()
    guest.virsh("destroy")
    guest.virsh("start")
    guest.assert_unbroken()
