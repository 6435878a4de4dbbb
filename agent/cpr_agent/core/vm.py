"""The acts that change a VM, which exclude each other: start, save, load, and what takes them back or finishes them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from cpr_agent.core.events import Event, about
from cpr_agent.core.hooks import after_load, before_save, vetoes
from cpr_agent.core.model import (
    Definition,
    DiskIdentity,
    Held,
    Launch,
    Located,
    Manifest,
    Ram,
    SaveTimes,
    Survives,
    VmState,
    Vmstate,
    ram_of,
    survives,
)
from cpr_agent.core.ports import PendingState, Qemu
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
from cpr_agent.core.turns import NO_TURN, Turn
from cpr_agent.core.vm_base import LATE_SLEEP_S, SAVEABLE, VmBase
from cpr_agent.errors import (
    AlreadyRunning,
    AlreadySaved,
    Blocked,
    CprError,
    DeviceMissing,
    GuestAgentFailed,
    InvalidArgument,
    LoadFailed,
    MachineChanged,
    MemoryChanged,
    NoCheckpoint,
    ProofFailed,
    QemuFailed,
    SaveFailed,
    WrongState,
)
from cpr_agent.report.timeline import GuestTimeline

log = logging.getLogger(__name__)


class LoadTimes(NamedTuple):
    """Epoch seconds: when a load began, had its memory, had its state, and when its guest ran."""

    load_at: float
    memory_at: float
    loaded_at: float
    resumed_at: float


class Vm(VmBase):
    """See the bus's contract for what each act is to its caller."""

    async def recover(self) -> None:
        """After a start of the agent: finish or take back what an earlier one was in the middle of."""
        async with self._exclusive("recover"):
            await self._ports.runner.kill(self.name, beside=True)  # no guest has run in it, or has stopped there for good
            await self._derive()
            if self._qemu is None:
                return
            if self._in_transfer():
                await self._qemu.withdraw()
                await self._derive()
            if self._in_refresh():
                await self._settle_sockets()
            if self.awaits_cold_start():
                self._ports.journal.append("cold-started", vm=self.name)
            launch, manifest = self.launched(), self._live_or_none()
            never_ran = self.run_state in ("inmigrate", "paused", "prelaunch")
            if manifest and launch and launch.kind == "load" and launch.checkpoint == manifest.id and never_ran:
                log.warning("VM %s: a load was interrupted before its guest ran; it can be repeated", self.name)
                self._ports.journal.append("load-interrupted", vm=self.name, checkpoint=manifest.id)
                await self._end_qemu()
            elif manifest and self._in_refresh() and self.run_state == "postmigrate" and manifest.run_state == "running":
                log.warning("VM %s: a refresh was interrupted; the guest goes on in the QEMU that it has", self.name)
                await self._take_back(manifest)
            elif self._ports.store.checkpointed(self.name):
                return  # saved, also if nobody can read by what
            elif self.run_state == "postmigrate" and self._in_transfer():
                log.warning("VM %s: a refresh was interrupted; the guest goes on in the QEMU that it has", self.name)
                await self._undo_transfer()
            elif self.run_state == "postmigrate":
                await self._finish_interrupted_save()
            elif self.run_state == "paused" and launch and launch.kind == "load":
                await self._finish_interrupted_resume(launch.checkpoint)
            await self._end_sleep()
            self.end_refresh()

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
                self._require_no_silent_qemu("nothing was resumed")
                await self._load_by_either(manifest)

    async def discard(self) -> None:
        """Give a checkpoint up, on the record. Its guest is lost, unless its QEMU still runs."""
        async with self._exclusive("discard"):
            self._admit()
            await self._derive()
            self._require_no_silent_qemu("nothing was discarded")
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

    async def save(
        self,
        filename: str,
        mode: str,
        need: Survives = Survives.QEMU_RESTART,
        upgrade: str = "",
        turn: Turn = NO_TURN,
    ) -> Manifest:
        """Save device state and leave the RAM where it is; the guest is stopped after, in its ``turn``. Raises CprError; a
        guest that ran then runs on."""
        if mode != "reboot":
            raise InvalidArgument(
                f"mode {mode!r} is not supported", vm=self.name, left="nothing was saved", remedy='use mode "reboot"'
            )
        async with self._exclusive("save"):
            qemu, launch = await self._require_live(need)
            if not upgrade:  # which has done that for all its guests, before the first of them stopped
                await before_save(self._ports, self)
            return await self._save_asleep_or_not(qemu, launch, filename, mode, upgrade, turn)

    async def replace_qemu(self, *, in_turn: bool = False) -> str:
        """Give the guest a new QEMU, of the program that is installed now, on the same RAM. A guest that runs gets it
        beside the old one, which goes on with it if anything fails: by QEMU's own cpr-transfer where both offer it
        ("transfer"), else by a save and a load ("beside"). Any other guest, or ``in_turn``, gets it after the old one has
        ended: what fails then leaves it saved ("in-turn"). Returns which. Raises CprError."""
        async with self._exclusive("refresh"):
            self._admit()
            await self._derive()
            qemu, launch = await self._require_live(Survives.QEMU_RESTART)
            await before_save(self._ports, self)
            self._ports.journal.append("refresh", vm=self.name)
            try:
                if in_turn or self.run_state != "running" or await self._must_sleep(qemu):
                    await self._replace_in_turn(qemu, launch)
                    return "in-turn"
                self._refuse_sharing(launch)
                how = "beside" if await qemu.transfer_problem() else "transfer"
                async with self._keeping_old_qemu():
                    await (self._replace_beside if how == "beside" else self._transfer)(qemu, launch)
                return how
            finally:
                self._ports.journal.append("refreshed", vm=self.name)

    async def load(self, filename: str, turn: Turn = NO_TURN) -> str:
        """Prove the memory and the state, and continue the guest in a new QEMU. Raises CprError; up to the moment at
        which the guest runs the checkpoint stays and the load can be repeated.

        Returns "", or why the guest was started afresh: its memory is lost, and the definition wants that.
        """
        async with self._exclusive("load"):
            self._admit()
            await self._derive()
            self._require_no_silent_qemu("nothing was loaded")
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
                await self._load_by_either(manifest, filename, turn)
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
        await self._require_saveable(need)
        if need is Survives.KEXEC and (reasons := await self.successor_reasons()):
            raise Blocked(reasons, vm=self.name)

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

    # -- parts of the acts ----------------------------------------------------------------------------------------------

    async def _require_live(self, need: Survives) -> tuple[Qemu, Launch]:
        """Its QEMU, and what that was started with, if its guest can be saved. Raises CprError."""
        if self.live_checkpoint():
            raise AlreadySaved("is already saved", vm=self.name, remedy=f"`cprctl resume {self.name}` takes the save back")
        if self._qemu is None or self.run_state not in SAVEABLE:
            raise WrongState(f"is {self.state} and can't be saved", vm=self.name, left="nothing was saved")
        return self._qemu, await self._require_saveable(need)

    async def _save_asleep_or_not(
        self,
        qemu: Qemu,
        launch: Launch,
        filename: str = "",
        mode: str = "reboot",
        upgrade: str = "",
        turn: Turn = NO_TURN,
    ) -> Manifest:
        if not await self._must_sleep(qemu):
            draft = await self._draft(qemu, launch, self.run_state, mode, upgrade)
            return await self._save(qemu, draft, filename, turn=turn)
        try:
            asleep_at = await self._fall_asleep(qemu)
            draft = await self._draft(qemu, launch, "suspended", mode, upgrade)
            return await self._save(qemu, draft, filename, asleep_at=asleep_at, turn=turn)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._end_sleep()))
            raise

    async def _replace_in_turn(self, qemu: Qemu, launch: Launch) -> None:
        """The old one's program is kept before its guest stops, and brought back if the new one fails."""
        unkept = ""
        try:
            await asyncio.to_thread(self._ports.programs.keep, self.name, self.pid, launch.argv[1:])
        except OSError as error:
            unkept = f": its old QEMU could not be kept ({error})"
            log.warning("VM %s: should its new QEMU fail, it will stay saved%s", self.name, unkept)
        manifest = await self._save_asleep_or_not(qemu, launch)
        try:
            failed = await self._load_by_either(manifest)
        except CprError as error:
            raise LoadFailed(
                f"could not get a new QEMU: {error.what}",
                vm=self.name,
                left=f"it stays saved{unkept}, and the load can be repeated",
                remedy=error.remedy,
            ) from error
        if failed:
            raise failed

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

    async def _replace_beside(self, qemu: Qemu, launch: Launch) -> None:
        """The new one is there before the guest stops, and waits for its state: as with QEMU's own cpr-transfer, it has the
        RAM, and writes nothing to it before that (FACTS.md: only ``-incoming`` skips writing firmware into RAM)."""
        draft = await self._draft(qemu, launch, "running", "reboot", "")
        plan = self._ports.definitions.plan_load(draft, await self._relocated(launch.memory))
        new = await self._launch_beside(self._stamped(plan))
        await refuse_lesser_machine(new, draft)
        await self._load(await self._save(qemu, draft, ""), "", into=new)

    async def _transfer(self, qemu: Qemu, launch: Launch) -> None:
        """One QEMU hands its guest to the other, and neither lets go of the RAM on the way: no checkpoint, no witness (ADR
        9). Until the new one is adopted no guest has run in it; the old one, once stopped, goes on only if it is not."""
        runner, host, agent = self._ports.runner, self._ports.host, self._settings.agent
        draft = await self._draft(qemu, launch, "running", "transfer", "")
        directory = runner.directory(self.name, beside=True)
        plan = self._ports.definitions.plan_transfer(draft, await self._relocated(launch.memory), directory)
        self._ports.journal.append("transfer", vm=self.name, checkpoint=draft.id)

        async def lives() -> bool:
            return bool(await runner.active(self.name, beside=True))

        try:
            await runner.start(self._stamped(plan), beside=True)
            async with qemu.handing_over(directory, lives, agent.qemu_start_timeout) as handed_over:
                new = await runner.connect(self.name, agent.qemu_start_timeout, beside=True)
                await refuse_lesser_machine(new, draft)
                await new.take_over(directory, agent.load_timeout)
                stopped_at = await handed_over()
        except (QemuFailed, LoadFailed) as error:
            raise self._failed_beside(error) from error
        handed_at = host.now()
        uptime_s = host.uptime_s() - (handed_at - stopped_at)
        times = replace(
            draft.times, stopped_at=stopped_at, written_at=handed_at, durable_at=handed_at, stopped_uptime_s=uptime_s
        )
        resumed_at = await self._go_on(new, draft, adopt=True) or host.now()
        await runner.kill(self.name, beside=True)
        loaded = LoadTimes(handed_at, handed_at, handed_at, resumed_at)
        self._spawn(self._record(replace(draft, times=times), loaded))

    async def _undo_transfer(self) -> None:
        """The guest stands in the QEMU that it had, and no other has it any more."""
        assert self._qemu
        checkpoint = self._last_record("transfer")["checkpoint"]
        self._ports.journal.append("transfer-undone", vm=self.name, checkpoint=checkpoint)
        await self._qemu.cont()
        self._ports.journal.append("resumed", vm=self.name, checkpoint=checkpoint)

    @contextlib.asynccontextmanager
    async def _keeping_old_qemu(self) -> AsyncIterator[None]:
        """Whatever fails, its guest goes on in it, unless it was adopted by the new one; or its memory is not what it was
        when it stopped, and then it stays where it is (invariant 1). Raises LoadFailed."""
        assert self._qemu
        sockets = await self._qemu.listening()
        try:
            self._ports.host.keep_sockets(sockets, self.pid)
            yield
            self._ports.host.settle_sockets(sockets, self.pid)
        except BaseException as error:
            changed = isinstance(error, MemoryChanged)
            await asyncio.shield(asyncio.ensure_future(self._keep_old_qemu(may_run=not changed)))
            if not isinstance(error, CprError):
                raise
            goes_on = self.run_state == "running"
            left = "its guest goes on in the QEMU that it had" if goes_on else "see its state in `cprctl status`"
            if changed:
                left = "it stays saved, and stands still in the QEMU that it had"
            raise LoadFailed(
                f"could not get a new QEMU: {error.what}", vm=self.name, left=left, remedy=error.remedy
            ) from error

    def _refuse_sharing(self, launch: Launch) -> None:
        """Raises LoadFailed."""
        if both := self._ports.definitions.unshareable(launch):
            raise LoadFailed(
                f"could not get a new QEMU: two at once can't have {', '.join(both)}",
                vm=self.name,
                left="its guest goes on in the QEMU that it had",
                remedy=f"`cprctl refresh --in-turn {self.name}` ends the old one first",
            )

    async def _keep_old_qemu(self, *, may_run: bool) -> None:
        """After the one beside it has failed."""
        await self._ports.runner.kill(self.name, beside=True)
        await self._derive()
        manifest = self.live_checkpoint()
        if may_run and self.run_state == "postmigrate" and (manifest or self._in_transfer()):
            await (self._take_back(manifest) if manifest else self._undo_transfer())
            await self._derive()
        await self._settle_sockets()

    async def _settle_sockets(self) -> None:
        if self._qemu:
            with contextlib.suppress(QemuFailed):  # nothing else may fail by it
                self._ports.host.settle_sockets(await self._qemu.listening(), self.pid)

    async def _start(self, definition: Definition) -> None:
        with naming(self.name):
            await self._ports.memory.prepare(definition.memory, definition.vm.user)
            located = await self._ports.memory.locate(definition.memory, self._settings.agent.device_timeout)
            refuse_overlap(self.name, ram_of(located), await self._claims(self.name, True))
            await refuse_other_users(self._ports, self.name, located, self.pid)
        launch = self._stamped(self._ports.definitions.plan_start(definition, located))
        self._ports.journal.append("start", vm=self.name)
        await self._launch(launch)
        await asyncio.to_thread(self._ports.programs.forget, self.name)

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

    async def _require_saveable(self, need: Survives) -> Launch:
        launch = self.launched()
        if launch is None:
            raise Blocked(["the record of how its QEMU was started is gone"], vm=self.name)
        reasons = await self.blocked_reasons() + await vetoes(self._ports, self)
        reasons += [
            f"its RAM in {one.place} ({one.filesystem}) does not survive a {need}"
            for one in launch.memory
            if not one.survives.covers(need)
        ]
        if reasons:
            raise Blocked(reasons, vm=self.name)
        return launch

    async def _draft(
        self, qemu: Qemu, launch: Launch, run_state: str, mode: str, upgrade: str, checkpoint: str = ""
    ) -> Manifest:
        """What of a manifest is known before the guest stops."""
        host = self._ports.host
        return Manifest(
            id=checkpoint or uuid.uuid4().hex,
            vm=self.name,
            mode=mode,
            survives=survives(launch.memory),
            run_state=run_state,
            launch=launch,
            qemu=await qemu.facts(launch),
            qemu_path=launch.base_argv[0],
            qemu_sha256=await asyncio.to_thread(host.program_digest, self.pid),
            memory=launch.memory,
            witness=self._ports.memory.new_witness(self._settings.witness.kind),
            vmstate=Vmstate(path="", size_bytes=0, sha256=""),
            boot_id=host.boot_id(),
            kernel=host.kernel(),
            times=SaveTimes(requested_at=host.now(), stopped_at=0.0, written_at=0.0, durable_at=0.0),
            upgrade=upgrade,
            wakes=run_state == "suspended" and self._put_to_sleep(),
        )

    async def _save(
        self,
        qemu: Qemu,
        draft: Manifest,
        filename: str,
        begun: dict[str, object] | None = None,
        asleep_at: float = 0.0,
        turn: Turn = NO_TURN,
    ) -> Manifest:
        """``begun`` is the journal's record of a save that QEMU has done and nobody has stored. ``asleep_at``: since when
        the guest sleeps for it (epoch s)."""
        definition_timeout = self.definition.save.timeout if self.definition else 60.0
        host, store = self._ports.host, self._ports.store
        located = await self._relocated(draft.memory)
        try:
            pending = store.reopen(self.name, str(begun["path"])) if begun else store.begin(self.name, filename)
        except OSError as error:
            raise SaveFailed(f"the state file cannot be opened: {error}", vm=self.name, left="nothing changed") from error
        try:
            async with self._ports.memory.prepared_witness(located, draft.witness) as take_witness, turn:
                stopped_at = draft.times.requested_at
                if begun is None:
                    self._ports.journal.append(
                        "save-begin", vm=self.name, checkpoint=draft.id, run_state=draft.run_state, path=pending.path
                    )
                    self._set(VmState.SAVING)
                    stopped_at = await qemu.save(pending.fd, definition_timeout) or host.now()
                    if asleep_at:
                        stopped_at = asleep_at
                        self._refuse_woken()
                written_at = host.now()
                vmstate, witness, disks, firmware = await asyncio.gather(
                    asyncio.to_thread(pending.seal),
                    take_witness(),
                    self._disks(qemu),
                    digest_firmware(self._ports, draft.qemu.firmware),
                )
                refuse_foreign_state(vmstate, draft.qemu)
                manifest = replace(
                    draft,
                    qemu=replace(draft.qemu, disks=tuple(disks), firmware=firmware),
                    witness=witness,
                    vmstate=vmstate,
                    times=replace(
                        draft.times,
                        stopped_at=stopped_at,
                        written_at=written_at,
                        durable_at=host.now(),
                        stopped_uptime_s=host.uptime_s() - (host.now() - stopped_at),
                    ),
                )
                await asyncio.to_thread(pending.commit, manifest)
                self._ports.journal.append("saved", vm=self.name, checkpoint=draft.id, stopped_at=stopped_at)
        except BaseException as error:
            # Shielded: whatever interrupts the save, also a cancelled job, the guest must not stay stopped.
            if asleep_at and self._woke:
                draft = replace(draft, run_state="running")
            left = await asyncio.shield(asyncio.ensure_future(self._undo_save(qemu, pending, draft, located)))
            if isinstance(error, (CprError, OSError)):
                what = error.what if isinstance(error, CprError) else f"the state could not be stored: {error}"
                failure = SaveFailed(f"could not be saved: {what}", vm=self.name, left=left)
                log.error("%s", failure.text, extra=about(Event.SAVE_FAILED, **self._named(draft, phase="save")))
                raise failure from error
            raise
        log.info(
            "VM %s: saved in %.3f s, %d bytes of state",
            self.name,
            host.now() - stopped_at,
            vmstate.size_bytes,
            extra=about(Event.SAVED, **self._named(manifest, phase="save")),
        )
        return manifest

    async def _disks(self, qemu: Qemu) -> list[DiskIdentity]:
        return await identify_disks(self._ports, await qemu.disks())

    async def _fall_asleep(self, qemu: Qemu) -> float:
        """Returns since when the guest sleeps (epoch s). Raises SaveFailed, QemuFailed; it may go to sleep all the same."""
        self._ports.journal.append("suspend", vm=self.name)
        self._woke = False
        try:
            return await qemu.suspend(self.definition.save.suspend_timeout if self.definition else 60.0)
        except GuestAgentFailed as error:
            raise SaveFailed(
                f"could not be saved: it must sleep for that, and {error.what}",
                vm=self.name,
                left="the guest was not stopped; should it go to sleep late, it is woken",
                remedy="the guest's own log says what keeps it awake",
            ) from error

    async def _end_sleep(self) -> None:
        """Wake a guest that the agent has put to sleep, unless it is saved: then its load does."""
        if self.checkpointed or not self._put_to_sleep():
            return
        self._may_sleep_late_until = asyncio.get_running_loop().time() + LATE_SLEEP_S
        try:
            await self._wake()
        except QemuFailed as error:
            log.error("VM %s: its guest was put to sleep, and could not be woken: %s", self.name, error.what)

    def _refuse_woken(self) -> None:
        """Its devices run again, and after the load there would be nobody to wake. Raises SaveFailed."""
        if self._woke:
            raise SaveFailed("its guest was put to sleep, and woke by itself before it was saved", vm=self.name)

    async def _undo_save(self, qemu: Qemu, pending: PendingState, draft: Manifest, located: Sequence[Located]) -> str:
        """Bring the guest back to what it was before a save that failed; returns a sentence for the error."""
        run_state = draft.run_state
        self._ports.journal.append("save-undone", vm=self.name, checkpoint=draft.id)
        try:
            with contextlib.ExitStack() as at_end:
                state = -1
                if run_state != "running":
                    state = await asyncio.to_thread(pending.reader)
                    at_end.callback(os.close, state)
                await asyncio.to_thread(pending.abort)
                now = await qemu.run_state()
                if run_state == "running" and now != "running":
                    await qemu.cont()
                    self._ports.journal.append("resumed", vm=self.name, checkpoint=draft.id)
                    now = await qemu.run_state()
                elif run_state != "running" and now == "postmigrate":
                    await self._load_back(draft, located, state)
                    now = self.run_state
        except OSError as error:
            return f"the half-written checkpoint could not be removed ({error}), so the guest stays stopped"
        except CprError as error:
            return f"and its QEMU is gone ({error.what}); the guest is lost unless it shut itself down"
        if now == run_state:
            return f"the guest is {now}, as before; no checkpoint was left"
        return f"the guest was {run_state} and QEMU is now {now}, where only `cont` on the admin's QMP socket continues it"

    async def _load_back(self, draft: Manifest, located: Sequence[Located], state: int) -> None:
        """For a guest that did not run: ``cont`` in postmigrate would let a paused one run, and aborts QEMU for one that
        sleeps (FACTS.md, "Rollback"). What QEMU has written is read by a new one."""
        await self._end_qemu()
        qemu = await self._launch(self._stamped(self._ports.definitions.plan_load(draft, located)))
        await qemu.load(state, self._settings.agent.load_timeout)
        await self._go_on(qemu, draft)
        self.run_state = await qemu.run_state()

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
            await self._save(
                self._qemu,
                await self._draft(self._qemu, launch, run_state, "reboot", "", str(begun[-1]["checkpoint"])),
                "",
                begun[-1],
            )
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
            refuse_other_users(self._ports, self.name, located, self.pid, beside),
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
        launch = self.launched()
        if launch and launch.argv[0] == launch.base_argv[0]:  # another is needed on for what lies beside it
            await asyncio.to_thread(self._ports.programs.forget, self.name)
        return await self._wake() if manifest.wakes else resumed_at

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
