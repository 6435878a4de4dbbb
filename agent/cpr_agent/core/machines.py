# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as machines of systemd-machined: which of them it lists, and what it may ask of them (ADR 37).

No act waits for machined and no guest depends on it: VMs are listed by a task of their own, once the act that changed them
is over, and not while a job has guests that stand still.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from cpr_agent.core.listener import Listener
from cpr_agent.core.model import VmState
from cpr_agent.errors import Busy, CprError, HostFailed, WrongState

if TYPE_CHECKING:
    from cpr_agent.core.jobs import Job
    from cpr_agent.core.manager import Manager
    from cpr_agent.core.vm import Vm

log = logging.getLogger(__name__)

SERVICE = "cpr-agent"
"""As `machinectl list` has it: what tells our machines from those of others."""
LISTED = (VmState.RUNNING, VmState.PAUSED, VmState.SUSPENDED)
"""Of a guest that is saved, QEMU may still be there, but whoever presses its power button presses no guest's."""
UNCERTAIN = (VmState.RECOVERING, VmState.STARTING, VmState.SAVING, VmState.LOADING, VmState.UNREACHABLE)
"""In these, whatever stands in the list stays there."""
HARMLESS_JOBS = ("load-all", "load-early", "recover", "reload")
"""They have no part in a guest that runs already. All others save guests, or are about to."""
RETRY_S, SLOWEST_S = 60.0, 3600.0
"""Until machined is asked again that has not answered; each time twice as long."""


class Listed(msgspec.Struct, frozen=True):
    """A machine that machined lists. ``leader`` is the PID of the process that machined sends its signals to."""

    service: str
    leader: int
    unit: str


class Registry(Protocol):
    """machined. Each call ends within seconds, and raises HostFailed if machined is not there or does not answer,
    WrongState if it refuses."""

    async def get(self, name: str) -> Listed | None: ...

    async def register(self, name: str, leader: int) -> None:
        """As a VM of SERVICE; its unit is that of ``leader``."""

    async def unregister(self, name: str) -> None:
        """Its processes are not touched."""


class Leaders(Protocol):
    """The processes that stand for VMs; there are none where systemd does not run the VMs, or has no machined."""

    def leader(self, qemu_pid: int) -> int:
        """The leader beside this QEMU, 0 if there is none."""

    def hear(self, unit: str, asked: Callable[[str], None]) -> None:
        """Call back with each word of the leader in this unit from now on: "poweroff", "reboot"."""

    def unhear(self, unit: str) -> None:
        """No more."""


class Machines(Listener):
    def __init__(self, manager: Manager, registry: Registry, leaders: Leaders) -> None:
        self._manager = manager
        self._registry = registry
        self._leaders = leaders
        self._dirty = {*manager.vms}
        self._due = asyncio.Event()
        self._due.set()
        self._units: dict[str, str] = {}
        """By VM, the unit whose leader is heard."""
        self._complained: dict[str, str] = {}
        """By VM, what was last said of it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._unproved: set[str] = set()
        """VMs for which machined was asked to take a leader, and not yet looked at which process it took."""
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = RETRY_S

    def vm_added(self, vm: Vm) -> None:
        self._dirty.add(vm.name)
        self._due.set()

    vm_changed = vm_removed = vm_added

    def job_removed(self, job: Job) -> None:  # noqa: ARG002 - whichever it was
        self._due.set()

    async def run(self) -> None:
        """Keep machined's list, until cancelled."""
        self._manager.listeners.add(self)
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                await self._tidy_all()
        finally:
            self._manager.listeners.remove(self)

    async def _tidy_all(self) -> None:
        """One VM after the other: no guest waits for it. A job's end wakes us, and the time to ask machined again."""
        if self._retry:
            return
        for name in sorted(self._dirty):
            if not all(job.parked.is_set() for job in self._manager.jobs.current.values()):
                return
            self._dirty.discard(name)
            vm = self._manager.vms.get(name)
            try:
                if vm and vm.busy:
                    self._spawn(self._after(vm))
                else:
                    await self._tidy(name, vm)
            except HostFailed as error:
                self._complain("", str(error))
                self._dirty.add(name)
                self._ask_again_later()
                return
            except WrongState as error:
                self._complain(name, f"VM {name}: systemd-machined does not list it: {error}")

    async def _after(self, vm: Vm) -> None:
        await vm.idle()
        self.vm_changed(vm)

    async def _tidy(self, name: str, vm: Vm | None) -> None:
        """Raises HostFailed, WrongState."""
        if vm and vm.state in UNCERTAIN:
            return
        leader = self._leaders.leader(vm.pid) if vm and vm.pid else 0
        unit = vm.unit if vm and leader else ""
        if (before := self._units.get(name, "")) and before != unit:
            del self._units[name]
            self._leaders.unhear(before)
        if not (vm and leader):
            if name in self._unproved:  # else machined sees the end of a leader by itself
                await self._disown(name)
            return
        self._units[name] = unit
        self._leaders.hear(unit, partial(self._asked, name))
        listed = await self._registry.get(name)
        self._complained.pop("", None)
        self._retry_s = RETRY_S
        ours = listed is not None and listed.service == SERVICE
        if vm.state not in LISTED:
            if ours:
                await self._registry.unregister(name)
        elif listed and not ours:
            raise WrongState(f"{listed.service or 'another service'} has a machine of this name ({listed.unit})")
        elif listed is None or (listed.leader, listed.unit) != (leader, unit):
            if listed:
                await self._registry.unregister(name)
            await self._register(name, leader, unit)
            self._complained.pop(name, None)

    async def _disown(self, name: str) -> None:
        """Take back what machined may have listed after nobody waited for it any more."""
        listed = await self._registry.get(name)
        if listed and listed.service == SERVICE:
            await self._registry.unregister(name)
        self._unproved.discard(name)

    async def _register(self, name: str, leader: int, unit: str) -> None:
        """machined takes the leader by its number, which may be another process's by then."""
        self._unproved.add(name)
        await self._registry.register(name, leader)
        listed = await self._registry.get(name)
        wrong = listed is not None and listed.unit != unit
        if wrong:
            await self._registry.unregister(name)
        self._unproved.discard(name)
        if wrong:
            raise WrongState(f"its leader (PID {leader}) has ended")

    # -- what machined asks ---------------------------------------------------------------------------------------------

    def _asked(self, name: str, word: str) -> None:
        if vm := self._manager.vms.get(name):
            self._spawn(self._answer(vm, word))

    async def _answer(self, vm: Vm, word: str) -> None:
        try:
            if word != "poweroff":
                remedy = f"reboot it from within, or use `machinectl poweroff` and `cprctl start {vm.name}`"
                raise WrongState(
                    "can't be rebooted from the host in order", vm=vm.name, left="nothing was done", remedy=remedy
                )
            if jobs := [job.kind for job in self._manager.jobs.current.values() if job.kind not in HARMLESS_JOBS]:
                raise Busy(f"belongs to a host in the middle of {', '.join(jobs)}", vm=vm.name, left="nothing was done")
            log.info("VM %s: machinectl asks for its power button", vm.name)
            await vm.power_off()
        except (CprError, OSError) as error:
            log.warning("machinectl %s is refused: %s", word, error)

    # -------------------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ask_again_later(self) -> None:
        def again() -> None:
            self._retry = None
            self._due.set()

        self._retry = asyncio.get_running_loop().call_later(self._retry_s, again)
        self._retry_s = min(2 * self._retry_s, SLOWEST_S)

    def _complain(self, about: str, text: str) -> None:
        """Once for each thing: nothing depends on it."""
        if self._complained.get(about) != text:
            log.warning("%s", text)
        self._complained[about] = text
