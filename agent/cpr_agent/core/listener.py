# SPDX-License-Identifier: GPL-2.0-or-later
"""Who wants to hear of changes: the bus, the publisher of metrics. Core tells, and asks for no answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpr_agent.core.jobs import Job
    from cpr_agent.core.vm import Vm


class Listener:
    """Hears of nothing; a listener overrides what it wants to hear of. Calls come in the event loop, in the middle of acts
    for which guests stand still: they return at once, and raise nothing."""

    def vm_added(self, vm: Vm) -> None:
        """There is another VM."""

    def vm_removed(self, vm: Vm) -> None:
        """The VM is no more."""

    def vm_changed(self, vm: Vm) -> None:
        """The VM may have another state."""

    def upgrade_changed(self) -> None:
        """The ledger has another phase."""

    def job_added(self, job: Job) -> None:
        """A job has begun."""

    def job_changed(self, job: Job) -> None:
        """The job has another step or state."""

    def job_removed(self, job: Job) -> None:
        """The job has ended."""


class Listeners(Listener):
    """Tells each of those that were added, in this order."""

    def __init__(self) -> None:
        self._all: list[Listener] = []

    def add(self, listener: Listener) -> None:
        self._all.append(listener)

    def remove(self, listener: Listener) -> None:
        self._all.remove(listener)

    def vm_added(self, vm: Vm) -> None:
        for one in tuple(self._all):
            one.vm_added(vm)

    def vm_removed(self, vm: Vm) -> None:
        for one in tuple(self._all):
            one.vm_removed(vm)

    def vm_changed(self, vm: Vm) -> None:
        for one in tuple(self._all):
            one.vm_changed(vm)

    def upgrade_changed(self) -> None:
        for one in tuple(self._all):
            one.upgrade_changed()

    def job_added(self, job: Job) -> None:
        for one in tuple(self._all):
            one.job_added(job)

    def job_changed(self, job: Job) -> None:
        for one in tuple(self._all):
            one.job_changed(job)

    def job_removed(self, job: Job) -> None:
        for one in tuple(self._all):
            one.job_removed(job)
