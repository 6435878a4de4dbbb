# SPDX-License-Identifier: GPL-2.0-or-later
"""How an upgrade is taken back: every guest goes on in this boot."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.model import RunState
from cpr_agent.core.undo import uninterrupted
from cpr_agent.core.upgrade import kernel
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.upgrade.scope import UNTOUCHED, Scope, names, on_each, reason, start_if_off
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CheckpointUnreadable, CprError, SaveFailed

START_S = 120.0
"""How long a rollback waits for the host's units to be up again."""


@contextlib.asynccontextmanager
async def or_roll_back(scope: Scope, job: Job, remedy: str) -> AsyncIterator[None]:
    """Roll back if the block fails or is cancelled. Raises SaveFailed for a CprError, with how the rollback ended."""
    try:
        yield
    except BaseException as error:
        left = await roll_back(scope, job, reason(error))
        if isinstance(error, CprError):
            raise SaveFailed(error.text, left=left, remedy=remedy) from error
        raise


async def roll_back(scope: Scope, job: Job, why: str) -> str:
    """Let every guest go on that this upgrade saved or shut down; returns a sentence for the error. A guest that can't be
    resumed stays saved or held, is named in the ledger's failures, and keeps no other guest from going on.

    The rollback comes to its end before this returns, and so before the transaction's lock is free, however often the job
    is cancelled.
    """
    job.cancellable = False
    return await uninterrupted(_roll_back(scope, job, why))


async def _roll_back(scope: Scope, job: Job, why: str) -> str:
    ledger, kexec = scope.ledger, scope.ports.kexec
    kexec.withdraw()
    untouched = ledger.phase is Phase.STOPPING
    if ledger.phase is not Phase.ROLLING_BACK:
        ledger.enter(Phase.ROLLING_BACK, reason=why)
    current = ledger.require_current()
    saved = [vm for vm in scope.vms() if _stands_for(vm, current.id)]
    job.expect(vm.name for vm in saved)
    job.enter(f"rolling back: resuming {names(saved)}" if saved else "rolling back")
    failures = await on_each(saved, lambda vm: _resume(job, vm, current.id))
    ended = [vm for vm in scope.vms() if vm.name in current.shut_down and not vm.pid and not vm.checkpointed]
    failures += await on_each(ended, lambda vm: start_if_off(job, vm))
    if current.kind.loads_kernel:
        await kernel.unload(scope.ports.kernels)
    again, not_started = await _start_again(scope, job, current.stopped_first)
    ledger.enter(Phase.ROLLED_BACK, failures=list(map(str, failures)), not_started=not_started)
    failed = {failure.vm for failure in failures}
    resumed = names(vm for vm in saved if vm not in failed)
    restarted = ", ".join((*(vm.name for vm in ended if vm not in failed), *again))
    went_on = f"the others were resumed ({resumed or ('none could be' if saved else 'none had been saved')})"
    return "".join(
        (
            UNTOUCHED if untouched else went_on,
            f"; started again: {restarted}" if restarted else "",
            f", but not {'; '.join((*map(str, failures), *not_started))}" if failures or not_started else "",
        )
    )


async def _start_again(scope: Scope, job: Job, units: Sequence[str]) -> tuple[list[str], list[str]]:
    """The units that were stopped before the guests, now that these run. Returns those that have started, and why the
    others have not; systemd goes on with one that takes long."""
    if not units:
        return [], []
    job.enter(f"starting {', '.join(units)} again")
    starts = {asyncio.create_task(scope.ports.units.start(unit)): unit for unit in units}
    done, late = await asyncio.wait(starts, timeout=START_S)
    for task in late:
        task.cancel()
    said = {starts[task]: task.result() for task in done}
    said |= {starts[task]: f"{starts[task]} has not started within {START_S:g} s" for task in late}
    return [unit for unit in units if not said[unit]], [said[unit] for unit in units if said[unit]]


async def _resume(job: Job, vm: Vm, upgrade: str) -> None:
    """Another caller who just then wants something of the VM must not keep its guest stopped by that."""
    with job.guest(vm.name, Step.RESUMING, Step.RESUMED):
        await vm.idle()
        if _stands_for(vm, upgrade):
            await vm.resume()


def _stands_for(vm: Vm, upgrade: str) -> bool:
    """Whether it is this upgrade that stopped the guest. If its checkpoint can't be read the guest may be one of them, and
    the refusal to resume it has to be reported."""
    try:
        manifest = vm.live_checkpoint()
    except CheckpointUnreadable:
        return vm.run_state == RunState.POSTMIGRATE
    return manifest is not None and manifest.upgrade == upgrade
