"""One VM under the agent's care: what it is now, and the acts that change it.

A VM's acts exclude each other. Its state is never remembered but derived: from the live QEMU, if there is one, and from
the live checkpoint, if there is one (invariant 5).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from itertools import takewhile

from cpr_agent.core.model import (
    Definition,
    Held,
    Launch,
    Located,
    Manifest,
    MemoryIdentity,
    Policy,
    SaveTimes,
    Survives,
    VmState,
)
from cpr_agent.core.ports import Ports, Qemu
from cpr_agent.core.proof import (
    digest_firmware,
    identify_disks,
    naming,
    provably_lost,
    refuse_changed_disks,
    refuse_changed_firmware,
    refuse_changed_ram,
    refuse_foreign_state,
    refuse_lesser_machine,
    refuse_other_users,
    refuse_overlap,
    refuse_spent,
)
from cpr_agent.core.settings import Settings
from cpr_agent.errors import (
    AlreadyRunning,
    AlreadySaved,
    Blocked,
    Busy,
    CheckpointUnreadable,
    CprError,
    DeviceMissing,
    InvalidArgument,
    InvalidDefinition,
    LoadFailed,
    MemoryUnusable,
    NoCheckpoint,
    ProofFailed,
    QemuFailed,
    SaveFailed,
    WrongState,
)
from cpr_agent.report.timeline import GuestTimeline

log = logging.getLogger(__name__)

_FROM_RUN_STATE = {
    "running": VmState.RUNNING,
    "paused": VmState.PAUSED,
    "suspended": VmState.SUSPENDED,
    "shutdown": VmState.SHUT_DOWN,
    "inmigrate": VmState.LOADING,
    "prelaunch": VmState.STARTING,
}
MAX_LOADS = 3
SAVEABLE = ("running", "paused", "suspended")


class Vm:
    """``changed`` is called after each change of state; ``claims`` yields the memory that the guests of other VMs occupy
    and, if asked to, that which is only defined to be theirs. ``admit`` raises while no guest may be let run."""

    def __init__(
        self,
        name: str,
        ports: Ports,
        settings: Settings,
        changed: Callable[[Vm], None],
        claims: Callable[[Vm, bool], Awaitable[list[tuple[str, MemoryIdentity]]]],
        admit: Callable[[], None] = lambda: None,
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
        self._qemu: Qemu | None = None
        self._lock = asyncio.Lock()
        self._act = ""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        return self._ports.runner.unit(self.name)

    def live_checkpoint(self) -> Manifest | None:
        return self._ports.store.live(self.name)

    def launched(self) -> Launch | None:
        """What the live QEMU was started with."""
        return self._ports.runner.launched(self.name) if self.pid else None

    def occupied_memory(self) -> MemoryIdentity | None:
        """The memory that this VM's guest is in now, by its QEMU or its checkpoint."""
        launch = self.launched()
        if launch:
            return launch.memory
        with contextlib.suppress(CheckpointUnreadable):
            manifest = self.live_checkpoint()
            return manifest.memory if manifest else None
        return None

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
        return policy != "all-or-nothing" or "shut-down" in self._ladder()

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

    async def claimed_memory(self) -> MemoryIdentity | None:
        """The memory that is this VM's own: what its guest occupies, else what its definition names on this host."""
        if occupied := self.occupied_memory():
            return occupied
        if self.definition:
            with contextlib.suppress(MemoryUnusable):
                return (await self._ports.memory.locate(self.definition.memory, 0)).identity
        return None

    def usable_definition(self) -> Definition:
        """Raises InvalidDefinition."""
        if self.definition is None:
            if isinstance(self.problem, CprError):
                raise self.problem
            raise InvalidDefinition(
                f"has no usable definition: {self.problem or 'its file is gone'}", vm=self.name, left="nothing was done"
            )
        return self.definition

    async def refresh(self) -> None:
        """Derive the state anew, connecting to a QEMU that is there."""
        async with self._lock:
            await self._derive()

    async def recover(self) -> None:
        """After a start of the agent: finish or take back what an earlier one was in the middle of."""
        async with self._exclusive("recover"):
            await self._derive()
            if self._qemu is None:
                return
            if self.awaits_cold_start():
                self._ports.journal.append("cold-started", vm=self.name)
            launch, manifest = self.launched(), self._live_or_none()
            never_ran = self.run_state in ("inmigrate", "paused", "prelaunch")
            if manifest and launch and launch.kind == "load" and launch.checkpoint == manifest.id and never_ran:
                log.warning("VM %s: a load was interrupted before its guest ran; it can be repeated", self.name)
                self._ports.journal.append("load-interrupted", vm=self.name, checkpoint=manifest.id)
                await self._end_qemu()
            elif self._ports.store.checkpointed(self.name):
                return  # saved, also if nobody can read by what
            elif self.run_state == "postmigrate":
                await self._finish_interrupted_save()
            elif self.run_state == "paused" and launch and launch.kind == "load":
                await self._finish_interrupted_resume(launch.checkpoint)

    def load_interrupted(self) -> bool:
        """Whether the last thing that happened to the live checkpoint was a load that did not get to its end.

        After three such loads it is left to the admin: it may be what ends the agent.
        """
        manifest = self._live_or_none()
        if manifest is None:
            return False
        events = [r["event"] for r in self._ports.journal.records() if r.get("checkpoint") == manifest.id]
        begun = events.count("load-begin")
        return bool(begun) and events[-1] in ("load-begin", "load-interrupted") and begun < MAX_LOADS

    def held(self) -> Held | None:
        """Why it is kept untouched, if it is."""
        return self._ports.store.held(self.name)

    def awaits_cold_start(self) -> bool:
        """Whether its memory was found to be lost, and it was not started afresh yet."""
        records = [r for r in self._ports.journal.records() if r.get("vm") == self.name]
        ended = [r["event"] for r in records if r["event"] in ("memory-lost", "cold-started")]
        return ended[-1:] == ["memory-lost"]

    async def blocked_reasons(self) -> list[str]:
        launch = self.launched()
        if self._qemu is None or launch is None or self.run_state not in SAVEABLE:
            return []
        return await self._qemu.blocked_reasons(launch)

    # -- acts ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the guest afresh. Refused while a live checkpoint holds it. Raises CprError."""
        async with self._exclusive("start"):
            self._admit()
            definition = self.usable_definition()
            if self.live_checkpoint():
                raise AlreadySaved(
                    "is saved, and starting it afresh would destroy the saved guest",
                    vm=self.name,
                    left="the checkpoint was not touched",
                    remedy=f"continue it with `cprctl load {self.name}`, or give it up with `cprctl discard {self.name}`",
                )
            await self._require_no_qemu()
            await self._start(definition)
            if self.awaits_cold_start():
                self._ports.journal.append("cold-started", vm=self.name)

    async def stop(self, how: str) -> None:
        """``acpi``: press the power button, and after the definition's shutdown-timeout go on as ``hard``: quit QEMU."""
        if how not in ("acpi", "hard"):
            raise InvalidArgument(f"unknown way to stop {how!r}", vm=self.name, remedy="use acpi or hard")
        async with self._exclusive("stop"):
            await self._derive()
            if not self.pid:
                raise WrongState("is not running", vm=self.name)
            if how == "acpi" and self._qemu is None:
                raise QemuFailed(
                    "its QEMU does not answer, so its power button can't be pressed",
                    vm=self.name,
                    left="the guest was not touched",
                    remedy=f"`cprctl stop --hard {self.name}` ends QEMU",
                )
            if how == "acpi" and self._qemu and self.run_state in ("running", "suspended"):
                await self._qemu.powerdown()
                launch = self.launched()
                timeout_s = launch.shutdown_timeout_s if launch else 60.0
                if await self._ports.runner.wait_exit(self.name, timeout_s):
                    return
                log.warning("VM %s: did not shut down within %.0f s, going on the hard way", self.name, timeout_s)
            await self._end_qemu()

    async def resume(self) -> None:
        """Take a save back: the guest goes on where it was saved, in the QEMU that is still there if that is possible.

        ``cont`` does it for a guest that ran. One that was paused or suspended must be loaded (FACTS.md, "Rollback").
        """
        async with self._exclusive("resume"):
            self._admit()
            await self._derive()
            manifest = self.live_checkpoint()
            if manifest is None:
                if self._qemu is None or self.run_state != "paused":
                    raise WrongState(f"is {self.state}, there is nothing to resume", vm=self.name)
                await self._qemu.cont()
            elif self._qemu and self.run_state == "postmigrate" and manifest.run_state == "running":
                await self._take_back(manifest)
            else:
                await self._load(manifest, "")

    async def discard(self) -> None:
        """Give a checkpoint up, on the record. Its guest is lost, unless its QEMU still runs."""
        async with self._exclusive("discard"):
            self._admit()
            await self._derive()
            if self.run_state == "postmigrate":
                raise WrongState(
                    "is saved and its QEMU still has the guest",
                    vm=self.name,
                    left="nothing was discarded",
                    remedy=f"`cprctl resume {self.name}` continues the guest, `cprctl stop {self.name}` ends QEMU",
                )
            if not self._ports.store.checkpointed(self.name):
                raise NoCheckpoint("has no checkpoint to discard", vm=self.name)
            self._ports.journal.append("discard", vm=self.name)
            await asyncio.to_thread(self._ports.store.discard, self.name)

    async def save(self, filename: str, mode: str, need: Survives = Survives.QEMU_RESTART, upgrade: str = "") -> Manifest:
        """Save device state and leave the RAM where it is; the guest is stopped after. Raises CprError; a guest that
        ran then runs on."""
        if mode != "reboot":
            raise InvalidArgument(
                f"mode {mode!r} is not supported", vm=self.name, left="nothing was saved", remedy='use mode "reboot"'
            )
        async with self._exclusive("save"):
            await self._derive()
            if self.live_checkpoint():
                raise AlreadySaved(
                    "is already saved", vm=self.name, remedy=f"`cprctl resume {self.name}` takes the save back"
                )
            if self._qemu is None or self.run_state not in SAVEABLE:
                raise WrongState(f"is {self.state} and can't be saved", vm=self.name, left="nothing was saved")
            launch = await self._require_saveable(self._qemu, need)
            return await self._save(self._qemu, launch, self.run_state, filename, mode, upgrade)

    async def load(self, filename: str) -> str:
        """Prove the memory and the state, and continue the guest in a new QEMU. Raises CprError; up to the moment at
        which the guest runs the checkpoint stays and the load can be repeated.

        Returns "", or why the guest was started afresh: its memory is lost, and the definition wants that.
        """
        async with self._exclusive("load"):
            self._admit()
            await self._derive()
            if self.pid and self.run_state != "postmigrate":
                raise AlreadyRunning(
                    f"is {self.state}; a checkpoint can't be loaded into a live VM",
                    vm=self.name,
                    left="it was not touched",
                )
            manifest = self.live_checkpoint()
            if manifest is None:
                raise NoCheckpoint("has no checkpoint to load", vm=self.name, remedy=f"`cprctl start {self.name}` boots it")
            try:
                await self._load(manifest, filename)
            except (ProofFailed, DeviceMissing) as error:
                if filename:  # a file that the caller named wrongly says nothing about the checkpoint
                    raise
                definition = self.definition
                may_boot = definition is not None and definition.load.on_lost_memory == "cold-start"
                if definition and may_boot and (lost := await provably_lost(self._ports, manifest, error)):
                    await self._start_afresh(definition, manifest, lost)
                    return lost
                if isinstance(error, ProofFailed):
                    self._hold(manifest, error)
                raise
            return ""

    async def require_saveable(self, need: Survives, *, wait: bool = False) -> None:
        """Raises what a save would raise now, and stops nothing. ``wait``: if the definition says so, not at once."""
        if self._qemu is None:
            raise WrongState(f"is {self.state} and can't be saved", vm=self.name)
        launch = self.launched()
        if wait and launch and self.definition and self.waits:
            await self._qemu.until_saveable(launch, self.definition.save.blocked_wait)
        await self._require_saveable(self._qemu, need)

    async def shut_down(self, *, forced: bool) -> None:
        """For a guest that can't be saved: its power button; if ``forced`` also an end for a QEMU that doesn't answer."""
        try:
            await self.stop("acpi")
        except QemuFailed:
            if not forced:
                raise
            await self.stop("hard")
        except WrongState:
            if self.pid:
                raise

    # -- parts of the acts --------------------------------------------------------------------------------------------

    async def _start(self, definition: Definition) -> None:
        with naming(self.name):
            await self._ports.memory.prepare(definition.memory, definition.vm.user)
            located = await self._ports.memory.locate(definition.memory, self._settings.agent.device_timeout)
            refuse_overlap(self.name, located.identity, await self._claims(self, True))
            await refuse_other_users(self._ports, self.name, located, self.pid)
        launch = self._stamped(self._ports.definitions.plan_start(definition, located))
        self._ports.journal.append("start", vm=self.name)
        await self._launch(launch)

    def _hold(self, manifest: Manifest, error: ProofFailed) -> None:
        """Keep everything as it is, with what was found, for an admin to decide."""
        held = Held(reason=error.text, error=error.kind, at=self._ports.host.now(), evidence=error.evidence)
        self._ports.store.hold(self.name, held)
        found = "; ".join(f"{one.what}: expected {one.expected}, found {one.found}" for one in error.evidence)
        log.error("%s", error.text)
        self._ports.host.tell(
            "held", error.text, vm=self.name, upgrade=manifest.upgrade, checkpoint=manifest.id, evidence=found
        )

    async def _start_afresh(self, definition: Definition, manifest: Manifest, lost: str) -> None:
        """Its RAM is no more: what was saved is moved aside, on the record, and the guest boots."""
        self._ports.journal.append("memory-lost", vm=self.name, checkpoint=manifest.id, reason=lost)
        text = f"VM {self.name}: its memory is lost: {lost}. It is started afresh, as its definition wants."
        log.warning("%s", text)
        self._ports.host.tell("memory-lost", text, vm=self.name, upgrade=manifest.upgrade, checkpoint=manifest.id)
        await asyncio.to_thread(self._ports.store.discard, self.name, "lost")
        await self._end_qemu()
        await self._start(definition)
        self._ports.journal.append("cold-started", vm=self.name)

    async def _require_saveable(self, qemu: Qemu, need: Survives) -> Launch:
        launch = self.launched()
        if launch is None:
            raise Blocked(["the record of how its QEMU was started is gone"], vm=self.name)
        reasons = await qemu.blocked_reasons(launch)
        if not launch.memory.survives.covers(need):
            where = launch.memory.path or launch.node
            reasons.append(f"its RAM in {where} ({launch.memory.filesystem}) does not survive a {need}")
        if reasons:
            raise Blocked(reasons, vm=self.name)
        return launch

    async def _save(
        self,
        qemu: Qemu,
        launch: Launch,
        run_state: str,
        filename: str,
        mode: str,
        upgrade: str,
        begun: dict[str, object] | None = None,
    ) -> Manifest:
        """``begun`` is the journal's record of a save that QEMU has done and nobody has stored."""
        definition_timeout = self.definition.save.timeout if self.definition else 60.0
        host, store = self._ports.host, self._ports.store
        facts = await qemu.facts(launch)
        digest = await asyncio.to_thread(host.program_digest, self.pid)
        witness = self._ports.memory.new_witness(self._settings.witness.kind)
        located = await self._relocated(launch.memory)
        checkpoint = str(begun["checkpoint"]) if begun else uuid.uuid4().hex
        try:
            pending = store.reopen(self.name, str(begun["path"])) if begun else store.begin(self.name, filename)
        except OSError as error:
            raise SaveFailed(f"the state file cannot be opened: {error}", vm=self.name, left="nothing changed") from error
        requested_at = host.now()
        try:
            stopped_at = requested_at
            if begun is None:
                self._ports.journal.append(
                    "save-begin", vm=self.name, checkpoint=checkpoint, run_state=run_state, path=pending.path
                )
                self._set(VmState.SAVING)
                stopped_at = await qemu.save(pending.fd, definition_timeout) or host.now()
            written_at = host.now()
            vmstate, witness, disks, firmware = await asyncio.gather(
                asyncio.to_thread(pending.seal),
                self._ports.memory.witness(located, witness),
                identify_disks(self._ports, await qemu.disks()),
                digest_firmware(self._ports, facts.firmware),
            )
            refuse_foreign_state(vmstate, facts)
            manifest = Manifest(
                id=checkpoint,
                vm=self.name,
                mode=mode,
                survives=launch.memory.survives,
                run_state=run_state,
                launch=launch,
                qemu=replace(facts, disks=tuple(disks), firmware=firmware),
                qemu_path=launch.argv[0],
                qemu_sha256=digest,
                memory=launch.memory,
                witness=witness,
                vmstate=vmstate,
                boot_id=host.boot_id(),
                kernel=host.kernel(),
                times=SaveTimes(
                    requested_at=requested_at,
                    stopped_at=stopped_at,
                    written_at=written_at,
                    durable_at=host.now(),
                    stopped_uptime_s=host.uptime_s() - (host.now() - stopped_at),
                ),
                upgrade=upgrade,
            )
            await asyncio.to_thread(pending.commit, manifest)
            self._ports.journal.append("saved", vm=self.name, checkpoint=checkpoint)
        except BaseException as error:
            # Shielded: whatever interrupts the save, also a cancelled job, the guest must not stay stopped.
            left = await asyncio.shield(asyncio.ensure_future(self._undo_save(qemu, pending.abort, run_state, checkpoint)))
            if isinstance(error, (CprError, OSError)):
                what = error.what if isinstance(error, CprError) else f"the state could not be stored: {error}"
                raise SaveFailed(f"could not be saved: {what}", vm=self.name, left=left) from error
            raise
        log.info("VM %s: saved in %.3f s, %d bytes of state", self.name, host.now() - stopped_at, vmstate.size_bytes)
        return manifest

    async def _undo_save(self, qemu: Qemu, abort: Callable[[], None], run_state: str, checkpoint: str) -> str:
        """Bring the guest back to what it was before a save that failed; returns a sentence for the error."""
        self._ports.journal.append("save-undone", vm=self.name, checkpoint=checkpoint)
        try:
            await asyncio.to_thread(abort)
        except OSError as error:
            return f"the half-written checkpoint could not be removed ({error}), so the guest stays stopped"
        try:
            now = await qemu.run_state()
            if run_state == "running" and now != "running":
                await qemu.cont()
                self._ports.journal.append("resumed", vm=self.name, checkpoint=checkpoint)
                now = await qemu.run_state()
        except QemuFailed as error:
            return f"and its QEMU is gone ({error.what}); the guest is lost unless it shut itself down"
        if now == run_state:
            return f"the guest is {now}, as before; no checkpoint was left"
        return f"the guest was {run_state} and QEMU is now {now}, where only `cont` on the admin's QMP socket continues it"

    async def _finish_interrupted_save(self) -> None:
        """QEMU is in postmigrate and no manifest says why: an agent died between the two. The journal knows the run
        state. A guest that ran goes on. ``cont`` would change what another is (FACTS.md), and QEMU does not save twice
        without it; but a QEMU in postmigrate has written its whole state: it is stored now."""
        assert self._qemu
        records = [r for r in self._ports.journal.records() if r.get("vm") == self.name and "checkpoint" in r]
        last = records[-1] if records else {"event": "none", "checkpoint": ""}
        begun = [r for r in records if r["event"] == "save-begin" and r["checkpoint"] == last["checkpoint"]]
        interrupted = begun and last["event"] in ("save-begin", "save-undone", "rollback")
        run_state = str(begun[-1]["run_state"]) if interrupted else "unknown"
        if run_state == "running":
            log.warning("VM %s: a save was interrupted; the guest goes on", self.name)
            self._ports.journal.append("save-undone", vm=self.name, checkpoint=last["checkpoint"])
            await self._qemu.cont()
            self._ports.journal.append("resumed", vm=self.name, checkpoint=last["checkpoint"])
        elif last["event"] == "save-begin" and (launch := self.launched()):
            log.warning("VM %s: a save was interrupted; storing the state of the %s guest", self.name, run_state)
            await self._save(self._qemu, launch, run_state, "", "reboot", "", begun[-1])
        else:
            self.error = "QEMU has stopped after a save that this agent knows nothing of; its guest was left as it is"

    async def _finish_interrupted_resume(self, checkpoint: str) -> None:
        """The checkpoint is spent, and the journal announced that its guest would run: let it, if nobody has."""
        records = [r for r in self._ports.journal.records() if r.get("checkpoint") == checkpoint]
        announced = [r for r in records if r["event"] == "resume"]
        if announced and records[-1]["event"] == "resume" and announced[-1].get("run_state") != "paused":
            log.warning("VM %s: its resume was interrupted; the guest goes on", self.name)
            assert self._qemu
            await self._qemu.cont()
            self._ports.journal.append("resumed", vm=self.name, checkpoint=checkpoint)

    async def _take_back(self, manifest: Manifest) -> None:
        """The checkpoint is out of the world before the guest runs, so that nothing can ever load it (invariant 2)."""
        assert self._qemu
        self._ports.journal.append("rollback", vm=self.name, checkpoint=manifest.id)
        await asyncio.to_thread(self._ports.store.discard, self.name)
        try:
            await self._qemu.cont()
        except QemuFailed as error:
            raise QemuFailed(
                f"could not be resumed: {error.what}",
                vm=self.name,
                left="the guest is stopped in its QEMU, and the checkpoint is retired",
                remedy="if another process holds its disk, end that; then `cont` on the admin's QMP socket",
            ) from error
        self._ports.journal.append("resumed", vm=self.name, checkpoint=manifest.id)

    async def _load(self, manifest: Manifest, filename: str) -> None:
        store, host, keep = self._ports.store, self._ports.host, "the checkpoint is kept and the load can be repeated"
        load_at = host.now()
        refuse_spent(self._ports, manifest)
        fd = await asyncio.to_thread(store.open_vmstate, manifest, filename)
        with open(fd, "rb", buffering=0), naming(self.name):  # noqa: PTH123 - only to be closed
            self._set(VmState.LOADING)
            located = await self._ports.memory.relocate(manifest.memory, self._settings.agent.device_timeout)
            memory_at = host.now()
            refuse_overlap(self.name, located.identity, await self._claims(self, False))
            await asyncio.gather(
                refuse_changed_disks(self._ports, manifest),
                refuse_changed_firmware(self._ports, manifest),
                refuse_other_users(self._ports, self.name, located, self.pid),
                refuse_changed_ram(self._ports, manifest, located),
            )
            self._ports.journal.append("load-begin", vm=self.name, checkpoint=manifest.id)
            await self._end_qemu()
            try:
                await self._launch(self._stamped(self._ports.definitions.plan_load(manifest, located)))
                assert self._qemu
                await refuse_lesser_machine(self._qemu, manifest)
                await self._qemu.load(fd, self._settings.agent.load_timeout)
            except BaseException as error:
                # Shielded: a cancelled load must not leave a QEMU that has not run its guest either.
                said = self._ports.runner.log_tail(self.name)
                await asyncio.shield(asyncio.ensure_future(self._end_qemu()))
                if not isinstance(error, (CprError, TimeoutError)):
                    raise
                self._ports.journal.append("load-failed", vm=self.name, checkpoint=manifest.id)
                if isinstance(error, ProofFailed):
                    raise
                what = error.what if isinstance(error, CprError) else "QEMU did not get done"
                said = f" (QEMU: {said})" if said and said not in what else ""
                raise LoadFailed(f"could not be loaded: {what}{said}", vm=self.name, left=keep) from error
            self._ports.journal.append("resume", vm=self.name, checkpoint=manifest.id, run_state=manifest.run_state)
            await asyncio.to_thread(store.consume, manifest)
            # From here on the checkpoint is spent, whatever happens (invariant 2).
            resumed_at = 0.0
            if manifest.run_state != "paused":
                resumed_at = await self._qemu.cont()
            resumed_at = resumed_at or host.now()
            self._ports.journal.append("resumed", vm=self.name, checkpoint=manifest.id, resumed_at=resumed_at)
            self._spawn(self._record(manifest, load_at, memory_at, resumed_at))  # nobody's guest need wait for it

    async def _record(self, manifest: Manifest, load_at: float, memory_at: float, resumed_at: float) -> None:
        host, times = self._ports.host, manifest.times
        rebooted = host.boot_id() != manifest.boot_id
        stepped_s = 0.0
        if not rebooted and times.stopped_uptime_s:
            paused_s = host.uptime_s() - (host.now() - resumed_at) - times.stopped_uptime_s
            stepped_s = resumed_at - times.stopped_at - paused_s
        timeline = GuestTimeline(
            id=manifest.id,
            vm=self.name,
            upgrade=manifest.upgrade,
            kernel_before=manifest.kernel,
            kernel_after=host.kernel(),
            stopped_at=times.stopped_at,
            saved_at=times.durable_at,
            shutdown_at=await asyncio.to_thread(host.boot_ended_at, manifest.boot_id) if rebooted else 0.0,
            userspace_at=host.userspace_at() if rebooted else 0.0,
            load_at=load_at - stepped_s,
            memory_at=memory_at - stepped_s,
            resumed_at=resumed_at - stepped_s,
            by_kexec=not rebooted or host.booted_by_kexec(),
        )
        log.info("VM %s: loaded, it was stopped for %.3f s", self.name, timeline.pause_s)
        try:
            self._ports.history.add(timeline)
        except OSError as error:  # the guest runs; a report is not worth failing for
            log.warning("VM %s: its timeline could not be stored: %s", self.name, error)

    async def _launch(self, launch: Launch) -> None:
        """Start QEMU and speak to it, or leave nothing of it. Raises QemuFailed with what QEMU said."""
        self._set(VmState.STARTING if launch.kind == "start" else VmState.LOADING)
        runner = self._ports.runner
        try:
            await runner.start(launch)
            self.pid = await runner.active(self.name)
            await self._connect()
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(runner.kill(self.name)))
            self.pid = 0
            if not isinstance(error, CprError):
                raise
            said = runner.log_tail(self.name)
            detail = f": {said}" if said and said not in error.what else ""
            raise QemuFailed(f"{error.what}{detail}", vm=self.name, left="nothing runs", remedy=error.remedy) from error

    async def _end_qemu(self) -> None:
        """Quit QEMU, then the hard way; done when its process is gone."""
        if self._qemu:
            await self._qemu.quit()
            await self._drop_connection()
        if not await self._ports.runner.wait_exit(self.name, 10.0):
            await self._ports.runner.kill(self.name)
        self.pid = 0

    async def _relocated(self, identity: MemoryIdentity) -> Located:
        with naming(self.name):
            return await self._ports.memory.relocate(identity, 5.0)

    async def _require_no_qemu(self) -> None:
        await self._derive()
        if self.pid:
            raise AlreadyRunning(f"is already {self.state}", vm=self.name)

    def _stamped(self, launch: Launch) -> Launch:
        return replace(launch, created_at=self._ports.host.now(), boot_id=self._ports.host.boot_id())

    def _live_or_none(self) -> Manifest | None:
        try:
            return self.live_checkpoint()
        except CheckpointUnreadable as error:
            self.error = error.text
            return None

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

    # -- state --------------------------------------------------------------------------------------------------------

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

    async def _connect(self) -> None:
        qemu = await self._ports.runner.connect(self.name, self._settings.agent.qemu_start_timeout)
        qemu.on_change(self._on_qemu_event)
        self._qemu = qemu

    async def _drop_connection(self) -> None:
        if self._qemu:
            qemu, self._qemu = self._qemu, None
            await qemu.close()

    def _on_qemu_event(self, event: str) -> None:
        if event in ("GONE", "STOP", "RESUME", "SUSPEND", "WAKEUP", "SHUTDOWN", "MIGRATION") and not self._act:
            self._spawn(self.refresh())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set(self, state: VmState) -> None:
        self.state = state
        self._changed(self)

    async def settled(self) -> None:
        """Wait for what an act left to be done after its guest ran."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Let go of QEMU, which runs on."""
        await self.settled()
        async with self._lock:
            await self._drop_connection()
