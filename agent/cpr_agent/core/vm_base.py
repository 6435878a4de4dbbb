"""What a VM is now, derived and never remembered: from the live QEMU, if there is one, and from the live checkpoint, if
there is one (invariant 5). And how its QEMU comes and goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from itertools import takewhile

from msgspec.structs import replace

from cpr_agent.core.model import (
    Definition,
    Held,
    Launch,
    Located,
    Manifest,
    MemoryIdentity,
    MemorySection,
    Policy,
    QemuFacts,
    Ram,
    Survives,
    VmState,
    ram_of,
)
from cpr_agent.core.ports import Ports, Qemu
from cpr_agent.core.settings import Settings
from cpr_agent.errors import (
    AlreadyRunning,
    Busy,
    CheckpointUnreadable,
    CprError,
    InvalidArgument,
    InvalidDefinition,
    MemoryUnusable,
    QemuFailed,
    WrongState,
)

log = logging.getLogger(__name__)

_FROM_RUN_STATE = {
    "running": VmState.RUNNING,
    "paused": VmState.PAUSED,
    "suspended": VmState.SUSPENDED,
    "shutdown": VmState.SHUT_DOWN,
    "inmigrate": VmState.LOADING,
    "prelaunch": VmState.STARTING,
}
EXIT_S = 10.0
"""For a QEMU that is on its way out: the kernel frees what it had."""
MAX_LOADS = 3
LATE_SLEEP_S = 300.0
"""How long after a guest was asked to sleep in vain it is expected to do so all the same, and woken."""
SAVEABLE = ("running", "paused", "suspended")
_TAKEN = ("Device or resource busy", "Address already in use", "Could not set up host forwarding rule")
"""What QEMU says of what the one beside it has: a tap device without a free queue, a port of the host."""


class VmBase:
    """``changed`` is called with its name after each change of state; ``claims`` yields the memory that the guests of all
    VMs but the named one occupy and, if asked to, that which is only defined to be theirs. ``admit`` raises while no guest
    may be let run. ``live_pids`` are those of all VMs' QEMUs that answer."""

    def __init__(
        self,
        name: str,
        ports: Ports,
        settings: Settings,
        changed: Callable[[str], None],
        claims: Callable[[str, bool], Awaitable[list[tuple[str, MemoryIdentity]]]],
        admit: Callable[[], None] = lambda: None,
        live_pids: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.name = name
        self.definition: Definition | None = None
        self.problem: Exception | None = None
        self.state = VmState.STOPPED
        self.run_state = ""
        self.pid = 0
        self.error = ""
        self._ports = ports
        self._settings = settings
        self._changed = changed
        self._claims = claims
        self._admit = admit
        self._live_pids = live_pids
        self._qemu: Qemu | None = None
        self._lock = asyncio.Lock()
        self._act = ""
        self._woke = False
        self._may_sleep_late_until = 0.0
        self._asked_successor: tuple[tuple[str, ...], list[str]] = ((), [])
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what it is -----------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        return self._ports.runner.unit(self.name)

    def live_checkpoint(self) -> Manifest | None:
        return self._ports.store.live(self.name)

    def launched(self) -> Launch | None:
        """What the live QEMU was started with."""
        return self._ports.runner.launched(self.name) if self.pid else None

    def occupied_memory(self) -> Ram:
        """The memory that this VM's guest is in now, by its QEMU or its checkpoint."""
        launch = self.launched()
        if launch:
            return launch.memory
        with contextlib.suppress(CheckpointUnreadable):
            manifest = self.live_checkpoint()
            return manifest.memory if manifest else ()
        return ()

    @property
    def checkpointed(self) -> bool:
        """Whether there is a live checkpoint, readable or not."""
        return self._ports.store.checkpointed(self.name)

    @property
    def off(self) -> bool:
        """Whether its guest has powered off, though QEMU may still be there."""
        return self.run_state == "shutdown" or not self.pid

    @property
    def trouble(self) -> str:
        """Why it has no run state in which it could be saved."""
        return "its QEMU does not answer" if self.state is VmState.UNREACHABLE else f"its run state is {self.run_state}"

    def saved_by(self, upgrade: str) -> bool:
        manifest = self._live_or_none()
        return manifest is not None and manifest.upgrade == upgrade

    def saved_in_volatile(self, need: Survives) -> bool:
        """Whether it is saved already, in RAM that would not outlive ``need``."""
        manifest = self._live_or_none()
        return manifest is not None and not manifest.survives.covers(need)

    def may_shut_down(self, policy: Policy) -> bool:
        """Whether it may be shut down in order when it cannot be saved."""
        return policy is not Policy.ALL_OR_NOTHING or "shut-down" in self._ladder()

    @property
    def witness_kind(self) -> str:
        return self._settings.witness.kind

    @property
    def waits(self) -> bool:
        """Whether what blocks its save is waited for."""
        return "wait" in self._ladder()

    def _ladder(self) -> list[str]:
        """What to do one after the other when CPR is blocked; "refuse" is the end of it."""
        steps = self.definition.save.when_blocked if self.definition else ()
        return list(takewhile(lambda step: step != "refuse", steps))

    @property
    def qemu(self) -> Qemu | None:
        """The live QEMU, if there is one that answers."""
        return self._qemu

    async def claimed_memory(self) -> Ram:
        """The memory that is this VM's own: what its guest occupies, else what of its definition is on this host."""
        if occupied := self.occupied_memory():
            return occupied
        found: list[Located] = []
        for one in self.definition.memory.ranges if self.definition else ():
            with contextlib.suppress(MemoryUnusable):
                found += await self._ports.memory.locate(MemorySection(node=(one,)), 0)
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

    def load_interrupted(self) -> bool:
        """Whether the last thing that happened to the live checkpoint was a load that did not get to its end.

        After three such loads it is left to the admin: it may be what ends the agent.
        """
        manifest = self._live_or_none()
        if manifest is None:
            return False
        events = [r["event"] for r in self._ports.journal.records() if r.get("checkpoint") == manifest.id]
        begun = events.count("load-begin")
        under_way = self._in_refresh() or (begun and events[-1] in ("load-begin", "load-interrupted"))
        return bool(under_way) and begun < MAX_LOADS

    def _in_refresh(self) -> bool:
        """Whether an agent was in the middle of giving the guest a new QEMU."""
        return self._last_of("refresh", "refreshed", "start") == "refresh"

    def _in_transfer(self) -> bool:
        """The same by cpr-transfer, since when its guest has run in no other QEMU than its own."""
        return self._last_of("transfer", "transfer-undone", "refreshed", "start") == "transfer"

    def end_refresh(self) -> None:
        """Whatever became of one that was under way: unless its guest is still to be loaded, it is over."""
        if self._in_refresh() and not self.checkpointed:
            self._ports.journal.append("refreshed", vm=self.name)

    def _last_of(self, *events: str) -> str:
        """Which of these the journal told last of this VM; "" for none."""
        return str(self._last_record(*events).get("event", ""))

    def _last_record(self, *events: str) -> dict[str, object]:
        """The last that the journal has of this VM and these; empty for none."""
        found = (r for r in reversed(self._ports.journal.records()) if r.get("vm") == self.name and r["event"] in events)
        return next(found, {})

    def held(self) -> Held | None:
        """Why it is kept untouched, if it is."""
        return self._ports.store.held(self.name)

    def awaits_cold_start(self) -> bool:
        """Whether its memory was found to be lost, and it was not started afresh yet."""
        return self._last_of("memory-lost", "cold-started") == "memory-lost"

    async def blocked_reasons(self) -> list[str]:
        """Why it can't be saved as it is now; empty too where there is nothing to save."""
        launch = self.launched()
        if self._qemu is None or launch is None or self.run_state not in SAVEABLE:
            return []
        return await self._qemu.blocked_reasons(launch) + await self._sleep_reasons(self._qemu)

    async def successor_reasons(self) -> list[str]:
        """Why the QEMU that is installed now, which would load its guest after a kexec, could not; empty too where it is
        the one that runs. It is asked in the VM's other place, and has no machine there."""
        launch = self.launched()
        if self._qemu is None or launch is None:
            return []
        host, path = self._ports.host, launch.base_argv[0]
        running, installed = host.program_identity(f"/proc/{self.pid}/exe"), host.program_identity(path)
        if running == installed:
            return []
        if not installed:
            return [f"the QEMU that would load it, {path}, is not there any more"]
        async with self._lock:
            if self._qemu is None:
                return []
            facts = await self._qemu.facts(launch)
            asked = (installed, facts.version, facts.machine_type)
            if self._asked_successor[0] != asked:
                self._asked_successor = (asked, await self._ask_successor(launch, facts))
            return self._asked_successor[1]

    async def _ask_successor(self, launch: Launch, facts: QemuFacts) -> list[str]:
        try:
            qemu = await self._launch_beside(self._stamped(self._ports.definitions.plan_probe(launch)))
            try:
                lacking = await qemu.lacks(facts)
            finally:
                await qemu.close()
                await asyncio.shield(asyncio.ensure_future(self._ports.runner.kill(self.name, beside=True)))
        except QemuFailed as error:
            return [f"the QEMU that would load it does not work: {error.what}"]
        return [f"the QEMU that would load it lacks what it needs: {'; '.join(map(str, lacking))}"] if lacking else []

    # -- its sleep ------------------------------------------------------------------------------------------------------

    async def _must_sleep(self, qemu: Qemu) -> bool:
        """Whether a save has to put the guest to sleep before: a device of the host keeps state that only the guest's own
        driver can put aside (QEMU, hw/vfio/cpr.c)."""
        return self._must_sleep_with(await qemu.vfio_devices())

    def _must_sleep_with(self, devices: list[str]) -> bool:
        wanted = self._suspend_policy
        return self.run_state == "running" and (wanted == "always" or (wanted == "auto" and bool(devices)))

    async def _sleep_reasons(self, qemu: Qemu) -> list[str]:
        """Why a guest that must sleep for a save would not."""
        devices = await qemu.vfio_devices()
        if self._must_sleep_with(devices):
            problem = await qemu.sleep_problem()
            return [f"it must sleep while it is saved (save.suspend), and can't: {problem}"] if problem else []
        if self.run_state == "suspended" or not devices:
            return []
        why = "is paused" if self.run_state == "paused" else "is not to be put to sleep (save.suspend is never)"
        return [f"it has {', '.join(devices)}, which can be saved only while the guest sleeps, and it {why}"]

    @property
    def _suspend_policy(self) -> str:
        return self.definition.save.suspend if self.definition else "auto"

    def _put_to_sleep(self) -> bool:
        """Whether the guest was last put to sleep by the agent, and not woken since."""
        return self._last_of("suspend", "woken", "start") == "suspend"

    async def _wake(self) -> float:
        """Wake the guest that the agent has put to sleep. Returns when it woke (epoch s), 0 if it was awake or is gone."""
        if self._qemu is None:
            return 0.0
        woken_at = await self._qemu.wake()
        self._ports.journal.append("woken", vm=self.name)
        return woken_at

    # -- its state ------------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Derive the state anew, connecting to a QEMU that is there."""
        async with self._lock:
            await self._derive()
            if self.run_state == "suspended" and asyncio.get_running_loop().time() < self._may_sleep_late_until:
                log.warning(
                    "VM %s: its guest went to sleep late, when nobody waited for that any more; it is woken", self.name
                )
                await self._wake()

    @contextlib.asynccontextmanager
    async def _exclusive(self, act: str) -> AsyncIterator[None]:
        if self._act:
            raise Busy(
                f"is in the middle of {self._act}",
                vm=self.name,
                left="nothing was done",
                remedy="try again when it is done",
            )
        self._act = act
        self.error = ""
        try:
            async with self._lock:
                try:
                    yield
                except (WrongState, InvalidArgument):
                    raise  # the caller's problem, not the VM's
                except CprError as error:
                    self.error = error.text
                    raise
                finally:
                    await self._derive()
        finally:
            self._act = ""

    async def _derive(self) -> None:
        """With the lock held."""
        self.pid = await self._ports.runner.active(self.name)
        if not self.pid:
            await self._drop_connection()
            self.run_state = ""
            self._set(self._state_without_qemu())
            return
        try:
            if self._qemu is None:
                await self._connect()
            assert self._qemu
            self.run_state = await self._qemu.run_state()
        except QemuFailed as error:
            self.error = error.text
            await self._drop_connection()
            self._set(VmState.UNREACHABLE)
            self._spawn(self._after_end())
            return
        manifest = self._live_or_none()
        if manifest and self._ran_since(manifest):
            # Somebody let the saved guest run, by the admin's own QMP socket: its checkpoint is history.
            log.warning("VM %s: its guest was resumed by hand; the checkpoint is retired", self.name)
            self._ports.journal.append("resumed-by-hand", vm=self.name, checkpoint=manifest.id)
            await asyncio.to_thread(self._ports.store.discard, self.name)
            manifest = None
        if self.run_state == "postmigrate":
            self._set(VmState.SAVED if self._ports.store.checkpointed(self.name) else VmState.PAUSED)
        else:
            self._set(_FROM_RUN_STATE.get(self.run_state, VmState.PAUSED))

    def _ran_since(self, manifest: Manifest) -> bool:
        """Whether the live QEMU's guest ran after it was saved: its QEMU left postmigrate, and does not load just this."""
        launch = self.launched()
        loading = launch is None or (launch.kind == "load" and launch.checkpoint == manifest.id)
        return self.run_state in ("running", "suspended") or not (loading or self.run_state == "postmigrate")

    def _state_without_qemu(self) -> VmState:
        if self.held():
            return VmState.HELD
        try:
            return VmState.SAVED if self.live_checkpoint() else VmState.STOPPED
        except CheckpointUnreadable as error:
            self.error = error.text
            return VmState.HELD

    def _live_or_none(self) -> Manifest | None:
        try:
            return self.live_checkpoint()
        except CheckpointUnreadable as error:
            self.error = error.text
            return None

    def _set(self, state: VmState) -> None:
        self.state = state
        self._changed(self.name)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait for what an act left to be done after its guest ran."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Let go of QEMU, which runs on."""
        await self.settled()
        async with self._lock:
            await self._drop_connection()

    # -- its QEMU -------------------------------------------------------------------------------------------------------

    async def _launch(self, launch: Launch) -> Qemu:
        """Start QEMU and speak to it, or leave nothing of it. Raises QemuFailed with what QEMU said."""
        state = VmState.STARTING if launch.kind == "start" else VmState.LOADING
        if self.state is not state:  # each that is told costs other guests time
            self._set(state)
        try:
            await self._ports.runner.start(launch)
            self.pid = await self._ports.runner.active(self.name)
            return await self._connect()
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(self._ports.runner.kill(self.name)))
            self.pid = 0
            if not isinstance(error, CprError):
                raise
            raise self._not_started(error, "nothing runs", self._ports.runner.log_tail(self.name)) from error

    async def _launch_beside(self, launch: Launch) -> Qemu:
        """The same beside the VM's own QEMU, which is left as it is."""
        runner = self._ports.runner
        try:
            await runner.start(launch, beside=True)
            return await runner.connect(self.name, self._settings.agent.qemu_start_timeout, beside=True)
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(runner.kill(self.name, beside=True)))
            if not isinstance(error, CprError):
                raise
            raise self._failed_beside(error) from error

    def _failed_beside(self, error: CprError) -> QemuFailed:
        said = self._ports.runner.log_tail(self.name, beside=True)
        failed = self._not_started(error, "the QEMU that it has is untouched", said)
        if any(word in failed.what for word in _TAKEN):
            failed.remedy = f"where two can't have that, `cprctl refresh --in-turn {self.name}` ends the old one first"
        return failed

    def _not_started(self, error: CprError, left: str, said: str) -> QemuFailed:
        detail = f": {said}" if said and said not in error.what else ""
        return QemuFailed(f"{error.what}{detail}", vm=self.name, left=left, remedy=error.remedy)

    async def _adopt(self, qemu: Qemu) -> None:
        """The QEMU beside the VM's own is its own from now on."""
        self._ports.runner.adopt(self.name)
        self.pid = await self._ports.runner.active(self.name)
        old, self._qemu = self._qemu, qemu
        qemu.on_change(self._on_qemu_event)
        if old:
            await old.close()

    async def _end_qemu(self) -> None:
        """Quit QEMU, then the hard way; done when its process is gone."""
        if self._qemu:
            await self._qemu.quit()
            await self._drop_connection()
        if not await self._ports.runner.wait_exit(self.name, EXIT_S):
            await self._ports.runner.kill(self.name)
        self.pid = 0

    async def _require_no_qemu(self) -> None:
        await self._derive()
        if self.pid:
            raise AlreadyRunning(f"is already {self.state}", vm=self.name)

    def _require_no_silent_qemu(self, left: str) -> None:
        """Raises QemuFailed. Whether the guest of a QEMU that does not answer still stands where it was saved, nobody can
        tell, and the witness, a sample, need not (invariant 2)."""
        if self.pid and self._qemu is None:
            raise QemuFailed(
                "its QEMU does not answer, so nobody can tell whether its guest has run since it was saved",
                vm=self.name,
                left=left,
                remedy=f"`cprctl stop --hard {self.name}` ends QEMU, if you know that it has not",
            )

    def _stamped(self, launch: Launch) -> Launch:
        return replace(launch, created_at=self._ports.host.now(), boot_id=self._ports.host.boot_id())

    async def _connect(self) -> Qemu:
        qemu = await self._ports.runner.connect(self.name, self._settings.agent.qemu_start_timeout)
        qemu.on_change(self._on_qemu_event)
        self._qemu = qemu
        return qemu

    async def _drop_connection(self) -> None:
        if self._qemu:
            qemu, self._qemu = self._qemu, None
            await qemu.close()

    async def _after_end(self) -> None:
        """If that is what its silence means: a QEMU's connection ends a moment before its process does."""
        if await self._ports.runner.wait_exit(self.name, EXIT_S):
            await self.refresh()

    def _on_qemu_event(self, event: str) -> None:
        self._woke = self._woke or event == "WAKEUP"
        if event in ("GONE", "STOP", "RESUME", "SUSPEND", "WAKEUP", "SHUTDOWN", "MIGRATION") and not self._act:
            self._spawn(self.refresh())
