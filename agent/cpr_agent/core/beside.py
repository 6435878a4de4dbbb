# SPDX-License-Identifier: GPL-2.0-or-later
"""Two QEMUs of one VM for a while: the names of their sockets belong to the one that is the VM's own at the end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial

from cpr_agent.core.machine import Machine
from cpr_agent.core.ports import Qemu
from cpr_agent.core.undo import uninterrupted
from cpr_agent.errors import QemuFailed, StorageSilent


@contextlib.asynccontextmanager
async def keeping_sockets(machine: Machine, qemu: Qemu) -> AsyncIterator[None]:
    """While another QEMU with the arguments of ``qemu`` starts beside it, and takes the names that it listens on. Raises
    QemuFailed, StorageSilent, OSError."""
    names = await qemu.listening()
    try:
        keep = partial(machine.ports.sockets.keep_sockets, names, machine.pid)
        await uninterrupted(machine.ports.threads.run(machine.name, keep))  # else it goes on beside what undoes it
        yield
    finally:
        await uninterrupted(_settle(machine, names))


async def settle_sockets(machine: Machine) -> None:
    """An earlier agent may have ended in ``keeping_sockets``."""
    if machine.qemu:
        with contextlib.suppress(QemuFailed):  # nothing else may fail by it
            await _settle(machine, await machine.qemu.listening())


async def _settle(machine: Machine, names: Sequence[str]) -> None:
    """Their directories may be on storage that does not answer: nothing fails by that, either."""
    settle = partial(machine.ports.sockets.settle_sockets, names, machine.pid)
    with contextlib.suppress(StorageSilent):
        await machine.ports.threads.run(machine.name, settle)
