"""Kernels on disk, and the one that waits for a kexec; implements core.ports.Kernels.

What a new kernel must bring for the guests' memory to appear again is read from its config and its modules, before any
guest stops. ``kexec`` runs with ``--kexec-file-syscall`` only: it is the form that works under lockdown, and the kernel
checks what it is given (kexec(8), kexec_file_load(2)).
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.core.upgrade.command_line import without_boot_loader
from cpr_agent.errors import KernelRefused
from cpr_agent.mounts import mounts

KEXEC_TIMEOUT_S = 60.0
LIST_INITRD_TIMEOUT_S = 60.0
SETUP_BYTES = 64 << 10
"""No real-mode part of an x86 kernel is larger (boot.rst)."""

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
}
"""What builds each module: the Makefiles in drivers/{nvdimm,acpi/nfit,dax,cxl}, arch/powerpc/platforms/pseries and fs."""

DAX_DRIVERS = frozenset({"dax", "device_dax", "dax_pmem", "dax_hmem", "dax_cxl"})
"""Those that a pmem block device does without."""

INITRD_MAGICS = (
    *(b"070701", b"070702"),  # cpio, newc (init/initramfs.c); early microcode is one too
    *(b"\x1f\x8b", b"\x1f\x9e", b"BZ", b"\x5d\x00", b"\xfd7", b"\x89L", b"\x02!", b"\x28\xb5"),
)
"""The latter are gzip (two), bzip2, lzma, xz, lzop, lz4 legacy and zstd (lib/decompress.c)."""

LEFTOVER = re.compile(r"\.(old|bak|sig|hmac|dpkg-\w+|rpm\w+)$|~$|rescue")
MODULE_DIRECTORIES = ("usr/lib/modules", "lib/modules")

SAID_BY_KEXEC = {
    "Required key not available": "the kernel wants a signed image: boot a signed kernel, or enrol its key (mokutil(1))",
    "Key was rejected": "the image's signature is not one that the running kernel trusts: enrol its key (mokutil(1))",
    "Bad message": "the image's signature is damaged: install the kernel package again",
    "Exec format error": "the image is not one for this machine: choose another kernel",
    "Device or resource busy": "another kexec is being loaded: try again",
    "not available": "the running kernel lacks CONFIG_KEXEC_FILE: boot one that has it",
    "Operation not permitted": "only root may; look at the sysctls kernel.kexec_load_* and /sys/kernel/security/lockdown",
}


class InstalledKernels:
    """Kernels under ``root``; ``kexec`` is the program that loads them, and may take ``timeout_s``."""

    def __init__(self, root: Path = Path("/"), kexec: str = "kexec", timeout_s: float = KEXEC_TIMEOUT_S) -> None:
        self._root = root
        self._kexec = kexec
        self._timeout_s = timeout_s

    def installed(self) -> list[Kernel]:
        """In /boot, and in the module directory, where Fedora's packages put them."""
        boot = self._root / "boot"
        packed = (image for top in MODULE_DIRECTORIES for image in self._root.glob(f"{top}/*/vmlinuz"))
        images = {image.parent.name: image for image in packed}
        images |= {image.name.removeprefix("vmlinuz-"): image for image in boot.glob("vmlinuz-*")}
        return [
            Kernel(
                version=version,
                image=str(images[version]),
                initrd=_first(boot / name.format(version) for name in ("initrd.img-{}", "initramfs-{}.img", "initrd-{}")),
                config=_first([boot / f"config-{version}", *(where / "config" for where in self._directories(version))]),
            )
            for version in sorted(images, key=version_key, reverse=True)
            if re.match(r"\d+\.\d", version) and not LEFTOVER.search(version)
        ]

    def command_line(self) -> str:
        return without_boot_loader(self._text("proc/cmdline"))

    def findings(self, kernel: Kernel, drivers: Collection[str]) -> list[Finding]:
        kernel = replace(kernel, version=kernel.version or _version_inside(kernel.image))
        return [
            *self._about_kexec(),
            *_about_image(kernel),
            *_about_initrd(kernel),
            *self._about_drivers(kernel, drivers),
            *self._about_root_on_pmem(kernel, drivers),
        ]

    def loaded(self) -> bool:
        return self._text("sys/kernel/kexec_loaded") == "1"

    async def load(self, kernel: Kernel, command_line: str) -> None:
        name = f"kernel {kernel.version or kernel.image}"
        files = [kernel.image, *([f"--initrd={kernel.initrd}"] if kernel.initrd else [])]
        await self._run(f"{name} could not be loaded", "--load", *files, f"--command-line={command_line}")
        if not self.loaded():
            raise self._refused(f"kexec loaded {name}, but the running kernel has none")

    async def unload(self) -> None:
        await self._run("the kernel that is loaded for a kexec could not be unloaded", "--unload")
        if self.loaded():
            raise self._refused("kexec unloaded the kernel, but the running kernel still has one")

    async def _run(self, failed: str, act: str, *arguments: str) -> None:
        try:
            kexec = await asyncio.create_subprocess_exec(
                self._kexec,
                act,
                "--kexec-file-syscall",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
            )
        except OSError as error:
            raise self._refused(f"{failed}: {self._kexec}: {error.strerror}", "install kexec-tools") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                output = (await kexec.communicate())[0].decode(errors="replace")
        except TimeoutError:
            raise self._refused(f"{failed}: kexec did not end within {self._timeout_s:g} s") from None
        finally:
            if kexec.returncode is None:
                kexec.kill()
                await kexec.wait()
        if kexec.returncode:
            said = "; ".join(line.strip() for line in output.splitlines() if line.strip())
            remedy = next((remedy for what, remedy in SAID_BY_KEXEC.items() if what in said), "")
            raise self._refused(f"{failed}: {said or f'kexec ended with {kexec.returncode}'}", remedy)

    def _refused(self, what: str, remedy: str = "") -> KernelRefused:
        """A load that fails leaves what was loaded before (kernel/kexec_file.c swaps images last)."""
        left = "a kexec would start the kernel that is loaded now" if self.loaded() else "no kernel is loaded for a kexec"
        return KernelRefused(what, left=left, remedy=remedy or "see the kernel's log (dmesg)")

    def _about_kexec(self) -> Iterator[Finding]:
        """Documentation/admin-guide/sysctl/kernel.rst; kernel_lockdown(7)."""
        for name, forbidden in (("kexec_load_disabled", "1"), ("kexec_load_limit_reboot", "0")):
            if self._text(f"proc/sys/kernel/{name}") == forbidden:
                yield Finding(
                    severity="error",
                    code="kexec-disabled",
                    what=f"kernel.{name} is {forbidden}: this boot takes no kernel for a kexec any more",
                    why="no kernel can be loaded, and the setting can't be taken back",
                    remedy=f"take kernel.{name} out of sysctl.d(5), and reboot with the guests shut down",
                )
        mode = re.search(r"\[(integrity|confidentiality)\]", self._text("sys/kernel/security/lockdown"))
        if mode:
            yield Finding(
                severity="warning",
                code="lockdown",
                what=f"the running kernel is locked down ({mode[1]})",
                why="it refuses to load an image without a signature that it trusts",
                remedy="choose a kernel that the distribution signed",
            )

    def _about_drivers(self, kernel: Kernel, drivers: Collection[str]) -> Iterator[Finding]:
        config, modules = _read_config(kernel), self._modules(kernel)
        unchecked = []
        for driver in sorted(drivers):
            symbol = SYMBOLS.get(driver, "")
            value = config.get(symbol, "n") if config and symbol else ""
            missing = modules.lacks(driver) if modules else "modules.dep"
            if value == "y" or not missing:
                continue
            if value == "n":
                yield _lacks(kernel, driver, "driver-not-configured", f"it was built without CONFIG_{symbol}")
            elif value == "m" or (modules and symbol):
                yield _lacks(kernel, driver, "driver-not-installed", f"{missing} is not there")
            elif modules:
                yield Finding(
                    severity="warning",
                    code="driver-not-found",
                    what=f"kernel {kernel.version} may lack the driver {driver}: {missing} is not there",
                    why="a part of a kernel that can't be a module is listed nowhere, so this may be a false alarm",
                    remedy="choose a kernel that is known to find the guests' memory",
                )
            else:
                unchecked.append(driver)
        if unchecked:
            yield Finding(
                severity="warning",
                code="drivers-not-checked",
                what=f"nothing tells whether kernel {kernel.version} has the drivers {', '.join(unchecked)}",
                why="it has no config or modules.dep; without a driver the guests' memory would not appear again",
                remedy="choose a kernel that is known to find the guests' memory, or install its modules",
            )

    def _about_root_on_pmem(self, kernel: Kernel, drivers: Collection[str]) -> Iterator[Finding]:
        """What an initrd mounts (/, /usr) has no other place to take its drivers from. /var comes later, from the root."""
        source, modules = self._pmem_under_root(), self._modules(kernel)
        if not (source and modules and kernel.initrd):
            return
        base = {"libnvdimm", "nd_pmem"}
        wanted = (base | (set(drivers) - DAX_DRIVERS)) & modules.loadable.keys()
        there = _modules_in_initrd(kernel.initrd)
        if there is None:
            yield Finding(
                severity="info",
                code="initrd-not-looked-at",
                what=f"{source} holds the root file system, and nobody looked for its drivers in {kernel.initrd}",
                why="an initrd without them can't mount it",
                remedy="look for them with lsinitramfs (initramfs-tools) or lsinitrd (dracut)",
            )
            return
        for driver in sorted(wanted - there):
            yield Finding(
                severity="error" if driver in base else "warning",
                code="driver-not-in-initrd",
                what=f"{kernel.initrd} lacks the module {driver}, and {source} holds the root file system",
                why="if it needs this driver the new kernel can't mount it, and the host does not come up",
                remedy=f"make the initrd again with {driver} in it (/etc/initramfs-tools/modules, or dracut's add_drivers)",
            )

    def _pmem_under_root(self) -> str:
        mountinfo = self._root / "proc/self/mountinfo"
        shown = {mount.point: mount.source for mount in mounts(mountinfo)} if mountinfo.exists() else {}
        return next((shown[at] for at in ("/", "/usr") if shown.get(at, "").startswith("/dev/pmem")), "")

    def _modules(self, kernel: Kernel) -> _Modules | None:
        for directory in self._directories(kernel.version):
            if (directory / "modules.dep").exists():
                return _Modules.read(directory)
        return None

    def _directories(self, version: str) -> list[Path]:
        return [self._root / top / version for top in MODULE_DIRECTORIES]

    def _text(self, path: str) -> str:
        try:
            return (self._root / path).read_text(errors="surrogateescape").strip()
        except OSError:
            return ""


class _Modules(msgspec.Struct, frozen=True):
    """What modules.builtin and modules.dep say (modules.dep(5)); of each module, the file and those that it depends on."""

    directory: Path
    builtin: frozenset[str]
    loadable: dict[str, list[str]]

    @classmethod
    def read(cls, directory: Path) -> _Modules:
        loadable = {}
        for line in _lines(directory / "modules.dep"):
            path, _, needs = line.partition(":")
            loadable[_module_name(path)] = [path, *needs.split()]
        return cls(directory, frozenset(map(_module_name, _lines(directory / "modules.builtin"))), loadable)

    def lacks(self, name: str) -> str:
        """What is not there of a module, or of those that it depends on; "" if nothing is."""
        if name in self.builtin:
            return ""
        if name not in self.loadable:
            return f"{name}.ko"
        return next((path for path in self.loadable[name] if not (self.directory / path).exists()), "")


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Orders versions as people read them: 6.12.10 after 6.12.9, and 6.12-rc1 before 6.12."""
    tokens = [
        (3, int(token), "") if token.isdigit() else (0 if token in {"rc", "~"} else 2, 0, token)
        for token in re.findall(r"\d+|[A-Za-z]+|~", version)
    ]
    return [*tokens, (1, 0, "")]


def _about_image(kernel: Kernel) -> Iterator[Finding]:
    problem = _unreadable(kernel.image) or _no_kernel(_head(kernel.image))
    if problem:
        yield Finding(
            severity="error",
            code="kernel-image",
            what=f"the image of kernel {kernel.version}, {kernel.image}, {problem}",
            why="it can't be loaded for a kexec",
            remedy="install the kernel package again, or choose another kernel",
        )


def _about_initrd(kernel: Kernel) -> Iterator[Finding]:
    if not kernel.initrd:
        yield Finding(
            severity="warning",
            code="initrd-none",
            what=f"kernel {kernel.version} has no initrd",
            why="unless it was built to do without one it can't mount the root file system",
            remedy=f"make one: update-initramfs -c -k {kernel.version}, or dracut --kver {kernel.version}",
        )
        return
    problem = _unreadable(kernel.initrd)
    if not problem and not _head(kernel.initrd).startswith(INITRD_MAGICS):
        problem = "is neither a cpio archive nor compressed in a way that a kernel knows"
    if problem:
        yield Finding(
            severity="error",
            code="initrd",
            what=f"the initrd of kernel {kernel.version}, {kernel.initrd}, {problem}",
            why="the new kernel could not mount the root file system, and the host would not come up",
            remedy=f"make it again: update-initramfs -u -k {kernel.version}, or dracut --force --kver {kernel.version}",
        )


def _unreadable(path: str) -> str:
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            return "is not a regular file"
        _head(path)
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "" if info.st_size else "is empty"


def _no_kernel(head: bytes) -> str:
    """What bzImage64_probe (arch/x86/kernel/kexec-bzimage64.c) would refuse; fields: Documentation/arch/x86/boot.rst."""
    if os.uname().machine != "x86_64":
        return ""
    if len(head) < 1024 or head[0x1FE:0x200] != b"\x55\xaa" or head[0x202:0x206] != b"HdrS":
        return "is not a bzImage"
    (protocol,), (flags,) = struct.unpack_from("<H", head, 0x206), struct.unpack_from("<H", head, 0x236)
    if protocol < 0x20C:
        return f"speaks boot protocol {protocol >> 8}.{protocol & 0xFF:02}, and a kexec needs 2.12"
    if not head[0x211] & 1 or not flags & 0b01:  # LOADED_HIGH, XLF_KERNEL_64
        return "is not a 64-bit bzImage"
    return "" if flags & 0b10 else "can't be loaded above 4 GiB"  # XLF_CAN_BE_LOADED_ABOVE_4G


def _version_inside(image: str) -> str:
    """What a bzImage says of itself (``kernel_version`` in Documentation/arch/x86/boot.rst), else its path."""
    try:
        start = _head(image, SETUP_BYTES)
        (at,) = struct.unpack_from("<H", start, 0x20E) if start[0x202:0x206] == b"HdrS" else (0,)
    except (OSError, struct.error):
        at = 0
    return start[0x200 + at :].split(b"\0")[0].decode(errors="replace").partition(" ")[0] if at else image


def _lacks(kernel: Kernel, driver: str, code: str, because: str) -> Finding:
    return Finding(
        severity="error",
        code=code,
        what=f"kernel {kernel.version} lacks the driver {driver}: {because}",
        why="the guests' memory would not appear after the kexec, and they would be held",
        remedy="choose another kernel"
        if code == "driver-not-configured"
        else "install all of its modules (a package such as linux-modules-extra), or choose another kernel",
    )


def _read_config(kernel: Kernel) -> dict[str, str] | None:
    """Options that are set, without ``CONFIG_``. None where there is no config."""
    if not kernel.config or not (lines := _lines(Path(kernel.config))):
        return None
    return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", "\n".join(lines), re.MULTILINE))


def _modules_in_initrd(initrd: str) -> set[str] | None:
    program = shutil.which("lsinitramfs") or shutil.which("lsinitrd")
    if not program:
        return None
    try:
        listed = subprocess.run([program, initrd], capture_output=True, timeout=LIST_INITRD_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    words = listed.stdout.decode(errors="replace").split()
    return {_module_name(word) for word in words if re.search(r"\.ko(\.\w+)?$", word)}


def _module_name(path: str) -> str:
    """As /sys/module has it: nd_pmem of kernel/drivers/nvdimm/nd_pmem.ko.xz."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _first(paths: Iterable[Path]) -> str:
    return next((str(path) for path in paths if path.exists()), "")


def _head(path: str, size_bytes: int = 1024) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(size_bytes)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
