"""A new QEMU for a guest that stays where it is: the host's, and its RAM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from msgspec.structs import replace

from cpr_agent.core.hooks import before_save
from cpr_agent.core.loading import LoadTimes
from cpr_agent.core.model import (
    Launch,
    Survives,
)
from cpr_agent.core.ports import Qemu
from cpr_agent.core.proof import (
    refuse_lesser_machine,
)
from cpr_agent.core.saving import Saving
from cpr_agent.errors import (
    CprError,
    LoadFailed,
    MemoryChanged,
    QemuFailed,
)

log = logging.getLogger(__name__)


class Refreshing(Saving):
    """The act, and its parts."""

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
