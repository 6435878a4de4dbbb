# SPDX-License-Identifier: GPL-2.0-or-later
"""What the acts of an upgrade share: the ports, the ledger, and the way to act on many VMs at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from itertools import groupby
from typing import NamedTuple

import msgspec

from cpr_agent.core.jobs import Job, Step
from cpr_agent.core.ports import Ports
from cpr_agent.core.settings import UpgradeSection
from cpr_agent.core.upgrade.ledger import Ledger
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError

UNTOUCHED = "no guest was stopped"
_DEFAULT_ORDER = 100


class Scope(msgspec.Struct, frozen=True):
    """``vms`` yields all VMs as they are now."""

    ports: Ports
    ledger: Ledger
    vms: Callable[[], Collection[Vm]]
    settings: UpgradeSection


class Failure(NamedTuple):
    """A VM for which an act failed. As a string it is fit for an admin."""

    vm: Vm
    error: Exception

    def __str__(self) -> str:
        if isinstance(self.error, CprError) and self.error.vm:
            return self.error.text.rstrip(".")
        return f"VM {self.vm.name}: {self.error}"


async def on_each(vms: Iterable[Vm], act: Callable[[Vm], Awaitable[object]]) -> list[Failure]:
    """Run ``act`` on all VMs at once, and wait until each has ended: one that fails does not stop the others. Returns the
    failures. Raises a cancellation, or any other BaseException that is no Exception."""
    vms = list(vms)
    results = await asyncio.gather(*(act(vm) for vm in vms), return_exceptions=True)
    failures = []
    for vm, result in zip(vms, results, strict=True):
        if isinstance(result, Exception):
            failures.append(Failure(vm, result))
        elif isinstance(result, BaseException):
            raise result
    return failures


async def on_all(vms: Iterable[Vm], act: Callable[[Vm], Awaitable[object]]) -> None:
    """Likewise, and then raise the first failure."""
    for failure in await on_each(vms, act):
        raise failure.error


async def start_if_off(job: Job, vm: Vm) -> None:
    """Once no other caller wants anything of it: a guest must not stay off because of a call that was refused."""
    with job.guest(vm.name, Step.STARTING, Step.STARTED):
        await vm.idle()
        if not vm.pid:
            await vm.start()


def in_turn(vms: Iterable[Vm]) -> list[list[Vm]]:
    """Groups of VMs with the same ``order``, the lowest first: it is for guests to whom each second of pause counts."""
    return [list(group) for _, group in groupby(sorted(vms, key=_order), key=_order)]


def names(vms: Iterable[Vm]) -> str:
    return ", ".join(vm.name for vm in vms)


def reason(error: BaseException) -> str:
    """Why an upgrade did not go on, for the ledger and for an admin."""
    return error.text if isinstance(error, CprError) else (str(error) or type(error).__name__)


def _order(vm: Vm) -> int:
    return vm.definition.save.order if vm.definition else _DEFAULT_ORDER
