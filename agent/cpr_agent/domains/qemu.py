# SPDX-License-Identifier: GPL-2.0-or-later
"""A domain's live QEMU: asked as any other, and stopped, saved and let run by libvirt, which has to know. Implements
core.ports.Qemu."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from msgspec.structs import replace

from cpr_agent.core.model import Inventory, Launch, RunState
from cpr_agent.core.run_states import SAVEABLE
from cpr_agent.core.undo import uninterrupted
from cpr_agent.domains.connection import listen
from cpr_agent.domains.desk import Start
from cpr_agent.domains.host import kill
from cpr_agent.errors import GuestAgentFailed, LoadFailed, QemuFailed, QemuRefused, SaveFailed
from cpr_agent.vm import devices, guest_agent
from cpr_agent.vm.cmdline import keyed, option
from cpr_agent.vm.dialects import Dialect, choose_migration
from cpr_agent.vm.qemu import LiveQemu
from cpr_agent.vm.qmp import Event, Qmp
from cpr_agent.vm.retry import poll_until

if TYPE_CHECKING:
    from cpr_agent.domains.place import World

_RESUME_S = 30.0
_GONE_S = 10.0
_ABORT_S = 30.0
_AGENT_PORT = f"name='{guest_agent.PORT}'"
_PAUSED = 3
"""virDomainState: VIR_DOMAIN_PAUSED."""
_WITHOUT_METADATA = 4
"""virDomainSnapshotCreateFlags: VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA."""


async def leave_ram_in_place(qmp: Qmp, *, on: bool) -> None:
    """Turn the capability on for a save or a load of the agent's own, and off again: any other snapshot or save of the
    domain would lack its RAM. Raises QemuFailed."""
    capability = {"capability": "x-ignore-shared", "state": on}
    await qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})


class DomainQemu(LiveQemu):
    """``start`` is that of its QEMU, as long as libvirt waits for the agent before the guest goes on; ``give_up`` ends
    both."""

    def __init__(  # noqa: PLR0913 - what its place has
        self,
        qmp: Qmp,
        launch: Launch | None,
        pid: int,
        world: World,
        start: Start | None,
        give_up: Callable[[Start], Awaitable[None]],
    ) -> None:
        super().__init__(qmp, launch, pid)
        self._world = world
        self._start = start
        self._give_up = give_up

    @property
    def _waits(self) -> Start | None:
        """The start that waits for the agent's answer."""
        return self._start if self._start and not self._start.answer.done() else None

    async def run_state(self) -> RunState:
        start = self._waits
        if start and start.launch is None:  # an earlier agent let it begin, and libvirt asks when all is loaded
            return RunState.PAUSED
        return await super().run_state()

    async def dialect(self) -> Dialect:
        """As libvirt saves, with any QEMU."""
        if self._dialect is None:
            self._dialect = await choose_migration(self._qmp)
        return self._dialect

    async def _prepare(self) -> None:
        """Nothing stays set."""

    async def inventory(self) -> Inventory:
        return by_place(await super().inventory())

    async def brief_inventory(self) -> Inventory:
        """As a whole: libvirt may give a device another id in the next QEMU, and restores an image meanwhile."""
        return await self.inventory()

    # -- save -----------------------------------------------------------------------------------------------------------

    async def blocked_reasons(self, launch: Launch) -> list[str]:
        asleep = await self.run_state() is RunState.SUSPENDED
        reasons = ["the guest is suspended, and libvirt saves none that is"] if asleep else []
        known = {*await self._call("told what devices it has", _aliases), *_ids(launch.argv)}
        unknown = [one.name for one in await devices.devices(self._qmp) if one.name not in known]
        reasons += [
            f"its device {name} was plugged behind libvirt's back, and a load would not have it" for name in unknown
        ]
        return reasons + await super().blocked_reasons(launch)

    async def save(self, vmstate_fd: int, timeout_s: float, checkpoint: str) -> float:
        """libvirt's external snapshot of the memory alone leaves the guest in its QEMU, and what it writes can be restored
        as any image of libvirt's. Raises SaveFailed; the guest may stand: ask ``run_state``."""
        name = self._qmp.vm
        disks = await self._call("listed its disks", _disks)
        self._resumed = False
        with self._qmp.expecting("STOP") as stopped:
            running = await self.run_state() is RunState.RUNNING
            image = self._world.images.begin(name, checkpoint, running=running)
            await leave_ram_in_place(self._qmp, on=True)
            try:
                if running:
                    await self._call("paused it", lambda domain: domain.suspend())
                await self._snapshot(image, disks, timeout_s)
            finally:
                await uninterrupted(self._leave_no_capability())
            state = await uninterrupted(poll_until(self.run_state, lambda now: now is RunState.POSTMIGRATE, _RESUME_S))
            if state is not RunState.POSTMIGRATE:
                raise SaveFailed(f"libvirt has saved it, but QEMU is {state}, not postmigrate", vm=name)
            await asyncio.to_thread(self._world.images.finish, name, vmstate_fd)
            return stopped.result().at if stopped.done() else 0.0

    async def _snapshot(self, image: Path, disks: list[str], timeout_s: float) -> None:
        """Raises SaveFailed, QemuFailed."""
        without = "".join(f"<disk name={quoteattr(disk)} snapshot='no'/>" for disk in disks)
        memory = f"<memory snapshot='external' file={quoteattr(str(image))}/>"
        xml = f"<domainsnapshot>{memory}<disks>{without}</disks></domainsnapshot>"
        saving = asyncio.ensure_future(
            self._world.libvirt.aside(
                self._qmp.vm, "saved it", lambda domain: domain.snapshotCreateXML(xml, _WITHOUT_METADATA), None
            )
        )
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(saving)
        except QemuRefused as error:
            raise SaveFailed(f"could not be written: {error.what}", vm=self._qmp.vm) from error
        except TimeoutError:
            await uninterrupted(self._abort(saving))
            raise SaveFailed(f"libvirt was not done within {timeout_s:.0f} s", vm=self._qmp.vm) from None
        except asyncio.CancelledError:
            await uninterrupted(self._abort(saving))
            raise

    async def _abort(self, saving: asyncio.Future[Any]) -> None:
        """Returns when libvirt is no longer at it. For ``uninterrupted``."""
        with contextlib.suppress(QemuFailed):
            await self._world.libvirt.aside(self._qmp.vm, "given the save up", lambda domain: domain.abortJob())
        await asyncio.wait({saving}, timeout=_ABORT_S)
        if saving.done() and not saving.cancelled():
            saving.exception()

    async def _leave_no_capability(self) -> None:
        with contextlib.suppress(QemuFailed):  # `cont` tries again, before the guest runs
            await leave_ram_in_place(self._qmp, on=False)

    async def withdraw(self) -> None:
        """A save of an earlier agent's may be under way: libvirt goes on with it alone."""
        if await self._migration_status() not in ("none", "completed", "failed", "cancelled"):
            await self._world.libvirt.aside(self._qmp.vm, "given the save up", lambda domain: domain.abortJob())
            await poll_until(self._migration_status, lambda now: now in ("completed", "failed", "cancelled"), _ABORT_S)

    # -- load -----------------------------------------------------------------------------------------------------------

    async def load_runs_guest(self, saved_as: str = "") -> bool:  # noqa: ARG002
        return False

    async def load(self, vmstate_fd: int, timeout_s: float, saved_as: str = "") -> float:  # noqa: ARG002
        """libvirt loads by itself, and then asks. Raises LoadFailed."""
        name, start = self._qmp.vm, self._waits
        if start is None:
            raise LoadFailed("libvirt does not wait for it any more", vm=name)
        either: set[asyncio.Future[Any]] = {start.started, start.ended}
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not start.started.done():
            why = await start.reason() if start.ended.done() else f"libvirt was not done within {timeout_s:g} s"
            raise LoadFailed(f"libvirt could not restore it: {why}", vm=name)
        asking, gone = start.started.result(), "libvirt does not wait for the agent's answer any more"
        if not asking.waiting:
            raise LoadFailed(gone, vm=name)
        state = await self.run_state()
        if state not in SAVEABLE:
            raise LoadFailed(f"libvirt has restored it, but QEMU is {state}, not paused", vm=name)
        if not asking.hold():
            raise LoadFailed(gone, vm=name)
        return 0.0

    async def cont(self) -> float:
        start = self._waits
        if start:
            return await self._go_on(start)
        await leave_ram_in_place(self._qmp, on=False)
        if not await self._call("told its state", lambda domain: domain.state()[0] == _PAUSED):
            return await super().cont()
        with self._qmp.expecting("RESUME") as resumed:
            await self._call("let it run", lambda domain: domain.resume())
            return await self._time_of(resumed, "resume the guest")

    async def _go_on(self, start: Start) -> float:
        """libvirt lets the guest run once it has the agent's answer."""
        if start.launch is not None:
            await leave_ram_in_place(self._qmp, on=False)
        with self._qmp.expecting("RESUME") as resumed:
            start.say("")
            try:
                at = await self._until_resumed(start, resumed)
            finally:
                self._world.desk.forget(self._qmp.vm, start)
        self._world.spawn(self._world.forget_checkpoint(self._qmp.vm))
        if start.launch is None:
            await leave_ram_in_place(self._qmp, on=False)
        return at

    async def _until_resumed(self, start: Start, resumed: asyncio.Future[Event]) -> float:
        """libvirt does so in milliseconds; unless another hook says no, its daemon ends just then, or whoever has started
        it wants it paused: then the time is 0. Raises LoadFailed if the guest has certainly not run, QemuFailed."""
        heard, loop = self._world.libvirt.heard, asyncio.get_running_loop()
        lost: asyncio.Future[str] = loop.create_future()
        left_paused: asyncio.Future[str] = loop.create_future()

        def on_loss() -> None:
            if not lost.done():
                lost.set_result("libvirt's daemon has ended")

        def on_suspend(domain: str) -> None:
            if domain == self._qmp.vm and not left_paused.done():
                left_paused.set_result(domain)

        forgets = [listen(heard.lost, on_loss), listen(heard.suspended, on_suspend)]
        either: set[asyncio.Future[Any]] = {resumed, start.ended, lost, left_paused}
        try:
            await asyncio.wait(either, timeout=_RESUME_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for forget in forgets:
                forget()
        if left_paused.done() and not start.ended.done() and not self._resumed:
            return 0.0
        if not self._resumed and start.launch is not None:
            why = lost.result() if lost.done() else "libvirt has not done so"
            await self._refuse_unrun(await start.reason() if start.ended.done() else why)
        return await self._time_of(resumed, "resume the guest")

    async def _refuse_unrun(self, why: str) -> None:
        """A QEMU that nobody will let run any more ends here. It tells of RESUME on this connection before its guest runs.
        Raises LoadFailed if it has not."""
        try:
            if await self.run_state() is not RunState.PAUSED:
                return
            if not kill(self.pid, self._qmp.vm):
                return
        except QemuFailed:  # it has ended, or must not be touched
            if not await poll_until(self._has_ended, bool, _GONE_S):
                return
        if await poll_until(self._is_gone, bool, _GONE_S) and not self._resumed:
            raise LoadFailed(f"its guest was not let run: {why}", vm=self._qmp.vm)

    async def _has_ended(self) -> bool:
        return not Path(f"/proc/{self.pid}/exe").exists()

    # -- the rest -------------------------------------------------------------------------------------------------------

    async def transfer_problem(self) -> str:
        return "libvirt runs one QEMU of a domain at a time"

    async def sleep_problem(self) -> str:
        return "libvirt saves no guest that sleeps"

    async def set_guest_clock(self, now: Callable[[], float]) -> float | None:
        """By libvirt, which has the guest agent's socket."""

        def set_it(domain: Any) -> float | None:
            if _AGENT_PORT not in domain.XMLDesc(0):
                return None
            told = domain.getTime()
            behind_s = now() - told["seconds"] - told["nseconds"] / 1e9
            at = now()
            domain.setTime({"seconds": int(at), "nseconds": int(at % 1 * 1e9)})
            return float(behind_s)

        try:
            return await self._world.libvirt.aside(self._qmp.vm, "set its guest's clock", set_it)
        except QemuFailed as error:
            raise GuestAgentFailed(error.what, vm=self._qmp.vm) from error

    async def quit(self) -> None:
        """By itself: libvirt's own way takes 0.2 s and more, in which a guest may stand (virProcessKillPainfully,
        src/util/virprocess.c). One that libvirt is about to let run is asked nothing."""
        if start := self._waits:
            await self._give_up(start)
        else:
            await super().quit()

    async def close(self) -> None:
        """QEMU does not connect again: from now on it is asked by libvirt."""
        if self._world.own_monitors.get(self._qmp.vm) is self._qmp:
            del self._world.own_monitors[self._qmp.vm]
        await super().close()

    async def _call(self, deed: str, work: Callable[[Any], Any]) -> Any:
        return await self._world.libvirt.of(self._qmp.vm).call(self._qmp.vm, deed, work)


def by_place(inventory: Inventory) -> Inventory:
    """With devices named by their places on their buses, as far as they have one: their ids count those that were there
    when QEMU was started."""
    placed = [
        replace(one, name=f"{one.bus} {one.address}") if one.bus and one.address else one for one in inventory.devices
    ]
    return replace(inventory, devices=tuple(sorted(placed, key=lambda one: one.name)))


def _aliases(domain: Any) -> list[str]:
    """The ids in QEMU of all that libvirt knows."""
    return re.findall(r"<alias name='([^']*)'", domain.XMLDesc(0))


def _ids(argv: Sequence[str]) -> list[str]:
    return [one.get("id", "") for one in map(keyed, option(argv, "-device"))]


def _disks(domain: Any) -> list[str]:
    """Names of all disks as a snapshot takes them."""
    root = ElementTree.fromstring(domain.XMLDesc(0))  # noqa: S314 - libvirt's own
    return [target.get("dev", "") for target in root.iterfind("devices/disk/target")]
