# SPDX-License-Identifier: GPL-2.0-or-later
"""All VMs of a host, and what is done to all of them at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from itertools import chain
from typing import TYPE_CHECKING

from msgspec.structs import replace

from cpr_agent import core
from cpr_agent.core import upgrade
from cpr_agent.core.acts.requests import Replacement
from cpr_agent.core.jobs import Job, Jobs
from cpr_agent.core.listener import Listener, Listeners
from cpr_agent.core.model import Bytes, DaxDevice, Finding, Imported, MemoryIdentity, Policy, Survives, VmState
from cpr_agent.core.ports import Ports
from cpr_agent.core.saveable import waits_when_blocked
from cpr_agent.core.settings import Settings
from cpr_agent.core.turns import Places
from cpr_agent.core.upgrade.ledger import Ledger, Phase
from cpr_agent.core.upgrade.scope import names
from cpr_agent.core.upgrade.transaction import Transaction
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, HostFailed, InvalidArgument, InvalidDefinition, NoSuchVM, QemuFailed

if TYPE_CHECKING:
    from cpr_agent.core.adoption import Adoption
    from cpr_agent.core.allocation import Range
    from cpr_agent.core.upgrade.preflight import Plan, UpgradeRequest

log = logging.getLogger(__name__)

CHECK_S = 30.0
"""For all that is asked of one VM in a check."""
RECOVERY_S = 20.0
"""How long an end of the agent waits for a recovery under way; one that is interrupted is begun anew."""


class Manager:
    """Implements core.machine.Neighbours for its VMs. ``listeners`` hear of all that changes."""

    def __init__(self, ports: Ports, settings: Settings) -> None:
        self.vms: dict[str, Vm] = {}
        self.listeners = Listeners()
        self.listeners.add(_Housekeeper(self))
        self.jobs = Jobs(self.listeners)
        self.ports = ports
        self._adoption: Adoption | None = None
        self.ledger = Ledger(ports.journal, ports.boot, self.listeners)
        self._transaction = Transaction(ports, self.ledger, lambda: list(self.vms.values()), settings.upgrade)
        self._settings = settings
        self._recovered = asyncio.Event()
        self._recovered.set()

    @property
    def adoption(self) -> Adoption:
        if self._adoption is None:
            self._adoption = core.adoption.Adoption(self.ports, self)
        return self._adoption

    def vm(self, name: str) -> Vm:
        try:
            return self.vms[name]
        except KeyError:
            raise NoSuchVM(f"there is no VM {name!r}", remedy="see `cprctl list`") from None

    async def reload(self) -> None:
        """Read the definitions again, and look at each VM."""
        await self.read_definitions()
        await self._on_each(self._assign_user, "it has no user of its own")
        await self._on_each(Vm.refresh, "its state could not be derived")

    async def read_definitions(self) -> None:
        """A VM without a usable one stays, as long as it runs or is saved: it is somebody's guest."""
        good, bad = self.ports.definitions.load_all()
        kept = set(self.ports.store.live_all())
        for name in self.ports.runner.launched_all():
            if await self.ports.runner.own(name).pid():
                kept.add(name)
        names = {*good, *bad, *kept}
        for name in sorted(set(self.vms) - names):
            vm = self.vms.pop(name)
            await vm.close()
            self.ports.threads.forget(name)
            self.listeners.vm_removed(vm)
        for name in sorted(names):
            known = name in self.vms
            vm = self.vms.get(name) or Vm(name, self.ports, self._settings, self)
            vm.define(good.get(name), bad.get(name))
            if name in bad:
                log.warning("VM %s: %s", name, bad[name])
            self.vms[name] = vm
            if not known:
                self.listeners.vm_added(vm)

    async def _assign_user(self, vm: Vm) -> None:
        """Now, so that an admin can give it its disks before its first start."""
        if vm.definition and not vm.user:
            await self.ports.runner.assign_user(vm.name)

    def validate(self, name: str, text: str) -> None:
        """Whether ``text`` could be the definition of a VM ``name``. Raises InvalidDefinition."""
        self.ports.definitions.parse(name, text)

    def import_command_line(self, text: str, **wanted: str) -> tuple[Imported, str]:
        """A definition from another QEMU's command line, and what is wrong with it as one. Raises InvalidArgument."""
        imported = self.ports.definitions.import_command_line(text, **wanted)
        try:
            self.ports.definitions.parse(imported.name, imported.text)
        except InvalidDefinition as error:
            return imported, error.text
        return imported, ""

    async def expect_recovery(self) -> None:
        """Once, after the definitions were read. Callers may come from now on: an act on a VM is refused as Busy until that
        VM is recovered, and a job on all waits for the end of ``recover``."""
        self._recovered.clear()
        await asyncio.gather(*(vm.expect_recovery() for vm in self.vms.values()))

    async def recover(self, *, early: bool = False) -> None:
        """Finish or take back what an earlier agent left. What may have to wait for devices or for guests goes on as a
        job. ``early``: guests that a kexec has saved go on now, and do not wait for the load of all."""
        try:
            await self._on_each(Vm.recover, "it could not be recovered")
            await self._recover_all(early=early)
        except (CprError, OSError) as error:
            log.error("what an earlier agent left of an act on all VMs could not be ended: %s", error)
        finally:
            self._recovered.set()

    async def _recover_all(self, *, early: bool) -> None:
        if await self._transaction.recover(self.jobs):
            return
        if self.ledger.phase is Phase.BOOTED:  # cpr-load.service asks for the load of all
            if early and self.ports.boot.booted_by_kexec():
                self.jobs.start("load-early", self._transaction.load_early)
        elif interrupted := [vm for vm in self.vms.values() if vm.load_interrupted()]:
            self.jobs.start("recover", lambda job: self._transaction.load_again(job, interrupted))

    async def _on_each(self, act: Callable[[Vm], Awaitable[None]], failed: str) -> None:
        """All VMs at once, so that none waits for another one's silent QEMU; the failure of one is no other's."""
        vms = list(self.vms.values())
        for vm, result in zip(vms, await asyncio.gather(*map(act, vms), return_exceptions=True), strict=True):
            if isinstance(result, CprError | OSError):
                log.error("VM %s: %s: %s", vm.name, failed, result)
            elif isinstance(result, Exception):
                log.error("VM %s: %s", vm.name, failed, exc_info=result)
            elif result is not None:
                raise result

    async def arrive(self, name: str, checkpoint: str) -> None:
        """Another program of the host's is about to start a QEMU for this VM: see Vm.arrive. Raises CprError."""
        if name not in self.vms:
            await self.read_definitions()
        await self.vm(name).arrive(checkpoint)

    async def look_again(self, name: str) -> None:
        """At a VM that could not be asked before; a recovery that is under way may just have asked it in vain. Raises
        CprError."""
        await self._recovered.wait()
        if vm := self.vms.get(name):
            await vm.recover_again()

    # -- memory -------------------------------------------------------------------------------------------------------

    async def claims(self) -> list[tuple[str, MemoryIdentity]]:
        """The memory of all VMs: their guests', or else the ranges that their definitions name."""
        return await self.claimed("")

    async def allocate(self, vm: str, size: str, device: str) -> tuple[DaxDevice, Range]:
        """Where the RAM of ``vm`` can go; nothing is reserved. ``size`` "" is that of its definition. Raises
        InvalidArgument, MemoryUnusable."""
        known = self.vms.get(vm)
        defined = known.definition.memory.ranges if known and known.definition else ()
        if not size and len(defined) > 1:
            what = f"has {len(defined)} NUMA nodes, each with memory of its own"
            raise InvalidArgument(what, vm=vm, left="nothing was allocated", remedy="name the size for one of them")
        try:
            wanted = Bytes.parse(size) if size else sum(one.size for one in defined)
        except ValueError as error:
            raise InvalidArgument(str(error), vm=vm, left="nothing was allocated") from error
        return core.allocation.allocate(
            vm, wanted, self.ports.memory.devices(), await self.claims(), device.removeprefix("uuid:")
        )

    # -- checks -------------------------------------------------------------------------------------------------------

    async def findings(self) -> list[Finding]:
        return [*await self._of_each(lambda vm: self.vm_findings(vm.name)), *await self._unit_findings()]

    async def own_findings_of_all(self) -> list[Finding]:
        return [*await self._of_each(self.own_findings), *await self._unit_findings()]

    async def _unit_findings(self) -> list[Finding]:
        return await upgrade.stop_first.findings(self.ports, self._settings.upgrade.stop_first, self.vms.values())

    async def _of_each(self, look: Callable[[Vm], Awaitable[list[Finding]]]) -> list[Finding]:
        """A few VMs at a time, and none keeps its place for long."""
        places = Places()

        async def in_turn(vm: Vm) -> list[Finding]:
            async with places.place():
                return await look(vm)

        return list(chain.from_iterable(await asyncio.gather(*map(in_turn, self.vms.values()))))

    async def vm_findings(self, name: str) -> list[Finding]:
        vm = self.vm(name)
        return [*await self.own_findings(vm), *await core.checks.check_hooks(vm)]

    async def own_findings(self, vm: Vm) -> list[Finding]:
        """Those of the agent itself, without the admin's hooks. A VM that can't be looked at is a finding: the others are
        checked all the same."""
        try:
            async with asyncio.timeout(CHECK_S):
                users = {other.name: other.user for other in self._others(vm.name)}
                return await core.checks.check_vm(vm, self.ports, await self.claimed(vm.name), users)
        except TimeoutError:
            what = f"its QEMU does not answer: the check took more than {CHECK_S:g} s"
            return [_not_known(vm, QemuFailed(what, remedy=f"see its log; `cprctl stop {vm.name} --hard` ends it"))]
        except CprError as error:
            return [_not_known(vm, error)]
        except OSError as error:
            return [_not_known(vm, HostFailed.of(error, vm=vm.name))]

    def plan(self, request: UpgradeRequest) -> Plan:
        """Raises InvalidArgument, KernelRefused."""
        return upgrade.preflight.plan(request, self.ports, self._settings, self.ledger.booted)

    async def plan_findings(self, the_plan: Plan, *, whole: bool = True) -> list[Finding]:
        """Everything about the host and its VMs that matters to the plan. An error would stop it. Not ``whole``, for a
        caller who may only look: no program of the admin's runs, and no kernel is unpacked."""
        out = await upgrade.preflight.check_host(the_plan, self.ports, self.vms.values(), kernel=whole)
        out += await self._unit_findings()
        out += await upgrade.uptime.findings(self.ports)
        found = await upgrade.sort.triage(list(self.vms.values()), Survives.KEXEC, the_plan.policy, hooks=whole)
        decided = {vm.name for vm, _ in (*found.refused, *found.unsaveable)}
        for vm, error in found.refused:
            waits = waits_when_blocked(vm.machine)
            out.append(
                Finding(
                    severity="warning" if waits else "error",
                    code=error.kind,
                    what=error.what,
                    why="it will be waited for" if waits else "its guest would be lost",
                    remedy=error.remedy or "shut it down first, or choose another policy",
                    vm=vm.name,
                )
            )
        for vm, error in found.unsaveable:
            what = f"it will be shut down, because it {error.what}"
            out.append(
                Finding(severity="warning", code="will-be-shut-down", what=what, why="its guest boots anew", vm=vm.name)
            )
        # The triage has asked the hooks already.
        for finding in await self._of_each(self.own_findings):
            if finding.severity == "error":  # of a VM that the plan does not depend on
                out += [] if finding.vm in decided else [replace(finding, severity="warning")]
            elif finding.code not in (core.checks.MEMORY_SURVIVES, *core.separation.NOT_OF_AN_UPGRADE) and (
                finding.code not in ("volatile-memory", "unnamed-disk") or finding.vm not in decided
            ):
                out.append(finding)
        return out

    # -- acts on all --------------------------------------------------------------------------------------------------

    def save_all(self, need: Survives, policy: Policy | None = None) -> Job:
        """Save every VM that has a live guest: all, or none (invariant 3)."""
        return self._start("save-all", lambda job: self._transaction.save_all(job, need, self._policy(policy)))

    def before_kexec(self) -> Job:
        """For cpr-save.service: save for the kexec that systemd is about to do."""
        return self._start("before-kexec", self._before_kexec)

    async def _before_kexec(self, job: Job) -> None:
        watched = self.ledger.committed
        await self._transaction.before_kexec(job, self._policy(None))
        if not watched:
            self.jobs.watch("kexec", self._transaction.watch_kexec)

    def load_all(self) -> Job:
        """Load every live checkpoint; one that fails does not stop the others."""
        vms = self.vms.values()
        return self._start("load-all", lambda job: self._transaction.load_all(job, vms))

    def load_and_start_all(self) -> Job:
        """Likewise, then start the VMs whose definition has autostart."""
        vms = self.vms.values()
        return self._start("load-all", lambda job: self._transaction.load_and_start_all(job, vms))

    def refresh_all(self) -> Job:
        """A new QEMU for every live guest, of the program that is installed now; the host stays."""
        return self._refresh_all(lambda vm: vm.replace_qemu())

    def refresh_all_in_turn(self) -> Job:
        """Likewise, and each old QEMU ends before the new one starts."""
        return self._refresh_all(lambda vm: vm.replace_qemu(Replacement.IN_TURN))

    def _refresh_all(self, replace_qemu: Callable[[Vm], Awaitable[object]]) -> Job:
        vms = self.vms.values()
        return self._start("refresh-all", lambda job: self._transaction.refresh_all(job, vms, replace_qemu))

    def upgrade(self, request: UpgradeRequest) -> Job:
        """The host into another kernel, and its guests with it. Raises InvalidArgument, KernelRefused."""
        the_plan = self.plan(request)
        return self._start(
            the_plan.kind, lambda job: self._transaction.upgrade(job, the_plan, lambda: self.plan_findings(the_plan))
        )

    def rollback(self) -> Job:
        """Take back what an upgrade saved, as long as the host has not started anew."""
        return self._start("rollback", lambda job: self._transaction.roll_back(job, "an admin asked for it"))

    def _start(self, kind: str, work: Callable[[Job], Awaitable[None]]) -> Job:
        async def start(job: Job) -> None:
            if not self._recovered.is_set():
                job.enter(f"waiting for the recovery of {names(self._unrecovered())}")
                await self._recovered.wait()
            await work(job)

        return self.jobs.start(kind, start)

    def _unrecovered(self) -> list[Vm]:
        return [vm for vm in self.vms.values() if vm.state is VmState.RECOVERING]

    def _policy(self, policy: Policy | None) -> Policy:
        return policy or self._settings.upgrade.policy

    # -- what the VMs ask of each other -------------------------------------------------------------------------------

    def changed(self, name: str) -> None:
        vm = self.vms.get(name)
        if vm is None:
            return
        if self.ledger.committed and not vm.machine.powered_off and not vm.machine.stands_saved:
            self.ports.kexec.withdraw()  # its guest was let run behind our back, on another socket: no kexec over it
        self.listeners.vm_changed(vm)

    def admit(self) -> None:
        self._transaction.refuse_when_committed()

    def live_pids(self) -> list[int]:
        return [vm.pid for vm in self.vms.values() if vm.qemu]

    def occupied(self, asking: str) -> list[tuple[str, MemoryIdentity]]:
        return [(vm.name, one) for vm in self._others(asking) for one in vm.occupied_memory()]

    async def claimed(self, asking: str) -> list[tuple[str, MemoryIdentity]]:
        return [(vm.name, one) for vm in self._others(asking) for one in await vm.machine.claimed_memory()]

    def _others(self, asking: str) -> list[Vm]:
        return [vm for vm in self.vms.values() if vm.name != asking]

    def tidy(self) -> None:
        """Compact the journal if it has grown, unless an act is under way, for which a guest may wait."""
        if not self.jobs.current and not any(vm.busy for vm in self.vms.values()):
            self.ports.journal.compact_if_grown()

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECOVERY_S):
                await self._recovered.wait()
        self._transaction.end_waiting()
        await self.jobs.drain(60.0)
        for vm in self.vms.values():
            await vm.close()


class _Housekeeper(Listener):
    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def job_removed(self, job: Job) -> None:  # noqa: ARG002 - whichever it was
        self._manager.tidy()


def _not_known(vm: Vm, error: CprError) -> Finding:
    why = "whether it could be saved is not known"
    return Finding(severity="error", code=error.kind, what=error.what, why=why, remedy=error.remedy, vm=vm.name)
