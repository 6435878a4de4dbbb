# SPDX-License-Identifier: GPL-2.0-or-later
"""How each generation of QEMU is told to save and load with RAM left in place. One class each, one interface.

The choice depends on QEMU's commands, migration capabilities and parameters, not on its version. A guest waits for the
answer at each load, and the schema (``query-qmp-schema``) is 200 KB that QEMU makes in some 30 ms. What
was run for real is in docs/dialects.md.
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from cpr_agent.errors import QemuFailed, QemuRefused, SaveFailed
from cpr_agent.vm.qmp import Qmp
from cpr_agent.vm.replies import (
    ADD_FD,
    CAPABILITIES,
    COMMANDS,
    PARAMETERS,
    SCHEMA,
    Capability,
    Parameters,
    Query,
)

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]
_NO_CAPABILITIES = [{"capability": "x-ignore-shared", "state": False}]
CONFLICTING = (
    *("postcopy-ram", "background-snapshot", "x-colo", "multifd", "mapped-ram"),
    *("return-path", "pause-before-switchover", "dirty-bitmaps", "compress", "block"),
)
"""Capabilities that a save or its load fails with: QEMU refuses it, waits for an answer of the other side, or for
``migrate-continue`` while its guest stands, or writes what no QEMU reads without them."""


class Dialect(ABC):
    """``prepare`` before either act. Both acts only start it, and completion is the MIGRATION event's to tell; unless they
    are ``synchronous``."""

    name: ClassVar[str]
    synchronous: ClassVar[bool] = False
    keeps_suspended: ClassVar[bool]
    """False where a save wakes a suspended guest (QEMU up to 8.2)."""
    load_runs_guest: ClassVar[bool] = False
    """See core.ports.Qemu."""

    async def prepare(self, qmp: Qmp) -> None:
        await qmp.execute("migrate-set-capabilities", {"capabilities": _CAPABILITIES})

    @abstractmethod
    async def save(self, qmp: Qmp, fd: int) -> None: ...

    @abstractmethod
    async def load(self, qmp: Qmp, fd: int) -> None: ...


class CprReboot(Dialect):
    """QEMU >= 8.2: ``mode=cpr-reboot`` and ``file:`` on a descriptor set, so that QEMU needs no right to any path."""

    name = "cpr-reboot"
    keeps_suspended = True

    async def prepare(self, qmp: Qmp) -> None:
        await super().prepare(qmp)
        await qmp.execute("migrate-set-parameters", {"mode": "cpr-reboot"})

    async def transfers(self, qmp: Qmp) -> bool:
        """Whether it can hand its guest over to another QEMU beside it (cpr-transfer); only the schema tells."""
        return any("cpr-transfer" in entity.values for entity in await qmp.ask(SCHEMA))

    async def prepare_transfer(self, qmp: Qmp) -> None:
        """For handing a guest over, and for taking one: only where it ``transfers``. ``prepare`` takes it back."""
        await super().prepare(qmp)
        await qmp.execute("migrate-set-parameters", {"mode": "cpr-transfer"})

    async def save(self, qmp: Qmp, fd: int) -> None:
        async with fdset_for(qmp, fd) as path:
            await qmp.execute("migrate", {"uri": f"file:{path}"})

    async def load(self, qmp: Qmp, fd: int) -> None:
        async with fdset_for(qmp, fd) as path:
            await qmp.execute("migrate-incoming", {"uri": f"file:{path}"})


class IgnoreShared(Dialect):
    """QEMU 5.0 to 8.1: x-ignore-shared alone, to a descriptor given by name. (``exec:`` hides failures of the program.)"""

    name = "ignore-shared"
    keeps_suspended = False

    async def save(self, qmp: Qmp, fd: int) -> None:
        await qmp.execute("getfd", {"fdname": "cpr-state"}, fd=fd)
        await qmp.execute("migrate", {"uri": "fd:cpr-state"})

    async def load(self, qmp: Qmp, fd: int) -> None:
        await qmp.execute("getfd", {"fdname": "cpr-state"}, fd=fd)
        await qmp.execute("migrate-incoming", {"uri": "fd:cpr-state"})


class CprSave(Dialect):
    """The original proposal (S. Sistare, "Live Update", 2020 to 2022), never merged: ``cpr-save`` and ``cpr-load``, which
    packaging/qemu-cpr adds to Debian's QEMU.

    ``cpr-save`` stops the guest by itself, and its state file says whether it ran. A guest that ran does so again by
    ``cpr-load``, also with ``-S``. The proposal's new QEMU has no ``-incoming``; ours has, because only that keeps QEMU
    from writing firmware or a kernel into the RAM (measured).
    """

    name = "cpr-save"
    keeps_suspended = True
    synchronous = True
    load_runs_guest = True
    saved_as: ClassVar[str] = "save-vm"
    """The run state after a save, where all others say postmigrate. That of a guest that was paused stays ``paused``."""

    async def prepare(self, qmp: Qmp) -> None:
        """RAM is never part of what it saves. The mode is that whose blockers QEMU names, where it has one.

        A QEMU may have the capability, by the load of a state that a migration saved, say. It is written to the file, and
        cpr-load refuses the file in a QEMU that has it not (configuration_validate_capabilities of migration/savevm.c).
        """
        await qmp.execute("migrate-set-capabilities", {"capabilities": _NO_CAPABILITIES})
        if (await qmp.ask(PARAMETERS)).mode is not None:
            await qmp.execute("migrate-set-parameters", {"mode": "cpr-reboot"})

    async def save(self, qmp: Qmp, fd: int) -> None:
        try:
            async with fdset_for(qmp, fd) as path:
                await qmp.execute("cpr-save", {"filename": path, "mode": "reboot"})
        except QemuRefused as error:
            raise SaveFailed(f"QEMU could not write its state: {with_cause(error.what)}", vm=qmp.vm) from error

    async def load(self, qmp: Qmp, fd: int) -> None:
        async with fdset_for(qmp, fd) as path:
            await qmp.execute("cpr-load", {"filename": path})


def with_cause(what: str) -> str:
    """QEMU gives some errors by their number alone, or by the name of a device."""
    if "tpm-emulator" in what:
        return f"{what} (swtpm does not give the TPM's state: look whether it runs)"
    number = re.search(r"Error -(\d+) while saving|migration_stop_vm failed, error (\d+)", what)
    return f"{what} ({os.strerror(int(number[1] or number[2]))})" if number else what


async def fdset(qmp: Qmp, fd: int) -> str:
    """A path by which QEMU opens ``fd``, also where it may not open the file itself, until the connection ends."""
    added = await qmp.ask(ADD_FD, fd=fd)
    return f"/dev/fdset/{added.fdset_id}"


@contextlib.asynccontextmanager
async def fdset_for(qmp: Qmp, fd: int) -> AsyncIterator[str]:
    """Likewise for the one command in the block. QEMU lets go of it once it has read or written: a file that was removed
    would take up its room on the disk for as long as the guest lives."""
    path = await fdset(qmp, fd)
    try:
        yield path
    finally:
        with contextlib.suppress(QemuFailed):  # it has ended, or the connection has
            await qmp.execute("remove-fd", {"fdset-id": int(path.rpartition("/")[2])})


async def choose(qmp: Qmp) -> Dialect:
    """Raises QemuFailed if it has none."""
    listed, *migration = await qmp.ask_all([(COMMANDS, {}), *_MIGRATION])
    commands = {command.name for command in listed or ()}
    return CprSave() if {"cpr-save", "cpr-load"} <= commands else _by_migration(qmp.vm, *migration)


async def choose_migration(qmp: Qmp) -> Dialect:
    """That of QEMU as it is without our patch. Raises QemuFailed if it has none."""
    return _by_migration(qmp.vm, *await qmp.ask_all(_MIGRATION))


_MIGRATION: list[tuple[Query[Any], dict[str, object]]] = [(CAPABILITIES, {}), (PARAMETERS, {})]


def _by_migration(vm: str, capabilities: list[Capability] | None, parameters: Parameters | None) -> Dialect:
    """Raises QemuFailed."""
    if "x-ignore-shared" not in {one.capability for one in capabilities or ()}:
        what = "this QEMU cannot leave RAM in place (no x-ignore-shared)"
        raise QemuFailed(what, vm=vm, remedy="use QEMU 5.0 or newer")
    # The parameter came together with its value cpr-reboot (QEMU 8.2, migration/options.c).
    return CprReboot() if parameters and parameters.mode is not None else IgnoreShared()
