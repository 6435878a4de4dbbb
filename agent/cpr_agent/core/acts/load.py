# SPDX-License-Identifier: GPL-2.0-or-later
"""A saved guest goes on in a new QEMU, once all that it depends on is proved."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterator, Sequence
from typing import Protocol

from msgspec.structs import replace

from cpr_agent.core import acts
from cpr_agent.core.acts.afterwards import LoadTimes, entry, report
from cpr_agent.core.acts.requests import LoadRequest
from cpr_agent.core.endings import LastWords, last_words
from cpr_agent.core.events import Event, about
from cpr_agent.core.gate import Proof, let_run, let_run_by_load, wake
from cpr_agent.core.inventory import record, take_brief, throttle
from cpr_agent.core.machine import Machine
from cpr_agent.core.model import Definition, Held, Inventory, Launch, Located, Manifest, RunState, VmState, ram_of
from cpr_agent.core.past import VmEvent
from cpr_agent.core.ports import Place, Ports, Qemu
from cpr_agent.core.proof import (
    Proven,
    naming,
    provably_lost,
    prove,
    refuse_lesser_machine,
    refuse_other_devices,
    refuse_overlap,
    refuse_spent,
)
from cpr_agent.core.run_states import RUN_STATES
from cpr_agent.core.turns import Turn
from cpr_agent.core.undo import Undo, uninterrupted
from cpr_agent.errors import (
    AlreadyRunning,
    CprError,
    DeviceMissing,
    LoadFailed,
    MachineChanged,
    MemoryUnusable,
    NoCheckpoint,
    ProofFailed,
    QemuFailed,
    QemuRefused,
    StorageSilent,
)

log = logging.getLogger(__name__)


class Proving:
    """The comparison of a checkpoint with its memory and disks, for whoever decides when it is made."""

    def __init__(self, machine: Machine, manifest: Manifest, located: Sequence[Located]) -> None:
        self._machine = machine
        self._manifest = manifest
        self._located = located

    async def prove(self, *own_pids: int) -> Proven:
        """Raises ProofFailed, MemoryUnusable."""
        machine = self._machine
        own = {machine.pid, *own_pids, *machine.neighbours.live_pids()}
        return await prove(machine.ports, self._manifest, self._located, own)


class Vessel(Protocol):
    """The QEMU that is to take a saved guest."""

    remedy: str
    """For a load that failed in it."""

    @property
    def place(self) -> Place: ...

    def planned(self, plan: Launch) -> Launch:
        """``plan`` for this program."""

    async def prove_first(self, proving: Proving) -> Proven | None:
        """Prove before ending the old QEMU, which can still resume the guest. None where there is no old one."""

    async def make_room(self) -> None:
        """End the QEMU that stands in the way. Raises AlreadyRunning if its guest was let run by hand."""

    async def start(self, plan: Launch, proving: Proving, proven: Proven | None) -> tuple[Qemu, Proven]:
        """A QEMU that waits for the state, and the proof in hand. Raises QemuFailed, ProofFailed, MemoryUnusable."""

    async def fail(self) -> None:
        """Let go of it: it has run no guest."""

    async def adopt(self, qemu: Qemu) -> None:
        """Make it the VM's own. Raises AlreadyRunning if the old one's guest was let run by hand."""

    async def settle(self) -> None:
        """Its guest runs: end the QEMU that had the guest before."""


class Fresh:
    """A new QEMU in the VM's own place, of the installed program or of ``program``."""

    def __init__(self, machine: Machine, manifest: Manifest, program: str = "") -> None:
        self.remedy = f"it was saved by QEMU {manifest.qemu.version}: if another is installed now, try that one again"
        self._machine = machine
        self._manifest = manifest
        self._program = program

    @property
    def place(self) -> Place:
        return self._machine.own

    def planned(self, plan: Launch) -> Launch:
        return replace(plan, argv=(self._program, *plan.argv[1:])) if self._program else plan

    async def prove_first(self, proving: Proving) -> Proven | None:
        return await proving.prove() if self._machine.pid or self.place.delegated else None

    async def make_room(self) -> None:
        if self._machine.pid:
            await self._machine.refuse_resumed_by_hand(self._manifest)
            await self._machine.end()
            await self._machine.await_companions(self._manifest.launch)

    async def start(self, plan: Launch, proving: Proving, proven: Proven | None) -> tuple[Qemu, Proven]:
        """QEMU comes up while the proof is made: it writes nothing to the RAM before it is told to load (ADR 11)."""
        launch = self._machine.stamped(plan)
        if proven:
            return await self._machine.launch(launch), proven
        proof = asyncio.ensure_future(proving.prove())
        try:
            qemu = await self._machine.launch(launch)
        except CprError:
            await proof  # if the proof fails too, its error says more
            raise
        except BaseException:
            proof.cancel()
            raise
        return qemu, await proof

    async def fail(self) -> None:
        await self._machine.end()

    async def adopt(self, qemu: Qemu) -> None:
        """It is the VM's own already."""

    async def settle(self) -> None:
        """The old one has ended."""


class Beside:
    """A ``qemu`` that waits in the spare place. The one that saved the guest stays until the guest runs."""

    remedy = ""

    def __init__(self, machine: Machine, manifest: Manifest, qemu: Qemu) -> None:
        self._machine = machine
        self._manifest = manifest
        self._qemu = qemu

    @property
    def place(self) -> Place:
        return self._machine.spare

    def planned(self, plan: Launch) -> Launch:
        return plan

    async def prove_first(self, proving: Proving) -> Proven | None:
        return await proving.prove(await self.place.pid())

    async def make_room(self) -> None:
        """None is needed."""

    async def start(self, plan: Launch, proving: Proving, proven: Proven | None) -> tuple[Qemu, Proven]:  # noqa: ARG002
        """It was started before the guest stopped."""
        return self._qemu, proven or await proving.prove(await self.place.pid())

    async def fail(self) -> None:
        """The act that started it ends it."""

    async def adopt(self, qemu: Qemu) -> None:
        await self._machine.refuse_resumed_by_hand(self._manifest)
        await self._machine.adopt(qemu)

    async def settle(self) -> None:
        """Kill the old one. ``quit`` would unlink the paths of sockets, which are the new one's now."""
        await self._machine.spare.kill()


async def load(machine: Machine, request: LoadRequest) -> str:
    """Load the live checkpoint, which stays up to the moment at which the guest runs: till then the load can be repeated.
    Returns "", or why the guest was started afresh: its memory is lost, and the definition wants that. Raises CprError."""
    await machine.derive()
    machine.refuse_silent_qemu("nothing was loaded")
    if machine.pid and not RUN_STATES[machine.run_state].loads:
        raise AlreadyRunning(
            f"is {machine.state}; a checkpoint can't be loaded into a live VM", vm=machine.name, left="it was not touched"
        )
    manifest = machine.live_checkpoint()
    if manifest is None:
        raise NoCheckpoint("has no checkpoint to load", vm=machine.name, remedy=f"`cprctl start {machine.name}` boots it")
    if request.filename:  # a file that the caller named wrongly says nothing about the checkpoint
        await load_by_either(machine, manifest, request)
        return ""
    try:
        with holding(machine, manifest):
            try:
                await load_by_either(machine, manifest, request)
            except (ProofFailed, DeviceMissing) as error:
                lost = await _lost(machine, manifest, error) if request.cold_start else ""
                if not lost:
                    raise
                raise _MemoryLost(lost) from error
    except _MemoryLost as found:
        await _start_afresh(machine, machine.usable_definition(), manifest, found.lost)
        return found.lost
    return ""


class _MemoryLost(Exception):
    def __init__(self, lost: str) -> None:
        self.lost = lost


@contextlib.contextmanager
def holding(machine: Machine, manifest: Manifest) -> Iterator[None]:
    """A guest that fails its proof is kept untouched, with the evidence, for an admin to decide. Raises ProofFailed."""
    try:
        yield
    except ProofFailed as error:
        held = Held(reason=error.text, error=error.kind, at=machine.ports.clock.now(), evidence=error.evidence)
        try:
            machine.record(
                VmEvent.HELD,
                upgrade=manifest.upgrade,
                reason=error.what,
                evidence=[list(one) for one in error.evidence],
            )
            machine.ports.store.hold(machine.name, held)
        except OSError as unwritten:  # its checkpoint keeps the guest from running all the same
            log.error("VM %s: its hold could not be written: %s", machine.name, unwritten)
        found = "; ".join(f"{one.what}: expected {one.expected}, found {one.found}" for one in error.evidence)
        log.error("%s", error.text, extra=about(Event.HELD, **entry(manifest, "load"), evidence=found))
        raise


async def load_by_either(machine: Machine, manifest: Manifest, request: LoadRequest) -> LoadFailed | None:
    """By the QEMU that is installed now; else by the one that it was saved in, where a refresh has kept a copy: the same
    proofs, the same RAM. Returns why that was needed. Raises CprError."""
    try:
        await load_into(machine, manifest, request, Fresh(machine, manifest))
    except (LoadFailed, MachineChanged) as error:
        program = await asyncio.to_thread(machine.ports.programs.kept, machine.name, manifest.qemu_sha256)
        live = machine.readable_checkpoint()
        if request.filename or not program or live is None or live.id != manifest.id:
            raise
        log.warning("VM %s: it goes back to the QEMU that it had: %s", machine.name, error.what)
        try:
            await load_into(machine, manifest, request, Fresh(machine, manifest, program))
        except CprError as again:
            both = f"{error.what}; and its old QEMU, brought back, failed too: {again.what}"
            worse = again if isinstance(again, ProofFailed) else error
            worse.what = both
            raise worse from again
        failed = LoadFailed(
            f"could not get a new QEMU: {error.what}",
            vm=machine.name,
            left="its guest goes on in the QEMU that it had, on the same RAM",
            remedy=f"install a QEMU that works, then `cprctl refresh --in-turn {machine.name}`",
        )
        machine.error = failed.text
        return failed
    return None


async def load_into(machine: Machine, manifest: Manifest, request: LoadRequest, vessel: Vessel) -> None:
    """Raises CprError. The guest runs when this returns; its record is written later."""
    ports = machine.ports
    load_at = ports.clock.now()
    refuse_spent(ports, manifest)
    fd = await asyncio.to_thread(ports.store.open_vmstate, manifest, request.filename)
    with open(fd, "rb", buffering=0), naming(machine.name):  # noqa: PTH123 - only to be closed
        machine.enter(VmState.LOADING)
        located = await ports.memory.relocate(manifest.memory, machine.settings.agent.device_timeout)
        await machine.await_companions(manifest.launch)
        memory_at = ports.clock.now()
        async with request.turn or Turn():
            refuse_overlap(machine.name, ram_of(located), machine.neighbours.occupied(machine.name))
            qemu, proven, has = await _load_located(machine, manifest, fd, located, vessel)
            times = LoadTimes(load_at, memory_at, ports.clock.now())
            async with Undo() as undo:
                undo.push(vessel.fail)
                runs = await runs_by_load(qemu, manifest)
                announce_resume(machine, manifest)
                undo.done()
            going_on = (
                load_and_go_on(machine, qemu, manifest, proven, fd)
                if runs
                else go_on(machine, qemu, manifest, proven, vessel)
            )
            await finish_load(machine, manifest, times, going_on, has)


async def _load_located(
    machine: Machine, manifest: Manifest, fd: int, located: Sequence[Located], vessel: Vessel
) -> tuple[Qemu, Proven, Inventory]:
    """Once its memory is there. The state is read, unless that would let the guest go on (``runs_by_load``)."""
    ports = machine.ports
    proving = Proving(machine, manifest, located)
    proven = await vessel.prove_first(proving)
    plan = vessel.planned(await machine.plan_load(manifest, located))
    machine.record(VmEvent.LOAD_BEGIN, checkpoint=manifest.id, program=plan.argv[0])
    await vessel.make_room()
    said = LastWords()
    try:
        async with Undo() as undo:
            undo.push(vessel.fail)
            try:
                qemu, proven = await vessel.start(plan, proving, proven)
                has = await require_alike(ports, qemu, manifest, plan)
                if not await runs_by_load(qemu, manifest):
                    await qemu.load(fd, machine.settings.agent.load_timeout, manifest.qemu.dialect)
            except BaseException as error:
                said = await last_words(vessel.place, error)
                raise
            undo.done()
    except (CprError, TimeoutError) as error:
        machine.record(VmEvent.LOAD_FAILED, checkpoint=manifest.id)
        if isinstance(error, (ProofFailed, MemoryUnusable)):
            raise
        raise _failed(manifest, error, said, vessel.remedy) from error
    return qemu, proven, has


async def require_alike(ports: Ports, qemu: Qemu, manifest: Manifest, plan: Launch) -> Inventory:
    """What a QEMU that was started by ``plan`` has, if the guest of ``manifest`` can go on there; its disks get the limits
    that they had. Raises MachineChanged, ProofFailed, QemuFailed."""
    await refuse_lesser_machine(qemu, manifest)
    has = await take_brief(ports, qemu, plan)
    await refuse_other_devices(ports, manifest, has)
    await throttle(qemu, manifest)
    return has


def _failed(manifest: Manifest, error: CprError | TimeoutError, words: LastWords, remedy: str) -> LoadFailed:
    what = error.what if isinstance(error, CprError) else "QEMU did not get done"
    detail = f" (QEMU: {words.said})" if words.said and words.said not in what else ""
    failure = LoadFailed(
        f"could not be loaded: {what}{detail}",
        vm=manifest.vm,
        left="the checkpoint is kept and the load can be repeated",
        remedy=(isinstance(error, (QemuFailed, StorageSilent)) and error.remedy) or words.remedy or remedy,
    )
    log.error("%s", failure.text, extra=about(Event.LOAD_FAILED, **entry(manifest, "load")))
    return failure


async def runs_by_load(qemu: Qemu, manifest: Manifest) -> bool:
    """Whether QEMU lets the guest of ``manifest`` go on by the load itself (ADR 18)."""
    return manifest.run_state != RunState.PAUSED and await qemu.load_runs_guest(manifest.qemu.dialect)


def announce_resume(machine: Machine, manifest: Manifest) -> None:
    """Before the guest can run (invariant 5). Raises OSError."""
    machine.record(VmEvent.RESUME, checkpoint=manifest.id, run_state=manifest.run_state)


async def load_and_go_on(machine: Machine, qemu: Qemu, manifest: Manifest, proof: Proof, fd: int) -> float:
    """The resume is announced, and QEMU waits for the state: it lets the guest go on by reading it. The checkpoint is spent
    before, and put back if the guest has certainly not run (ADR 18). Returns when it ran (epoch s). A caller runs it to its
    end."""
    ports = machine.ports
    await asyncio.to_thread(ports.store.consume, manifest)
    try:
        resumed_at = await let_run_by_load(machine, qemu, proof, fd)
    except LoadFailed as error:
        said = await last_words(machine.own, error)
        await put_back(machine, manifest.id, VmEvent.LOAD_FAILED)
        raise _failed(manifest, error, said, Fresh(machine, manifest).remedy) from error
    return await _has_gone_on(machine, manifest, proof, resumed_at)


async def put_back(machine: Machine, checkpoint: str, why: VmEvent) -> None:
    """A load that was to let the guest go on has not: its checkpoint is live again before its QEMU ends. Raises
    CheckpointUnreadable, OSError."""
    await asyncio.to_thread(machine.ports.store.restore, machine.name, checkpoint)
    machine.record(why, checkpoint=checkpoint)
    await machine.end()


async def finish_load(
    machine: Machine, manifest: Manifest, times: LoadTimes, going_on: Awaitable[float], has: Inventory
) -> None:
    """``going_on`` is a ``go_on``: whoever is cancelled meanwhile, it comes to its end, and its guest has its record, its
    clock and its hooks. ``has`` is what its QEMU has."""

    async def run() -> None:
        resumed_at = await going_on
        machine.spawn(record_loaded(machine, manifest, has))
        machine.spawn(report(machine, manifest, times, resumed_at))

    await uninterrupted(run())


async def record_loaded(machine: Machine, manifest: Manifest, has: Inventory) -> None:
    """The places of devices are those that were saved: QEMU refuses a state whose devices are elsewhere."""
    launch, saved = machine.launched(), manifest.inventory
    if launch and saved:
        proved = replace(saved, nodes=has.nodes, named=has.named, started_at=launch.created_at)
        with contextlib.suppress(QemuFailed):  # it has ended meanwhile
            now = await machine.require_qemu().parts()
            proved = replace(proved, parts=now.parts, throttles=now.throttles)
        await record(machine.ports, machine.name, proved)


async def go_on(machine: Machine, qemu: Qemu, manifest: Manifest, proof: Proof, vessel: Vessel) -> float:
    """Its state is loaded and its resume announced: let the guest do what it did when it was saved. Returns when it ran
    (epoch s). The point of no return is in here, so that a caller runs it to its end."""
    ports = machine.ports
    await vessel.adopt(qemu)
    if machine.checkpointed:
        await asyncio.to_thread(ports.store.consume, manifest)
    # From here on the checkpoint is spent, whatever happens (invariant 2).
    resumed_at = 0.0
    try:
        if manifest.run_state != RunState.PAUSED:
            try:
                resumed_at = await let_run(machine, qemu, proof)
            except QemuRefused:  # the QEMU that had the guest before may hold the locks of its disks (measured: quorum)
                await vessel.settle()
                resumed_at = await let_run(machine, qemu, proof)
        await machine.own.settle()
    except LoadFailed as error:
        said = await last_words(machine.own, error)
        await put_back(machine, manifest.id, VmEvent.LOAD_FAILED)
        raise _failed(manifest, error, said, vessel.remedy) from error
    resumed_at = await _has_gone_on(machine, manifest, proof, resumed_at)
    await vessel.settle()
    return resumed_at


async def _has_gone_on(machine: Machine, manifest: Manifest, proof: Proof, resumed_at: float) -> float:
    """Note it, and wake a guest that the agent has put to sleep. Returns when it ran (epoch s)."""
    resumed_at = resumed_at or machine.ports.clock.now()
    machine.record(VmEvent.RESUMED, checkpoint=manifest.id, resumed_at=resumed_at)
    if manifest.wakes:
        resumed_at = await wake(machine, proof) or resumed_at
    launch = machine.launched()
    if launch and launch.argv[0] == launch.base_argv[0]:  # a kept copy is still running: its firmware links must stay
        await asyncio.to_thread(machine.ports.programs.forget, machine.name)
    return resumed_at


async def _lost(machine: Machine, manifest: Manifest, error: CprError) -> str:
    """Why its memory is provably lost, where the definition wants a cold start then; "" otherwise."""
    definition = machine.definition
    if definition is None or definition.load.on_lost_memory != "cold-start":
        return ""
    return await provably_lost(machine.ports, manifest, error)


async def _start_afresh(machine: Machine, definition: Definition, manifest: Manifest, lost: str) -> None:
    """Its RAM is no more: the checkpoint is moved aside, on the record, and the guest boots."""
    machine.record(VmEvent.MEMORY_LOST, checkpoint=manifest.id, reason=lost)
    text = f"VM {machine.name}: its memory is lost: {lost}. It is started afresh, as its definition wants."
    log.warning("%s", text, extra=about(Event.MEMORY_LOST, **entry(manifest, "load")))
    await machine.end()  # while the checkpoint stands: the next agent loads it, should this one be killed here
    await asyncio.to_thread(machine.ports.store.discard, machine.name, "lost")
    await acts.start.boot(machine, definition)
    machine.record(VmEvent.COLD_STARTED)
