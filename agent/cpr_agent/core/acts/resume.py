# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that stands still goes on in the QEMU that it is in, if its proof holds; and a checkpoint is given up."""

from __future__ import annotations

import asyncio

from cpr_agent.core.acts.load import holding, load_by_either
from cpr_agent.core.acts.requests import LoadRequest
from cpr_agent.core.gate import Unbroken, let_run
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Manifest, RunState
from cpr_agent.core.past import InterruptedSave, VmEvent
from cpr_agent.core.ports import Qemu
from cpr_agent.core.proof import prove_stopped, refuse_other_users
from cpr_agent.core.run_states import RUN_STATES
from cpr_agent.errors import NoCheckpoint, WrongState


async def resume(machine: Machine) -> None:
    """Take a save back, or let a paused guest go on. ``cont`` does it for a guest that ran when it was saved; one that was
    paused or suspended must be loaded (measured). The machine's state is derived. Raises ProofFailed, and the
    VM is held then; CprError."""
    manifest = machine.live_checkpoint()
    if manifest is None:
        await _unpause(machine)
    elif machine.qemu and machine.stands_saved and manifest.run_state == RunState.RUNNING:
        await take_back(machine, manifest)
    else:
        machine.refuse_silent_qemu("nothing was resumed")
        with holding(machine, manifest):
            await load_by_either(machine, manifest, LoadRequest())


async def _unpause(machine: Machine) -> None:
    if machine.pid:
        machine.require_qemu()
    row, begun = RUN_STATES.get(machine.run_state), machine.past.interrupted_save
    failed = begun if await _stands_by_failed_save(machine, begun) else None
    if machine.qemu is None or row is None or not (row.resumes or failed):
        remedy = row.remedy.format(vm=machine.name) if row and row.problem else ""
        raise WrongState(f"is {machine.state}, there is nothing to resume", vm=machine.name, remedy=remedy)
    if machine.stands_still and begun and begun.run_state is RunState.SUSPENDED:
        raise WrongState(
            "was asleep when its save failed, and QEMU has no way back for it",
            vm=machine.name,
            left=f"the guest stands in its QEMU (PID {machine.pid})",
            remedy=f"`cprctl stop --hard {machine.name}` gives it up",
        )
    if failed:
        await _go_on_after_failed_save(machine, machine.qemu, failed.checkpoint)
    else:
        await let_run(machine, machine.qemu, Unbroken.PAUSED)


async def _stands_by_failed_save(machine: Machine, begun: InterruptedSave | None) -> bool:
    """Whether nothing but the save that ``begun`` has the guest stand in postmigrate. After an earlier agent's save only
    QEMU tells: a migration that is completed may be an admin's, by which the guest runs elsewhere (invariant 2)."""
    if begun is None or machine.qemu is None or not machine.stands_saved:
        return False
    return machine.left_standing == begun.checkpoint or not await machine.qemu.has_saved()


async def _go_on_after_failed_save(machine: Machine, qemu: Qemu, checkpoint: str) -> None:
    await refuse_strangers(machine)
    await let_run(machine, qemu, Unbroken.SAVE_INTERRUPTED)
    machine.record(VmEvent.RESUMED, checkpoint=checkpoint)


async def refuse_strangers(machine: Machine) -> None:
    """While no agent was there, or its guest stood, another process may have opened the memory. Raises MemoryInUse,
    DeviceMissing."""
    if launch := machine.launched():
        located = await machine.relocated(launch.memory)
        own = {machine.pid, *machine.neighbours.live_pids()}
        await refuse_other_users(machine.ports, machine.name, located, own)


async def take_back(machine: Machine, manifest: Manifest) -> None:
    """The guest goes on in the QEMU that saved it, on memory and disks that are proved to be what they were. The checkpoint
    is out of the world before, so that no load can use it (invariant 2). Raises ProofFailed, and the VM is held then;
    MemoryUnusable, QemuFailed."""
    qemu = machine.require_qemu()
    with holding(machine, manifest):
        located = await machine.relocated(manifest.memory)
        own = {machine.pid, *machine.neighbours.live_pids()}
        proven = await prove_stopped(machine.ports, manifest, located, own)
    machine.record(VmEvent.ROLLBACK, checkpoint=manifest.id)
    await asyncio.to_thread(machine.ports.store.discard, machine.name)
    await let_run(machine, qemu, proven)
    machine.record(VmEvent.RESUMED, checkpoint=manifest.id)


async def take_back_again(machine: Machine, checkpoint: str) -> None:
    """After a ``take_back`` that ended between the checkpoint's retirement and ``cont``. Raises likewise, and
    CheckpointUnreadable, OSError."""
    await asyncio.to_thread(machine.ports.store.restore, machine.name, checkpoint)
    manifest = machine.live_checkpoint()
    if manifest is None:
        raise NoCheckpoint("has no checkpoint to take back", vm=machine.name)
    await take_back(machine, manifest)


async def discard(machine: Machine) -> None:
    """Give a checkpoint up, on the record. Its guest is lost, unless its QEMU still runs it. A QEMU in which it may not
    run, or was loaded and has not run, ends. Raises CprError."""
    await machine.derive()
    machine.refuse_silent_qemu("nothing was discarded")
    held = machine.held()
    if machine.stands_saved and not held:
        raise WrongState(
            "is saved and its QEMU still has the guest",
            vm=machine.name,
            left="nothing was discarded",
            remedy=f"`cprctl resume {machine.name}` continues the guest, `cprctl stop {machine.name}` ends QEMU",
        )
    if not machine.checkpointed:
        raise NoCheckpoint("has no checkpoint to discard", vm=machine.name)
    machine.record(VmEvent.DISCARD)
    if machine.stands_saved or machine.has_only_loaded:
        await machine.end()
    await asyncio.to_thread(machine.ports.store.discard, machine.name)
