# SPDX-License-Identifier: GPL-2.0-or-later
"""The sorting of all VMs before a save: those that can be saved, and the fate of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import msgspec

from cpr_agent.core.hooks import before_save
from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.model import Policy, Survives
from cpr_agent.core.run_states import SAVEABLE
from cpr_agent.core.saveable import may_shut_down, obstacle, saved_in_volatile, waits_when_blocked
from cpr_agent.core.upgrade.scope import UNTOUCHED, Failure, Scope, on_all, on_each
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, QemuFailed, SaveFailed, SaveRefused

CHECK_S = 60.0
"""For all that is asked of a VM before its save; others may sleep already."""
Check = Callable[[Vm], Awaitable[object]]


class Triage(msgspec.Struct):
    """All VMs that a kexec would end: those to save, those to shut down because they can't be saved, and those for which
    the policy allows neither."""

    policy: Policy
    saveable: list[Vm] = msgspec.field(default_factory=list)
    unsaveable: list[tuple[Vm, CprError]] = msgspec.field(default_factory=list)
    refused: list[tuple[Vm, CprError]] = msgspec.field(default_factory=list)

    def give_up(self, failure: Failure) -> None:
        """Put a VM that can't be saved where the policy wants it. Raises an error that is no CprError: a fault of ours."""
        vm, error = failure
        if not isinstance(error, CprError):
            raise error
        (self.unsaveable if may_shut_down(vm.machine, self.policy) else self.refused).append((vm, error))

    def require_none_refused(self, job: Job) -> None:
        """Raises SaveRefused."""
        if self.refused:
            for vm, error in self.refused:
                job.note(vm.name, Step.REFUSED, error.text)
            raise SaveRefused(
                "; ".join(str(Failure(vm, error)) for vm, error in self.refused),
                left=UNTOUCHED,
                remedy="mend the cause, shut the VM down first, or choose another policy",
            )


async def triage(vms: Collection[Vm], need: Survives, policy: Policy, *, hooks: bool = True) -> Triage:
    """As the VMs are now. Stops no guest, and waits for none. ``hooks``: ask those of the admin too."""
    return await _triage(vms, need, policy, lambda vm: vm.require_saveable(need, hooks=hooks))


async def triage_patiently(vms: Collection[Vm], need: Survives, policy: Policy) -> Triage:
    """Likewise; where a VM's definition says so, first wait until its save is no longer blocked."""
    return await _triage(vms, need, policy, lambda vm: vm.require_saveable_in_time(need))


async def in_time(vm: Vm, check: Check) -> None:
    """Raises QemuFailed, CprError."""
    patience_s = CHECK_S + (vm.definition.save.blocked_wait if vm.definition and waits_when_blocked(vm.machine) else 0.0)
    try:
        async with asyncio.timeout(patience_s):
            await check(vm)
    except TimeoutError:
        raise QemuFailed(f"its QEMU took more than {patience_s:g} s to say whether it can be saved", vm=vm.name) from None


async def _triage(vms: Collection[Vm], need: Survives, policy: Policy, check: Check) -> Triage:
    await on_all(vms, lambda vm: vm.refresh())
    out = Triage(policy)
    for vm in vms:
        if saved_in_volatile(vm.machine, need):
            what = f"is saved already, in RAM that does not survive a {need}"
            out.refused.append((vm, SaveFailed(what, vm=vm.name, remedy=f"`cprctl load {vm.name}` lets it go on")))
    live = [vm for vm in vms if vm.run_state in SAVEABLE]
    failures = await on_each(live, lambda vm: in_time(vm, check))
    unlike = [vm for vm in vms if vm.pid and vm not in live and not vm.machine.powered_off and not vm.checkpointed]
    failures += [Failure(vm, error) for vm in unlike if (error := obstacle(vm.machine))]
    for failure in failures:
        out.give_up(failure)
    failed = {failure.vm for failure in failures}
    out.saveable = [vm for vm in live if vm not in failed]
    return out


async def prepare(scope: Scope, job: Job, need: Survives, policy: Policy) -> Triage:
    """Sort the VMs, and run the admin's pre-save hooks of all guests before the first guest stops: no guest stands still
    for another one's hook. Raises SaveRefused."""
    out = await triage_patiently(scope.vms(), need, policy)
    out.require_none_refused(job)
    upgrade = scope.ledger.require_current().id
    failures = await on_each(out.saveable, lambda vm: before_save(vm.machine, upgrade))
    for failure in failures:
        out.saveable.remove(failure.vm)
        out.give_up(failure)
    out.require_none_refused(job)
    return out
