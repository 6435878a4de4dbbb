# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests after a boot: each checkpoint is loaded, and each guest that was shut down is started again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import chain

import msgspec

from cpr_agent.core.acts.requests import LoadRequest
from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.model import VmState
from cpr_agent.core.ports import Ports
from cpr_agent.core.turns import Places, PlaceTurn
from cpr_agent.core.upgrade.ledger import Phase, Upgrade
from cpr_agent.core.upgrade.scope import Failure, Scope, in_turn, names, on_all, on_each, start_if_off
from cpr_agent.core.vm import Vm
from cpr_agent.errors import LoadFailed

_ENDED_BY_LOADING = (Phase.SAVED, Phase.BOOTED, Phase.LOADING, Phase.HELD)


GROUP_S = 10.0
"""How long guests of the next order wait for those of the one before, one of which may never come."""


class Loaded(msgspec.Struct):
    """How many VMs there were to load or to start, which of them failed, and which were started afresh because their memory
    is lost."""

    total: int
    failures: list[Failure] = msgspec.field(default_factory=list)
    cold_started: list[str] = msgspec.field(default_factory=list)

    def require_no_failure(self) -> None:
        """Raises LoadFailed."""
        if self.failures:
            left = f"{self.total - len(self.failures)} of {self.total} run"
            raise LoadFailed("; ".join(map(str, self.failures)), left=left)


async def load_all(scope: Scope, job: Job, vms: Iterable[Vm], starts_too: Callable[[Vm], bool]) -> Loaded:
    """Load every live checkpoint, then start the VMs that were shut down because they could not be saved, and those that
    ``starts_too`` picks. One that fails does not stop the others. It ends the upgrade that saved them, if there is one."""
    ledger = scope.ledger
    if ledger.phase not in _ENDED_BY_LOADING:
        return await load_each(job, vms, starts_too)
    current = ledger.enter(Phase.LOADING)
    try:
        out = await load_each(job, vms, lambda vm: vm.name in current.shut_down or starts_too(vm))
    except asyncio.CancelledError:
        if job.cancelled:  # else the agent ends, and the next one goes on with it
            ledger.enter(Phase.HELD, reason="its load was cancelled")
        raise
    through = [pause for pause in scope.ports.history.all() if pause.upgrade == current.id]
    ended = Phase.ROLLED_BACK if current.interrupted else Phase.DONE
    ledger.enter(
        Phase.HELD if out.failures else ended,
        failures=list(map(str, out.failures)),
        loaded=sorted(pause.vm for pause in through),
        cold_started=[*current.cold_started, *out.cold_started],
        longest_pause_s=max((pause.pause_s for pause in through), default=0.0),
        reason=current.interrupted or _surprise(current, scope.ports),
    )
    return out


async def load_each(job: Job, vms: Iterable[Vm], starts_too: Callable[[Vm], bool]) -> Loaded:
    """Guests of a low order first; few at a time, so that none stands still until the last is loaded."""
    vms = list(vms)
    await on_all(vms, lambda vm: vm.refresh())
    waiting = [vm for vm in vms if vm.checkpointed]
    off = [vm for vm in vms if vm.definition and vm.state is VmState.STOPPED]
    fresh = [vm for vm in off if vm.machine.past.awaits_cold_start or starts_too(vm)]
    out = Loaded(len(waiting) + len(fresh))
    places = Places()

    async def load(vm: Vm) -> None:
        with job.guest(vm.name, Step.LOADING, Step.LOADED):
            await vm.idle()
            if vm.checkpointed and (lost := await vm.load(LoadRequest(turn=PlaceTurn(places)))):
                out.cold_started.append(f"{vm.name}: {lost}")

    job.expect(vm.name for vm in (*waiting, *fresh))
    async with asyncio.TaskGroup() as loads:
        tasks = []
        for group in in_turn(waiting):
            job.enter(f"loading {names(group)}")
            tasks.append(loads.create_task(on_each(group, load)))
            await asyncio.wait(tasks[-1:], timeout=GROUP_S)
    out.failures += chain.from_iterable(task.result() for task in tasks)
    if fresh:
        job.enter(f"starting {names(fresh)}")
        out.failures += await on_each(fresh, lambda vm: start_if_off(job, vm))
    await on_all(waiting, lambda vm: vm.settled())
    return out


def _surprise(current: Upgrade, ports: Ports) -> str:
    """What was not as planned, though guests are loaded on proof alone and not on plans."""
    kernel = ports.boot.kernel()
    if current.kernel_to and current.kernel_to != kernel and not current.kernel_to.startswith("/"):
        return f"the host runs kernel {kernel}, planned was {current.kernel_to}"
    return ""
