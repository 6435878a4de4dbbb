# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads a kernel for a kexec, by the program kexec(8).

``--kexec-file-syscall`` only: it is the form that works under lockdown, and the kernel checks what it is given
(kexec_file_load(2)).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator

from cpr_agent.core.model import Kernel
from cpr_agent.core.undo import uninterrupted
from cpr_agent.errors import KernelRefused
from cpr_agent.host.kernels.files import open_regular
from cpr_agent.host.kernels.images import NoUki, Part, read_uki

SAID_BY_KEXEC = {
    "Required key not available": "the kernel wants a signed image: boot a signed kernel, or enrol its key (mokutil(1))",
    "Key was rejected": "the image's signature is not one that the running kernel trusts: enrol its key (mokutil(1))",
    "Bad message": "the image's signature is damaged: install the kernel package again",
    "Exec format error": "the image is not one for this machine: choose another kernel",
    "Device or resource busy": "another kexec is being loaded: try again",
    "not available": "the running kernel lacks CONFIG_KEXEC_FILE: boot one that has it",
    "Operation not permitted": "only root may; look at the sysctls kernel.kexec_load_* and /sys/kernel/security/lockdown",
}


class Loader:
    """``kexec`` is the program, and may take ``timeout_s``; ``loaded`` asks whether a kernel waits for a kexec."""

    def __init__(self, kexec: str, timeout_s: float, loaded: Callable[[], bool]) -> None:
        self._kexec = kexec
        self._timeout_s = timeout_s
        self._loaded = loaded

    async def load(self, kernel: Kernel, command_line: str) -> None:
        """Raises KernelRefused."""
        name = f"kernel {kernel.version or kernel.image}"
        failed = f"{name} could not be loaded"
        with contextlib.ExitStack() as stack:
            try:
                image, initrd, fds = await asyncio.to_thread(stack.enter_context, _taken_apart(kernel))
            except (OSError, NoUki) as error:
                raise self._refused(f"{failed}: {kernel.image}: {error}") from error
            files = [image, *([f"--initrd={initrd}"] if initrd else [])]
            await self._run(failed, "--load", *files, f"--command-line={command_line}", fds=fds)
        if not self._loaded():
            raise self._refused(f"kexec loaded {name}, but the running kernel has none")

    async def unload(self) -> None:
        """Raises KernelRefused."""
        await self._run("the kernel that is loaded for a kexec could not be unloaded", "--unload")
        if self._loaded():
            raise self._refused("kexec unloaded the kernel, but the running kernel still has one")

    async def _run(self, failed: str, act: str, *arguments: str, fds: tuple[int, ...] = ()) -> None:
        try:
            kexec = await asyncio.create_subprocess_exec(
                self._kexec,
                act,
                "--kexec-file-syscall",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=fds,
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
                await uninterrupted(kexec.wait())  # the kernel may still load what it was given: see whether it did, then
        if kexec.returncode:
            said = "; ".join(line.strip() for line in output.splitlines() if line.strip())
            remedy = next((remedy for what, remedy in SAID_BY_KEXEC.items() if what in said), "")
            raise self._refused(f"{failed}: {said or f'kexec ended with {kexec.returncode}'}", remedy)

    def _refused(self, what: str, remedy: str = "") -> KernelRefused:
        """A load that fails leaves what was loaded before (kernel/kexec_file.c swaps images last)."""
        left = "a kexec would start the kernel that is loaded now" if self._loaded() else "no kernel is loaded for a kexec"
        return KernelRefused(what, left=left, remedy=remedy or "see the kernel's log (dmesg)")


@contextlib.contextmanager
def _taken_apart(kernel: Kernel) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Image and initrd as kexec is to be given them, with the descriptors that it needs for that: kexec_file_load knows
    nothing of unified kernel images, so their parts are copied into memory. Raises NoUki, OSError."""
    try:
        uki = read_uki(kernel.image)
    except NoUki:
        yield kernel.image, kernel.initrd, ()
        return
    with contextlib.ExitStack() as stack:
        parts = [uki.sections[".linux"]]
        if not kernel.initrd and ".initrd" in uki.sections:
            parts.append(uki.sections[".initrd"])
        fds = tuple(_copied(uki.path, part, stack) for part in parts)
        image, *initrd = [f"/proc/self/fd/{fd}" for fd in fds]
        yield image, kernel.initrd or "".join(initrd), fds


def _copied(path: str, part: Part, stack: contextlib.ExitStack) -> int:
    """A descriptor that can't be written to: the kernel takes no file that somebody may change (deny_write_access)."""
    with open_regular(path) as file, open(os.memfd_create("cpr-kernel"), "wb") as copy:  # noqa: PTH123 - a descriptor
        file.seek(part.offset)
        left = part.size
        while left and (chunk := file.read(min(left, 1 << 20))):
            copy.write(chunk)
            left -= len(chunk)
        copy.flush()
        fd = os.open(f"/proc/self/fd/{copy.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
