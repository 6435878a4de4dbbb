# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest boots, or is powered off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from msgspec.structs import replace

from cpr_agent.core import inventory
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Definition, RunState, ram_of
from cpr_agent.core.past import VmEvent
from cpr_agent.core.proof import naming, refuse_other_users, refuse_overlap
from cpr_agent.core.separation import CLOSED_IMAGE, image_findings
from cpr_agent.errors import AlreadyRunning, AlreadySaved, QemuFailed, StorageSilent, WrongState

log = logging.getLogger(__name__)


async def start(machine: Machine) -> None:
    """Raises AlreadySaved while a live checkpoint holds the guest, AlreadyRunning, and CprError."""
    definition = machine.usable_definition()
    if machine.live_checkpoint():
        raise AlreadySaved(
            "is saved, and starting it afresh would destroy the saved guest",
            vm=machine.name,
            left="the checkpoint was not touched",
            remedy=f"continue it with `cprctl load {machine.name}`, or give it up with `cprctl discard {machine.name}`",
        )
    await machine.derive()
    if machine.pid:
        raise AlreadyRunning(f"is already {machine.state}", vm=machine.name)
    await boot(machine, definition)
    if machine.past.awaits_cold_start:
        machine.record(VmEvent.COLD_STARTED)


async def boot(machine: Machine, definition: Definition) -> None:
    """Start QEMU on memory that is the VM's own. Raises CprError."""
    ports, neighbours = machine.ports, machine.neighbours
    user = definition.vm.user or await ports.runner.assign_user(machine.name)
    definition = replace(definition, vm=replace(definition.vm, user=user))
    with naming(machine.name):
        await ports.memory.prepare(definition.memory, definition.vm.user)
        located = await ports.memory.locate(definition.memory, machine.settings.agent.device_timeout)
        refuse_overlap(machine.name, ram_of(located), await neighbours.claimed(machine.name))
        await refuse_other_users(ports, machine.name, located, {machine.pid, *neighbours.live_pids()})
    launch = machine.stamped(ports.definitions.plan_start(definition, located))
    await inventory.keep_firmware(ports, launch)
    await machine.await_companions(launch)
    machine.record(VmEvent.START)
    try:
        qemu = await machine.launch(launch)
    except QemuFailed as error:
        looking = partial(image_findings, ports, machine.name, user, launch.argv)
        with contextlib.suppress(StorageSilent):
            found = await ports.threads.run(machine.name, looking)
            error.remedy = next((one.remedy for one in found if one.code == CLOSED_IMAGE), error.remedy)
        raise
    try:
        await inventory.record(ports, machine.name, await inventory.take(ports, qemu, launch))
    except (QemuFailed, StorageSilent) as error:  # the guest runs; its first check looks again
        log.warning("VM %s: its QEMU does not tell what it has: %s", machine.name, error.what)
    await asyncio.to_thread(ports.programs.forget, machine.name)
    machine.spawn(machine.prepare_next())


async def press_power_button(machine: Machine) -> None:
    """Then, after the definition's shutdown-timeout, quit QEMU. Raises WrongState, QemuFailed."""
    if await _has_button(machine) and await _shut_down(machine):
        return
    await machine.end()


async def power_off(machine: Machine) -> None:
    """The same, and no end for a QEMU whose guest has no power button now, or does not heed it. Raises WrongState,
    QemuFailed."""
    if not await _has_button(machine):
        what = f"is {machine.state}, and its power button can't be pressed"
        raise WrongState(what, vm=machine.name, left="nothing was done", remedy=f"see `cprctl status {machine.name}`")
    if not await _shut_down(machine):
        remedy = f"`cprctl stop {machine.name}` presses it again, and ends QEMU then"
        raise QemuFailed("does not heed its power button", vm=machine.name, left="it goes on", remedy=remedy)


async def _has_button(machine: Machine) -> bool:
    """As QEMU says now. Raises WrongState, QemuFailed."""
    await machine.derive()
    _require_running(machine)
    if machine.qemu is None:
        raise QemuFailed(
            "its QEMU does not answer, so its power button can't be pressed",
            vm=machine.name,
            left="the guest was not touched",
            remedy=f"`cprctl stop --hard {machine.name}` ends QEMU",
        )
    return machine.run_state in (RunState.RUNNING, RunState.SUSPENDED)


async def _shut_down(machine: Machine) -> bool:
    """Press the button. Returns False if the guest has not shut down within its definition's shutdown-timeout. Raises
    QemuFailed."""
    launch = machine.launched()
    timeout_s = launch.shutdown_timeout_s if launch else 60.0
    with machine.hearing("SHUTDOWN") as shut_down:
        await machine.require_qemu().powerdown()
        if await _ends(machine, shut_down, timeout_s):
            return True
    if shut_down.is_set():
        await machine.end()
        return True
    log.warning("VM %s: did not shut down within %.0f s", machine.name, timeout_s)
    return False


async def _ends(machine: Machine, shut_down: asyncio.Event, timeout_s: float) -> bool:
    """Wait until QEMU has ended, or its guest has shut down and QEMU stays (``-action shutdown=pause``)."""
    ended = asyncio.create_task(machine.own.wait_exit(timeout_s))
    stays = asyncio.create_task(shut_down.wait())
    try:
        await asyncio.wait({ended, stays}, return_when=asyncio.FIRST_COMPLETED)
        return ended.done() and ended.result()
    finally:
        for task in (ended, stays):
            task.cancel()
        await asyncio.gather(ended, stays, return_exceptions=True)


async def end_hard(machine: Machine) -> None:
    """Quit QEMU, or kill it. Raises WrongState."""
    await machine.derive()
    _require_running(machine)
    await machine.end()


def _require_running(machine: Machine) -> None:
    if not machine.pid:
        raise WrongState("is not running", vm=machine.name)
