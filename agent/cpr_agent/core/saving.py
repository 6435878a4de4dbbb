"""How a guest is saved, and how a save that fails is taken back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import Sequence

from msgspec.structs import replace

from cpr_agent.core.events import Event, about
from cpr_agent.core.hooks import vetoes
from cpr_agent.core.loading import Loading
from cpr_agent.core.model import (
    DiskIdentity,
    Launch,
    Located,
    Manifest,
    SaveTimes,
    Survives,
    VmState,
    Vmstate,
    survives,
)
from cpr_agent.core.ports import PendingState, Qemu
from cpr_agent.core.proof import (
    digest_firmware,
    identify_disks,
    refuse_foreign_state,
)
from cpr_agent.core.turns import NO_TURN, Turn
from cpr_agent.core.vm_base import LATE_SLEEP_S, SAVEABLE
from cpr_agent.errors import (
    AlreadySaved,
    Blocked,
    CprError,
    GuestAgentFailed,
    QemuFailed,
    SaveFailed,
    WrongState,
)

log = logging.getLogger(__name__)


class Saving(Loading):
    """Parts of acts, for whoever has the VM's lock."""

    async def _require_live(self, need: Survives) -> tuple[Qemu, Launch]:
        """Its QEMU, and what that was started with, if its guest can be saved. Raises CprError."""
        if self.live_checkpoint():
            raise AlreadySaved("is already saved", vm=self.name, remedy=f"`cprctl resume {self.name}` takes the save back")
        if self._qemu is None or self.run_state not in SAVEABLE:
            raise WrongState(f"is {self.state} and can't be saved", vm=self.name, left="nothing was saved")
        return self._qemu, await self._require_saveable(need)

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
