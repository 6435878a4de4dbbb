"""How a guest comes to run: afresh, or by a load that has proved all it depends on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from cpr_agent.core.events import Event, about
from cpr_agent.core.hooks import after_load
from cpr_agent.core.model import (
    Definition,
    Held,
    Launch,
    Located,
    Manifest,
    Ram,
    VmState,
    ram_of,
)
from cpr_agent.core.ports import Qemu
from cpr_agent.core.proof import (
    naming,
    refuse_changed_disks,
    refuse_changed_firmware,
    refuse_changed_ram,
    refuse_lesser_machine,
    refuse_other_users,
    refuse_overlap,
    refuse_spent,
)
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.core.turns import NO_TURN, Turn
from cpr_agent.core.vm_base import VmBase
from cpr_agent.errors import (
    CprError,
    LoadFailed,
    MachineChanged,
    ProofFailed,
    QemuFailed,
)

log = logging.getLogger(__name__)


class LoadTimes(NamedTuple):
    """Epoch seconds: when a load began, had its memory, had its state, and when its guest ran."""

    load_at: float
    memory_at: float
    loaded_at: float
    resumed_at: float


class Loading(VmBase):
    """Parts of acts, for whoever has the VM's lock."""

    async def _start(self, definition: Definition) -> None:
        with naming(self.name):
            await self._ports.memory.prepare(definition.memory, definition.vm.user)
            located = await self._ports.memory.locate(definition.memory, self._settings.agent.device_timeout)
            refuse_overlap(self.name, ram_of(located), await self._claims(self.name, True))
            await refuse_other_users(self._ports, self.name, located, {self.pid, *self._live_pids()})
        launch = self._stamped(self._ports.definitions.plan_start(definition, located))
        self._ports.journal.append("start", vm=self.name)
        await self._launch(launch)
        await asyncio.to_thread(self._ports.programs.forget, self.name)

    async def _load_by_either(self, manifest: Manifest, filename: str = "", turn: Turn = NO_TURN) -> LoadFailed | None:
        """By the QEMU that is installed now; else by the one that it was saved in, where a refresh has kept that: the same
        proofs, the same RAM. Returns why that was needed. Raises CprError, as ``_load`` does."""
        try:
            await self._load(manifest, filename, turn=turn)
        except (LoadFailed, MachineChanged) as error:
            program = await asyncio.to_thread(self._ports.programs.kept, self.name, manifest.qemu_sha256)
            live = self._live_or_none()
            if filename or not program or live is None or live.id != manifest.id:
                raise
            log.warning("VM %s: it goes back to the QEMU that it had: %s", self.name, error.what)
            try:
                await self._load(manifest, "", program=program, turn=turn)
            except CprError as again:
                error.what += f"; and its old QEMU, brought back, failed too: {again.what}"
                raise error from again
            failed = LoadFailed(
                f"could not get a new QEMU: {error.what}",
                vm=self.name,
                left="its guest goes on in the QEMU that it had, on the same RAM",
                remedy=f"install a QEMU that works, then `cprctl refresh --in-turn {self.name}`",
            )
            self.error = failed.text
            return failed
        return None

    async def _load(
        self, manifest: Manifest, filename: str, *, into: Qemu | None = None, program: str = "", turn: Turn = NO_TURN
    ) -> None:
        """``into`` a QEMU that waits for it beside the one that it was saved in, which stays until the guest runs; or by
        another ``program`` than the installed one. A device that is awaited takes nobody's ``turn``."""
        store, host = self._ports.store, self._ports.host
        load_at = host.now()
        refuse_spent(self._ports, manifest)
        fd = await asyncio.to_thread(store.open_vmstate, manifest, filename)
        with open(fd, "rb", buffering=0), naming(self.name):  # noqa: PTH123 - only to be closed
            self._set(VmState.LOADING)
            located = await self._ports.memory.relocate(manifest.memory, self._settings.agent.device_timeout)
            memory_at = host.now()
            async with turn:
                loaded_at, resumed_at = await self._load_located(manifest, fd, located, into, program)
            times = LoadTimes(load_at, memory_at, loaded_at, resumed_at)
            self._spawn(self._record(manifest, times))  # nobody's guest need wait for it

    async def _load_located(
        self, manifest: Manifest, fd: int, located: Sequence[Located], into: Qemu | None, program: str
    ) -> tuple[float, float]:
        """Once its memory is there. Returns when its state was loaded, and when its guest ran (epoch s)."""
        refuse_overlap(self.name, ram_of(located), await self._claims(self.name, False))
        beside = await self._ports.runner.active(self.name, beside=True) if into else self.pid
        proof: asyncio.Future[None] | None = None
        if old := into or self.pid:
            # Before the old QEMU is let go of, by which its guest could still be resumed.
            await self._prove(manifest, located, beside)
        plan = self._ports.definitions.plan_load(manifest, located)
        if program:
            plan = replace(plan, argv=(program, *plan.argv[1:]))
        self._ports.journal.append("load-begin", vm=self.name, checkpoint=manifest.id, program=plan.argv[0])
        if into is None:
            await self._end_qemu()
        try:
            if not old:
                proof = asyncio.ensure_future(self._prove(manifest, located, beside))
            qemu = into or await self._launch_proved(plan, proof)
            await refuse_lesser_machine(qemu, manifest)
            await qemu.load(fd, self._settings.agent.load_timeout)
        except BaseException as error:
            # Shielded: a cancelled load must not leave a QEMU that has not run its guest either.
            said = self._ports.runner.log_tail(self.name, beside=into is not None)
            if into is None:
                await asyncio.shield(asyncio.ensure_future(self._end_qemu()))
            if not isinstance(error, (CprError, TimeoutError)):
                raise
            self._ports.journal.append("load-failed", vm=self.name, checkpoint=manifest.id)
            unproved = proof and proof.done() and not proof.cancelled() and proof.exception() is error
            if unproved or isinstance(error, ProofFailed):
                raise
            what = error.what if isinstance(error, CprError) else "QEMU did not get done"
            said = f" (QEMU: {said})" if said and said not in what else ""
            other = f"it was saved by QEMU {manifest.qemu.version}: if another is installed now, try that one again"
            keep = "the checkpoint is kept and the load can be repeated"
            remedy = "" if into else other
            failure = LoadFailed(f"could not be loaded: {what}{said}", vm=self.name, left=keep, remedy=remedy)
            log.error("%s", failure.text, extra=about(Event.LOAD_FAILED, **self._named(manifest, phase="load")))
            raise failure from error
        loaded_at = self._ports.host.now()
        resumed_at = await self._go_on(qemu, manifest, adopt=into is not None) or self._ports.host.now()
        if into:
            # Not by `quit`: it would unlink the paths of sockets, which are the new one's now.
            await self._ports.runner.kill(self.name, beside=True)
        return loaded_at, resumed_at

    async def _prove(self, manifest: Manifest, located: Sequence[Located], beside: int) -> None:
        """What a load depends on, all at once: a guest waits for it. Raises ProofFailed, MemoryInUse."""
        await asyncio.gather(
            refuse_changed_disks(self._ports, manifest),
            refuse_changed_firmware(self._ports, manifest),
            refuse_other_users(self._ports, self.name, located, {self.pid, beside, *self._live_pids()}),
            refuse_changed_ram(self._ports, manifest, located),
        )

    async def _launch_proved(self, launch: Launch, proof: asyncio.Future[None] | None) -> Qemu:
        """A QEMU takes its time to come up, and writes nothing to the RAM before it is told to load (FACTS.md: -incoming):
        a proof that is still under way is done when this returns. Raises what it raises, and QemuFailed."""
        try:
            qemu = await self._launch(self._stamped(launch))
            if proof:
                await proof
        except CprError:
            if proof:
                await proof  # it knows better what is wrong, if it finds anything
            raise
        except BaseException:
            if proof:
                proof.cancel()
            raise
        return qemu

    async def _go_on(self, qemu: Qemu, manifest: Manifest, *, adopt: bool = False) -> float:
        """Once its state is loaded: let the guest do what it did when it was saved. Returns when it ran (epoch s)."""
        self._ports.journal.append("resume", vm=self.name, checkpoint=manifest.id, run_state=manifest.run_state)
        if adopt:
            await self._adopt(qemu)
        if self.checkpointed:
            await asyncio.to_thread(self._ports.store.consume, manifest)
        # From here on the checkpoint is spent, whatever happens (invariant 2).
        resumed_at = 0.0
        if manifest.run_state != "paused":
            resumed_at = await qemu.cont()
        self._ports.journal.append(
            "resumed", vm=self.name, checkpoint=manifest.id, resumed_at=resumed_at or self._ports.host.now()
        )
        if manifest.wakes:
            resumed_at = await self._wake()
        launch = self.launched()
        if launch and launch.argv[0] == launch.base_argv[0]:  # another is needed on for what lies beside it
            await asyncio.to_thread(self._ports.programs.forget, self.name)
        return resumed_at

    def _hold(self, manifest: Manifest, error: ProofFailed) -> None:
        """Keep everything as it is, with what was found, for an admin to decide."""
        held = Held(reason=error.text, error=error.kind, at=self._ports.host.now(), evidence=error.evidence)
        self._ports.journal.append(
            "held",
            vm=self.name,
            upgrade=manifest.upgrade,
            reason=error.what,
            evidence=[list(one) for one in error.evidence],
        )
        self._ports.store.hold(self.name, held)
        found = "; ".join(f"{one.what}: expected {one.expected}, found {one.found}" for one in error.evidence)
        facts = about(Event.HELD, **self._named(manifest, phase="load"), evidence=found)
        log.error("%s", error.text, extra=facts)

    async def _start_afresh(self, definition: Definition, manifest: Manifest, lost: str) -> None:
        """Its RAM is no more: what was saved is moved aside, on the record, and the guest boots."""
        self._ports.journal.append("memory-lost", vm=self.name, checkpoint=manifest.id, reason=lost)
        text = f"VM {self.name}: its memory is lost: {lost}. It is started afresh, as its definition wants."
        log.warning("%s", text, extra=about(Event.MEMORY_LOST, **self._named(manifest, phase="load")))
        await asyncio.to_thread(self._ports.store.discard, self.name, "lost")
        await self._end_qemu()
        await self._start(definition)
        self._ports.journal.append("cold-started", vm=self.name)

    async def _finish_interrupted_resume(self, checkpoint: str) -> None:
        """The checkpoint is spent, and the journal announced that its guest would run: let it, if nobody has."""
        records = [r for r in self._ports.journal.records() if r.get("checkpoint") == checkpoint]
        announced = [r for r in records if r["event"] == "resume"]
        if announced and records[-1]["event"] == "resume" and announced[-1].get("run_state") != "paused":
            log.warning("VM %s: its resume was interrupted; the guest goes on", self.name)
            assert self._qemu
            await self._qemu.cont()
            self._ports.journal.append("resumed", vm=self.name, checkpoint=checkpoint)

    async def _record(self, manifest: Manifest, loaded: LoadTimes) -> None:
        host, times, resumed_at = self._ports.host, manifest.times, loaded.resumed_at
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
            load_at=loaded.load_at - stepped_s,
            memory_at=loaded.memory_at - stepped_s,
            resumed_at=resumed_at - stepped_s,
            by_kexec=not rebooted or host.booted_by_kexec(),
            loaded_at=loaded.loaded_at - stepped_s,
            run_state=manifest.run_state,
            qemu_before=manifest.qemu.version,
            qemu_after=await self._qemu_version(),
            witness=manifest.witness.kind,
            state_bytes=manifest.vmstate.size_bytes,
            memory=", ".join(one.place for one in manifest.memory),
            memory_bytes=sum(one.size_bytes for one in manifest.memory),
        )
        facts = about(Event.LOADED, **self._named(manifest, phase="load"), pause=f"{timeline.pause_s:.3f}")
        log.info("VM %s: loaded, it was stopped for %.3f s", self.name, timeline.pause_s, extra=facts)
        await self._store_timeline(timeline)
        if (manifest.run_state == "running" or manifest.wakes) and (clock := await self._set_clock(manifest)):
            timeline = replace(timeline, **clock)
            await self._store_timeline(timeline)
        if problems := await after_load(self._ports, self, timeline):
            await self._store_timeline(replace(timeline, hook_problems=problems))

    async def _store_timeline(self, timeline: GuestTimeline) -> None:
        try:
            await asyncio.to_thread(self._ports.history.add, timeline)  # it is made durable, and other guests wait
            self._changed(self.name)
        except OSError as error:  # the guest runs; a report is not worth failing for
            log.warning("VM %s: its timeline could not be stored: %s", self.name, error)

    async def _qemu_version(self) -> str:
        """For the record; "" if its QEMU is gone already."""
        with contextlib.suppress(QemuFailed):
            return await self._qemu.version() if self._qemu else ""
        return ""

    async def _set_clock(self, manifest: Manifest) -> dict[str, Any]:
        """A guest's clock stood still with it. Returns what its timeline has to tell of that."""
        if self._qemu is None or (self.definition and self.definition.load.resync_clock == "never"):
            return {}
        try:
            behind_s = await self._qemu.set_guest_clock(self._ports.host.now)
        except CprError as error:
            facts = about(Event.CLOCK_NOT_SET, **self._named(manifest, phase="load"))
            log.warning("VM %s: its clock was not set: %s", self.name, error.what, extra=facts)
            return {"clock_problem": error.what}
        if behind_s is None:
            return {}
        log.info("VM %s: its clock was %.3f s behind, and was set", self.name, behind_s)
        return {"clock_behind_s": behind_s}

    def _named(self, manifest: Manifest, phase: str) -> dict[str, str]:
        """Fields of an entry in the system's journal."""
        return {"vm": self.name, "upgrade": manifest.upgrade, "checkpoint": manifest.id, "phase": phase}

    async def _relocated(self, ram: Ram) -> list[Located]:
        with naming(self.name):
            return await self._ports.memory.relocate(ram, 5.0)
