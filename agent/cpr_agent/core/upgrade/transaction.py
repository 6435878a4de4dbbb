# SPDX-License-Identifier: GPL-2.0-or-later
"""The upgrade as one transaction: the lock that excludes a second one, and the order of the phases (invariants 2 to 6)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from cpr_agent.core import upgrade
from cpr_agent.core.jobs import Job, Jobs
from cpr_agent.core.model import Finding, Policy, Survives
from cpr_agent.core.ports import Ports
from cpr_agent.core.saveable import saved_in_volatile
from cpr_agent.core.settings import UpgradeSection
from cpr_agent.core.undo import Undo
from cpr_agent.core.upgrade.ledger import OVER, TAKEN_BACK, Kind, Ledger, Phase, Upgrade
from cpr_agent.core.upgrade.load_all import load_all, load_each
from cpr_agent.core.upgrade.load_early import load_early
from cpr_agent.core.upgrade.scope import UNTOUCHED, Scope, reason
from cpr_agent.core.vm import Vm
from cpr_agent.errors import Busy, NothingToDo, SaveFailed

if TYPE_CHECKING:
    from cpr_agent.core.upgrade.preflight import Plan

log = logging.getLogger(__name__)

Findings = Callable[[], Awaitable[list[Finding]]]


class Transaction:
    """One at a time. ``vms`` yields all VMs as they are now."""

    def __init__(self, ports: Ports, ledger: Ledger, vms: Callable[[], Collection[Vm]], settings: UpgradeSection) -> None:
        self._scope = Scope(ports, ledger, vms, settings)
        self._ports = ports
        self._ledger = ledger
        self._lock = asyncio.Lock()
        self._services = asyncio.Event()
        """Set once somebody asks for the load of all: nobody waits any more for what a single guest lacks."""
        self._early = False
        """Whether guests are being loaded early; the load of all comes after that."""

    def refuse_when_committed(self) -> None:
        """Raises Busy between the commit and the kexec: a guest that ran on would be lost."""
        if self._ledger.committed:
            raise Busy("the host is on its way into another kernel", left="nothing was done", remedy="see cprctl status")

    # -- forth --------------------------------------------------------------------------------------------------------

    async def save_all(self, job: Job, need: Survives, policy: Policy) -> None:
        """An admin's own save: no kexec follows, and no crash takes it back. Raises SaveFailed, NothingToDo."""
        self._refuse_second()
        nothing = NothingToDo("no VM has a live guest that is not saved yet")
        async with self._lock:
            if not any(vm.pid or saved_in_volatile(vm.machine, need) for vm in self._scope.vms()):
                raise nothing  # and leave no report that would be the last one
            self._begin(Kind.SAVE_ALL, policy)
            async with self._or_refused():
                found = await upgrade.sort.prepare(self._scope, job, need, policy)
            if not await upgrade.save_all.save(self._scope, job, found, need):
                raise nothing

    async def before_kexec(self, job: Job, policy: Policy) -> None:
        """Save for a kexec that systemd is about to do, whether an upgrade or an admin started it, or for a soft reboot,
        and promise the gate that all guests are saved. No guest waits for what it lacks any more: such ones stay saved.
        Raises SaveFailed, SaveRefused, Busy."""
        self.end_waiting()
        async with self._lock:
            if self._ledger.committed:  # an upgrade saved before it started the kexec
                await upgrade.save_all.promise(self._scope)
                return
            need = await self._ports.kexec.pending() or Survives.KEXEC
            self._begin(Kind.SOFT_REBOOT if need is Survives.SOFT_REBOOT else Kind.KEXEC, policy)
            async with self._or_refused():
                if need is Survives.KEXEC:
                    await upgrade.uptime.wait(self._ports, job)
                found = await upgrade.sort.prepare(self._scope, job, need, policy)
            await upgrade.save_all.save(self._scope, job, found, need)
            await upgrade.save_all.commit(self._scope, job)

    async def upgrade(self, job: Job, plan: Plan, findings: Findings) -> None:
        """Check, load the kernel, save, commit, kexec. Returns only if a dry run is over, or as the host goes down."""
        self._refuse_second()
        async with self._lock:
            facts = {"kernel_to": plan.target, "kernel_bytes": upgrade.kernel.size_bytes(self._ports.files, plan)}
            self._begin(plan.kind, plan.policy, command_line_from=self._ports.kernels.command_line(), **facts)
            if plan.dry_run:
                await self._rehearse(job, plan, findings)
                return
            await self._save_for(job, plan, findings)
        job.enter("the host restarts")
        job.parked.set()
        await self._fallen_through(job, await self._ports.kexec.start())

    async def _rehearse(self, job: Job, plan: Plan, findings: Findings) -> None:
        async with self._or_refused():
            job.enter("checking")
            upgrade.preflight.refuse(await findings())
            await upgrade.kernel.try_out(self._ports.kernels, job, plan)
        self._ledger.enter(Phase.CHECKED)

    async def _save_for(self, job: Job, plan: Plan, findings: Findings) -> None:
        kernels, kexec = self._ports.kernels, self._ports.kexec
        async with AsyncExitStack() as until_committed:
            async with self._or_refused(), Undo() as undo:
                job.enter("checking")
                upgrade.preflight.refuse(await findings())
                await upgrade.kernel.load(kernels, job, plan)
                undo.push(lambda: upgrade.kernel.unload(kernels))
                await until_committed.enter_async_context(kexec.inhibit("guests are saved for a new kernel"))
                await upgrade.uptime.wait(self._ports, job)
                found = await upgrade.sort.prepare(self._scope, job, Survives.KEXEC, plan.policy)
                undo.done()
            await upgrade.stop_first.stop(self._scope, job)
            await upgrade.save_all.save(self._scope, job, found, Survives.KEXEC)
            await upgrade.save_all.commit(self._scope, job)

    def _refuse_second(self) -> None:
        if self._lock.locked():
            raise Busy("guests are just being saved, loaded or resumed", left=UNTOUCHED, remedy="see cprctl status")

    def _begin(self, kind: Kind, policy: Policy, **facts: object) -> None:
        """With the lock held, so that no check is under way. Raises Busy."""
        ledger = self._ledger
        if ledger.phase is Phase.CHECKING:
            ledger.enter(Phase.REFUSED, reason="its check came to no end on record")
        if not ledger.free:
            what = f"another {ledger.current.kind if ledger.current else 'upgrade'} is under way"
            raise Busy(f"{what} ({ledger.phase})", left=UNTOUCHED, remedy="`cprctl rollback` takes it back")
        ledger.begin(kind, policy=policy, **facts)

    @contextlib.asynccontextmanager
    async def _or_refused(self) -> AsyncIterator[None]:
        """Around the check: an error or a cancellation ends the upgrade in REFUSED, before a guest is stopped."""
        try:
            yield
        except BaseException as error:
            self._ledger.enter(Phase.REFUSED, reason=reason(error))
            raise

    # -- back ---------------------------------------------------------------------------------------------------------

    async def watch_kexec(self, job: Job) -> None:
        """While a kexec of somebody's is under way: if it does not come, take the save back. For a parked job."""
        job.enter("waiting for the kexec")
        await self._fallen_through(job, await self._ports.kexec.over())

    async def _fallen_through(self, job: Job, said: str) -> None:
        job.parked.clear()
        why = f"the kexec did not happen: {said}"
        async with self._lock:
            if not self._ledger.committed:  # an admin has rolled back
                return
            left = await upgrade.roll_back.roll_back(self._scope, job, why)
            self._ports.kexec.bring_back()
        raise SaveFailed(why, left=left, remedy="see: systemctl list-jobs, journalctl -b")

    async def roll_back(self, job: Job, why: str) -> None:
        """By hand, or after a crash. Raises NothingToDo, Busy, SaveFailed if a guest is stuck."""
        async with self._lock:
            if self._ledger.phase not in TAKEN_BACK or self._ledger.rebooted:
                raise NothingToDo("there is no save that could be taken back", left="nothing was done")
            if await self._ports.kexec.pending():
                raise Busy("the kexec is under way", left="nothing was done", remedy="stop it with: systemctl cancel")
            left = await upgrade.roll_back.roll_back(self._scope, job, why)
            if self._ledger.require_current().failures:
                raise SaveFailed("not every guest could be resumed", left=left, remedy="see cprctl status")

    # -- after boot ---------------------------------------------------------------------------------------------------

    def end_waiting(self) -> None:
        """Whatever a single guest still lacks, it is not waited for any more."""
        self._services.set()

    async def load_early(self, job: Job) -> None:
        """Load what the kexec has saved, each guest once what is its own is there. Raises LoadFailed, NothingToDo."""
        async with self._lock:
            self._early = True
            try:
                await load_early(self._scope, job, self._services)
            finally:
                self._early = False

    async def load_all(self, job: Job, vms: Iterable[Vm]) -> None:
        """Load every live checkpoint; one that fails does not stop the others. Then start the VMs that were shut down
        because they could not be saved. Raises LoadFailed, NothingToDo, Busy."""
        if not self._early:
            self._refuse_second()
        if not await self._load_all(job, vms, lambda vm: False):
            raise NothingToDo("no VM has a checkpoint")

    async def load_and_start_all(self, job: Job, vms: Iterable[Vm]) -> None:
        """Likewise, then start the VMs whose definition has autostart. Nobody else would do so after a boot: it waits for
        what is under way, and finds the guests that this left."""
        if not await self._load_all(job, vms, lambda vm: bool(vm.definition and vm.definition.vm.autostart)):
            raise NothingToDo("no VM has a checkpoint, and none waits to be started")

    async def _load_all(self, job: Job, vms: Iterable[Vm], starts_too: Callable[[Vm], bool]) -> int:
        """Returns how many there were to load or to start. Raises LoadFailed."""
        self.end_waiting()
        async with self._lock:
            self.refuse_when_committed()
            of_a_boot = self._ledger.phase in (Phase.BOOTED, Phase.LOADING)
            loaded = await load_all(self._scope, job, vms, starts_too)
        if of_a_boot:
            await upgrade.blame.account(self._scope)
        loaded.require_no_failure()
        return loaded.total

    async def load_again(self, job: Job, vms: list[Vm]) -> None:
        """Loads of single VMs that an earlier agent was in the middle of: they end no upgrade. Raises LoadFailed."""
        async with self._lock:
            self.refuse_when_committed()
            loaded = await load_each(job, vms, lambda vm: False)
            for vm in vms:
                vm.end_refresh()
        loaded.require_no_failure()

    async def refresh_all(self, job: Job, vms: Iterable[Vm], replace: Callable[[Vm], Awaitable[object]]) -> None:
        """A new QEMU for every guest, by ``replace``. Raises LoadFailed, NothingToDo."""
        async with self._lock:
            self.refuse_when_committed()
            await upgrade.refresh_all.refresh_all(job, vms, replace)

    # -- after a crash ------------------------------------------------------------------------------------------------

    async def recover(self, jobs: Jobs) -> Job | None:
        """End an upgrade that an earlier agent left, if its work is over; or start a job that goes on with it."""
        current = self._ledger.current
        if current is None or current.phase in (Phase.HELD, *OVER):
            return None
        if current.phase is Phase.CHECKING:
            if current.kind.loads_kernel and not self._ledger.rebooted:
                await upgrade.kernel.unload(self._ports.kernels)
            self._ledger.enter(Phase.REFUSED, reason="the agent was interrupted")
        elif self._ledger.rebooted:
            if current.kind.loads_kernel and _same_kernel(current, self._ports):
                await upgrade.kernel.unload(self._ports.kernels)
            self._note_boot(current)  # cpr-load.service asks for the load, once memory and disks are there
        elif current.phase in (Phase.BOOTED, Phase.LOADING):  # an earlier agent of this boot was loading
            return jobs.start("recover", lambda job: self.load_all(job, self._scope.vms()))
        elif current.phase is Phase.COMMITTING and await self._ports.kexec.pending():
            return jobs.watch("recover", self.watch_kexec)
        elif not current.by_hand:
            return jobs.start("recover", lambda job: self.roll_back(job, "the agent was interrupted"))
        return None

    def _note_boot(self, current: Upgrade) -> None:
        boot = self._ports.boot
        self._ports.kexec.withdraw()  # the promise was of the host as it was before a soft reboot, too
        log.info("upgrade %s: booted %s after %s", current.id, boot.kernel(), current.phase)
        self._ledger.enter(
            Phase.BOOTED,
            interrupted=_interruption(current, self._ports),
            kernel=boot.kernel(),
            userspace_at=boot.userspace_at(),
            by_kexec=boot.booted_by_kexec(),
        )


def _interruption(current: Upgrade, ports: Ports) -> str:
    """Why the boot that was upgraded ended, if not by the upgrade's own kexec: a crash, a reset, a power cut."""
    if current.kind is Kind.SAVE_ALL or current.phase in (Phase.BOOTED, Phase.LOADING):
        return current.interrupted
    if _same_kernel(current, ports) and current.phase is not Phase.COMMITTING:
        return f"a soft reboot came while {current.phase}"
    if _same_kernel(current, ports):
        return "" if current.kind is Kind.SOFT_REBOOT else "a soft reboot came in place of the kexec"
    if current.phase is Phase.COMMITTING and ports.boot.booted_by_kexec():
        return ""
    return f"the host went down while {current.phase}, and was not started by a kexec"


def _same_kernel(current: Upgrade, ports: Ports) -> bool:
    """Whether userspace alone was started anew since."""
    return current.boot.partition(".")[0] == ports.boot.boot_id()
