# SPDX-License-Identifier: GPL-2.0-or-later
"""Reasons why a VM can't be saved now, and what its definition allows to be done then. Asks, and stops no guest."""

from __future__ import annotations

from itertools import takewhile
from typing import Literal

import msgspec

from cpr_agent.core import inventory
from cpr_agent.core.acts.sleep import sleep_reasons
from cpr_agent.core.hooks import vetoes
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Inventory, Launch, Policy, QemuFacts, Survives, VmState
from cpr_agent.core.run_states import RUN_STATES, SAVEABLE
from cpr_agent.errors import (
    AlreadySaved,
    Blocked,
    CprError,
    DeviceMissing,
    MemoryChanged,
    QemuFailed,
    QemuUnreachable,
    WrongState,
)

Fallback = Literal["wait", "shut-down", "refuse"]


def obstacle(machine: Machine) -> CprError | None:
    """Why it has no guest that could be saved now, whatever QEMU might say; None also where a checkpoint has the guest."""
    nothing = "nothing was saved"
    if machine.pid and machine.state is VmState.UNREACHABLE:
        return QemuUnreachable(
            "can't be saved: its QEMU does not answer",
            vm=machine.name,
            left=nothing,
            remedy="its storage or swtpm may hang, or another client hold its socket: mend that, and "
            f"`cprctl resume {machine.name}` looks at it again; `cprctl stop --hard {machine.name}` would lose its guest",
        )
    if not machine.pid or machine.qemu is None:
        return WrongState(f"is {machine.state} and can't be saved", vm=machine.name, left=nothing)
    row = RUN_STATES[machine.run_state]
    if row.problem and not (machine.stands_saved and machine.checkpointed):
        what = f"can't be saved: {row.problem} (run state {machine.run_state})"
        return WrongState(what, vm=machine.name, left=nothing, remedy=row.remedy.format(vm=machine.name))
    return None


class Saveable(msgspec.Struct, frozen=True):
    """How the QEMU of a guest that can be saved was started, and what it has; None for one that is saved."""

    launch: Launch
    has: Inventory | None


async def blocked_reasons(machine: Machine, need: Survives = Survives.QEMU_RESTART) -> list[str]:
    """Why it can't be saved as it is now; empty also where there is nothing to save."""
    _, reasons = await _look(machine, need)
    return reasons


async def _look(machine: Machine, need: Survives) -> tuple[Inventory | None, list[str]]:
    launch, qemu = machine.launched(), machine.qemu
    if qemu is None or launch is None or machine.run_state not in SAVEABLE:
        return None, []
    has, changed = await inventory.reasons(machine.ports, qemu, launch, need)
    reasons = await qemu.blocked_reasons(launch) + changed + await sleep_reasons(machine, qemu, has)
    return has, reasons + await _memory_reasons(machine, launch)


async def _memory_reasons(machine: Machine, launch: Launch) -> list[str]:
    """Why the next QEMU would not find its guest's RAM, which this one has open."""
    try:
        await machine.relocated(launch.memory)
    except (DeviceMissing, MemoryChanged) as error:
        remedy = "bring back under this name what its QEMU has open, or shut the guest down and start it afresh"
        return [f"{error.what}: {remedy}"]
    return []


async def require_live(machine: Machine, need: Survives) -> Saveable:
    """Raises CprError if its guest can't be saved."""
    if machine.live_checkpoint():
        remedy = f"`cprctl resume {machine.name}` takes the save back"
        raise AlreadySaved("is already saved", vm=machine.name, remedy=remedy)
    return await require_saveable(machine, need)


async def require_saveable(machine: Machine, need: Survives, *, hooks: bool = True) -> Saveable:
    """``hooks``: ask those of the admin too. Raises WrongState, QemuUnreachable, Blocked with every reason."""
    if error := obstacle(machine):
        raise error
    launch = machine.launched()
    if launch is None:
        raise Blocked(["the record of how its QEMU was started is gone"], vm=machine.name)
    has, reasons = await _look(machine, need)
    reasons += await vetoes(machine) if hooks else []
    reasons += [
        f"its RAM in {one.place} ({one.filesystem}) does not survive a {need}"
        for one in launch.memory
        if not one.outlives(need)
    ]
    if reasons:
        raise Blocked(reasons, vm=machine.name)
    return Saveable(launch, has)


async def until_saveable(machine: Machine) -> None:
    """Wait until nothing blocks a save any more, if the definition says so, and as long as it says. Raises QemuFailed."""
    launch = machine.launched()
    if machine.qemu and launch and machine.definition and waits_when_blocked(machine):
        await machine.qemu.until_saveable(launch, machine.definition.save.blocked_wait)


def saved_in_volatile(machine: Machine, need: Survives) -> bool:
    """Whether it is saved already, in RAM that would not outlive ``need``."""
    manifest = machine.readable_checkpoint()
    return manifest is not None and not all(one.outlives(need) for one in manifest.memory)


def may_shut_down(machine: Machine, policy: Policy) -> bool:
    """Whether its guest may be shut down in order when it cannot be saved."""
    return policy is not Policy.ALL_OR_NOTHING or "shut-down" in _fallbacks(machine)


def waits_when_blocked(machine: Machine) -> bool:
    """Whether a save waits for the end of its obstacles."""
    return "wait" in _fallbacks(machine)


def _fallbacks(machine: Machine) -> list[Fallback]:
    """The steps to try one after the other when CPR is blocked; "refuse" is the end of them."""
    steps = machine.definition.save.when_blocked if machine.definition else ()
    return list(takewhile(lambda step: step != "refuse", steps))


class Successor:
    """The QEMU that is installed now, and would load the guest after a kexec."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._asked: tuple[str, ...] = ()
        self._reasons: list[str] = []

    async def reasons(self) -> list[str]:
        """Why it could not load the guest; empty also where it is the one that runs. It is started in the VM's spare place
        without a machine, and asked once: for whoever holds the VM's lock."""
        machine = self._machine
        launch = machine.launched()
        if machine.qemu is None or launch is None:
            return []
        files, path = machine.ports.files, launch.base_argv[0]
        running, installed = files.program_identity(f"/proc/{machine.pid}/exe"), files.program_identity(path)
        if running == installed:
            return []
        if not installed:
            return [f"the QEMU that would load it, {path}, is not there any more"]
        facts = await machine.qemu.facts(launch)
        asked = (installed, facts.version, facts.machine_type)
        if self._asked != asked and not await _memory_reasons(machine, launch):  # it opens the RAM, too
            self._asked, self._reasons = asked, await self._ask(launch, facts)
        return self._reasons

    async def _ask(self, launch: Launch, facts: QemuFacts) -> list[str]:
        machine = self._machine
        try:
            if machine.own.delegated:
                lacking = await machine.own.lacks(launch, facts)
            else:
                async with machine.spare_qemu(machine.ports.definitions.plan_probe(launch)) as qemu:
                    lacking = await qemu.lacks(facts)
        except QemuFailed as error:
            return [f"the QEMU that would load it does not work: {error.what}"]
        return [f"the QEMU that would load it lacks what it needs: {'; '.join(map(str, lacking))}"] if lacking else []
