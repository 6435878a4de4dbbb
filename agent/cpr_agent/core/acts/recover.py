# SPDX-License-Identifier: GPL-2.0-or-later
"""An earlier agent ended in the middle of an act: what is true now decides what becomes of it (ADR 4)."""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from cpr_agent.core import acts
from cpr_agent.core.acts.load import put_back
from cpr_agent.core.acts.resume import refuse_strangers, take_back, take_back_again
from cpr_agent.core.acts.sleep import end_sleep
from cpr_agent.core.beside import settle_sockets
from cpr_agent.core.gate import Unbroken, let_run
from cpr_agent.core.machine import BEFORE_IT_RUNS, Machine
from cpr_agent.core.model import Launch, Manifest, RunState, VmState
from cpr_agent.core.past import InterruptedSave, VmEvent

log = logging.getLogger(__name__)


class Recovery(enum.Enum):
    """What is done with a live QEMU that answers."""

    NOTHING = enum.auto()
    LEAVE = enum.auto()
    """The guest stands after a save that the journal does not explain."""
    REPEAT_LOAD = enum.auto()
    TAKE_BACK = enum.auto()
    """A refresh was interrupted after its save: the guest goes on in the QEMU that it has."""
    UNDO_TRANSFER = enum.auto()
    TAKE_BACK_AGAIN = enum.auto()
    """The checkpoint is out of the world, but the guest does not run: its memory may have changed since it was proved."""
    RUN_ON = enum.auto()
    """A save of a guest that ran was interrupted."""
    FINISH_SAVE = enum.auto()
    """Likewise of one that did not run: ``cont`` would change what it is, and QEMU does not save twice without
    it. But QEMU may have written its whole state: it is stored now."""
    PUT_BACK = enum.auto()
    """The checkpoint was spent for a load that would have let the guest go on, and has not (ADR 18)."""
    NOTE_RESUMED = enum.auto()
    """The guest runs, or stands paused as it was saved: a checkpoint out of a backup must not pass for unspent."""
    FINISH_RESUME = enum.auto()
    """The checkpoint is spent, and it was announced that its guest would run."""


_LETS_RUN = (Recovery.TAKE_BACK_AGAIN, Recovery.RUN_ON, Recovery.FINISH_RESUME, Recovery.UNDO_TRANSFER)


class Facts(NamedTuple):
    """All that the decision depends on."""

    run_state: RunState
    checkpointed: bool = False
    """There is a live checkpoint, readable or not."""
    saved_run_state: RunState | None = None
    """The guest's, by the checkpoint; None where that can't be read."""
    loads_checkpoint: bool = False
    """QEMU was started to load the live checkpoint, whose guest has not run on record."""
    started_for_load: bool = False
    in_refresh: bool = False
    in_transfer: bool = False
    interrupted_save: RunState | None = None
    """The run state before a save that neither ended nor was taken back to its end."""
    stopped_first: bool = False
    """Its guest is stopped before it is saved, by whoever runs its QEMU."""
    save_was_taken_back: bool = False
    proved_before: bool = False
    """The save had ended, and was being taken back with its guest's memory proved."""
    resume_announced: bool = False
    """No record says that the guest of QEMU's checkpoint has gone on."""
    resume_interrupted: bool = False
    """Likewise, and it is to run."""
    has_launch: bool = True
    has_saved: bool = True
    """By QEMU's word: what it has written is whole."""


def decide(facts: Facts) -> Recovery:
    """ADR 4's table. The first rule that fits decides."""
    stands = facts.run_state is RunState.POSTMIGRATE
    failed = facts.run_state is RunState.FINISH_MIGRATE
    """Of no migration that is under way: that is taken back before."""
    stopped = facts.run_state is RunState.PAUSED and facts.stopped_first
    rules = (
        (facts.loads_checkpoint and facts.run_state in BEFORE_IT_RUNS, Recovery.REPEAT_LOAD),
        (stands and facts.in_refresh and facts.saved_run_state is RunState.RUNNING, Recovery.TAKE_BACK),
        (facts.checkpointed, Recovery.NOTHING),
        ((stands or failed) and facts.in_transfer, Recovery.UNDO_TRANSFER),
        (
            facts.run_state is RunState.INMIGRATE and facts.started_for_load and facts.resume_interrupted,
            Recovery.PUT_BACK,
        ),
        (stands and facts.interrupted_save is RunState.RUNNING and facts.proved_before, Recovery.TAKE_BACK_AGAIN),
        ((stands or failed or stopped) and facts.interrupted_save is RunState.RUNNING, Recovery.RUN_ON),
        (
            stands
            and facts.interrupted_save is not None
            and not facts.save_was_taken_back
            and facts.has_launch
            and facts.has_saved,
            Recovery.FINISH_SAVE,
        ),
        (stands, Recovery.LEAVE),
        (
            facts.run_state is RunState.PAUSED and facts.started_for_load and facts.resume_interrupted,
            Recovery.FINISH_RESUME,
        ),
        (
            facts.run_state in (RunState.RUNNING, RunState.SUSPENDED, RunState.PAUSED)
            and facts.started_for_load
            and facts.resume_announced,
            Recovery.NOTE_RESUMED,
        ),
    )
    return next((recovery for fits, recovery in rules if fits), Recovery.NOTHING)


async def recover(machine: Machine) -> None:
    """Finish or take back what an earlier agent was in the middle of. Raises CprError."""
    await machine.derive()
    await _give_back(machine)
    await machine.spare.kill()  # no guest has run in it, or has stopped there for good
    if machine.qemu is None:
        return
    past = machine.past
    await _withdraw(machine)
    if past.in_refresh or past.interrupted_save:
        await settle_sockets(machine)
    if past.awaits_cold_start:
        machine.record(VmEvent.COLD_STARTED)
    launch, manifest = machine.launched(), machine.readable_checkpoint()
    facts = _facts(machine, launch, manifest)
    if facts.interrupted_save not in (None, RunState.RUNNING):
        facts = facts._replace(has_saved=await machine.require_qemu().has_saved())
    recovery = decide(facts)
    await _carry_out(machine, recovery, launch, manifest)
    if not (recovery is Recovery.NOTHING and machine.checkpointed):
        await end_sleep(machine)
        end_refresh(machine)
    if machine.qemu and not machine.has_only_loaded:
        await machine.own.settle()


async def _withdraw(machine: Machine) -> None:
    """QEMU may still be at a save or a transfer that was given up. Raises QemuFailed."""
    past = machine.past
    if machine.qemu and (past.in_transfer or past.interrupted_save):
        await machine.qemu.withdraw()
        await machine.derive()


async def _give_back(machine: Machine) -> None:
    """The undo of a save had made a QEMU the VM's own that was to let the guest go on by its load, and it has read nothing:
    no checkpoint is left, and the guest is still in the QEMU that was saved."""
    launch = machine.launched()
    waits = machine.run_state is RunState.INMIGRATE and not machine.checkpointed
    if launch and waits and await machine.spare.pid():
        log.warning("VM %s: it goes back to the QEMU that it was saved in", machine.name)
        machine.record(VmEvent.SAVE_UNDONE, checkpoint=launch.checkpoint)
        await machine.give_back()
        await machine.derive()


async def resume_unfinished(machine: Machine) -> bool:
    """A guest may stand that its recovery, or the undo of an act, could not let run. Returns whether there was one, which
    runs now. Raises CprError."""
    await machine.derive()
    if not _waits_to_run(machine):
        return False
    await _withdraw(machine)
    launch = machine.launched()
    recovery = decide(_facts(machine, launch, None))
    if machine.qemu is None or recovery not in _LETS_RUN:
        return False
    await machine.spare.kill()
    await _carry_out(machine, recovery, launch, None)
    end_refresh(machine)
    return True


def unfinished(machine: Machine) -> Callable[[Machine], Awaitable[object]] | None:
    """How to try again where a guest stands that is to run, and that QEMU did not let run. Where QEMU has not answered
    since a save or a transfer failed, only a recovery finds out how its guest is."""
    if machine.held():
        return None
    if machine.state is VmState.UNREACHABLE:
        return recover if machine.past.in_transfer or machine.past.interrupted_save else None
    return resume_unfinished if _waits_to_run(machine) else None


def _waits_to_run(machine: Machine) -> bool:
    return machine.qemu is not None and decide(_facts(machine, machine.launched(), None)) in _LETS_RUN


def end_refresh(machine: Machine) -> None:
    """Whatever became of one that was under way: unless its guest is still to be loaded, it is over."""
    if machine.past.in_refresh and not machine.checkpointed:
        machine.record(VmEvent.REFRESHED)


def _facts(machine: Machine, launch: Launch | None, manifest: Manifest | None) -> Facts:
    past, for_load = machine.past, launch is not None and launch.kind == "load"
    begun = past.interrupted_save
    return Facts(
        run_state=machine.run_state,
        checkpointed=machine.checkpointed,
        saved_run_state=RunState(manifest.run_state) if manifest else None,
        loads_checkpoint=bool(machine.has_only_loaded and manifest and launch and launch.checkpoint == manifest.id),
        started_for_load=for_load,
        in_refresh=past.in_refresh,
        in_transfer=past.in_transfer,
        interrupted_save=begun.run_state if begun else None,
        stopped_first=machine.own.delegated,
        save_was_taken_back=begun is not None and begun.last is not VmEvent.SAVE_BEGIN,
        proved_before=begun is not None and begun.last is VmEvent.ROLLBACK,
        resume_announced=launch is not None and past.resume_announced(launch.checkpoint),
        resume_interrupted=launch is not None and past.resume_interrupted(launch.checkpoint),
        has_launch=launch is not None,
    )


async def _carry_out(machine: Machine, recovery: Recovery, launch: Launch | None, manifest: Manifest | None) -> None:
    begun = machine.past.interrupted_save
    match recovery:
        case Recovery.REPEAT_LOAD if manifest:
            log.warning("VM %s: a load was interrupted before its guest ran; it can be repeated", machine.name)
            machine.record(VmEvent.LOAD_INTERRUPTED, checkpoint=manifest.id)
            await machine.end()
        case Recovery.TAKE_BACK if manifest:
            log.warning("VM %s: a refresh was interrupted; the guest goes on in the QEMU that it has", machine.name)
            await take_back(machine, manifest)
        case Recovery.TAKE_BACK_AGAIN if begun:
            log.warning("VM %s: a resume was interrupted; its memory is proved again", machine.name)
            await take_back_again(machine, begun.checkpoint)
        case Recovery.UNDO_TRANSFER:
            log.warning("VM %s: a refresh was interrupted; the guest goes on in the QEMU that it has", machine.name)
            await acts.replace.undo_transfer(machine)
        case Recovery.RUN_ON if begun:
            await refuse_strangers(machine)
            await acts.save.run_after_interrupted_save(machine, begun.checkpoint)
        case Recovery.FINISH_SAVE if begun and launch:
            state = begun.run_state
            log.warning("VM %s: a save was interrupted; storing the state of the %s guest", machine.name, state)
            await acts.save.finish(machine, launch, begun)
        case Recovery.PUT_BACK | Recovery.NOTE_RESUMED | Recovery.FINISH_RESUME if launch:
            await _settle_resume(machine, recovery, launch)
        case Recovery.NOTHING if begun and begun.last is VmEvent.SAVE_BEGIN and not machine.stands_saved:
            machine.record(VmEvent.SAVE_UNDONE, checkpoint=begun.checkpoint)
        case Recovery.LEAVE:
            _leave(machine, begun)


def _leave(machine: Machine, begun: InterruptedSave | None) -> None:
    if begun is None:
        machine.error = "QEMU has stopped after a save that this agent knows nothing of; its guest was left as it is"
        return
    machine.error = "its save has failed, and left the guest standing"
    if begun.last is VmEvent.SAVE_BEGIN:  # should it run again, by whoever's hand, that save is over
        machine.record(VmEvent.SAVE_UNDONE, checkpoint=begun.checkpoint)


async def _settle_resume(machine: Machine, recovery: Recovery, launch: Launch) -> None:
    """It was announced that the guest of ``launch``'s checkpoint would run."""
    if recovery is Recovery.PUT_BACK:
        log.warning("VM %s: a load was interrupted before its guest ran; it can be repeated", machine.name)
        await put_back(machine, launch.checkpoint, VmEvent.LOAD_INTERRUPTED)
    elif recovery is Recovery.NOTE_RESUMED:
        machine.record(VmEvent.RESUMED, checkpoint=launch.checkpoint)
    else:
        await refuse_strangers(machine)
        await _finish_resume(machine, launch.checkpoint)


async def _finish_resume(machine: Machine, checkpoint: str) -> None:
    log.warning("VM %s: its resume was interrupted; the guest goes on", machine.name)
    await let_run(machine, machine.require_qemu(), Unbroken.RESUME_ANNOUNCED)
    machine.record(VmEvent.RESUMED, checkpoint=checkpoint)
