# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels on disk: which there are, what speaks against each, and the one that is loaded for a kexec.

``layout`` finds them as distributions and boot loaders lay them out, ``versions`` orders them, the other modules look at
one: its ``images``, its ``archive`` (the initrd), its ``modules``, and ``roots``, which is what it has to mount.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpr_agent.core.model import Finding, Kernel
    from cpr_agent.host.kernels.installed import KernelsOnDisk

LOAD_TIMEOUT_S = 60.0


def __getattr__(name: str) -> Any:
    """``version_key``, for whoever orders versions as these are: imported when it is asked for, like all below."""
    if name != "version_key":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cpr_agent.host.kernels.versions import version_key

    return version_key


class InstalledKernels:
    """Kernels under ``root``; ``kexec`` is the program that loads them, and may take ``timeout_s``. Implements
    core.ports.Kernels. The modules behind it are imported at the first question: guests wait for the agent's start, which
    asks none."""

    def __init__(self, root: Path = Path("/"), kexec: str = "kexec", timeout_s: float = LOAD_TIMEOUT_S) -> None:
        self._root = root
        self._kexec = kexec
        self._timeout_s = timeout_s

    @cached_property
    def _kernels(self) -> KernelsOnDisk:
        from cpr_agent.host.kernels.installed import KernelsOnDisk

        return KernelsOnDisk(self._root, self._kexec, self._timeout_s)

    def installed(self) -> list[Kernel]:
        return self._kernels.installed()

    def command_line(self) -> str:
        return self._kernels.command_line()

    def findings(self, kernel: Kernel, drivers: Collection[str]) -> list[Finding]:
        return self._kernels.findings(kernel, drivers)

    def loaded(self) -> bool:
        return self._kernels.loaded()

    async def load(self, kernel: Kernel, command_line: str) -> None:
        await self._kernels.load(kernel, command_line)

    async def unload(self) -> None:
        await self._kernels.unload()
