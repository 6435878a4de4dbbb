"""All guests of a host, through a kexec or not at all: save, commit, roll back, load (invariants 2 to 6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from contextlib import AsyncExitStack
from itertools import groupby

import msgspec

from cpr_agent.core.hooks import before_save
from cpr_agent.core.jobs import Job
from cpr_agent.core.upgrade.ledger import Kind, Ledger, Phase, Upgrade
from cpr_agent.core.model import Finding, Policy, Survives, VmState
from cpr_agent.core.ports import Ports
from cpr_agent.core.upgrade.preflight import Plan
from cpr_agent.core.turns import Turns, at_once
from cpr_agent.core.vm import Vm
from cpr_agent.core.vm_base import SAVEABLE
from cpr_agent.errors import (
    Busy,
    CprError,
    KernelRefused,
    LoadFailed,
    NothingToDo,
    SaveFailed,
    SaveRefused,
    UpgradeRefused,
    WrongState,
)

log = logging.getLogger(__name__)

_UNTOUCHED = "no guest was stopped"
Findings = Callable[[], Awaitable[list[Finding]]]


class SortedOut(msgspec.Struct):
    """VMs by what will become of them, with the errors that say why."""

    saveable: list[Vm] = msgspec.field(default_factory=list)
    unsaveable: list[tuple[Vm, CprError]] = msgspec.field(default_factory=list)
    refused: list[tuple[Vm, CprError]] = msgspec.field(default_factory=list)


class Transaction:
    """One at a time. ``vms`` yields all VMs as they are now."""

    def __init__(self, ports: Ports, ledger: Ledger, vms: Callable[[], Collection[Vm]]) -> None:
        self.ledger = ledger
        self._ports = ports
        self._vms = vms
        self._lock = asyncio.Lock()

    def refuse_when_committed(self) -> None:
        """Raises Busy between the commit and the kexec: a guest that ran on would be lost."""
        if self.ledger.committed:
            raise Busy("the host is on its way into another kernel", left="nothing was done", remedy="see cprctl status")

    # -- forth --------------------------------------------------------------------------------------------------------

    async def save_all(self, job: Job, need: Survives, policy: Policy) -> None:
        """An admin's own save: no kexec follows, and no crash takes it back. Raises SaveFailed, NothingToDo."""
        self._refuse_second()
        async with self._lock:
            self._begin("save-all", policy)
            if not await self._save(job, need, policy):
                raise NothingToDo("no VM has a live guest that is not saved yet")

    async def before_kexec(self, job: Job, policy: Policy) -> None:
        """For a kexec that systemd is about to do, by an upgrade of ours or by anybody's hand: save what is not saved yet,
        and promise the gate that all is."""
        async with self._lock:
            if self.ledger.committed:  # ours: it saved before it started the kexec
                await self._require_all_saved()
                self._ports.kexec.promise()
                return
            self._begin("kexec", policy)
            await self._save(job, Survives.KEXEC, policy)
            await self._commit(job)

    async def upgrade(self, job: Job, plan: Plan, findings: Findings) -> None:
        """Check, load the kernel, save, commit, kexec. Returns only from a dry run, or as the host goes down."""
        self._refuse_second()
        async with self._lock:
            command_line = self._ports.kernels.command_line()
            target = plan.kernel.version or plan.kernel.image
            self._begin(plan.kind, plan.policy, kernel_to=target, command_line_from=command_line)
            async with AsyncExitStack() as stack:
                try:
                    job.advance(0, 1, "checking")
                    refuse(await findings())
                    await self._load_kernel(job, plan)
                    if not plan.dry_run:
                        await stack.enter_async_context(self._ports.kexec.inhibit("guests are saved for a new kernel"))
                except BaseException as error:
                    self.ledger.enter(Phase.REFUSED, reason=_text(error))
                    raise
                if plan.dry_run:
                    self.ledger.enter(Phase.CHECKED)
                    return
                await self._save(job, Survives.KEXEC, plan.policy)
                await self._commit(job)
        job.advance(1, 1, "the host restarts")
        job.parked.set()
        await self._fallen_through(job, await self._ports.kexec.start())

    async def _load_kernel(self, job: Job, plan: Plan) -> None:
        """A dry run takes it away again, and does without if that would take away what somebody else has loaded."""
        kernels = self._ports.kernels
        if plan.dry_run and kernels.loaded():
            return
        job.advance(0, 1, f"loading kernel {plan.kernel.version or plan.kernel.image}")
        try:
            await kernels.load(plan.kernel, plan.command_line)
        except asyncio.CancelledError:
            await asyncio.shield(asyncio.ensure_future(self._unload()))
            raise
        if plan.dry_run:
            await self._unload()

    def _refuse_second(self) -> None:
        if self._lock.locked():
            raise Busy("guests are just being saved, loaded or resumed", left=_UNTOUCHED, remedy="see cprctl status")

    def _begin(self, kind: Kind, policy: Policy, **facts: object) -> None:
        if not self.ledger.free:
            what = f"another {self.ledger.current.kind if self.ledger.current else 'upgrade'} is under way"
            raise Busy(f"{what} ({self.ledger.phase})", left=_UNTOUCHED, remedy="`cprctl rollback` takes it back")
        self.ledger.begin(kind, policy=policy, **facts)

    async def _save(self, job: Job, need: Survives, policy: Policy) -> int:
        """Up to SAVED; or everything is taken back and it raises. Returns how many guests it stopped."""
        try:
            sorted_out = await self.sort_out(need, policy, wait=True)
            if not sorted_out.refused:
                await self._prepare(sorted_out, policy)
            if sorted_out.refused:
                raise SaveRefused(
                    "; ".join(_reason(vm, error) for vm, error in sorted_out.refused),
                    left=_UNTOUCHED,
                    remedy="mend the cause, shut the VM down first, or choose another policy",
                )
        except BaseException as error:
            if self._own_kernel:
                await asyncio.shield(asyncio.ensure_future(self._unload()))
            self.ledger.enter(Phase.REFUSED, reason=_text(error))
            raise
        live, unsaveable = sorted_out.saveable, [vm for vm, _ in sorted_out.unsaveable]
        self.ledger.enter(Phase.SAVING, shut_down=[vm.name for vm in unsaveable])
        try:
            if unsaveable:
                job.advance(0, len(live), f"shutting down {_names(unsaveable)}, which cannot be saved")
                await self._shut_down(unsaveable, policy)
            await self._save_each(job, live, need, policy)
            job.advance(len(live), len(live), "verifying what was written")
            await asyncio.gather(*(asyncio.to_thread(self._verify, vm) for vm in live))
            self.ledger.enter(Phase.SAVED)
        except BaseException as error:
            left = await asyncio.shield(asyncio.ensure_future(self._roll_back(job, _text(error))))
            if isinstance(error, CprError):
                raise SaveFailed(error.text, left=left, remedy="mend the cause, or shut the VM down first") from error
            raise
        job.advance(len(live), len(live), "saved")
        return len(live) + len(unsaveable)

    async def sort_out(self, need: Survives, policy: Policy, *, wait: bool) -> SortedOut:
        """Which live VMs would be saved, which shut down because they can't be, and for which neither is allowed. Touches
        nothing. ``wait``: where the definition says so, until what blocks a save is over."""
        vms = self._vms()
        await asyncio.gather(*(vm.refresh() for vm in vms))
        out = SortedOut()
        for vm in vms:
            if vm.saved_in_volatile(need):
                what = f"is saved already, in RAM that does not survive a {need}"
                out.refused.append((vm, SaveFailed(what, vm=vm.name, remedy=f"cprctl load {vm.name}")))
        live = [vm for vm in vms if vm.run_state in SAVEABLE]
        checks = await asyncio.gather(*(vm.require_saveable(need, wait=wait) for vm in live), return_exceptions=True)
        problems = [(vm, found) for vm, found in zip(live, checks, strict=True) if isinstance(found, BaseException)]
        problems += [
            (vm, WrongState(f"can't be saved: {vm.trouble}", vm=vm.name))
            for vm in vms
            if vm.pid and vm not in live and not vm.off and not vm.checkpointed
        ]
        for vm, error in problems:
            if not isinstance(error, CprError):
                raise error
            (out.unsaveable if vm.may_shut_down(policy) else out.refused).append((vm, error))
        out.saveable += [vm for vm in live if vm not in {bad for bad, _ in problems}]
        return out

    async def _prepare(self, sorted_out: SortedOut, policy: Policy) -> None:
        """The admin's pre-save hooks, of all guests before the first of them stops: none stands still for another's."""
        assert self.ledger.current
        upgrade, vms = self.ledger.current.id, list(sorted_out.saveable)
        results = await asyncio.gather(*(before_save(self._ports, vm, upgrade) for vm in vms), return_exceptions=True)
        for vm, error in zip(vms, results, strict=True):
            if isinstance(error, CprError):
                sorted_out.saveable.remove(vm)
                (sorted_out.unsaveable if vm.may_shut_down(policy) else sorted_out.refused).append((vm, error))
            elif error:
                raise error

    def _verify(self, vm: Vm) -> None:
        if manifest := vm.live_checkpoint():
            self._ports.store.verify(manifest)

    async def _save_each(self, job: Job, live: list[Vm], need: Survives, policy: Policy) -> None:
        assert self.ledger.current
        upgrade, done = self.ledger.current.id, 0
        # The highest order first: a low one is for guests to whom each second of pause counts.
        for _, group in groupby(sorted(live, key=_order, reverse=True), key=_order):
            vms = list(group)
            job.advance(done, len(live), f"saving {_names(vms)}")
            turns = Turns(vm.name for vm in vms)
            results = await asyncio.gather(
                *(self._save_in_turn(vm, need, upgrade, turns) for vm in vms), return_exceptions=True
            )
            failures = [(vm, e) for vm, e in zip(vms, results, strict=True) if isinstance(e, BaseException)]
            fatal = [(vm, e) for vm, e in failures if not (isinstance(e, CprError) and vm.may_shut_down(policy))]
            if fatal:
                raise SaveFailed("; ".join(_reason(vm, error) for vm, error in fatal))
            if failures:
                given_up = [vm for vm, _ in failures]
                job.advance(done, len(live), f"shutting down {_names(given_up)}, which could not be saved")
                shut_down = [*self.ledger.current.shut_down, *(vm.name for vm in given_up)]
                self.ledger.enter(Phase.SAVING, shut_down=shut_down)
                await self._shut_down(given_up, policy)
            done += len(vms)

    async def _save_in_turn(self, vm: Vm, need: Survives, upgrade: str, turns: Turns) -> None:
        """No guest stops while another one is still being asked whether it could be saved."""
        try:
            await vm.save("", "reboot", need, upgrade, turns.turn(vm.name))
        finally:
            turns.no_longer_awaited(vm.name)

    async def _shut_down(self, vms: list[Vm], policy: Policy) -> None:
        """In order, and with the policy ``force`` also what does not answer."""
        for _, group in groupby(sorted(vms, key=_order, reverse=True), key=_order):
            await asyncio.gather(*(vm.shut_down(forced=policy is Policy.FORCE) for vm in group))

    async def _commit(self, job: Job) -> None:
        """The point of no return: from here on guests may not run in this boot, whoever asks."""
        job.cancellable = False
        self.ledger.enter(Phase.COMMITTING)
        try:
            if self._own_kernel and not self._ports.kernels.loaded():
                raise KernelRefused("the kernel that was loaded is not loaded any more")
            await self._require_all_saved()
            self._ports.kexec.promise()
        except BaseException as error:
            left = await asyncio.shield(asyncio.ensure_future(self._roll_back(job, _text(error))))
            if isinstance(error, CprError):
                raise SaveFailed(error.text, left=left, remedy="mend the cause and try again") from error
            raise

    async def _require_all_saved(self) -> None:
        await asyncio.gather(*(vm.refresh() for vm in self._vms()))
        if unsaved := [vm for vm in self._vms() if vm.pid and not vm.off and vm.state is not VmState.SAVED]:
            raise SaveFailed(f"not saved: {', '.join(f'{vm.name} ({vm.state})' for vm in unsaved)}")

    # -- back ---------------------------------------------------------------------------------------------------------

    async def watch_kexec(self, job: Job) -> None:
        """While somebody's kexec is under way: if it does not come, take the save back. For a parked job."""
        job.advance(1, 1, "waiting for the kexec")
        await self._fallen_through(job, await self._ports.kexec.over())

    async def _fallen_through(self, job: Job, said: str) -> None:
        job.parked.clear()
        async with self._lock:
            if not self.ledger.committed:  # somebody has rolled back by hand
                return
            left = await self._roll_back(job, f"the kexec did not happen: {said}")
            self._ports.kexec.bring_back()
        raise SaveFailed(f"the kexec did not happen: {said}", left=left, remedy="see: systemctl list-jobs, journalctl -b")

    async def roll_back(self, job: Job, reason: str) -> None:
        """By hand, or after a crash. Raises NothingToDo, Busy, SaveFailed if a guest is stuck."""
        async with self._lock:
            current = self.ledger.current
            back = (Phase.SAVING, Phase.SAVED, Phase.COMMITTING, Phase.ROLLING_BACK)
            if current is None or current.phase not in back or self.ledger.rebooted:
                raise NothingToDo("there is no save that could be taken back", left="nothing was done")
            if await self._ports.kexec.pending():
                raise Busy("the kexec is under way", left="nothing was done", remedy="stop it with: systemctl cancel")
            left = await self._roll_back(job, reason)
            assert self.ledger.current
            if self.ledger.current.failures:
                raise SaveFailed("not every guest could be resumed", left=left, remedy="see cprctl status")

    async def _roll_back(self, job: Job, reason: str) -> str:
        """Every guest that this upgrade saved or shut down goes on; returns a sentence for the error."""
        assert self.ledger.current
        job.cancellable = False
        self._ports.kexec.withdraw()
        if self.ledger.phase is not Phase.ROLLING_BACK:
            self.ledger.enter(Phase.ROLLING_BACK, reason=reason)
        current = self.ledger.current
        saved = [vm for vm in self._vms() if vm.saved_by(current.id)]
        job.advance(0, max(1, len(saved)), f"rolling back: resuming {_names(saved)}" if saved else "rolling back")
        failures = await _each(saved, lambda vm: vm.resume())
        ended = [vm for vm in self._vms() if vm.name in current.shut_down and not vm.pid and not vm.checkpointed]
        failures += await _each(ended, lambda vm: vm.start())
        if self._own_kernel:
            await self._unload()
        self.ledger.enter(Phase.ROLLED_BACK, failures=failures)
        stuck = f", but not {'; '.join(failures)}" if failures else ""
        restarted = f"; started again: {_names(ended)}" if ended else ""
        return f"the others were resumed ({_names(saved) or 'none had been saved'}){restarted}{stuck}"

    @property
    def _own_kernel(self) -> bool:
        """Whether this transaction loaded the kernel, and so unloads it."""
        current = self.ledger.current
        return current is not None and current.kind in ("upgrade", "drill", "back")

    async def _unload(self) -> None:
        if self._ports.kernels.loaded():
            try:
                await self._ports.kernels.unload()
            except KernelRefused as error:  # no guest depends on it
                log.warning("%s", error)

    # -- after boot ---------------------------------------------------------------------------------------------------

    async def load_all(self, job: Job, vms: Iterable[Vm], autostart: bool) -> None:
        """Load every live checkpoint; one that fails does not stop the others. Then start what was shut down for want of a
        save, and with ``autostart`` what is to start with the host. Raises LoadFailed, NothingToDo."""
        async with self._lock:  # a second one waits, and finds what the first has left
            self.refuse_when_committed()
            in_ledger = self.ledger.phase in (Phase.SAVED, Phase.BOOTED, Phase.LOADING, Phase.HELD)
            if in_ledger:
                self.ledger.enter(Phase.LOADING)
            failures, cold_started, total = await self._load_each(job, list(vms), autostart)
            if in_ledger:
                assert self.ledger.current
                upgrade = self.ledger.current
                ended = Phase.ROLLED_BACK if upgrade.interrupted else Phase.DONE
                through = [pause for pause in self._ports.history.all() if pause.upgrade == upgrade.id]
                self.ledger.enter(
                    Phase.HELD if failures else ended,
                    failures=failures,
                    loaded=sorted(pause.vm for pause in through),
                    cold_started=[*upgrade.cold_started, *cold_started],
                    longest_pause_s=max((pause.pause_s for pause in through), default=0.0),
                    reason=upgrade.interrupted or _surprise(upgrade, self._ports),
                )
            if failures:
                raise LoadFailed("; ".join(failures), left=f"{total - len(failures)} of {total} run")
            if not total:
                raise NothingToDo("no VM has a checkpoint" + (", and none waits to be started" if autostart else ""))

    async def refresh_all(self, job: Job, vms: Iterable[Vm], *, in_turn: bool) -> None:
        """A new QEMU for every guest, one after the other: one that fails would fail the others too, and ends it. Raises
        CprError, NothingToDo."""
        async with self._lock:
            self.refuse_when_committed()
            live = sorted((vm for vm in vms if vm.run_state in SAVEABLE), key=_order)
            if not live:
                raise NothingToDo("no VM has a live guest")
            for done, vm in enumerate(live):
                job.advance(done, len(live), f"a new QEMU for {vm.name}")
                try:
                    await vm.replace_qemu(in_turn=in_turn)
                except CprError as error:
                    waiting = _names(live[done + 1 :])
                    left = f"{error.left or 'nothing was done'}; {done} of {len(live)} have a new QEMU"
                    raise LoadFailed(
                        error.what,
                        vm=vm.name,
                        left=f"{left}, and these were not tried: {waiting}" if waiting else left,
                        remedy=error.remedy,
                    ) from error

    async def load_again(self, job: Job, vms: list[Vm]) -> None:
        """Loads of single VMs that an earlier agent was in the middle of: they end no upgrade. Raises LoadFailed."""
        async with self._lock:
            self.refuse_when_committed()
            failures, _, total = await self._load_each(job, vms, autostart=False)
            for vm in vms:
                vm.end_refresh()
            if failures:
                raise LoadFailed("; ".join(failures), left=f"{total - len(failures)} of {total} run")

    async def _load_each(self, job: Job, vms: list[Vm], autostart: bool) -> tuple[list[str], list[str], int]:
        """What failed, who was started afresh because memory was lost, and how many there were."""
        await asyncio.gather(*(vm.refresh() for vm in vms))
        current = self.ledger.current
        shut_down = current.shut_down if current and self.ledger.phase is Phase.LOADING else ()
        failures: list[str] = []
        cold_started: list[str] = []
        done = 0

        free = asyncio.Semaphore(at_once())

        async def load(vm: Vm) -> None:
            if lost := await vm.load("", free):
                cold_started.append(f"{vm.name}: {lost}")

        waiting = [vm for vm in vms if vm.checkpointed]
        fresh = [
            vm
            for vm in vms
            if vm.definition
            and vm.state is VmState.STOPPED
            and (vm.name in shut_down or vm.awaits_cold_start() or (autostart and vm.definition.vm.autostart))
        ]
        total = len(waiting) + len(fresh)
        for _, group in groupby(sorted(waiting, key=_order), key=_order):
            loading = list(group)
            job.advance(done, total, f"loading {_names(loading)}")
            failures += await _each(loading, load)
            done += len(loading)
        if fresh:
            job.advance(done, total, f"starting {_names(fresh)}")
            failures += await _each(fresh, lambda vm: vm.start())
        await asyncio.gather(*(vm.settled() for vm in waiting))
        return failures, cold_started, total

    # -- after a crash ------------------------------------------------------------------------------------------------

    async def recover(self) -> Callable[[Job], Awaitable[None]] | None:
        """What an earlier agent left of an upgrade: notes what is over, and returns the work that has to go on as a job."""
        current = self.ledger.current
        if current is None or current.phase in (Phase.HELD, *_OVER):
            return None
        if current.phase is Phase.CHECKING:
            if self._own_kernel and not self.ledger.rebooted:
                await self._unload()
            self.ledger.enter(Phase.REFUSED, reason="the agent was interrupted")
            return None
        if self.ledger.rebooted:
            log.info("upgrade %s: booted %s after %s", current.id, self._ports.host.kernel(), current.phase)
            host = self._ports.host
            about = {"kernel": host.kernel(), "userspace_at": host.userspace_at(), "by_kexec": host.booted_by_kexec()}
            self.ledger.enter(Phase.BOOTED, interrupted=_interruption(current, self._ports), **about)
            return None  # cpr-load.service asks for the load, once memory and disks are there
        if current.phase in (Phase.BOOTED, Phase.LOADING):  # an earlier agent of this boot was at it
            return lambda job: self.load_all(job, self._vms(), autostart=False)
        if current.kind == "save-all" and current.phase is Phase.SAVED:
            return None
        if current.phase is Phase.COMMITTING and await self._ports.kexec.pending():
            return self.watch_kexec
        return lambda job: self.roll_back(job, "the agent was interrupted")


_OVER = (Phase.CHECKED, Phase.REFUSED, Phase.ROLLED_BACK, Phase.DONE)


def refuse(findings: list[Finding]) -> None:
    """Raises UpgradeRefused with every error among the findings of the host; a VM's are its policy's matter."""
    errors = [finding for finding in findings if finding.severity == "error" and not finding.vm]
    if errors:
        raise UpgradeRefused(
            "the host can't be upgraded: " + "; ".join(finding.what for finding in errors),
            left=_UNTOUCHED,
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in errors if finding.remedy)),
        )


def _interruption(current: Upgrade, ports: Ports) -> str:
    """What ended the boot that was upgraded, if that was no kexec of its: a crash, a reset, a power cut."""
    if current.kind == "save-all" or current.phase in (Phase.BOOTED, Phase.LOADING):
        return current.interrupted
    if current.phase is Phase.COMMITTING and ports.host.booted_by_kexec():
        return ""
    return f"the host went down while {current.phase}, and was not started by a kexec"


def _surprise(current: Upgrade, ports: Ports) -> str:
    """What was not as planned, though guests are loaded on proof alone and not on plans."""
    kernel = ports.host.kernel()
    if current.kernel_to and current.kernel_to != kernel and not current.kernel_to.startswith("/"):
        return f"the host runs kernel {kernel}, planned was {current.kernel_to}"
    return ""


async def _each(vms: list[Vm], act: Callable[[Vm], Awaitable[object]]) -> list[str]:
    """``act`` on all at once; the reasons of those that failed."""
    results = await asyncio.gather(*(act(vm) for vm in vms), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    return [_reason(vm, result) for vm, result in zip(vms, results, strict=True) if isinstance(result, BaseException)]


def _names(vms: Iterable[Vm]) -> str:
    return ", ".join(vm.name for vm in vms)


def _order(vm: Vm) -> int:
    return vm.definition.save.order if vm.definition else 100


def _reason(vm: Vm, error: BaseException) -> str:
    if isinstance(error, CprError) and error.vm:
        return error.text.rstrip(".")
    return f"VM {vm.name}: {error}"


def _text(error: BaseException) -> str:
    return error.text if isinstance(error, CprError) else (str(error) or type(error).__name__)
