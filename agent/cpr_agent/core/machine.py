# SPDX-License-Identifier: GPL-2.0-or-later
"""The live QEMU of one VM, and what is derived from it and from the live checkpoint. Nothing is remembered (ADR 4)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Sequence
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from cpr_agent.core.endings import EXITING_S, LastWords, ending, last_words
from cpr_agent.core.model import (
    Companion,
    Definition,
    Held,
    Inventory,
    Launch,
    Located,
    Manifest,
    MemoryIdentity,
    MemorySection,
    Ram,
    RunState,
    VmState,
    ram_of,
)
from cpr_agent.core.past import Past, VmEvent
from cpr_agent.core.paths import is_node_name
from cpr_agent.core.ports import Place, Ports, Qemu
from cpr_agent.core.proof import naming
from cpr_agent.core.run_states import RUN_STATES
from cpr_agent.core.settings import Settings
from cpr_agent.core.undo import Undo
from cpr_agent.errors import (
    AlreadyRunning,
    CheckpointUnreadable,
    CprError,
    InvalidDefinition,
    MemoryUnusable,
    QemuEnded,
    QemuFailed,
    QemuRefused,
    QemuUnreachable,
)

log = logging.getLogger(__name__)

EXIT_S = 10.0
"""For a QEMU that is on its way out: the kernel frees its memory."""
GREETING_S = 5.0
"""For a QEMU that runs already, and greets at once unless it is stopped or held by a debugger. The next look asks again."""
LOOK_S = 10.0
"""For its run state, which it knows at once: others may stand still until all are looked at."""
SILENT = f"QEMU has not said within {LOOK_S:g} s how its guest is"
COMPANION_S = 15.0
"""For programs beside a QEMU, which units start; systemd starts one that has ended again after 100 ms."""
RELOCATE_S = 5.0
"""For memory that a live QEMU has open, so that its device is there."""
BEFORE_IT_RUNS = (RunState.INMIGRATE, RunState.PAUSED, RunState.PRELAUNCH)
"""The run states of a QEMU whose guest has not run yet."""
_TAKEN = ("Device or resource busy", "Address already in use", "Could not set up host forwarding rule")
"""QEMU's errors for a resource that the other QEMU holds: a tap device without a free queue, a port of the host."""


class Neighbours(Protocol):
    """The other VMs of the host."""

    def changed(self, name: str) -> None:
        """The VM of that name has another state."""

    def admit(self) -> None:
        """Raises Busy while no guest may be let run."""

    def live_pids(self) -> Collection[int]:
        """PIDs of all QEMUs that answer."""

    def occupied(self, asking: str) -> list[tuple[str, MemoryIdentity]]:
        """Memory that the guests of all VMs but ``asking`` are in, with the VMs' names."""

    async def claimed(self, asking: str) -> list[tuple[str, MemoryIdentity]]:
        """Likewise, and memory that definitions name for guests that do not run."""


class Machine:
    """The facts of one VM, for the acts on it, which hold the VM's lock. ``on_event`` gets the name of each QMP event."""

    def __init__(
        self, name: str, ports: Ports, settings: Settings, neighbours: Neighbours, on_event: Callable[[str], None]
    ) -> None:
        self.name = name
        self.definition: Definition | None = None
        self.problem: Exception | None = None
        self.state = VmState.RECOVERING
        self.since = 0.0
        self.run_state = RunState.NONE
        self.pid = 0
        self.error = ""
        self.left_standing = ""
        """The checkpoint of a save of this agent's life that failed, and by which its guest stands in postmigrate since."""
        self._told: object = None
        """What was last said to have changed."""
        self.qemu: Qemu | None = None
        self.ports = ports
        self.settings = settings
        self._awaits_end = False
        self.neighbours = neighbours
        self._on_event = on_event
        self._late_sleep_until = 0.0
        self._listeners: set[Callable[[str], None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def own(self) -> Place:
        return self.ports.runner.own(self.name)

    @property
    def spare(self) -> Place:
        return self.ports.runner.spare(self.name)

    @property
    def past(self) -> Past:
        return self.ports.journal.past(self.name)

    def record(self, event: VmEvent, **facts: object) -> None:
        """Make it durable in the journal before anything else happens. Blocking; a few milliseconds."""
        self.ports.journal.append(event, vm=self.name, **facts)

    def live_checkpoint(self) -> Manifest | None:
        """Raises CheckpointUnreadable."""
        return self.ports.store.live(self.name)

    def readable_checkpoint(self) -> Manifest | None:
        """The live checkpoint; None also if it can't be read, which ``error`` tells then."""
        try:
            return self.live_checkpoint()
        except CheckpointUnreadable as error:
            self.error = error.text
            return None

    @property
    def checkpointed(self) -> bool:
        """Whether there is a live checkpoint, readable or not."""
        return self.ports.store.checkpointed(self.name)

    @property
    def powered_off(self) -> bool:
        """Whether the guest has powered off, though QEMU may still be there."""
        return self.run_state is RunState.SHUTDOWN or not self.pid

    def held(self) -> Held | None:
        """Why the VM is kept untouched, if it is."""
        return self.ports.store.held(self.name)

    def launched(self) -> Launch | None:
        """The command line that the live QEMU was started with, and its memory."""
        return self.ports.runner.launched(self.name) if self.pid else None

    def occupied_memory(self) -> Ram:
        """The memory that this VM's guest is in now, by its QEMU or its checkpoint."""
        launch = self.launched()
        if launch:
            return launch.memory
        with contextlib.suppress(CheckpointUnreadable):
            manifest = self.live_checkpoint()
            return manifest.memory if manifest else ()
        return ()

    async def claimed_memory(self) -> Ram:
        """The memory that is this VM's own: its guest's, or else the ranges of its definition that are on this host."""
        if occupied := self.occupied_memory():
            return occupied
        found: list[Located] = []
        for one in self.definition.memory.ranges if self.definition else ():
            with contextlib.suppress(MemoryUnusable):
                found += await self.ports.memory.locate(MemorySection(node=(one,)), 0)
        return ram_of(found)

    def usable_definition(self) -> Definition:
        """Raises InvalidDefinition."""
        if self.definition is None:
            if isinstance(self.problem, CprError):
                raise self.problem
            raise InvalidDefinition(
                f"has no usable definition: {self.problem or 'its file is gone'}", vm=self.name, left="nothing was done"
            )
        return self.definition

    def require_qemu(self) -> Qemu:
        """The live QEMU. Raises QemuEnded, QemuUnreachable."""
        if self.qemu is None:
            error = QemuUnreachable if self.pid else QemuEnded
            raise error("has no QEMU that answers", vm=self.name)
        return self.qemu

    async def answering_qemu(self) -> Qemu:
        """The live QEMU, to which the agent connects anew where it has lost its connection: for an undo, which must not
        leave a guest stopped because of that. Raises QemuEnded, QemuUnreachable."""
        with contextlib.suppress(QemuFailed):
            qemu = self.require_qemu()
            await qemu.run_state()
            return qemu
        await self.disconnect()
        if not await self.own.pid():
            raise QemuEnded("its QEMU has ended", vm=self.name)
        return await self._connect(GREETING_S)

    async def locating_guest(self, error: QemuFailed) -> QemuFailed:
        """``error``, by which its guest does not go on, with the place where the guest is then."""
        what = f"could not be resumed: {error.what}"
        if isinstance(error, QemuRefused):
            left = f"the guest stands, whole, in its QEMU (PID {self.pid})"
            remedy = f"mend that; the agent tries again, and `cprctl resume {self.name}` does so at once"
            return QemuRefused(what, vm=self.name, left=left, remedy=remedy)
        if isinstance(error, QemuEnded) or await self.own.wait_exit(EXITING_S):
            left = "its QEMU has ended, and the guest is lost unless it had shut itself down"
            return QemuEnded(what, vm=self.name, left=left, remedy="see the end of its log")
        left = f"its QEMU (PID {self.pid}) is there, with the guest, and does not answer"
        remedy = f"once it does, `cprctl resume {self.name}` lets the guest go on"
        return QemuUnreachable(what, vm=self.name, left=left, remedy=remedy)

    def refuse_silent_qemu(self, left: str) -> None:
        """Raises QemuUnreachable: a QEMU that does not answer can't say whether its guest still stands where it was saved,
        and the witness, a sample, need not show it (invariant 2)."""
        if self.pid and self.qemu is None:
            raise QemuUnreachable(
                "its QEMU does not answer, so the agent can't tell whether its guest has run since it was saved",
                vm=self.name,
                left=left,
                remedy=f"`cprctl stop --hard {self.name}` ends QEMU, if you know that it has not",
            )

    async def refuse_resumed_by_hand(self, manifest: Manifest) -> None:
        """Another look at the saved guest, before its QEMU is ended. Raises AlreadyRunning if it was let run on another
        socket, QemuFailed."""
        now = RunState(await self.require_qemu().run_state())
        if self._ran_since(manifest, now):
            what = f"was resumed by hand meanwhile: its QEMU is {now}"
            raise AlreadyRunning(what, vm=self.name, left="the guest goes on in the QEMU that it has")

    def stamped(self, launch: Launch) -> Launch:
        return replace(launch, created_at=self.ports.clock.now(), boot_id=self.ports.boot.boot_id())

    async def relocated(self, ram: Ram) -> list[Located]:
        """Raises DeviceMissing, MemoryChanged."""
        with naming(self.name):
            return await self.ports.memory.relocate(ram, RELOCATE_S)

    async def plan_load(self, manifest: Manifest, located: Sequence[Located], directory: str = "") -> Launch:
        """How to start a QEMU that takes the guest of ``manifest``, by cpr-transfer where it is to wait in ``directory``.
        Where its firmware is not what it was, with copies."""
        definitions, firmware = self.ports.definitions, self.ports.firmware
        changed, opened = await self.ports.threads.run(
            self.name, lambda: (firmware.changed(self.name), self._devices_below(manifest.inventory))
        )
        plan = (
            definitions.plan_transfer(manifest, located, directory)
            if directory
            else definitions.plan_load(manifest, located)
        )
        return definitions.with_firmware(replace(plan, opened=opened), changed)

    async def prepare_next(self) -> None:
        """Have what the next QEMU of its guest needs of the host: an agent that knew less may have started this one."""
        launch = self.launched()
        if launch is None:
            return
        has = await asyncio.to_thread(self.ports.runner.inventory, self.name)
        try:
            opened = await self.ports.threads.run(self.name, partial(self._devices_below, has))
            await self.ports.runner.prepare(replace(launch, opened=opened))
        except (CprError, OSError) as error:
            log.warning("VM %s: its next start has to wait: %s", self.name, error)

    def _devices_below(self, inventory: Inventory | None) -> tuple[str, ...]:
        """Block devices that its QEMU had open, by QEMU's names where these still lead there. Root looks at no name of
        QEMU's outside of /dev, in which none but root makes nodes and links. Blocking."""
        nodes = inventory.nodes if inventory else ()
        opened = {
            node.filename: node.file
            for node in nodes
            if node.file and node.file.kind == "device" and is_node_name(node.filename)
        }
        look = self.ports.files.look_at
        return tuple(
            sorted(path for path, was in opened.items() if (now := look(path)) and was.same_as(now, rebooted=True))
        )

    # -- its state ----------------------------------------------------------------------------------------------------

    def enter(self, state: VmState) -> None:
        if state is not self.state:
            self.since = self._on_record(state) if self.state is VmState.RECOVERING else self.ports.clock.now()
        self.state = state
        manifest = self.readable_checkpoint()
        told = (state, self.run_state, self.pid, self.error, manifest and manifest.id, self.definition, self.problem)
        if told != self._told:  # a look at all of its properties costs other guests time
            self._told = told
            self.neighbours.changed(self.name)

    def _on_record(self, state: VmState) -> float:
        """Since when it has been in a state that it was in before this agent looked (epoch s); 0 if no record tells."""
        if state is VmState.HELD and (held := self.held()):
            return held.at
        if state in (VmState.SAVED, VmState.HELD):
            manifest = self.readable_checkpoint()
            return manifest.times.stopped_at if manifest else 0.0
        launch, last = self.launched(), self.ports.history.last(self.name)
        if state is not VmState.RUNNING or launch is None:
            return 0.0
        return max(launch.created_at, last.resumed_at if last else 0.0)

    async def derive(self) -> None:
        """Derive the state anew, connecting to a QEMU that is there."""
        had, self.pid = self.pid, await self.own.pid()
        if not self.pid:
            await self.disconnect()
            if had:
                await self._tell_end()
            self.run_state = RunState.NONE
            self.enter(self._state_without_qemu())
            return
        try:
            qemu = self.qemu or await self._connect(GREETING_S)
            async with asyncio.timeout(LOOK_S):
                self.run_state = RunState(await qemu.run_state())
        except (QemuFailed, TimeoutError) as failure:
            error = failure if isinstance(failure, QemuFailed) else QemuFailed(SILENT, vm=self.name)
            self.error = error.text
            await self.disconnect()
            self.enter(VmState.UNREACHABLE)
            self.spawn(self._after_end())
            return
        if not self.stands_saved:
            self.left_standing = ""
        await self._retire_if_resumed_by_hand()
        self._end_save_that_was_taken_back()
        self.enter(self._state_with_qemu())

    async def _tell_end(self) -> None:
        """Of a QEMU that has ended by a signal, and not by the agent."""
        if said := ending(await self.own.ended_by(EXITING_S)).said:
            self.error = f"VM {self.name}: its QEMU has ended: {said}"
            log.error("%s", self.error)

    @property
    def stands_saved(self) -> bool:
        """Whether QEMU is there, and the guest in it stands where a save has left it."""
        return self.run_state is RunState.POSTMIGRATE

    @property
    def has_only_loaded(self) -> bool:
        """Whether QEMU was started to load a checkpoint, and its guest has not run since, by QEMU and by the journal."""
        launch = self.launched()
        loads = launch is not None and launch.kind == "load" and not self.past.spent_by(launch.checkpoint)
        return loads and self.run_state in BEFORE_IT_RUNS

    @property
    def stands_still(self) -> bool:
        """Whether it stands saved, or where a failed save left it: QEMU has the guest, and could not flush its disks."""
        return self.run_state in (RunState.POSTMIGRATE, RunState.FINISH_MIGRATE)

    def _state_with_qemu(self) -> VmState:
        if not self.stands_saved:
            return RUN_STATES[self.run_state].shown
        if self.held():
            return VmState.HELD
        return VmState.SAVED if self.checkpointed else VmState.PAUSED

    def _state_without_qemu(self) -> VmState:
        if self.held():
            return VmState.HELD
        try:
            return VmState.SAVED if self.live_checkpoint() else VmState.STOPPED
        except CheckpointUnreadable as error:
            self.error = error.text
            return VmState.HELD

    async def _retire_if_resumed_by_hand(self) -> None:
        """A saved guest that runs was let run on the admin's own QMP socket: its checkpoint is history."""
        manifest = self.readable_checkpoint()
        if manifest and self._ran_since(manifest, self.run_state):
            log.warning("VM %s: its guest was resumed by hand; the checkpoint is retired", self.name)
            self.record(VmEvent.RESUMED_BY_HAND, checkpoint=manifest.id)
            await asyncio.to_thread(self.ports.store.discard, self.name)

    def _end_save_that_was_taken_back(self) -> None:
        """The guest runs again, by whoever's hand. Should its QEMU stand in postmigrate later, an admin has migrated it
        away (invariant 2)."""
        begun = self.past.interrupted_save
        if begun and begun.last is not VmEvent.SAVE_BEGIN and self.run_state is RunState.RUNNING:
            with contextlib.suppress(OSError):  # the next look tries again
                self.record(VmEvent.RESUMED, checkpoint=begun.checkpoint)

    def _ran_since(self, manifest: Manifest, now: RunState) -> bool:
        """Whether the live QEMU's guest ran after it was saved: its QEMU left postmigrate, and does not load just this."""
        launch = self.launched()
        loading = launch is None or (launch.kind == "load" and launch.checkpoint == manifest.id)
        return now in (RunState.RUNNING, RunState.SUSPENDED) or not (loading or now is RunState.POSTMIGRATE)

    async def _after_end(self) -> None:
        """A QEMU's connection ends a moment before its process does: derive again if that is what its silence meant. One at
        a time: each wait has a descriptor, and a QEMU that answers nonsense may be asked a hundred times a second."""
        if self._awaits_end:
            return
        self._awaits_end = True
        try:
            if await self.own.wait_exit(EXIT_S):
                self._on_event("GONE")
        finally:
            self._awaits_end = False

    # -- its QEMU -----------------------------------------------------------------------------------------------------

    async def launch(self, launch: Launch) -> Qemu:
        """Start QEMU and speak to it, or leave no trace. Raises QemuFailed with QEMU's words."""
        state = VmState.STARTING if launch.kind == "start" else VmState.LOADING
        if self.state is not state:  # skip redundant change signals: they delay other guests
            self.enter(state)
        place = self.own
        said = LastWords()
        try:
            async with Undo() as undo:
                undo.push(place.kill)
                try:
                    await place.start(launch)
                    self.pid = await place.pid()
                    qemu = await self._connect(self.settings.agent.qemu_start_timeout)
                except CprError as error:
                    said = await last_words(place, error)
                    raise
                undo.done()
                return qemu
        except BaseException as error:
            self.pid = 0
            if not isinstance(error, CprError):
                raise
            raise self._not_started(error, launch, "nothing runs", said) from error

    async def launch_spare(self, launch: Launch) -> Qemu:
        """Likewise beside the VM's own QEMU, which is left as it is."""
        place = self.spare
        said = LastWords()
        try:
            async with Undo() as undo:
                undo.push(place.kill)
                try:
                    await place.start(launch)
                    qemu = await place.connect(self.settings.agent.qemu_start_timeout)
                except CprError as error:
                    said = await last_words(place, error)
                    raise
                undo.done()
                return qemu
        except CprError as error:
            raise self.spare_failed(error, launch, said) from error

    def spare_failed(self, error: CprError, launch: Launch, said: LastWords) -> QemuFailed:
        failed = self._not_started(error, launch, "the QEMU that it has is untouched", said)
        if any(word in failed.what for word in _TAKEN):
            failed.remedy = f"where two can't have that, `cprctl refresh --in-turn {self.name}` ends the old one first"
        return failed

    def _not_started(self, error: CprError, launch: Launch, left: str, said: LastWords) -> QemuFailed:
        detail = f": {said.said}" if said.said and said.said not in error.what else ""
        what = f"{error.what}{detail}"
        named = [one for one in self.ports.definitions.companions(launch) if one.where in what]
        return QemuFailed(what, vm=self.name, left=left, remedy=_start_first(named) or said.remedy or error.remedy)

    async def await_companions(self, launch: Launch) -> None:
        """Wait for the programs that its QEMU needs beside it. One that can start without them does so, and one that can't
        says it best."""
        if missing := await self.ports.definitions.missing_companions(launch, COMPANION_S):
            log.warning("VM %s: not there yet: %s", self.name, ", ".join(map(str, missing)))

    async def adopt(self, qemu: Qemu) -> None:
        """Make the QEMU in the spare place the VM's own."""
        self.ports.runner.adopt(self.name)
        self.pid = await self.own.pid()
        old, self.qemu = self.qemu, qemu
        qemu.on_change(self._hear)
        if old:
            await old.close()

    async def give_back(self) -> None:
        """To the QEMU that was the VM's own before ``adopt``."""
        self.ports.runner.adopt(self.name)
        self.pid = await self.own.pid()
        await self.disconnect()

    async def end(self) -> None:
        """Quit QEMU, then kill it; its process is gone when this returns."""
        place = self.own
        if self.qemu:
            await self.qemu.quit()
            await self.disconnect()
        if not await place.wait_exit(EXIT_S):
            await place.kill()
        self.pid = 0

    async def _connect(self, timeout_s: float) -> Qemu:
        qemu = await self.own.connect(timeout_s)
        qemu.on_change(self._hear)
        self.qemu = qemu
        return qemu

    async def disconnect(self) -> None:
        """Let go of QEMU, which runs on."""
        if self.qemu:
            qemu, self.qemu = self.qemu, None
            await qemu.close()

    @contextlib.asynccontextmanager
    async def spare_qemu(self, launch: Launch) -> AsyncIterator[Qemu]:
        """A QEMU in the spare place that runs no guest, and ends with the block. Raises QemuFailed."""
        qemu = await self.launch_spare(self.stamped(launch))
        async with Undo() as end:
            end.push(self.spare.kill)
            try:
                yield qemu
            finally:
                await qemu.close()

    # -- what it says -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hearing(self, wanted: str) -> Iterator[asyncio.Event]:
        """The event is set once QEMU has told of ``wanted``, a QMP event, while this lasts."""
        heard = asyncio.Event()

        def listen(event: str) -> None:
            if event == wanted:
                heard.set()

        self._listeners.add(listen)
        try:
            yield heard
        finally:
            self._listeners.discard(listen)

    def expect_late_sleep(self, seconds: float) -> None:
        """A guest that was asked to sleep in vain may do so all the same, within this time."""
        self._late_sleep_until = asyncio.get_running_loop().time() + seconds

    @property
    def expects_late_sleep(self) -> bool:
        return asyncio.get_running_loop().time() < self._late_sleep_until

    def _hear(self, event: str) -> None:
        for listen in tuple(self._listeners):
            listen(event)
        self._on_event(event)

    # -- work that no act waits for -----------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for the work that acts left to be done after their guests ran. It goes on if the caller is cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks)


def _start_first(some: Sequence[Companion]) -> str:
    return f"start {' and '.join(map(str, some))} first, by a unit that is there before the VM's" if some else ""
