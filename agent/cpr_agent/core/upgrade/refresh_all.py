# SPDX-License-Identifier: GPL-2.0-or-later
"""A new QEMU for every guest of the host, which stays in its kernel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from itertools import chain

from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.run_states import SAVEABLE
from cpr_agent.core.upgrade.scope import in_turn, names
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, LoadFailed, NothingToDo


async def refresh_all(job: Job, vms: Iterable[Vm], replace: Callable[[Vm], Awaitable[object]]) -> None:
    """``replace`` the QEMU of one guest after the other, and stop at the first that fails: the same would fail the others
    too. Raises LoadFailed, NothingToDo."""
    live = list(chain.from_iterable(in_turn(vm for vm in vms if vm.run_state in SAVEABLE)))
    if not live:
        raise NothingToDo("no VM has a live guest")
    job.expect(vm.name for vm in live)
    for done, vm in enumerate(live):
        job.enter(f"a new QEMU for {vm.name}")
        try:
            with job.guest(vm.name, Step.REFRESHING, Step.REFRESHED):
                await replace(vm)
        except CprError as error:
            left = f"{error.left or 'nothing was done'}; {done} of {len(live)} have a new QEMU"
            if waiting := names(live[done + 1 :]):
                left += f", and these were not tried: {waiting}"
            raise LoadFailed(error.what, vm=vm.name, left=left, remedy=error.remedy) from error
