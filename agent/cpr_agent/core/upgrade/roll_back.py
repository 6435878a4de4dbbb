# SPDX-License-Identifier: GPL-2.0-or-later
"""How an upgrade is taken back: every guest goes on in this boot."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from cpr_agent.core.jobs import Job
from cpr_agent.core.model import RunState
from cpr_agent.core.undo import uninterrupted
from cpr_agent.core.upgrade import kernel
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.upgrade.scope import Scope, names, on_each, reason, start_if_off
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CheckpointUnreadable, CprError, SaveFailed


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
    if ledger.phase is not Phase.ROLLING_BACK:
        ledger.enter(Phase.ROLLING_BACK, reason=why)
    current = ledger.require_current()
    saved = [vm for vm in scope.vms() if _stands_for(vm, current.id)]
    job.advance(0, max(1, len(saved)), f"rolling back: resuming {names(saved)}" if saved else "rolling back")
    failures = await on_each(saved, lambda vm: _resume(vm, current.id))
    ended = [vm for vm in scope.vms() if vm.name in current.shut_down and not vm.pid and not vm.checkpointed]
    failures += await on_each(ended, start_if_off)
    if current.kind.loads_kernel:
        await kernel.unload(scope.ports.kernels)
    ledger.enter(Phase.ROLLED_BACK, failures=list(map(str, failures)))
    failed = {failure.vm for failure in failures}
    resumed = names(vm for vm in saved if vm not in failed)
    restarted = names(vm for vm in ended if vm not in failed)
    return "".join(
        (
            f"the others were resumed ({resumed or ('none could be' if saved else 'none had been saved')})",
            f"; started again: {restarted}" if restarted else "",
            f", but not {'; '.join(map(str, failures))}" if failures else "",
        )
    )


async def _resume(vm: Vm, upgrade: str) -> None:
    """Another caller who just then wants something of the VM must not keep its guest stopped by that."""
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
