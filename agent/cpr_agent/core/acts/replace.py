# SPDX-License-Identifier: GPL-2.0-or-later
"""A new QEMU for a guest that stays on its host and in its RAM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from msgspec.structs import replace as changed

from cpr_agent.core.acts.afterwards import LoadTimes
from cpr_agent.core.acts.load import (
    Beside,
    announce_resume,
    finish_load,
    go_on,
    holding,
    load_by_either,
    load_into,
    require_alike,
)
from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.acts.resume import take_back
from cpr_agent.core.acts.save import draft_manifest, save, save_drafted
from cpr_agent.core.acts.sleep import must_sleep
from cpr_agent.core.beside import keeping_sockets
from cpr_agent.core.endings import last_words
from cpr_agent.core.gate import Unbroken, let_run
from cpr_agent.core.hooks import before_save
from cpr_agent.core.inventory import take
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Launch, Manifest, RunState, Survives
from cpr_agent.core.past import VmEvent
from cpr_agent.core.ports import Qemu
from cpr_agent.core.proof import refuse_lesser_machine, refuse_other_devices
from cpr_agent.core.saveable import require_live
from cpr_agent.core.undo import Undo, uninterrupted
from cpr_agent.errors import CprError, LoadFailed, QemuFailed, WrongState

log = logging.getLogger(__name__)


async def replace(machine: Machine, wanted: Replacement | None = None) -> Replacement:
    """Give the guest a QEMU of the program that is installed now. A guest that runs gets it beside the old one, which goes
    on with it if anything fails. Any other guest gets it in turn, as does one for which that is ``wanted``: a failure then
    leaves it saved. Returns how. Raises CprError."""
    await machine.derive()
    if not machine.pid and machine.live_checkpoint() is None:
        what = f"is {machine.state}, and has no QEMU that could be replaced"
        raise WrongState(what, vm=machine.name, left="nothing was done")
    launch = (await require_live(machine, Survives.QEMU_RESTART)).launch
    _refuse_ending_companions(machine, launch)
    await before_save(machine)
    machine.record(VmEvent.REFRESH)
    try:
        qemu = machine.require_qemu()
        how = wanted or await _choose(machine, qemu, launch)
        if how is Replacement.IN_TURN:
            await _in_turn(machine, launch)
            return how
        async with _keeping_old_qemu(machine, qemu):
            await (_beside if how is Replacement.BESIDE else _transfer)(machine, qemu, launch)
        return how
    finally:
        if not (machine.stands_still and machine.past.in_transfer):  # else a resume can still end what was begun
            machine.record(VmEvent.REFRESHED)


def _refuse_ending_companions(machine: Machine, launch: Launch) -> None:
    """The QEMU that it has would take them along, and the new one could not start: its guest would stand still until
    somebody starts them again. Raises LoadFailed."""
    if ending := [str(one) for one in machine.ports.definitions.companions(launch) if one.ends]:
        save, stop, load = (f"`cprctl {act} {machine.name}`" for act in ("save", "stop", "load"))
        raise LoadFailed(
            f"could not get a new QEMU: {', '.join(ending)} serves one QEMU, and ends with it",
            vm=machine.name,
            left="its guest goes on in the QEMU that it had",
            remedy=f"{save} and {stop}, start that program again, then {load}",
        )


async def _choose(machine: Machine, qemu: Qemu, launch: Launch) -> Replacement:
    """By what QEMU has after the hooks. Raises LoadFailed where two QEMUs can't have the same resources."""
    in_turn = machine.run_state is not RunState.RUNNING or machine.own.delegated
    in_turn = in_turn or await must_sleep(machine, qemu, await qemu.brief_inventory())
    if in_turn or await qemu.load_runs_guest():  # ADR 18: its checkpoint is spent before the new QEMU has shown that it can
        return Replacement.IN_TURN
    if both := machine.ports.definitions.unshareable(launch):
        raise LoadFailed(
            f"could not get a new QEMU: two at once can't have {', '.join(both)}",
            vm=machine.name,
            left="its guest goes on in the QEMU that it had",
            remedy=f"`cprctl refresh --in-turn {machine.name}` ends the old one first",
        )
    return Replacement.BESIDE if await qemu.transfer_problem() else Replacement.TRANSFER


async def _in_turn(machine: Machine, launch: Launch) -> None:
    """The old one's program is kept before its guest stops, and brought back if the new one fails."""
    unkept = ""
    try:
        if not machine.own.delegated:  # nobody would start the copy
            await asyncio.to_thread(machine.ports.programs.keep, machine.name, machine.pid, launch.argv[1:])
    except OSError as error:
        unkept = f": its old QEMU could not be kept ({error})"
        log.warning("VM %s: should its new QEMU fail, it will stay saved%s", machine.name, unkept)
    manifest = await save(machine, launch, SaveRequest())
    try:
        failed = await uninterrupted(_load(machine, manifest))  # a cancelled job must not leave the guest stopped
    except CprError as error:
        raise LoadFailed(
            f"could not get a new QEMU: {error.what}",
            vm=machine.name,
            left=f"it stays saved{unkept}, and the load can be repeated",
            remedy=error.remedy,
        ) from error
    if failed:
        raise failed


async def _load(machine: Machine, manifest: Manifest) -> LoadFailed | None:
    with holding(machine, manifest):
        return await load_by_either(machine, manifest, LoadRequest())


async def _beside(machine: Machine, qemu: Qemu, launch: Launch) -> None:  # noqa: ARG001 - as _transfer
    """The new one is there before the guest stops, and waits for its state: as with QEMU's own cpr-transfer, it has the
    RAM, and writes nothing to it before that (measured: only ``-incoming`` skips writing firmware into RAM)."""
    request = SaveRequest()
    draft = await draft_manifest(machine, launch, RunState.RUNNING, request)
    plan = await machine.plan_load(draft, await machine.relocated(launch.memory))
    new = await machine.launch_spare(machine.stamped(plan))
    await refuse_lesser_machine(new, draft)
    await refuse_other_devices(machine.ports, draft, await take(machine.ports, new, plan))
    manifest = await save_drafted(machine, draft, request)
    await load_into(machine, manifest, LoadRequest(), Beside(machine, manifest, new))


async def _transfer(machine: Machine, qemu: Qemu, launch: Launch) -> None:
    """One QEMU hands its guest to the other, and neither lets go of the RAM on the way: no checkpoint, no witness (ADR 9).
    Until the new one is adopted no guest has run in it; the old one, once stopped, goes on only if it is not."""
    clock, agent, spare = machine.ports.clock, machine.settings.agent, machine.spare
    draft = await draft_manifest(machine, launch, RunState.RUNNING, SaveRequest(mode="transfer"))
    located = await machine.relocated(launch.memory)
    plan = await machine.plan_load(draft, located, spare.directory)
    machine.record(VmEvent.TRANSFER, checkpoint=draft.id)

    async def lives() -> bool:
        return bool(await spare.pid())

    try:
        await spare.start(machine.stamped(plan))
        async with qemu.handing_over(spare.directory, lives, agent.qemu_start_timeout) as handed_over:
            new = await spare.connect(agent.qemu_start_timeout)
            has = await require_alike(machine.ports, new, draft, plan)
            await new.take_over(spare.directory, agent.load_timeout)
            stopped_at = await handed_over()
    except (QemuFailed, LoadFailed) as error:
        raise machine.spare_failed(error, plan, await last_words(machine.spare, error)) from error
    handed_at = clock.now()
    uptime_s = clock.uptime_s() - (handed_at - stopped_at)
    times = changed(
        draft.times, stopped_at=stopped_at, written_at=handed_at, durable_at=handed_at, stopped_uptime_s=uptime_s
    )
    handed = changed(draft, times=times)
    loaded = LoadTimes(handed_at, handed_at, handed_at)
    vessel = Beside(machine, handed, new)
    announce_resume(machine, handed)
    await finish_load(machine, handed, loaded, go_on(machine, new, handed, Unbroken.HANDED_OVER, vessel), has)


@contextlib.asynccontextmanager
async def _keeping_old_qemu(machine: Machine, qemu: Qemu) -> AsyncIterator[None]:
    """Whatever fails, the guest goes on in its old QEMU, unless the new one was adopted; or its memory is not what it was
    when it stopped, and then it is held where it is (invariant 1). Raises LoadFailed."""
    try:
        async with keeping_sockets(machine, qemu), Undo() as undo:
            undo.push(lambda: _go_on_in_old_qemu(machine))
            yield
            undo.done()
    except CprError as error:
        raise LoadFailed(
            f"could not get a new QEMU: {error.what}",
            vm=machine.name,
            left=undo.left or error.left or "see its state in `cprctl status`",
            remedy=error.remedy,
        ) from error


async def _go_on_in_old_qemu(machine: Machine) -> str:
    """After the one beside it has failed. Returns a sentence for the error; "" where that says more."""
    await machine.spare.kill()
    await machine.derive()
    try:
        await _take_back(machine)
    except CprError as error:
        await machine.derive()
        held = machine.held() is not None
        return "it stays saved, and stands still in the QEMU that it had" if held else error.text
    return "its guest goes on in the QEMU that it had" if machine.run_state is RunState.RUNNING else ""


async def _take_back(machine: Machine) -> None:
    manifest = machine.readable_checkpoint()
    if machine.stands_saved and manifest:
        await take_back(machine, manifest)
    elif machine.stands_still and machine.past.in_transfer:
        await undo_transfer(machine)
    else:
        return
    await machine.derive()


async def undo_transfer(machine: Machine) -> None:
    """The guest stands in the QEMU that it had, and the other one has ended. Raises QemuFailed."""
    checkpoint = machine.past.transfer_checkpoint
    machine.record(VmEvent.TRANSFER_UNDONE, checkpoint=checkpoint)
    await let_run(machine, machine.require_qemu(), Unbroken.TRANSFER_UNDONE)
    machine.record(VmEvent.RESUMED, checkpoint=checkpoint)
