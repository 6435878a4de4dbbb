# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels on disk, and the one that waits for a kexec.

Whether a new kernel can mount the root, and brings what the guests' memory needs to appear again, is read from its files
before any guest stops.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from msgspec.structs import replace

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.core.upgrade.command_line import without_boot_loader
from cpr_agent.host.kernels import booting, loading
from cpr_agent.host.kernels.files import exists, head, text
from cpr_agent.host.kernels.images import is_uki, version_inside
from cpr_agent.host.kernels.layout import Candidate, Layout
from cpr_agent.host.kernels.memory_drivers import about_drivers
from cpr_agent.host.kernels.modules import Drivers, Modules, about_modules, about_packages, read_config
from cpr_agent.host.kernels.versions import is_version, preference

TEXT_BYTES = 1 << 20
RAMDISK_SIZE = 0x21C
"""In the boot parameters that the running kernel was given (boot.rst)."""


class KernelsOnDisk:
    """See InstalledKernels, which is this one once it is asked."""

    def __init__(self, root: Path, kexec: str, timeout_s: float) -> None:
        self._root = root
        self._layout = Layout(root)
        self._loader = loading.Loader(kexec, timeout_s, self.loaded)

    def installed(self) -> list[Kernel]:
        found = self._layout.kernels()
        return [found[version] for version in sorted(found, key=preference(self._running()), reverse=True)]

    def command_line(self) -> str:
        return without_boot_loader(self._text("proc/cmdline"))

    def findings(self, kernel: Kernel, drivers: Collection[str]) -> list[Finding]:
        kernel = replace(kernel, version=kernel.version or version_inside(kernel.image) or kernel.image)
        others = [one for version, one in self._layout.kernels().items() if version != kernel.version]
        own = Drivers(read_config(kernel.config), self._modules(kernel.version))
        return [
            *self._about_kexec(),
            *self._about_entries(kernel),
            *booting.about_image(kernel),
            *booting.about_boot(kernel, own, drivers, self._situation(others)),
            *self._about_modules(kernel, own, others),
            *about_drivers(kernel, own, drivers),
        ]

    def loaded(self) -> bool:
        return self._text("sys/kernel/kexec_loaded") == "1"

    async def load(self, kernel: Kernel, command_line: str) -> None:
        await self._loader.load(kernel, command_line)

    async def unload(self) -> None:
        await self._loader.unload()

    def _running(self) -> str:
        return self._text("proc/sys/kernel/osrelease") or os.uname().release

    def _situation(self, others: list[Kernel]) -> booting.Situation:
        having = next((one.version for one in others if one.initrd or is_uki(one.image)), "")
        words = "the running kernel" if self._began_with_initrd() else f"kernel {having}" if having else ""
        return booting.Situation(
            root=self._root, command_line=self.command_line(), initrds=words, running=self._modules(self._running())
        )

    def _began_with_initrd(self) -> bool:
        """Said by its boot parameters, where they are x86's, and by systemd-boot on its command line."""
        try:
            parameters = head(self._root / "sys/kernel/boot_params/data", 4096)
        except OSError:
            parameters = b""
        given = len(parameters) >= RAMDISK_SIZE + 4 and struct.unpack_from("<I", parameters, RAMDISK_SIZE)[0]
        return bool(given or re.search(r"(^|\s)initrd=", self._text("proc/cmdline")))

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

    def _about_entries(self, kernel: Kernel) -> Iterator[Finding]:
        """What the boot loader's entries say."""
        for entry in self._layout.bad_entries(kernel.version):
            yield Finding(
                severity="warning",
                code="boot-entry",
                what=f"the boot loader's entry {entry.path} is of no use: {entry.problem}",
                why="the agent looked for the kernel's files without it, and the boot loader may not find them",
                remedy="write it again (kernel-install add, grub2-mkconfig), or remove it",
            )
        where = self._layout.candidate(kernel) or Candidate(kernel.version, kernel.image)
        named = where.entry or kernel.image
        if where.tries_left == 0 and kernel.version != self._running():
            yield Finding(
                severity="error",
                code="boot-entry",
                what=f"the boot loader has given kernel {kernel.version} up: {named} has no tries left",
                why="it did not come up each time that it was started",
                remedy="choose another kernel; once this one works: systemd-bless-boot good",
            )
        if where.others:
            yield Finding(
                severity="warning",
                code="initrd-several",
                what=f"{named} names several initrds, and a kexec takes one: {', '.join(where.others)} left out",
                why=f"{kernel.initrd} has to do alone",
                remedy="join them: cat A B >C; and name it with --kernel-image and --initrd",
            )

    def _about_modules(self, kernel: Kernel, own: Drivers, others: list[Kernel]) -> Iterator[Finding]:
        if not is_version(kernel.version):
            return
        versions = {self._running(), *(one.version for one in others)} - {kernel.version}
        wanted = bool(self._text("proc/modules")) or any(map(self._modules, versions))
        yield from about_modules(kernel, self._layout.module_directories(kernel.version), own, wanted=wanted)
        yield from about_packages(kernel, self._root / "var/lib/dpkg/status")

    def _modules(self, version: str) -> Modules | None:
        for directory in self._layout.module_directories(version):
            if exists(directory / "modules.dep"):
                return Modules.read(directory)
        return None

    def _text(self, path: str) -> str:
        return text(self._root / path, TEXT_BYTES).strip()
