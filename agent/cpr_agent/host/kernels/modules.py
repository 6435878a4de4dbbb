# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel's modules on disk: what it has built in, what it can load, and whether all of that is there.

Sources: modules.dep(5), modules.builtin (Documentation/kbuild/kbuild.rst), deb-postinst and dpkg(1) on a package's states.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.host.kernels.files import exists, open_regular, text

LIST_BYTES = 32 << 20
"""Most to read of one of depmod's lists; a distribution's have up to 2 MiB."""
STATUS_BYTES = 256 << 20
"""Most to read of dpkg's status file."""

SYMBOLS = {
    "libnvdimm": "LIBNVDIMM",
    "nd_pmem": "BLK_DEV_PMEM",
    "nd_e820": "X86_PMEM_LEGACY",
    "of_pmem": "OF_PMEM",
    "virtio_pmem": "VIRTIO_PMEM",
    "nd_virtio": "VIRTIO_PMEM",
    "ramdax": "RAMDAX",
    "nfit": "ACPI_NFIT",
    "papr_scm": "PAPR_SCM",
    "dax": "DAX",
    "device_dax": "DEV_DAX",
    "dax_pmem": "DEV_DAX_PMEM",
    "dax_hmem": "DEV_DAX_HMEM",
    "dax_cxl": "DEV_DAX_CXL",
    "cxl_core": "CXL_BUS",
    "cxl_port": "CXL_PORT",
    "cxl_acpi": "CXL_ACPI",
    "cxl_pci": "CXL_PCI",
    "cxl_mem": "CXL_MEM",
    "cxl_pmem": "CXL_PMEM",
    "ext4": "EXT4_FS",
    "xfs": "XFS_FS",
    "btrfs": "BTRFS_FS",
    "f2fs": "F2FS_FS",
    "virtio_blk": "VIRTIO_BLK",
    "virtio_pci": "VIRTIO_PCI",
    "virtio_scsi": "SCSI_VIRTIO",
    "sd_mod": "BLK_DEV_SD",
    "nvme": "BLK_DEV_NVME",
    "ahci": "SATA_AHCI",
    "dm_mod": "BLK_DEV_DM",
    "dm_crypt": "DM_CRYPT",
    "md_mod": "BLK_DEV_MD",
}
"""What builds each module: the Makefiles in drivers/{nvdimm,acpi/nfit,dax,cxl,block,virtio,scsi,nvme/host,ata,md},
arch/powerpc/platforms/pseries and fs."""

Place = Literal["built in", "loadable", "nowhere", "unknown"]

_UNFINISHED = {
    "half-installed": "was not unpacked whole",
    "unpacked": "is unpacked, and not configured",
    "half-configured": "could not be configured",
}
_TEMPORARY = re.compile(r"\.dpkg-(?:new|tmp)$|;[0-9a-f]{8}$")
"""Names that dpkg and rpm give to files which they are about to put in place."""


class Modules(msgspec.Struct, frozen=True):
    """What modules.builtin and modules.dep say; of each module, the file and those that it depends on."""

    directory: Path
    builtin: frozenset[str]
    loadable: dict[str, list[str]]

    @classmethod
    def read(cls, directory: Path) -> Modules:
        loadable = {}
        for line in text(directory / "modules.dep", LIST_BYTES).splitlines():
            path, colon, needs = line.partition(":")
            if colon:
                loadable[module_name(path)] = [path, *needs.split()]
        builtin = text(directory / "modules.builtin", LIST_BYTES).splitlines()
        return cls(directory, frozenset(map(module_name, builtin)), loadable)

    def lacks(self, name: str) -> str:
        """What is not there of a module, or of those that it depends on; "" if nothing is."""
        if name in self.builtin:
            return ""
        if name not in self.loadable:
            return f"{name}.ko"
        return next((path for path in self.loadable[name] if not self.is_there(path)), "")

    def needs(self, name: str) -> set[str]:
        """The modules to be loaded for this one."""
        return set(map(module_name, self.loadable.get(name, [name]))) - self.builtin

    def is_there(self, path: str) -> bool:
        """Whether a file that modules.dep names is there, and has something in it."""
        try:
            info = self.file(path).stat()
        except OSError:
            return False
        return stat.S_ISREG(info.st_mode) and info.st_size > 0

    def file(self, path: str) -> Path:
        """Where one of modules.dep is; an older depmod wrote whole paths."""
        return self.directory / (path.partition(f"/{self.directory.name}/")[2] if path.startswith("/") else path)

    def missing(self) -> list[str]:
        """The kernel's own files of modules.dep that are not there. Of others (extra/, weak-updates/) a link may lead
        nowhere, once a kernel that they were shared with is gone."""
        return [paths[0] for paths in self.loadable.values() if "kernel/" in paths[0] and not self.is_there(paths[0])]

    def of_file_system(self, kind: str) -> str:
        """The module that mounts ``kind``: ext3 is ext4's to mount."""
        builtin = text(self.directory / "modules.builtin.modinfo", LIST_BYTES)
        if found := re.search(rf"(?:^|\0)(\w+)\.alias=fs-{re.escape(kind)}(?:\0|$)", builtin):
            return found[1]
        aliases = text(self.directory / "modules.alias", LIST_BYTES)
        found = re.search(rf"^alias fs-{re.escape(kind)} (\w+)$", aliases, re.MULTILINE)
        return found[1] if found else kind.replace("-", "_")


class Drivers(msgspec.Struct, frozen=True):
    """What a kernel's config and its modules say of its drivers. None where there is neither."""

    config: dict[str, str] | None
    modules: Modules | None

    def set_to(self, driver: str) -> str:
        """``y``, ``m`` or ``n``, as the config says; "" if it does not say."""
        symbol = SYMBOLS.get(driver, "")
        return self.config.get(symbol, "n") if self.config and symbol else ""

    def place(self, driver: str) -> Place:
        value = self.set_to(driver)
        if value == "y" or (self.modules and driver in self.modules.builtin):
            return "built in"
        if value == "m" or (self.modules and driver in self.modules.loadable):
            return "loadable"
        return "nowhere" if self.modules or value == "n" else "unknown"

    def needs(self, driver: str) -> set[str]:
        return self.modules.needs(driver) if self.modules else {driver}

    @property
    def modular(self) -> bool:
        """Whether the kernel has modules, as its config says."""
        return self.config is not None and (self.config.get("MODULES") == "y" or "m" in self.config.values())


def module_name(path: str) -> str:
    """As /sys/module has it: nd_pmem of kernel/drivers/nvdimm/nd_pmem.ko.xz."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def read_config(path: str) -> dict[str, str] | None:
    """Options that are set, without ``CONFIG_``. None where there is no config."""
    words = text(Path(path), LIST_BYTES) if path else ""
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", words, re.MULTILINE)) if words else None


def about_modules(kernel: Kernel, directories: list[Path], drivers: Drivers, *, wanted: bool) -> Iterator[Finding]:
    """What of the kernel's modules is not there. ``wanted`` says that other kernels of this host have some, such as
    the one that runs."""
    if not drivers.modules:
        half = next((directory for directory in directories if exists(directory)), None)
        if half or drivers.modular or (wanted and drivers.config is None):
            what = f"{half} has no modules.dep" if half else f"there is no {directories[0]}"
            yield _incomplete(kernel, f"the modules of kernel {kernel.version} are not installed: {what}")
        return
    directory = drivers.modules.directory
    if missing := drivers.modules.missing():
        some = f"{directory / missing[0]} is missing or empty"
        more = f", and so are {len(missing) - 1} more" if len(missing) > 1 else ""
        yield _incomplete(kernel, f"the modules of kernel {kernel.version} are not all there: {some}{more}")
    elif left := next((path for path in _all_files(directory) if _TEMPORARY.search(path.name)), None):
        yield _incomplete(kernel, f"the modules of kernel {kernel.version} are being replaced: {left} is there")


def _all_files(directory: Path, most: int = 100_000) -> Iterator[Path]:
    for path, _ in zip(directory.rglob("*"), range(most), strict=False):
        yield path


def about_packages(kernel: Kernel, status: Path) -> Iterator[Finding]:
    """What dpkg says of the packages that are named for this version."""
    for package, state in _unfinished_packages(status, kernel.version):
        yield _incomplete(kernel, f"the package {package} of kernel {kernel.version} {_UNFINISHED[state]} ({state})")


def _unfinished_packages(status: Path, version: str) -> list[tuple[str, str]]:
    if not version:
        return []
    name_of_one = rb"(?!\S*(?:headers|kbuild|tools))\S+-" + re.escape(version.encode()) + rb"(?:-signed)?"
    wanted = re.compile(rb"Package: (" + name_of_one + rb")\n")
    out, name, left = [], "", STATUS_BYTES
    try:
        with open_regular(status) as file:
            for line in file:
                left -= len(line)
                if left < 0:
                    break
                if found := wanted.fullmatch(line):
                    name = found[1].decode(errors="replace")
                elif line == b"\n":
                    name = ""
                elif name and line.startswith(b"Status: "):
                    state = line.split()[-1].decode(errors="replace")
                    out += [(name, state)] if state in _UNFINISHED else []
    except OSError:
        pass
    return out


def _incomplete(kernel: Kernel, what: str) -> Finding:
    return Finding(
        severity="error",
        code="modules-incomplete",
        what=what,
        why="the kernel would start without drivers that the host needs, the root file system's perhaps",
        remedy="let the package manager finish (dpkg --configure -a, dnf reinstall), or install the kernel's packages "
        f"again; then depmod {kernel.version}, and make the initrd again",
    )
