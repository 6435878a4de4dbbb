# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels that a host could not start: whatever a distribution lays out, an upgrade chooses none of them without an error.

The kernel that an upgrade takes when its caller names none is the first of ``installed``; an error refuses the upgrade
(tests/unit/test_core_upgrade.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cpr_agent.core.model import Kernel
from cpr_agent.host.kernels import InstalledKernels
from tests.kernel_trees import (
    DRIVERS,
    LAYOUTS,
    LayOut,
    arch,
    block,
    bzimage,
    debian,
    device,
    fedora,
    host,
    initrd,
    modules,
    opensuse,
    systemd_boot,
    unified,
    write,
)


def chosen(root: Path) -> Kernel:
    return InstalledKernels(root).installed()[0]


def wrong(root: Path) -> list[tuple[str, str]]:
    """What is said of the kernel that is chosen: severities and codes."""
    found = InstalledKernels(root).findings(chosen(root), DRIVERS)
    assert all(finding.what and finding.why and finding.remedy for finding in found)
    return [(finding.severity, finding.code) for finding in found]


def lay_out(root: Path, name: str) -> tuple[LayOut, str]:
    """A host that runs the older of two kernels; returns what lays the newer one out, and its version."""
    layout, older, newer = LAYOUTS[name]
    host(root, older)
    layout(root, older)
    return layout, newer


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_newest_kernel_is_chosen_with_its_initrd(tmp_path: Path, name: str) -> None:
    layout, newer = lay_out(tmp_path, name)
    layout(tmp_path, newer)
    assert chosen(tmp_path).version == newer
    assert bool(chosen(tmp_path).initrd) == (name != "UKI")  # there it is in the image
    assert newer in chosen(tmp_path).initrd or name == "UKI"
    assert wrong(tmp_path) == []
    assert len(InstalledKernels(tmp_path).installed()) == 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_newest_kernel_without_an_initrd_is_refused(tmp_path: Path, name: str) -> None:
    layout, newer = lay_out(tmp_path, name)
    layout(tmp_path, newer, made=None)
    assert chosen(tmp_path).version == newer
    said = "initrd" if name in ("Fedora 43", "RHEL 9") else "initrd-none"  # there the entry names one
    assert wrong(tmp_path) == [("error", said)]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_newest_kernel_with_half_an_initrd_is_refused(tmp_path: Path, name: str, share: float) -> None:
    layout, newer = lay_out(tmp_path, name)
    whole = initrd(newer, "gzip")
    layout(tmp_path, newer, made=whole[: int(len(whole) * share)])
    assert wrong(tmp_path) == [("error", "initrd")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_newest_kernel_whose_initrd_is_an_older_ones_is_refused(tmp_path: Path, name: str) -> None:
    layout, newer = lay_out(tmp_path, name)
    layout(tmp_path, newer, made=initrd(LAYOUTS[name][1]))
    assert wrong(tmp_path) == [("error", "initrd")]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_newest_kernel_whose_initrd_lacks_the_roots_driver_is_refused(tmp_path: Path, name: str) -> None:
    layout, newer = lay_out(tmp_path, name)
    layout(tmp_path, newer, made=initrd(newer, modules=("ext4", "jbd2", "mbcache")))
    assert set(wrong(tmp_path)) == {("error", "driver-not-in-initrd")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_newest_kernel_whose_modules_are_half_unpacked_is_refused(tmp_path: Path, name: str) -> None:
    layout, newer = lay_out(tmp_path, name)
    layout(tmp_path, newer)
    directory = tmp_path / "usr/lib/modules" / newer
    (directory / "kernel/drivers/dax/dax_pmem.ko.xz").write_bytes(b"")
    assert ("error", "modules-incomplete") in wrong(tmp_path)
    (directory / "modules.dep").unlink()
    assert ("error", "modules-incomplete") in wrong(tmp_path)
    for path in directory.iterdir():
        if path.name not in ("vmlinuz", "config"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert ("error", "modules-incomplete") in wrong(tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_newest_kernel_whose_image_is_cut_off_is_refused(tmp_path: Path, name: str) -> None:
    layout, newer = lay_out(tmp_path, name)
    layout(tmp_path, newer)
    image = Path(chosen(tmp_path).image)
    image.write_bytes(image.read_bytes()[:6000])
    assert ("error", "kernel-image") in wrong(tmp_path)


def test_a_newest_kernel_that_does_not_know_the_roots_disk_is_refused(tmp_path: Path) -> None:
    """A kernel for clouds on real hardware: its initrd is whole, and it has no driver for the controller."""
    host(tmp_path, "6.12.100+deb13-cloud-amd64")
    controller = ("pci0000:00", "0000:00:1c.0")
    device(tmp_path, *controller, driver="megaraid_sas", module="megaraid_sas")
    write(tmp_path / "sys/module/megaraid_sas/initstate", "live\n")
    block(tmp_path, "8:1", "sda1", "/".join((*controller, "host0/target0:0:0/0:0:0:0/block/sda/sda1")))
    (tmp_path / "sys/dev/block/254:1").unlink()
    (tmp_path / "sys/dev/block/254:1").symlink_to("8:1")
    debian(tmp_path, "6.12.117+deb13-cloud-amd64")
    assert wrong(tmp_path) == [("error", "driver-not-in-initrd")]


# -- names without versions -------------------------------------------------------------------------------------------

ARCH = "6.17.9-arch1-1"


@pytest.mark.parametrize("package", ["linux", "linux-lts", "linux-zen"])
def test_arch_calls_kernels_by_their_packages(tmp_path: Path, package: str) -> None:
    host(tmp_path, ARCH)
    arch(tmp_path, ARCH, package)
    kernel = chosen(tmp_path)
    assert kernel == Kernel(
        version=ARCH, image=f"{tmp_path}/boot/vmlinuz-{package}", initrd=f"{tmp_path}/boot/initramfs-{package}.img"
    )
    assert wrong(tmp_path) == []
    image = tmp_path / f"boot/vmlinuz-{package}"
    image.write_bytes(bzimage())  # one that says nothing: the modules say whose they are
    assert chosen(tmp_path) == kernel


def test_a_boot_partition_that_was_not_mounted_during_an_upgrade_is_noticed(tmp_path: Path) -> None:
    """On Arch the new modules are there, the old image and initrd are still in /boot, and the old modules are gone."""
    host(tmp_path, "6.17.8-arch1-1")
    arch(tmp_path, "6.17.8-arch1-1")
    image, made = ((tmp_path / "boot" / name).read_bytes() for name in ("vmlinuz-linux", "initramfs-linux.img"))
    shutil.rmtree(tmp_path / "usr/lib/modules")
    arch(tmp_path, ARCH)
    write(tmp_path / "boot/vmlinuz-linux", image)
    write(tmp_path / "boot/initramfs-linux.img", made)
    assert chosen(tmp_path).version == ARCH
    assert wrong(tmp_path) == [("error", "initrd-none")]
    old = InstalledKernels(tmp_path).installed()[1]
    found = InstalledKernels(tmp_path).findings(old, DRIVERS)
    assert ("error", "modules-incomplete") in {(finding.severity, finding.code) for finding in found}


def test_alpine_calls_kernels_by_their_flavour(tmp_path: Path) -> None:
    version = "6.12.58-0-lts"
    host(tmp_path, version)
    modules(tmp_path, version)
    write(tmp_path / "boot/vmlinuz-lts", bzimage(version))
    write(tmp_path / "boot/initramfs-lts", initrd(version, "gzip"))
    assert chosen(tmp_path).version == version
    assert wrong(tmp_path) == []


@pytest.mark.parametrize("name", ["kernel-genkernel-x86_64-{}", "vmlinuz-generic-{}"])
def test_gentoo_and_slackware_say_more_before_the_version(tmp_path: Path, name: str) -> None:
    version = "6.12.58-gentoo"
    host(tmp_path, version)
    modules(tmp_path, version)
    image = write(tmp_path / "boot" / name.format(version), bzimage())
    made = write(
        tmp_path / "boot" / name.format(version).replace(name.split("-")[0], "initramfs", 1), initrd(version, "gzip")
    )
    write(tmp_path / "boot" / f"{image.name}.old", bzimage("6.18.1-gentoo"))
    assert chosen(tmp_path) == Kernel(version=version, image=str(image), initrd=str(made))
    assert wrong(tmp_path) == []


def test_a_kernel_of_another_deployment_is_refused(tmp_path: Path) -> None:
    """Fedora CoreOS: the entry names a deployment (ostree=) that has the modules, and the command line that runs names
    another one."""
    running, newer, place = "6.16.3-200.fc42.x86_64", "6.17.8-300.fc43.x86_64", "ostree/fedora-coreos-0a1b"
    host(tmp_path, running)
    modules(tmp_path, running)
    write(tmp_path / f"boot/{place}/vmlinuz-{newer}", bzimage(newer))
    write(tmp_path / f"boot/{place}/initramfs-{newer}.img", initrd(newer))
    write(
        tmp_path / "boot/loader/entries/ostree-2.conf",
        f"title Fedora CoreOS\nversion 2\noptions root=UUID=4c4f ostree=/ostree/boot.1/fedora-coreos/0a1b/0\n"
        f"linux /{place}/vmlinuz-{newer}\ninitrd /{place}/initramfs-{newer}.img\n",
    )
    assert chosen(tmp_path).version == newer
    assert ("error", "modules-incomplete") in wrong(tmp_path)


def test_a_kernel_without_modules_where_the_one_that_runs_has_some_is_refused(tmp_path: Path) -> None:
    """On NixOS they are in a place that the agent does not know."""
    version = "6.12.58"
    host(tmp_path, version)
    write(tmp_path / "proc/modules", "ext4 1 1 - Live 0x0\n")
    write(tmp_path / f"boot/EFI/nixos/2b0l-linux-{version}-bzImage.efi", bzimage(version))
    write(tmp_path / f"boot/EFI/nixos/3c1m-initrd-linux-{version}-initrd.efi", initrd(version))
    write(
        tmp_path / "boot/loader/entries/nixos-generation-42.conf",
        f"title NixOS\nversion Generation 42 NixOS 25.05, Linux Kernel {version}\n"
        f"linux /EFI/nixos/2b0l-linux-{version}-bzImage.efi\n"
        f"initrd /EFI/nixos/3c1m-initrd-linux-{version}-initrd.efi\noptions init=/nix/store/x/init\n",
    )
    assert chosen(tmp_path).version == version
    assert ("error", "modules-incomplete") in wrong(tmp_path)


# -- several at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boot", ["boot", "efi", "boot/efi"])
def test_the_boot_partition_may_be_anywhere(tmp_path: Path, boot: str) -> None:
    host(tmp_path, ARCH)
    systemd_boot(tmp_path, ARCH, boot)
    unified(tmp_path, "6.18.1-arch1-1", boot)
    assert {Path(one.image).relative_to(tmp_path / boot).parts[0] for one in InstalledKernels(tmp_path).installed()} == {
        "0123456789abcdef0123456789abcdef",
        "EFI",
    }
    assert wrong(tmp_path) == []


def test_files_of_their_own_are_preferred_to_a_unified_image_of_the_same_version(tmp_path: Path) -> None:
    """kexec_file_load takes them as they are."""
    version = "6.17.8-300.fc43.x86_64"
    host(tmp_path, version)
    unified(tmp_path, version)
    fedora(tmp_path, version)
    assert chosen(tmp_path).image == f"{tmp_path}/boot/vmlinuz-{version}"
    (tmp_path / f"boot/initramfs-{version}.img").unlink()
    assert chosen(tmp_path).image.endswith(".efi")
    assert wrong(tmp_path) == []


@pytest.mark.parametrize(
    ("running", "others", "best"),
    [
        ("6.12.100+deb13-amd64", ["6.12.117+deb13-rt-amd64", "6.12.117+deb13-cloud-amd64"], "6.12.117+deb13-amd64"),
        ("6.8.0-79-generic", ["6.8.0-89-lowlatency", "6.8.1-1013-realtime"], "6.8.0-88-generic"),
        (
            "5.14.0-503.40.1.el9_5.x86_64",
            ["5.14.0-570.1.1.el9_6.x86_64+debug", "5.14.0-570.1.1.el9_6.x86_64+rt"],
            "5.14.0-570.1.1.el9_6.x86_64",
        ),
        ("6.12.100+deb13-rt-amd64", ["6.12.117+deb13-amd64", "6.16.3+deb13-amd64"], "6.12.117+deb13-rt-amd64"),
        ("6.16.9-arch1-1", ["6.17.9-zen1-1-zen", "6.18.1-hardened1-1-hardened"], "6.17.9-arch1-1"),
    ],
)
def test_no_other_flavour_takes_the_place_of_the_one_that_runs(
    tmp_path: Path, running: str, others: list[str], best: str
) -> None:
    host(tmp_path, running)
    for version in (running, *others, best):
        debian(tmp_path, version)
    assert chosen(tmp_path).version == best
    assert wrong(tmp_path) == []


def test_what_is_kept_for_a_rescue_or_a_dump_is_not_chosen(tmp_path: Path) -> None:
    version, machine = "6.17.8-300.fc43.x86_64", "0123456789abcdef0123456789abcdef"
    host(tmp_path, version)
    fedora(tmp_path, version)
    write(tmp_path / f"boot/vmlinuz-0-rescue-{machine}", bzimage("6.18.0-1.fc43.x86_64"))
    write(tmp_path / f"boot/initramfs-0-rescue-{machine}.img", initrd("6.18.0-1.fc43.x86_64"))
    write(tmp_path / f"boot/initramfs-{version}kdump.img", initrd(version))
    rescue = f"title Rescue\nversion 0-rescue-{machine}\nlinux /vmlinuz-0-rescue-{machine}\n"
    write(tmp_path / f"boot/loader/entries/{machine}-0-rescue.conf", f"{rescue}initrd /initramfs-0-rescue-{machine}.img\n")
    (kernel,) = InstalledKernels(tmp_path).installed()
    assert (kernel.version, kernel.initrd) == (version, f"{tmp_path}/boot/initramfs-{version}.img")
    assert wrong(tmp_path) == []


def test_opensuse_with_systemd_boot_has_a_snapshot_in_its_entries(tmp_path: Path) -> None:
    version, token = "6.17.9-1-default", "opensuse-tumbleweed"
    host(tmp_path, version)
    opensuse(tmp_path, version, made=None)
    for path in (tmp_path / "boot").iterdir():
        path.unlink()
    image = write(tmp_path / f"boot/efi/{token}/{version}/linux-0a1b2c", bzimage(version))
    made = write(tmp_path / f"boot/efi/{token}/{version}/initrd-3d4e5f", initrd(version))
    write(
        tmp_path / f"boot/efi/loader/entries/{token}-{version}-1.conf",
        f"title openSUSE\nversion 1@{version}\noptions root=UUID=4c4f rootflags=subvol=@/.snapshots/1/snapshot\n"
        f"linux /{token}/{version}/{image.name}\ninitrd /{token}/{version}/{made.name}\n",
    )
    assert (chosen(tmp_path).version, chosen(tmp_path).image, chosen(tmp_path).initrd) == (version, str(image), str(made))
    assert wrong(tmp_path) == []
