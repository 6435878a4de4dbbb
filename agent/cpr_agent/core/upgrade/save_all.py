# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests are saved, or none is: from the first that stops to the point of no return."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Self

from cpr_agent.core.acts.requests import SaveRequest
from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.model import Policy, Survives, VmState
from cpr_agent.core.saveable import may_shut_down
from cpr_agent.core.turns import Turn, Turns
from cpr_agent.core.undo import uninterrupted
from cpr_agent.core.upgrade.ledger import Kind, Phase
from cpr_agent.core.upgrade.roll_back import or_roll_back
from cpr_agent.core.upgrade.scope import Failure, Scope, in_turn, names, on_all
from cpr_agent.core.upgrade.sort import Triage
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, KernelRefused, SaveFailed

log = logging.getLogger(__name__)

UNDO_S = 10.0
"""How long others wait for the undo of a save that failed."""
_SAVED = (VmState.SAVED, VmState.HELD)


async def save(scope: Scope, job: Job, found: Triage, need: Survives) -> int:
    """From CHECKING to SAVED; or everything is taken back and it raises SaveFailed. Returns how many guests it stopped."""
    live, unsaveable = found.saveable, [vm for vm, _ in found.unsaveable]
    scope.ledger.enter(Phase.SAVING, shut_down=[vm.name for vm in unsaveable])
    job.expect(vm.name for vm in (*live, *unsaveable))
    async with or_roll_back(scope, job, "mend the cause, or shut the VM down first"):
        if unsaveable:
            job.enter(f"shutting down {names(unsaveable)}, which cannot be saved")
            await _shut_down(job, unsaveable, found.policy)
        await _save_each(scope, job, found, need)
        job.enter("verifying the saved states")
        await on_all(live, lambda vm: asyncio.to_thread(_verify, scope, vm))
        scope.ledger.enter(Phase.SAVED)
    job.enter("saved")
    return len(live) + len(unsaveable)


async def commit(scope: Scope, job: Job) -> None:
    """The point of no return: from here on no guest may run in this boot. Raises SaveFailed after a rollback."""
    job.cancellable = False
    async with or_roll_back(scope, job, "mend the cause and try again"):
        current = scope.ledger.enter(Phase.COMMITTING)
        if current.kind.loads_kernel and not scope.ports.kernels.loaded():
            raise KernelRefused("the kernel that was loaded is not loaded any more")
        await promise(scope)


async def promise(scope: Scope) -> None:
    """Tell the gate that each guest is saved, or held. Raises SaveFailed if one is not."""
    await on_all(scope.vms(), lambda vm: vm.refresh())
    if unsaved := [vm for vm in scope.vms() if vm.pid and not vm.machine.powered_off and vm.state not in _SAVED]:
        raise SaveFailed(f"not saved: {', '.join(f'{vm.name} ({vm.state})' for vm in unsaved)}")
    soft = scope.ledger.require_current().kind is Kind.SOFT_REBOOT
    outlives = Survives.SOFT_REBOOT if soft and await scope.ports.kexec.pending() is not Survives.KEXEC else Survives.KEXEC
    saved = {vm.name: manifest.memory for vm in scope.vms() if (manifest := vm.machine.readable_checkpoint())}
    if lost := [name for name, memory in saved.items() if not all(one.outlives(outlives) for one in memory)]:
        raise SaveFailed(f"saved in RAM that does not survive a {outlives}: {', '.join(lost)}")
    ram = tuple(one for memory in saved.values() for one in memory)
    scope.ports.kexec.promise(scope.ports.memory.drivers(ram), outlives)
    await on_all([vm for vm in scope.vms() if vm.machine.stands_saved and vm.machine.own.delegated], Vm.end_saved)
    own = [vm.machine.own for vm in scope.vms() if vm.machine.stands_saved]
    scope.ports.kexec.end_at_once([place.directory for place in own if not place.delegated])


async def _save_each(scope: Scope, job: Job, found: Triage, need: Survives) -> None:
    """Guests of a low order stop last. Before the first one stops, all that is asked of any guest has been answered, and
    each witness is prepared. Raises SaveFailed."""
    groups = list(reversed(in_turn(found.saveable)))
    if not groups:
        return
    async with _Saves(scope, job, groups, need, found.policy) as saves:
        await saves.prepare()
        for number, vms in enumerate(groups):
            job.enter(f"saving {names(vms)}")
            given_up = await saves.save(number)
            if given_up:
                job.enter(f"shutting down {names(given_up)}, which could not be saved")
                shut_down = [*scope.ledger.require_current().shut_down, *(vm.name for vm in given_up)]
                scope.ledger.enter(Phase.SAVING, shut_down=shut_down)
                await _shut_down(job, given_up, found.policy)


class _Saves:
    """The saves of all groups, which are under way at once; those that have not come to their end are taken back with the
    block.

    No guest stops while QEMU or a hook is still being asked whether another one can be saved. A guest that has to sleep for
    its save stands still from then on: one of a later group begins only when that group is called.
    """

    def __init__(self, scope: Scope, job: Job, groups: list[list[Vm]], need: Survives, policy: Policy) -> None:
        self._scope, self._job, self._groups, self._need, self._policy = scope, job, groups, need, policy
        self._turns = Turns([[]])
        self._saves: dict[Vm, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        later = [vm for group in self._groups[1:] for vm in group]
        late = [vm for vm, sleeps in zip(later, await asyncio.gather(*map(_must_sleep, later)), strict=True) if sleeps]
        self._turns = Turns([[vm.name for vm in group] for group in self._groups], [vm.name for vm in late])
        self._begin(vm for group in self._groups for vm in group if vm not in late)
        return self

    async def __aexit__(self, *_: object) -> None:
        if pending := [save for save in self._saves.values() if not save.done()]:
            for save in pending:
                save.cancel()
            await uninterrupted(asyncio.gather(*pending, return_exceptions=True))

    async def prepare(self) -> None:
        """Until no guest has anything left to be asked. Raises SaveFailed for one that can't be saved, before any stops."""
        self._job.enter(f"preparing the save of {names(self._saves)}")
        await self._turns.all_ready()
        self._failed(vm for vm, save in self._saves.items() if save.done())

    async def save(self, number: int) -> list[Vm]:
        """Save the VMs of this group. Returns those that could not be saved and may be shut down. Raises SaveFailed with
        all the others that could not."""
        vms = self._groups[number]
        self._begin(vm for vm in vms if vm not in self._saves)
        self._turns.call(number)
        await asyncio.wait([self._saves[vm] for vm in vms])
        return self._failed(vms)

    def _begin(self, vms: Iterable[Vm]) -> None:
        for vm in vms:
            self._saves[vm] = asyncio.create_task(self._save(vm))

    async def _save(self, vm: Vm) -> None:
        upgrade, limit_s = self._scope.ledger.require_current().id, self._scope.settings.standstill
        request = SaveRequest(need=self._need, upgrade=upgrade, turn=self._turns.turn(vm.name), limit_s=limit_s)
        try:
            with self._job.guest(vm.name, Step.PREPARING, Step.SAVED):
                await _in_time(vm, request, lambda: self._job.note(vm.name, Step.SAVING))
        finally:
            self._turns.no_longer_awaited(vm.name)

    def _failed(self, vms: Iterable[Vm]) -> list[Vm]:
        failures = []
        for vm in vms:
            error = self._saves[vm].exception()
            if isinstance(error, Exception):
                failures.append(Failure(vm, error))
            elif error:
                raise error
        if fatal := [failure for failure in failures if self._is_fatal(failure)]:
            raise SaveFailed("; ".join(map(str, fatal)))
        return [failure.vm for failure in failures]

    def _is_fatal(self, failure: Failure) -> bool:
        return not (isinstance(failure.error, CprError) and may_shut_down(failure.vm.machine, self._policy))


async def _must_sleep(vm: Vm) -> bool:
    """False for a QEMU that does not say: its save says why."""
    try:
        return await vm.must_sleep()
    except CprError:
        return False


async def _in_time(vm: Vm, request: SaveRequest, begun: Callable[[], None]) -> None:
    """Save a VM, and tell when its turn has ``begun``; others stand still meanwhile. If its QEMU takes more than its time,
    or the undo takes more than UNDO_S, then the VM is given up: the undo goes on, and nobody may act on the VM before its
    end, but the others do not wait. Raises SaveFailed, CprError."""
    turn = request.turn or Turn()
    task = asyncio.create_task(vm.save(request))
    try:
        await _until(turn.begun, task)
        begun()
        await _until(turn.written, task, request.limit_s + UNDO_S)
        if turn.written.is_set():
            await _until(turn.over, task)
            await asyncio.wait({task}, timeout=UNDO_S)
    except asyncio.CancelledError:
        await uninterrupted(_let_go(vm, task))
        raise
    if not task.done():
        await uninterrupted(_let_go(vm, task))
        raise SaveFailed(
            "takes too long to be saved, or to go on after a failed save, and is given up",
            vm=vm.name,
            left="the agent still tries to let its guest go on",
            remedy=f"see: cprctl status {vm.name}",
        )
    task.result()


async def _until(event: asyncio.Event, task: asyncio.Task[object], timeout_s: float | None = None) -> None:
    """Or until the end of the task."""
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({waiter, task}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()


async def _let_go(vm: Vm, task: asyncio.Task[object]) -> None:
    """Cancel it, and leave it to itself if its undo takes long."""
    task.cancel()
    await asyncio.wait({task}, timeout=UNDO_S)
    if not task.done():
        log.error("VM %s: given up; its save is taken back as soon as its QEMU lets that be", vm.name)
        vm.machine.spawn(_see_to_its_end(vm, task))


async def _see_to_its_end(vm: Vm, task: asyncio.Task[object]) -> None:
    await asyncio.wait({task})
    error = None if task.cancelled() else task.exception()
    log.info("VM %s: the save that was given up is over: %s", vm.name, error or "taken back")


async def _shut_down(job: Job, vms: list[Vm], policy: Policy) -> None:
    """Guests of a low order last. The policy ``force`` also ends a QEMU that does not answer."""

    async def shut_down(vm: Vm) -> None:
        with job.guest(vm.name, Step.SHUTTING_DOWN, Step.SHUT_DOWN):
            await vm.let_go(UNDO_S, force=policy is Policy.FORCE)
            await (vm.shut_down_or_end() if policy is Policy.FORCE else vm.shut_down())

    for group in reversed(in_turn(vms)):
        await on_all(group, shut_down)


def _verify(scope: Scope, vm: Vm) -> None:
    if manifest := vm.live_checkpoint():
        scope.ports.store.verify(manifest)
