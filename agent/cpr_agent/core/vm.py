"""The acts that change a VM, which exclude each other: start, save, load, and what takes them back or finishes them."""

from __future__ import annotations

import asyncio
import logging

from cpr_agent.core.hooks import before_save
from cpr_agent.core.model import (
    Manifest,
    Survives,
)
from cpr_agent.core.proof import (
    provably_lost,
)
from cpr_agent.core.refreshing import Refreshing
from cpr_agent.core.turns import NO_TURN, Turn
from cpr_agent.errors import (
    AlreadyRunning,
    AlreadySaved,
    Blocked,
    DeviceMissing,
    InvalidArgument,
    NoCheckpoint,
    ProofFailed,
    QemuFailed,
    WrongState,
)

log = logging.getLogger(__name__)


class Vm(Refreshing):
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
