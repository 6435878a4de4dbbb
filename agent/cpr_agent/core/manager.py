"""All VMs of a host, and what is done to all of them at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import groupby

from cpr_agent.core.checks import check_vm
from cpr_agent.core.jobs import Job, Jobs
from cpr_agent.core.model import Finding, MemoryIdentity, Survives, VmState
from cpr_agent.core.ports import Ports
from cpr_agent.core.settings import Settings
from cpr_agent.core.vm import SAVEABLE, Vm
from cpr_agent.errors import CprError, LoadFailed, NoSuchVM, SaveFailed

log = logging.getLogger(__name__)


class Manager:
    """``vm_added``, ``vm_removed`` and ``vm_changed`` tell the bus."""

    def __init__(self, ports: Ports, settings: Settings) -> None:
        self.vms: dict[str, Vm] = {}
        self.jobs = Jobs()
        self.vm_added: Callable[[Vm], None] = lambda vm: None
        self.vm_removed: Callable[[Vm], None] = lambda vm: None
        self.vm_changed: Callable[[Vm], None] = lambda vm: None
        self.ports = ports
        self._settings = settings
        self._hostwide = asyncio.Lock()

    def vm(self, name: str) -> Vm:
        try:
            return self.vms[name]
        except KeyError:
            raise NoSuchVM(f"there is no VM {name!r}", remedy="see `cprctl list`") from None

    async def reload(self) -> None:
        """Read the definitions again. A VM without a usable one stays, as long as it runs or is saved: it is somebody's
        guest."""
        good, bad = self.ports.definitions.load_all()
        kept = set(self.ports.store.live_all())
        for name in self.ports.runner.launched_all():
            if await self.ports.runner.active(name):
                kept.add(name)
        names = {*good, *bad, *kept}
        for name in sorted(set(self.vms) - names):
            vm = self.vms.pop(name)
            await vm.close()
            self.vm_removed(vm)
        for name in sorted(names):
            known = name in self.vms
            vm = self.vms.get(name) or Vm(name, self.ports, self._settings, self._changed, self._claims)
            vm.definition, vm.problem = good.get(name), bad.get(name)
            if name in bad:
                log.warning("VM %s: %s", name, bad[name])
            self.vms[name] = vm
            if not known:
                self.vm_added(vm)
        for vm in self.vms.values():
            await vm.refresh()

    async def recover(self) -> None:
        """Once, after the agent has started: finish or take back what an earlier one left.

        Interrupted loads go on as a job, because they may wait for devices.
        """
        for vm in self.vms.values():
            try:
                await vm.recover()
            except CprError as error:
                log.error("VM %s: could not be recovered: %s", vm.name, error)
        if interrupted := [vm for vm in self.vms.values() if vm.load_interrupted()]:
            self.jobs.start("recover", lambda job: self._load_all(job, interrupted, autostart=False))

    async def findings(self) -> list[Finding]:
        return [finding for name in self.vms for finding in await self.vm_findings(name)]

    async def vm_findings(self, name: str) -> list[Finding]:
        vm = self.vm(name)
        return await check_vm(vm, self.ports, await self._claims(vm, True))

    def save_all(self, need: Survives) -> Job:
        """Save every VM that has a live guest: all, or none (invariant 3)."""
        return self.jobs.start("save-all", lambda job: self._save_all(job, need))

    def load_all(self, autostart: bool) -> Job:
        """Load every live checkpoint; one that fails does not stop the others. ``autostart``: then start the rest."""
        return self.jobs.start("load-all", lambda job: self._load_all(job, list(self.vms.values()), autostart))

    async def _save_all(self, job: Job, need: Survives) -> None:
        async with self._hostwide:
            await self._save_each(job, need)

    async def _save_each(self, job: Job, need: Survives) -> None:
        for vm in self.vms.values():
            await vm.refresh()
        live = [vm for vm in self.vms.values() if vm.run_state in SAVEABLE]
        unreachable = [vm.name for vm in self.vms.values() if vm.state is VmState.UNREACHABLE]
        if unreachable:
            raise SaveFailed(
                f"QEMU does not answer for {', '.join(unreachable)}",
                left="no guest was stopped",
                remedy="see cprctl status",
            )
        lost = [
            f"{vm.name} ({vm.run_state})"
            for vm in self.vms.values()
            if vm.pid and vm.run_state not in (*SAVEABLE, "shutdown") and vm.live_checkpoint() is None
        ]
        if lost:
            raise SaveFailed(
                f"in their run state these can't be saved: {', '.join(lost)}",
                left="no guest was stopped",
                remedy="continue them on the admin's QMP socket, or stop them with `cprctl stop --hard`",
            )
        for vm in self.vms.values():
            manifest = vm.live_checkpoint()
            if manifest and not manifest.survives.covers(need):
                raise SaveFailed(
                    f"is saved already, in RAM that does not survive a {need}", vm=vm.name, left="no guest was stopped"
                )
        checks = await asyncio.gather(*(vm.require_saveable(need) for vm in live), return_exceptions=True)
        if refused := [
            _reason(vm, found) for vm, found in zip(live, checks, strict=True) if isinstance(found, BaseException)
        ]:
            raise SaveFailed(
                "; ".join(refused), left="no guest was stopped", remedy="mend the cause, or shut the VM down first"
            )
        saved: list[Vm] = []
        failures: list[tuple[Vm, BaseException]] = []
        try:
            # The highest order first: a low one is for guests to whom each second of pause counts.
            for _, group in groupby(sorted(live, key=_order, reverse=True), key=_order):
                vms = list(group)
                job.advance(len(saved), len(live), f"saving {', '.join(vm.name for vm in vms)}")
                results = await asyncio.gather(*(vm.save("", "reboot", need) for vm in vms), return_exceptions=True)
                for vm, result in zip(vms, results, strict=True):
                    if isinstance(result, BaseException):
                        failures.append((vm, result))
                    else:
                        saved.append(vm)
                if failures:
                    break
        except asyncio.CancelledError:
            await asyncio.shield(self._resume_all([vm for vm in live if vm.state is VmState.SAVED]))
            raise
        if failures:
            job.advance(0, len(live), "rolling back")
            stuck = await self._resume_all(saved)
            raise SaveFailed(
                "; ".join(_reason(vm, error) for vm, error in failures),
                left=f"the others were resumed ({', '.join(vm.name for vm in saved) or 'none had been saved'})"
                + (f", but not {'; '.join(stuck)}" if stuck else ""),
                remedy="mend the cause, or shut the VM down first",
            )
        job.advance(len(saved), len(live), "saved")

    async def _resume_all(self, saved: list[Vm]) -> list[str]:
        results = await asyncio.gather(*(vm.resume() for vm in saved), return_exceptions=True)
        return [_reason(vm, result) for vm, result in zip(saved, results, strict=True) if isinstance(result, BaseException)]

    async def _load_all(self, job: Job, vms: list[Vm], autostart: bool) -> None:
        async with self._hostwide:  # a second one waits, and finds what the first has left
            await self._load_each(job, vms, autostart)

    async def _load_each(self, job: Job, vms: list[Vm], autostart: bool) -> None:
        for vm in vms:
            await vm.refresh()
        failures: list[str] = []
        done = 0
        waiting = [vm for vm in vms if self.ports.store.checkpointed(vm.name)]
        fresh = [
            vm for vm in vms if autostart and vm.definition and vm.definition.vm.autostart and vm.state is VmState.STOPPED
        ]
        total = len(waiting) + len(fresh)

        async def each(vms: list[Vm], verb: str) -> None:
            nonlocal done
            job.advance(done, total, f"{verb}ing {', '.join(vm.name for vm in vms)}")
            acts = (vm.load("") if verb == "load" else vm.start() for vm in vms)
            for vm, result in zip(vms, await asyncio.gather(*acts, return_exceptions=True), strict=True):
                done += 1
                if isinstance(result, BaseException):
                    failures.append(_reason(vm, result))

        for _, group in groupby(sorted(waiting, key=_order), key=_order):
            await each(list(group), "load")
        if fresh:
            await each(fresh, "start")
        await asyncio.gather(*(vm.settled() for vm in waiting))
        if failures:
            raise LoadFailed("; ".join(failures), left=f"{total - len(failures)} of {total} run")

    def _changed(self, vm: Vm) -> None:
        self.vm_changed(vm)

    async def _claims(self, asking: Vm, defined: bool) -> list[tuple[str, MemoryIdentity]]:
        others = [vm for vm in self.vms.values() if vm is not asking]
        claims = [(vm.name, await vm.claimed_memory() if defined else vm.occupied_memory()) for vm in others]
        return [(name, memory) for name, memory in claims if memory]

    async def close(self) -> None:
        await self.jobs.drain(60.0)
        for vm in self.vms.values():
            await vm.close()


def _order(vm: Vm) -> int:
    return vm.definition.save.order if vm.definition else 100


def _reason(vm: Vm, error: BaseException) -> str:
    if isinstance(error, CprError) and error.vm:
        return error.text.rstrip(".")
    return f"VM {vm.name}: {error}"
