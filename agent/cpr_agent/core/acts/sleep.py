# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that must sleep while it is saved: a device of the host keeps state that only the guest's own driver can put
aside (QEMU, hw/vfio/cpr.c)."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from cpr_agent.core.gate import Unbroken, wake
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Inventory, RunState
from cpr_agent.core.past import VmEvent
from cpr_agent.core.ports import Qemu
from cpr_agent.errors import GuestAgentFailed, ProofFailed, QemuFailed, SaveFailed

log = logging.getLogger(__name__)

LATE_SLEEP_S = 300.0
"""After a suspend timed out, a late suspend within this time is undone by waking the guest."""


class Sleep(msgspec.Struct, frozen=True):
    """A guest that sleeps for its save, ``since`` (epoch s); ``woke`` is set if it wakes before the save is done."""

    since: float
    woke: asyncio.Event


async def must_sleep(machine: Machine, qemu: Qemu, has: Inventory) -> bool:
    """Whether a save has to put the guest to sleep before, whose QEMU ``has`` this."""
    return _must_sleep_with(machine, await qemu.vfio_devices(has.devices))


def _must_sleep_with(machine: Machine, devices: list[str]) -> bool:
    wanted = machine.definition.save.suspend if machine.definition else "auto"
    return machine.run_state is RunState.RUNNING and (wanted == "always" or (wanted == "auto" and bool(devices)))


async def sleep_reasons(machine: Machine, qemu: Qemu, has: Inventory) -> list[str]:
    """Why a guest that must sleep for a save would not."""
    devices = await qemu.vfio_devices(has.devices)
    if _must_sleep_with(machine, devices):
        problem = await qemu.sleep_problem()
        return [f"it must sleep while it is saved (save.suspend), and can't: {problem}"] if problem else []
    if machine.run_state is RunState.SUSPENDED or not devices:
        return []
    paused = machine.run_state is RunState.PAUSED
    why = "is paused" if paused else "is not to be put to sleep (save.suspend is never)"
    return [f"it has {', '.join(devices)}, which can be saved only while the guest sleeps, and it {why}"]


async def fall_asleep(machine: Machine, qemu: Qemu) -> float:
    """Returns since when the guest sleeps (epoch s). Raises SaveFailed, QemuFailed; the guest may go to sleep late."""
    machine.record(VmEvent.SUSPEND)
    try:
        return await qemu.suspend(machine.definition.save.suspend_timeout if machine.definition else 60.0)
    except GuestAgentFailed as error:
        raise SaveFailed(
            f"could not be saved: it must sleep for that, and {error.what}",
            vm=machine.name,
            left="the guest was not stopped; should it go to sleep late, it is woken",
            remedy="the guest's own log says what keeps it awake",
        ) from error


async def end_sleep(machine: Machine) -> None:
    """Wake a guest that the agent has put to sleep, unless it is saved: then its load wakes it."""
    if machine.checkpointed or not machine.past.put_to_sleep:
        return
    machine.expect_late_sleep(LATE_SLEEP_S)
    await _try_to_wake(machine)


async def wake_late_sleeper(machine: Machine) -> None:
    if machine.run_state is RunState.SUSPENDED and machine.expects_late_sleep and not machine.checkpointed:
        log.warning("VM %s: its guest went to sleep after the suspend had timed out; waking it", machine.name)
        await _try_to_wake(machine)


async def _try_to_wake(machine: Machine) -> None:
    """A guest that stays asleep is no reason for the caller to fail, which may be about to look at the other VMs."""
    try:
        await wake(machine, Unbroken.ASLEEP)
    except (QemuFailed, ProofFailed) as error:
        log.error("VM %s: its guest was put to sleep, and could not be woken: %s", machine.name, error.what)
