# SPDX-License-Identifier: GPL-2.0-or-later
"""Files that others read instead of asking the agent, kept up to date: metrics, and the message of the day."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from cpr_agent import __version__
from cpr_agent.core.jobs import Job
from cpr_agent.core.listener import Listener
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import VmState
from cpr_agent.core.upgrade.ledger import Kind
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CheckpointUnreadable
from cpr_agent.report.metrics import Numbers, openmetrics
from cpr_agent.report.motd import line

log = logging.getLogger(__name__)

Write = Callable[[str], None]
"""Replaces the file's text. Blocking. Raises OSError."""


class Publisher(Listener):
    """``metrics`` and ``motd`` are None where the file is not wanted."""

    def __init__(self, manager: Manager, metrics: Write | None, motd: Write | None) -> None:
        self._manager = manager
        self._metrics = metrics
        self._motd = motd
        self._dirty = asyncio.Event()
        self._complained: set[str] = set()

    def wake(self) -> None:
        """Write soon. Many changes are written once."""
        self._dirty.set()

    def vm_added(self, vm: Vm) -> None:  # noqa: ARG002 - all of them are written
        self.wake()

    vm_removed = vm_changed = vm_added

    def upgrade_changed(self) -> None:
        self.wake()

    def job_removed(self, job: Job) -> None:  # noqa: ARG002 - likewise
        self.wake()

    async def run(self) -> None:
        """Write after each change, until cancelled. Not during a job, because guests may wait for it: its end wakes us."""
        if not (self._metrics or self._motd):
            return
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if all(job.parked.is_set() for job in self._manager.jobs.current.values()):
                await asyncio.to_thread(self._publish)

    def _publish(self) -> None:
        for write, text in ((self._metrics, self._numbers), (self._motd, self._line)):
            if write is None:
                continue
            try:
                write(text())
                self._complained.discard(text.__name__)
            except (OSError, ValueError) as error:  # no guest depends on it
                if text.__name__ not in self._complained:
                    log.warning("%s could not be written: %s", text.__name__.strip("_"), error)
                self._complained.add(text.__name__)

    def _numbers(self) -> str:
        manager = self._manager
        vms, current = list(manager.vms.values()), manager.ledger.current
        checkpoints = {}
        for vm in vms:
            try:
                if manifest := vm.live_checkpoint():
                    checkpoints[vm.name] = manifest.vmstate.size_bytes
            except CheckpointUnreadable:
                continue
        names = {vm.name for vm in vms}
        return openmetrics(
            Numbers(
                version=__version__,
                kernel=manager.ports.boot.kernel(),
                states={vm.name: str(vm.state) for vm in vms},
                known_states=tuple(map(str, VmState)),
                pauses={t.vm: t.pause_s for t in manager.ports.history.all() if t.vm in names},
                checkpoints=checkpoints,
                held=frozenset(self._held()),
                kind=current.kind if current else "",
                outcome=str(current.phase) if current else "",
                changed_at=current.changed_at if current else 0.0,
            )
        )

    def _line(self) -> str:
        ledger = self._manager.ledger
        last = None if ledger.rebooted or (ledger.current and ledger.current.kind is Kind.SAVE_ALL) else ledger.current
        return line(last, self._manager.ports.boot.kernel(), self._held())

    def _held(self) -> list[str]:
        return sorted(vm.name for vm in self._manager.vms.values() if vm.state is VmState.HELD)
