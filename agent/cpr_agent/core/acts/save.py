# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest is saved: its device state goes to a file, its RAM stays where it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial

import msgspec
from msgspec.structs import replace

from cpr_agent.core.acts.afterwards import entry
from cpr_agent.core.acts.load import record_loaded, require_alike, runs_by_load
from cpr_agent.core.acts.requests import SaveRequest
from cpr_agent.core.acts.sleep import Sleep, end_sleep, fall_asleep, must_sleep
from cpr_agent.core.beside import keeping_sockets
from cpr_agent.core.events import Event, about
from cpr_agent.core.gate import Unbroken, let_run, let_run_by_load
from cpr_agent.core.inventory import carried, kept_paths, recorded_of, take
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import (
    DiskIdentity,
    Inventory,
    Launch,
    Located,
    Manifest,
    OpenFile,
    RunState,
    SaveTimes,
    VmState,
    Vmstate,
    Witness,
    survives,
)
from cpr_agent.core.past import InterruptedSave, VmEvent
from cpr_agent.core.ports import PendingState, Ports, Qemu
from cpr_agent.core.proof import digest_firmware, identify_open, refuse_foreign_state
from cpr_agent.core.turns import Turn
from cpr_agent.core.undo import Undo, uninterrupted
from cpr_agent.errors import CprError, LoadFailed, QemuFailed, SaveFailed

log = logging.getLogger(__name__)

_TakeWitness = Callable[[], Awaitable[Witness]]
_DEFAULT_TIMEOUT_S = 60.0
SIZE_S = 0.2
"""Most saves take less."""
DISKS_S = 5.0
"""For the question after the disks of a guest that stands still."""


class _Written(msgspec.Struct, frozen=True):
    """Epoch seconds: when the guest stopped, and when QEMU had written its state."""

    stopped_at: float
    written_at: float


async def save(machine: Machine, launch: Launch, request: SaveRequest, has: Inventory | None = None) -> Manifest:
    """``has`` is what its QEMU has, where it was just asked. Raises SaveFailed; the guest is then what it was before."""
    qemu = machine.require_qemu()
    has = has or await take(machine.ports, qemu, launch)
    if not await must_sleep(machine, qemu, has):
        draft = await draft_manifest(machine, launch, machine.run_state, request, has)
        return await save_drafted(machine, draft, request)
    with machine.hearing("WAKEUP") as woke:
        async with Undo() as undo:
            undo.push(lambda: end_sleep(machine))
            sleep = Sleep(await fall_asleep(machine, qemu), woke)
            draft = await draft_manifest(machine, launch, RunState.SUSPENDED, request)
            manifest = await save_drafted(machine, draft, request, sleep)
            undo.done()
            return manifest


async def draft_manifest(
    machine: Machine, launch: Launch, run_state: RunState, request: SaveRequest, has: Inventory | None = None
) -> Manifest:
    """The part of a manifest that is known before the guest stops; ``has`` as in ``save``. Raises QemuFailed."""
    ports, qemu = machine.ports, machine.require_qemu()
    has = has or await take(ports, qemu, launch)
    recorded = recorded_of(ports, launch)
    return Manifest(
        id=uuid.uuid4().hex,
        vm=machine.name,
        mode=request.mode,
        survives=survives(launch.memory),
        run_state=run_state,
        launch=carried(ports, launch, recorded, has).launch,
        qemu=await qemu.facts(launch),
        qemu_path=launch.base_argv[0],
        qemu_sha256=await ports.threads.run(machine.name, partial(ports.files.program_digest, machine.pid)),
        memory=launch.memory,
        witness=ports.memory.new_witness(machine.settings.witness.kind),
        vmstate=Vmstate(path="", size_bytes=0, sha256=""),
        boot_id=ports.boot.boot_id(),
        start_id=ports.boot.start_id(),
        kernel=ports.boot.kernel(),
        times=SaveTimes(requested_at=ports.clock.now(), stopped_at=0.0, written_at=0.0, durable_at=0.0),
        upgrade=request.upgrade,
        wakes=run_state is RunState.SUSPENDED and machine.past.put_to_sleep,
        inventory=has,
    )


async def save_drafted(machine: Machine, draft: Manifest, request: SaveRequest, sleep: Sleep | None = None) -> Manifest:
    """``sleep``: the guest was put to sleep for it. Raises SaveFailed; the guest is then what it was before."""
    located = await machine.relocated(draft.memory)
    try:
        pending = machine.ports.store.begin(machine.name, request.filename)
    except OSError as error:
        what = f"the state file cannot be opened: {error}"
        raise SaveFailed(what, vm=machine.name, left="nothing changed") from error
    turn = request.turn or Turn()
    async with _or_bring_back(machine, pending, draft, located, sleep) as take_witness, turn:
        written = await _write_state(machine, pending, draft, sleep, request.limit_s)
        turn.written.set()
        manifest = await _store_state(machine, pending, draft, written, take_witness)
    duration_s = machine.ports.clock.now() - manifest.times.stopped_at
    facts = about(Event.SAVED, **entry(manifest, "save"))
    log.info(
        "VM %s: saved in %.3f s, %d bytes of state", machine.name, duration_s, manifest.vmstate.size_bytes, extra=facts
    )
    return manifest


async def finish(machine: Machine, launch: Launch, begun: InterruptedSave) -> Manifest:
    """Store the state that QEMU has written for a save whose agent ended then. Raises SaveFailed."""
    request = SaveRequest(upgrade=begun.upgrade)
    draft = replace(await draft_manifest(machine, launch, begun.run_state, request), id=begun.checkpoint)
    located = await machine.relocated(draft.memory)
    try:
        pending = machine.ports.store.reopen(machine.name, begun.path)
    except OSError as error:
        raise SaveFailed(f"the state file cannot be opened: {error}", vm=machine.name) from error
    async with _or_bring_back(machine, pending, draft, located, None) as take_witness:
        written = _Written(draft.times.requested_at, machine.ports.clock.now())
        return await _store_state(machine, pending, draft, written, take_witness)


@contextlib.asynccontextmanager
async def _or_bring_back(
    machine: Machine, pending: PendingState, draft: Manifest, located: Sequence[Located], sleep: Sleep | None
) -> AsyncIterator[_TakeWitness]:
    """Whatever fails in the block or interrupts it, also a cancelled job: the guest must not stay stopped."""
    undo = Undo()
    undo.push(lambda: _bring_back(machine, pending, _as_it_was(draft, sleep), located))
    try:
        async with undo, machine.ports.memory.prepared_witness(located, draft.witness) as take_witness:
            yield take_witness
            undo.done()
    except (CprError, OSError) as error:
        what = error.what if isinstance(error, CprError) else f"the state could not be stored: {error}"
        failure = SaveFailed(f"could not be saved: {what}", vm=machine.name, left=undo.left)
        log.error("%s", failure.text, extra=about(Event.SAVE_FAILED, **entry(draft, "save")))
        raise failure from error


def _as_it_was(draft: Manifest, sleep: Sleep | None) -> Manifest:
    """A guest that was put to sleep and woke by itself is to run."""
    return replace(draft, run_state=RunState.RUNNING) if sleep and sleep.woke.is_set() else draft


async def _write_state(
    machine: Machine, pending: PendingState, draft: Manifest, sleep: Sleep | None, limit_s: float
) -> _Written:
    """QEMU's part: the guest stops, and its state is written. Raises SaveFailed, QemuFailed."""
    clock = machine.ports.clock
    facts = {"checkpoint": draft.id, "run_state": draft.run_state, "path": pending.path, "upgrade": draft.upgrade}
    machine.record(VmEvent.SAVE_BEGIN, **facts)
    machine.enter(VmState.SAVING)
    timeout_s = min(machine.definition.save.timeout if machine.definition else _DEFAULT_TIMEOUT_S, limit_s)
    try:
        async with asyncio.timeout(None if limit_s == math.inf else limit_s):
            saving = machine.require_qemu().save(pending.fd, timeout_s, draft.id)
            stopped_at = await _bounded(saving, pending) or clock.now()
    except TimeoutError:
        raise SaveFailed(
            f"its QEMU has not written its state within {limit_s:g} s, in which other guests stand still",
            vm=machine.name,
            remedy="allow more with `standstill` in [upgrade] of agent.toml, if it is right that it takes so long",
        ) from None
    if sleep and sleep.woke.is_set():  # its devices run again, and nobody would wake it after the load
        raise SaveFailed("its guest was put to sleep, and woke by itself before it was saved", vm=machine.name)
    return _Written(sleep.since if sleep else stopped_at, clock.now())


async def _bounded(saving: Coroutine[None, None, float], pending: PendingState) -> float:
    """Look at the file's size while QEMU writes it: others need the room. Raises SaveFailed."""
    task = asyncio.ensure_future(saving)
    try:
        while not (await asyncio.wait({task}, timeout=SIZE_S))[0]:
            if pending.too_large():
                raise SaveFailed("QEMU writes a state that is larger than any state is", vm=pending.vm)
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await uninterrupted(asyncio.wait({task}))


async def _store_state(
    machine: Machine, pending: PendingState, draft: Manifest, written: _Written, take_witness: _TakeWitness
) -> Manifest:
    """The durable part. Raises CprError, OSError."""
    ports, clock = machine.ports, machine.ports.clock
    vmstate, witness, identified, firmware = await asyncio.gather(
        asyncio.to_thread(pending.seal),
        take_witness(),
        _disks(machine, draft),
        digest_firmware(ports, machine.name, draft.qemu.firmware),
    )
    refuse_foreign_state(vmstate, draft.qemu)
    manifest = replace(
        draft,
        qemu=replace(draft.qemu, disks=tuple(identified), firmware=firmware),
        witness=witness,
        vmstate=vmstate,
        times=replace(
            draft.times,
            stopped_at=written.stopped_at,
            written_at=written.written_at,
            durable_at=clock.now(),
            stopped_uptime_s=clock.uptime_s() - (clock.now() - written.stopped_at),
        ),
    )
    # A cancellation does not end the thread: it would go on to make the checkpoint live while the undo removes it.
    await uninterrupted(asyncio.to_thread(pending.commit, manifest))
    machine.record(VmEvent.SAVED, checkpoint=draft.id, stopped_at=written.stopped_at)
    return manifest


async def _disks(machine: Machine, draft: Manifest) -> list[DiskIdentity]:
    """As QEMU has them open, now that the guest has stopped. Raises SaveFailed, QemuFailed."""
    if draft.inventory and not draft.inventory.nodes:  # a node that no disk has is lost with its QEMU
        return []
    qemu = machine.require_qemu()
    try:
        async with asyncio.timeout(DISKS_S):
            looking = machine.ports.threads.run(
                machine.name, partial(_opened_and_kept, machine.ports, machine.name, qemu.pid)
            )
            listed, (opened, kept) = await asyncio.gather(qemu.disks(), looking)
    except TimeoutError:
        raise QemuFailed(f"its QEMU has not named its disks within {DISKS_S:g} s", vm=machine.name) from None
    return identify_open(listed, opened, draft, kept)


def _opened_and_kept(ports: Ports, vm: str, pid: int) -> tuple[list[OpenFile], set[str]]:
    """The files that its QEMU has open, and those of its firmware that are kept. Blocking."""
    return ports.files.open_files(pid), kept_paths(ports, vm)


async def _bring_back(machine: Machine, pending: PendingState, was: Manifest, located: Sequence[Located]) -> str:
    """Make the guest what it was before a save that failed; returns a sentence for the error. While the half-written
    checkpoint can't be removed the guest stays stopped: a load could use it."""
    run_state = was.run_state
    _record_if_possible(machine, VmEvent.SAVE_UNDONE, was)
    with contextlib.ExitStack() as at_end:
        state = -1
        try:
            if run_state != RunState.RUNNING:
                state = await asyncio.to_thread(pending.reader)
                at_end.callback(os.close, state)
            await asyncio.to_thread(pending.abort)
        except OSError as error:
            return f"the half-written checkpoint could not be removed ({error}), so the guest stays stopped"
        try:
            now = await _run_again(machine, was, located, state)
        except QemuFailed as error:
            where = error if error.left else await machine.locating_guest(error)
            return f"{where.left}: {where.what}. {where.remedy[0].upper()}{where.remedy[1:]}"
        except (CprError, OSError) as error:
            return f"the guest stays stopped: {error.what if isinstance(error, CprError) else error}"
    if now == run_state:
        return f"the guest is {now}, as before; no checkpoint was left"
    stands = f"the guest was {run_state}; it stands in its QEMU (PID {machine.pid}), which is {now} now"
    if run_state != RunState.PAUSED:
        return stands
    return f"{stands}. Mend the cause, then `cprctl resume {machine.name}` lets it run, and a save is possible again"


async def _run_again(machine: Machine, was: Manifest, located: Sequence[Located], state: int) -> RunState:
    """``cont`` is right for a guest that ran. It would let a paused one run, and abort QEMU for one that sleeps
    (measured): a new QEMU reads the ``state`` that was written, if that is whole (QEMU 7.2 is in postmigrate also after a
    write that failed). Returns the run state then. Raises CprError."""
    qemu = await machine.answering_qemu()
    now = RunState(await qemu.run_state())
    if was.run_state == RunState.RUNNING:
        if now is not RunState.RUNNING:
            await let_run(machine, qemu, Unbroken.SAVE_UNDONE)
        _record_if_possible(machine, VmEvent.RESUMED, was)
    elif now is RunState.POSTMIGRATE and not machine.own.delegated and await qemu.has_saved():
        devices = was.inventory.devices if was.inventory else ()
        alone = machine.ports.definitions.unshareable(was.launch) or await qemu.vfio_devices(devices)
        if not alone:
            await _move_over(machine, qemu, was, located, state)
        elif was.run_state != RunState.PAUSED:  # `resume` lets a paused one go on where it is
            await _start_over(machine, was, located, state)
        qemu = await machine.answering_qemu()
    now = RunState(await qemu.run_state())
    machine.left_standing = was.id if now is RunState.POSTMIGRATE else ""
    return now


async def _move_over(machine: Machine, old: Qemu, was: Manifest, located: Sequence[Located], state: int) -> None:
    """Into a QEMU beside the ``old`` one, which keeps the guest until the other has shown that it has it: no checkpoint
    would tell the next agent of it. Where that fails the guest stays in the old one, if it has certainly not run."""
    plan = machine.stamped(await machine.plan_load(was, located))
    try:
        async with keeping_sockets(machine, old):
            try:
                new = await machine.launch_spare(plan)
                has = await _read_state(machine, new, was, plan, state)
                if await machine.own.pid():  # else the new one alone has the guest
                    await machine.refuse_resumed_by_hand(was)
                await machine.adopt(new)
                await _go_on(machine, new, was, state)
            except LoadFailed:
                if machine.qemu is not old:
                    await machine.give_back()
                raise
            finally:
                await machine.spare.kill()
    except CprError as error:
        log.warning("VM %s: it gets no other QEMU: %s", machine.name, error.what)
    else:
        machine.spawn(record_loaded(machine, was, has))


async def _start_over(machine: Machine, was: Manifest, located: Sequence[Located], state: int) -> None:
    """Likewise in turn, for a guest that sleeps where two QEMUs can't have the same of the host: nothing else leads back
    for it. Raises CprError."""
    plan = machine.stamped(await machine.plan_load(was, located))
    await machine.end()
    await machine.await_companions(was.launch)
    new = await machine.launch(plan)
    has = await _read_state(machine, new, was, plan, state)
    await _go_on(machine, new, was, state)
    machine.spawn(record_loaded(machine, was, has))


async def _read_state(machine: Machine, qemu: Qemu, was: Manifest, plan: Launch, state: int) -> Inventory:
    """What it has. The state is read, unless that would let the guest go on (``runs_by_load``). Raises CprError."""
    has = await require_alike(machine.ports, qemu, was, plan)
    if not await runs_by_load(qemu, was):
        await qemu.load(state, machine.settings.agent.load_timeout, was.qemu.dialect)
    return has


async def _go_on(machine: Machine, qemu: Qemu, was: Manifest, state: int) -> None:
    """``qemu`` is the VM's own now. Raises LoadFailed if the guest has certainly not run; QemuFailed, ProofFailed."""
    if was.run_state != RunState.PAUSED:
        _record_if_possible(machine, VmEvent.RESUME, was, run_state=was.run_state)
        if await runs_by_load(qemu, was):
            await let_run_by_load(machine, qemu, Unbroken.SAVE_UNDONE, state)
        else:
            await let_run(machine, qemu, Unbroken.SAVE_UNDONE)
    _record_if_possible(machine, VmEvent.RESUMED, was)
    await end_sleep(machine)


def _record_if_possible(machine: Machine, event: VmEvent, was: Manifest, **facts: object) -> None:
    """A full disk must not keep the guest stopped: without these records the run state of its QEMU tells as much."""
    try:
        machine.record(event, checkpoint=was.id, **facts)
    except OSError as error:
        log.error("VM %s: the journal can't be told of %s: %s", machine.name, event, error)


async def run_after_interrupted_save(machine: Machine, checkpoint: str) -> None:
    """The agent ended in the middle of a save of a guest that ran: it goes on. Raises QemuFailed."""
    log.warning("VM %s: a save was interrupted; the guest goes on", machine.name)
    machine.record(VmEvent.SAVE_UNDONE, checkpoint=checkpoint)
    await let_run(machine, machine.require_qemu(), Unbroken.SAVE_INTERRUPTED)
    machine.record(VmEvent.RESUMED, checkpoint=checkpoint)
