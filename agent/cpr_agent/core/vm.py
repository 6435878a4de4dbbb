# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM: the lock, the act under way, and who may act. The acts themselves are functions, in core/acts."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Literal

from cpr_agent.core import acts, saveable
from cpr_agent.core.acts import recover, resume
from cpr_agent.core.acts.load import load
from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.acts.sleep import must_sleep, wake_late_sleeper
from cpr_agent.core.hooks import before_save
from cpr_agent.core.machine import Machine, Neighbours
from cpr_agent.core.model import Definition, Held, Launch, Manifest, Owner, Ram, RunState, Survives, VmState
from cpr_agent.core.ports import Ports, Qemu
from cpr_agent.core.settings import Settings
from cpr_agent.core.undo import uninterrupted
from cpr_agent.errors import (
    AlreadyRunning,
    AlreadySaved,
    Blocked,
    Busy,
    CheckpointUnreadable,
    CprError,
    InvalidArgument,
    NoCheckpoint,
    QemuFailed,
    SaveFailed,
    WrongState,
)

_STATE_EVENTS = ("GONE", "STOP", "RESUME", "SUSPEND", "WAKEUP", "SHUTDOWN", "MIGRATION")
"""QMP events after which the state is derived anew."""

RECOVERY_PATIENCE_S = 3.0
"""A recovery takes milliseconds where QEMU answers, and the call that has started the agent is to find it done."""


RETRY_S = 5.0
"""After which a guest is tried again that QEMU did not let run, or did not tell of; each time twice as long."""
MAX_RETRY_S = 60.0


class Act(enum.StrEnum):
    RECOVER = "the recovery that follows a start of the agent"
    START = "start"
    STOP = "stop"
    RESUME = "resume"
    RETRY = "resume again"
    DISCARD = "discard"
    SAVE = "save"
    LOAD = "load"
    REFRESH = "refresh"
    ARRIVE = "start by another program"
    END = "end of the QEMU whose guest is saved"
    DEFINE = "a change of its definition"


class Vm:
    """See the bus's contract for the meaning of each act to its caller. ``machine`` has the facts."""

    def __init__(self, name: str, ports: Ports, settings: Settings, neighbours: Neighbours) -> None:
        self.name = name
        self.machine = Machine(name, ports, settings, neighbours, self._on_qemu_event)
        self._successor = saveable.Successor(self.machine)
        self._lock = asyncio.Lock()
        self._act: Act | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = RETRY_S
        self._outdated = False
        """Whether QEMU has told of something since the act's last look at it."""
        self._due = False
        """Whether a look at it waits for its turn."""

    # -- facts that others read -----------------------------------------------------------------------------------------

    @property
    def definition(self) -> Definition | None:
        return self.machine.definition

    def define(self, definition: Definition | None, problem: Exception | None) -> None:
        """Its definition from now on; or the problem with it, for a VM that stays as long as it runs or is saved."""
        self.machine.definition, self.machine.problem = definition, problem

    @property
    def problem(self) -> Exception | None:
        return self.machine.problem

    @property
    def state(self) -> VmState:
        return self.machine.state

    @property
    def since(self) -> float:
        """When it entered its state (epoch s); 0 if that is not known."""
        return self.machine.since

    @property
    def definition_state(self) -> Literal["ok", "changed", "invalid", "gone"]:
        """Whether a start would make the VM that is there now: "changed" if its definition has since that was started."""
        if self.definition is None:
            return "invalid" if self.problem else "gone"
        launch = self.launched()
        return "changed" if launch and launch.definition_digest != self.definition.digest else "ok"

    @property
    def run_state(self) -> RunState:
        return self.machine.run_state

    @property
    def pid(self) -> int:
        return self.machine.pid

    @property
    def error(self) -> str:
        return self.machine.error

    @property
    def unit(self) -> str:
        return self.machine.ports.runner.unit(self.name)

    @property
    def user(self) -> str:
        """The one that its QEMU runs as, or will at the next start or load; "" if it has none yet."""
        if launch := self.launched():
            return launch.user
        with contextlib.suppress(CheckpointUnreadable):
            if manifest := self.live_checkpoint():
                return manifest.launch.user
        named = self.definition.vm.user if self.definition else ""
        return named or self.machine.ports.runner.user(self.name)

    @property
    def owner(self) -> Owner:
        """Who defines it, and runs its QEMU."""
        return self.definition.owner if self.definition else self.machine.ports.definitions.owner(self.name)

    @property
    def busy(self) -> bool:
        """Whether an act is under way."""
        return self._act is not None

    @property
    def qemu(self) -> Qemu | None:
        """The live QEMU, if there is one that answers."""
        return self.machine.qemu

    @property
    def checkpointed(self) -> bool:
        return self.machine.checkpointed

    def live_checkpoint(self) -> Manifest | None:
        """Raises CheckpointUnreadable."""
        return self.machine.live_checkpoint()

    def launched(self) -> Launch | None:
        return self.machine.launched()

    def held(self) -> Held | None:
        return self.machine.held()

    def occupied_memory(self) -> Ram:
        return self.machine.occupied_memory()

    # -- questions ------------------------------------------------------------------------------------------------------

    async def blocked_reasons(self) -> list[str]:
        return await saveable.blocked_reasons(self.machine)

    async def successor_reasons(self) -> list[str]:
        """Why the QEMU that is installed now could not load its guest after a kexec."""
        async with self._lock:
            return await self._successor.reasons()

    async def require_saveable(self, need: Survives, *, hooks: bool = True) -> None:
        """Raises the error of a save as it would be now, and stops nothing."""
        await saveable.require_saveable(self.machine, need, hooks=hooks)
        if need is not Survives.QEMU_RESTART:
            found = self.machine.ports.surroundings.findings_of(self.name)
            around = [finding for finding in found if finding.severity == "error"]
            if reasons := await self.successor_reasons() + [finding.what for finding in around]:
                raise Blocked(reasons, vm=self.name, remedy="; ".join(finding.remedy for finding in around))

    async def require_saveable_in_time(self, need: Survives) -> None:
        """Likewise, after a wait for obstacles that pass, where the definition says to wait."""
        await saveable.until_saveable(self.machine)
        await self.require_saveable(need)

    async def must_sleep(self) -> bool:
        """Whether a save has to put the guest to sleep before. Raises QemuFailed."""
        qemu = self.machine.require_qemu()
        return await must_sleep(self.machine, qemu, await qemu.brief_inventory())

    def load_interrupted(self) -> bool:
        """Whether an earlier agent's load of the live checkpoint came to no end, and may be repeated."""
        manifest = self.machine.readable_checkpoint()
        return manifest is not None and self.machine.past.load_interrupted(manifest.id)

    # -- acts -----------------------------------------------------------------------------------------------------------

    async def idle(self) -> None:
        """Wait for the end of the act under way. Whoever acts before it waits for anything else finds the VM free."""
        while self._act:
            await self._idle.wait()

    async def refresh(self) -> None:
        """Derive the state anew, connecting to a QEMU that is there."""
        async with self._lock:
            self._due = False
            await self.machine.derive()
            await wake_late_sleeper(self.machine)

    async def expect_recovery(self) -> None:
        """From now on, until ``recover`` is over, each act is refused as Busy. Asks QEMU nothing."""
        self._act = Act.RECOVER
        self._idle.clear()
        self.machine.state = VmState.RECOVERING  # not by ``enter``: nothing has changed with the VM
        self.machine.pid = await self.machine.own.pid()  # its memory is occupied, whatever its definition says now

    async def recover(self) -> None:
        """After a start of the agent: finish or take back what an earlier one was in the middle of. Raises CprError."""
        self._act = None
        async with self._exclusive(Act.RECOVER):
            await recover.recover(self.machine)
        self.machine.spawn(self.machine.prepare_next())

    async def recover_again(self) -> None:
        """Its QEMU, or whoever runs it, could not be asked before, and can be now. Raises CprError."""
        await self.idle()
        async with self._exclusive(Act.RECOVER):
            await recover.recover(self.machine)

    def end_refresh(self) -> None:
        recover.end_refresh(self.machine)

    async def start(self) -> None:
        """Start the guest afresh. Refused while a live checkpoint holds it. Raises CprError."""
        async with self._admitted(Act.START):
            await acts.start.start(self.machine)

    async def stop(self, how: str) -> None:
        """``acpi``: press the power button, and after the definition's shutdown-timeout go on as ``hard``: quit QEMU."""
        ways = {"acpi": acts.start.press_power_button, "hard": acts.start.end_hard}
        if how not in ways:
            raise InvalidArgument(f"unknown way to stop {how!r}", vm=self.name, remedy="use acpi or hard")
        async with self._exclusive(Act.STOP):
            await ways[how](self.machine)

    async def power_off(self) -> None:
        """The power button of a guest that runs or sleeps, for another program of the host's; any other guest is left as it
        is. Raises CprError."""
        async with self._admitted(Act.STOP):
            await acts.start.power_off(self.machine)

    async def resume(self) -> None:
        """Take a save back, or let a paused guest go on. Raises ProofFailed, and the VM is held then; CprError."""
        while self._act is Act.RETRY:
            await self.idle()
        async with self._admitted(Act.RESUME):
            if not await recover.resume_unfinished(self.machine):
                await resume.resume(self.machine)

    async def discard(self) -> None:
        """Give a checkpoint up, on the record. Its guest is lost, unless its QEMU still runs it. Raises CprError."""
        async with self._admitted(Act.DISCARD):
            await resume.discard(self.machine)

    async def save(self, request: SaveRequest) -> Manifest:
        """Save device state and leave the RAM where it is; the guest is stopped after. Raises CprError; a guest that ran
        then runs on."""
        if request.mode != "reboot":
            what = f"mode {request.mode!r} is not supported"
            raise InvalidArgument(what, vm=self.name, left="nothing was saved", remedy='use mode "reboot"')
        async with self._exclusive(Act.SAVE):
            found = await saveable.require_live(self.machine, request.need)
            if request.upgrade:  # it has run the hooks of all its guests, before the first of them stopped
                return await acts.save.save(self.machine, found.launch, request, found.has)
            await before_save(self.machine)  # a hook may change what its QEMU has
            return await acts.save.save(self.machine, found.launch, request)

    async def load(self, request: LoadRequest) -> str:
        """Prove the memory and the state, and continue the guest in a new QEMU. Raises CprError; up to the moment at which
        the guest runs the checkpoint stays and the load can be repeated.

        Returns "", or why the guest was started afresh: its memory is lost, and the definition wants that.
        """
        async with self._admitted(Act.LOAD):
            return await load(self.machine, request)

    async def arrive(self, checkpoint: str) -> None:
        """Another program of the host's is about to start a QEMU for it, with the state of this checkpoint, or with none
        (""): the act that goes with it begins, or refuses it. Raises CprError."""
        async with self._admitted(Act.ARRIVE):
            manifest = self.machine.live_checkpoint()
            if not checkpoint:
                await acts.start.start(self.machine)
            elif manifest and manifest.id == checkpoint:
                await load(self.machine, LoadRequest())
            else:
                raise NoCheckpoint(
                    f"was to go on from checkpoint {checkpoint}, and "
                    + (f"is saved in {manifest.id}" if manifest else "that is spent, or is none of its own"),
                    vm=self.name,
                    left="nothing was started",
                    remedy=f"see `cprctl status {self.name}`",
                )

    async def end_saved(self) -> None:
        """End the QEMU of a guest that is saved, before anybody else does so as the host goes down. Raises CprError."""
        async with self._exclusive(Act.END):
            await self.machine.derive()
            manifest = self.machine.live_checkpoint()
            if manifest and self.machine.stands_saved:
                await self.machine.refuse_resumed_by_hand(manifest)
                await self.machine.end()

    async def replace_qemu(self, wanted: Replacement | None = None) -> Replacement:
        """Give the guest a new QEMU on the same RAM; ``wanted``: in turn. Returns how. Raises CprError."""
        async with self._admitted(Act.REFRESH):
            return await acts.replace.replace(self.machine, wanted)

    @contextlib.asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """For a change of its definition: it has no QEMU and no checkpoint, and gets none meanwhile. Raises WrongState."""
        async with self._admitted(Act.DEFINE):
            left = "nothing was changed"
            if self.checkpointed:
                remedy = f"load it and shut its guest down, or give the checkpoint up: cprctl discard {self.name}"
                raise AlreadySaved("has a checkpoint, whose guest would be lost", vm=self.name, left=left, remedy=remedy)
            if self.pid:
                remedy = f"shut its guest down first: cprctl stop {self.name}"
                raise AlreadyRunning(f"is {self.state}", vm=self.name, left=left, remedy=remedy)
            yield

    async def shut_down(self) -> None:
        """For a guest that can't be saved: its power button. Raises CprError."""
        try:
            await self.stop("acpi")
        except WrongState:
            if self.pid:
                raise

    async def shut_down_or_end(self) -> None:
        """Likewise, and an end for a QEMU that doesn't answer. Raises CprError."""
        try:
            await self.shut_down()
        except QemuFailed:
            await self.stop("hard")

    async def let_go(self, within_s: float, *, force: bool) -> None:
        """Wait for the end of an act that was given up. With ``force`` its QEMU is ended if that takes longer. Raises
        SaveFailed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self.idle()
        if not self._act:
            return
        if not force:
            raise SaveFailed(f"is still in the middle of {self._act}", vm=self.name, left="its guest may stand still")
        await self.machine.own.kill()
        await self.machine.disconnect()
        await self.idle()

    async def settled(self) -> None:
        """Wait for the work that acts left to be done after their guests ran."""
        await self.machine.settled()

    async def close(self) -> None:
        """Let go of QEMU, which runs on."""
        self._retry_s = 0.0
        self._stop_retrying()
        await self.settled()
        async with self._lock:
            await self.machine.disconnect()

    # -- who may --------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _admitted(self, act: Act) -> AsyncIterator[None]:
        """For an act that may let the guest run: Busy while the host is on its way into another kernel."""
        async with self._exclusive(act):
            self.machine.neighbours.admit()
            yield

    @contextlib.asynccontextmanager
    async def _exclusive(self, act: Act) -> AsyncIterator[None]:
        if self._act is Act.RECOVER:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECOVERY_PATIENCE_S):
                    await self.idle()
        if self._act:
            raise Busy(
                f"is in the middle of {self._act}",
                vm=self.name,
                left="nothing was done",
                remedy="try again when it is done",
            )
        self._act = act
        self._idle.clear()
        self.machine.error = ""
        try:
            async with self._lock:
                try:
                    yield
                except (WrongState, InvalidArgument):
                    raise  # the caller's problem, not the VM's
                except CprError as error:
                    self.machine.error = error.text
                    raise
                finally:
                    self._outdated = False
                    if not (act is Act.RECOVER and self.machine.state is VmState.UNREACHABLE):  # it was just asked in vain
                        await uninterrupted(self.machine.derive())
        finally:
            self._act = None
            self._idle.set()
            self._plan_retry()
            if self._outdated:
                self._look_soon()

    def _plan_retry(self) -> None:
        """Storage that failed or hung may be well again soon. Not once this is closed."""
        self._stop_retrying()
        again = recover.unfinished(self.machine)
        if again is None:
            self._retry_s = RETRY_S if self._retry_s else 0.0
        elif self._retry_s:
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(self._retry_s, lambda: self.machine.spawn(self._try_again(again)))
            self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def _stop_retrying(self) -> None:
        if self._retry:
            self._retry.cancel()
            self._retry = None

    async def _try_again(self, again: Callable[[Machine], Awaitable[object]]) -> None:
        """A silent QEMU is asked before: that takes seconds, and an act that comes then waits, and is not refused."""
        if self.state is VmState.UNREACHABLE:
            await self.refresh()
            if self.state is VmState.UNREACHABLE:
                self._plan_retry()
                return
        with contextlib.suppress(CprError):  # the VM's error tells
            async with self._admitted(Act.RETRY):
                await again(self.machine)

    def _on_qemu_event(self, event: str) -> None:
        if event not in _STATE_EVENTS:
            return
        if self._act:
            self._outdated = True
        else:
            self._look_soon()

    def _look_soon(self) -> None:
        """Once for all that QEMU tells before that: a look may take seconds, and an act that comes then waits for it."""
        if not self._due:
            self._due = True
            self.machine.spawn(self.refresh())
