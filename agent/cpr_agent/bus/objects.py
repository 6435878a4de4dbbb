# SPDX-License-Identifier: GPL-2.0-or-later
"""The objects on the bus: ten lines a method at most, the decisions are core's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import cache
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cpr_agent import __version__, core
from cpr_agent.bus.contract import ROOT, escape
from cpr_agent.bus.library import Variant
from cpr_agent.bus.options import take_options, vardict
from cpr_agent.core import upgrade
from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.jobs import Job
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import DaxDevice, Finding, Policy, Survives, survives
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.core.vm import Vm
from cpr_agent.errors import AccessDenied, CheckpointUnreadable, CprError, InvalidArgument
from cpr_agent.words import advice, sentence

if TYPE_CHECKING:
    from cpr_agent.core.adoption import Outcome, Wanted
    from cpr_agent.core.allocation import Range
    from cpr_agent.core.upgrade.preflight import UpgradeRequest
    from cpr_agent.report.story import Entry

Result = Awaitable[list[Any]]
MANAGE_VMS = "org.cpragent1.manage-vms"
MAX_REPORTS = MAX_HISTORY = 500
"""Entries of one call of ListReports, and of ListHistory, of which each takes the loop's thread 0.1 ms to send."""
ANSWER_S = 2.0
"""How long who reads a property waits for QEMU."""


class Caller(Protocol):
    """The maker of the call that is being answered."""

    async def may(self, action: str) -> bool:
        """Whether polkit allows this caller that too, without a password typed for it."""

    async def is_trusted(self) -> bool:
        """Whether it is root, or the user that the agent itself is."""

    async def apart(self, work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        """Do blocking work in a thread that no guest's work waits for."""

    async def read(self, reading: Callable[..., Any], *arguments: Any) -> Any:
        """Likewise something short, for which no work that ``apart`` does is waited for."""


class BusObject:
    """One object: ``interface`` of the contract at ``path``. Its method M is ``call_M``, its property P ``get_P``."""

    interface: ClassVar[str]
    path: str

    def method(self, name: str) -> Callable[..., Result]:
        function: Callable[..., Result] = getattr(self, f"call_{name}")
        return function

    def set(self, name: str, value: Any) -> None:
        """A property that the contract has as writable; its setter is ``set_P``."""
        getattr(self, f"set_{name}")(value)

    @classmethod
    @cache
    def is_slow(cls, name: str) -> bool:
        """Whether property ``name`` is to be awaited."""
        return iscoroutinefunction(getattr(cls, f"get_{name}"))

    def property(self, name: str) -> Any:
        return getattr(self, f"get_{name}")()


class ManagerObject(BusObject):
    interface = "org.cpragent1.Manager"
    path = ROOT

    def __init__(self, manager: Manager, caller: Caller) -> None:
        self._manager = manager
        self._caller = caller

    async def call_SaveAll(self, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {"survives": "s", "policy": "s", "before-kexec": "b", "wait": "b"})
        if taken.get("before-kexec"):
            return await _job(self._manager.before_kexec(), taken)
        return await _job(self._manager.save_all(_survives(taken, Survives.KEXEC), _policy(taken)), taken)

    async def call_LoadAll(self, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {"autostart": "b", "wait": "b"})
        load = self._manager.load_and_start_all if taken.get("autostart") else self._manager.load_all
        return await _job(load(), taken)

    async def call_RefreshAll(self, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {"in-turn": "b", "wait": "b"})
        refresh = self._manager.refresh_all_in_turn if taken.get("in-turn") else self._manager.refresh_all
        return await _job(refresh(), taken)

    async def call_Upgrade(self, options: dict[str, Variant]) -> list[Any]:
        return [job_path(self._manager.upgrade(_request(options)))]

    async def call_Rollback(self) -> list[Any]:
        return [job_path(self._manager.rollback())]

    async def call_Check(self, options: dict[str, Variant]) -> list[Any]:
        manager, hooks = self._manager, await self._caller.may(MANAGE_VMS)
        if not options:
            found = await (manager.findings() if hooks else manager.own_findings_of_all())
        else:
            request = _request(options)
            if not hooks and (request.kernel_image or request.initrd):
                raise AccessDenied(
                    f"to name files of a kernel: not authorized for {MANAGE_VMS}",
                    left="nothing was done",
                    remedy="name an installed kernel, or use sudo",
                )
            found = await manager.plan_findings(manager.plan(request), whole=hooks)
        return [[_finding(finding) for finding in found]]

    async def call_ListVMs(self) -> list[Any]:
        return [[[vm.name, str(vm.state), vm_path(vm.name)] for _, vm in sorted(self._manager.vms.items())]]

    async def call_ListDevices(self) -> list[Any]:
        claims = await self._manager.claims()
        return [[_device(device, core.allocation.used(device, claims)) for device in self._manager.ports.memory.devices()]]

    async def call_AllocateMemory(self, vm: str, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {"size": "s", "device": "s"})
        device, found = await self._manager.allocate(vm, taken.get("size", ""), taken.get("device", ""))
        return [vardict(device=f"uuid:{device.uuid}", size=found.size, offset=found.offset)]

    async def call_ListHistory(self, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {"vm": "s", "limit": "u"})
        limit = _limit(taken.get("limit", MAX_HISTORY), MAX_HISTORY)
        return [await self._caller.read(self._history, taken.get("vm"), limit)]

    def _history(self, vm: str | None, limit: int) -> list[dict[str, Variant]]:
        """Blocking: thousands of files may be there."""
        wanted = [one for one in self._manager.ports.history.all() if vm in (None, one.vm)]
        return [_timeline(timeline) for timeline in wanted[-limit:]]

    async def call_ListReports(self, limit: int, before: float) -> list[Any]:
        from cpr_agent.report.story import list_stories  # as in call_Report

        ports = self._manager.ports
        found = list_stories(ports.journal.records(), ports.history.all(), _limit(limit, MAX_REPORTS), before)
        return [[_entry(entry) for entry in found]]

    async def call_Report(self, wanted: str, form: str) -> list[Any]:
        from cpr_agent.report.render import render  # here: the agent's start, for which guests wait, goes without them
        from cpr_agent.report.story import story_of

        ports = self._manager.ports
        story = story_of(wanted, ports.journal.records(), ports.history.all(), ports.boot.name())
        return [await self._caller.apart(render, story, form)]

    async def call_Reload(self) -> list[Any]:
        await self._manager.reload()
        return [[[vm.name, str(vm.problem)] for vm in self._manager.vms.values() if vm.problem]]

    async def call_Validate(self, name: str, definition: str) -> list[Any]:
        await self._caller.apart(self._manager.validate, name, definition)
        return []

    async def call_Import(self, command_line: str, options: dict[str, Variant]) -> list[Any]:
        known = dict.fromkeys(("name", "device", "offset", "user"), "s")
        wanted = {**dict.fromkeys(known, ""), **take_options(options, known)}
        imported, problem = await self._caller.apart(self._manager.import_command_line, command_line, **wanted)
        notes = Variant("a(sss)", [list(note) for note in imported.notes])
        return [vardict(name=imported.name, definition=imported.text, notes=notes, problem=problem)]

    async def call_Adopt(self, domain: str, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {**_CHANGE_OPTIONS, "device": "s", "offset": "s"})
        device = taken.get("device", "")
        if device.startswith("/") and not device.startswith("/dev/dax") and not await self._caller.is_trusted():
            raise AccessDenied(
                "to name a file as a guest's RAM is for root alone",
                vm=domain,
                left="nothing was changed",
                remedy="name a dax device, or use sudo",
            )
        return [_change(await self._manager.adoption.adopt(domain, _wanted(taken)))]

    async def call_Release(self, domain: str, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, _CHANGE_OPTIONS)
        return [_change(await self._manager.adoption.release(domain, _wanted(taken)))]

    def get_Version(self) -> str:
        return __version__

    def get_Hostname(self) -> str:
        return self._manager.ports.boot.name()

    def get_Kernel(self) -> str:
        return self._manager.ports.boot.kernel()

    def get_Kernels(self) -> list[str]:
        return [kernel.version for kernel in self._manager.ports.kernels.installed()]

    def get_DefinitionDirectory(self) -> str:
        return self._manager.ports.definitions.directory

    def get_LastUpgrade(self) -> dict[str, Variant]:
        current = self._manager.ledger.current
        if current is None:
            return {}
        names = ("id", "kind", "phase", "policy", "kernel_from", "kernel_to", "reason", "started_at", "changed_at")
        lists = {
            name: Variant("as", list(getattr(current, name)))
            for name in ("loaded", "cold_started", "shut_down", "failures", "stopped_first", "not_started")
        }
        lists["longest_pause"] = Variant("d", current.longest_pause_s)
        return vardict(**{name: getattr(current, name) for name in names}, **lists)

    def get_Jobs(self) -> list[str]:
        return [job_path(job) for job in self._manager.jobs.current.values()]


class VmObject(BusObject):
    interface = "org.cpragent1.VM"

    def __init__(self, vm: Vm, manager: Manager, admin_socket: str, caller: Caller) -> None:
        self._vm = vm
        self._manager = manager
        self._admin_socket = admin_socket
        self._caller = caller
        self._asking: asyncio.Task[list[str]] | None = None
        self.path = vm_path(vm.name)
        self.name = vm.name

    async def call_CprSave(self, filename: str, mode: str, options: dict[str, Variant]) -> list[Any]:
        taken = take_options(options, {"survives": "s"})
        await self._vm.save(SaveRequest(filename, mode, _survives(taken, Survives.QEMU_RESTART)))
        return []

    async def call_CprLoad(self, filename: str, options: dict[str, Variant]) -> list[Any]:
        take_options(options, {})
        await self._vm.load(LoadRequest(filename))
        return []

    async def call_Refresh(self, options: dict[str, Variant]) -> list[Any]:
        in_turn = take_options(options, {"in-turn": "b"}).get("in-turn", False)
        return [await self._vm.replace_qemu(Replacement.IN_TURN if in_turn else None)]

    async def call_Start(self) -> list[Any]:
        await self._vm.start()
        return []

    async def call_Stop(self, how: str) -> list[Any]:
        await self._vm.stop(how)
        return []

    async def call_Resume(self) -> list[Any]:
        await self._vm.resume()
        return []

    async def call_Discard(self) -> list[Any]:
        await self._vm.discard()
        return []

    async def call_Check(self) -> list[Any]:
        hooks = await self._caller.may(MANAGE_VMS)
        found = self._manager.vm_findings(self._vm.name) if hooks else self._manager.own_findings(self._vm)
        return [[_finding(finding) for finding in await found]]

    def get_Name(self) -> str:
        return self._vm.name

    def get_Description(self) -> str:
        return self._vm.definition.vm.description if self._vm.definition else ""

    def get_State(self) -> str:
        return str(self._vm.state)

    def get_Since(self) -> float:
        return self._vm.since

    def get_Cpus(self) -> int:
        launch, definition = self._vm.launched(), self._vm.definition
        return self._manager.ports.definitions.cpus(
            launch.argv if launch else definition.vm.arguments if definition else ()
        )

    def get_Autostart(self) -> bool:
        return bool(self._vm.definition and self._vm.definition.vm.autostart)

    def get_DefinitionState(self) -> str:
        return self._vm.definition_state

    def get_LastPause(self) -> float:
        last = self._manager.ports.history.last(self._vm.name)
        return last.pause_s if last else 0.0

    async def get_QemuRunning(self) -> str:
        return await self._version(self._running) if self._running else ""

    async def get_QemuInstalled(self) -> str:
        return await self._version(self._installed) if self._installed else ""

    def get_QemuOutdated(self) -> bool:
        files = self._manager.ports.files
        running, installed = (files.program_identity(path) for path in (self._running, self._installed))
        return "" not in (running, installed) and running != installed

    @property
    def _running(self) -> str:
        return f"/proc/{self._vm.pid}/exe" if self._vm.pid else ""

    @property
    def _installed(self) -> str:
        """The program that the next QEMU of its guest is; it may run in a copy of another one."""
        launch = self._vm.launched()
        return launch.base_argv[0] if launch else self.get_Qemu()

    async def _version(self, path: str) -> str:
        return str(await self._caller.read(self._manager.ports.files.program_version, path))

    def get_RunState(self) -> str:
        return self._vm.run_state

    def get_MainPID(self) -> int:
        return self._vm.pid

    async def get_Memory(self) -> dict[str, Variant]:
        ram = await self._vm.machine.claimed_memory()
        defined = self._vm.definition.memory.ranges if self._vm.definition else ()
        if ram:
            ranges = [
                vardict(
                    kind=one.kind,
                    device=one.place,
                    size=one.size_bytes,
                    offset=one.offset_bytes,
                    survives=str(one.survives),
                )
                for one in ram
            ]
        else:
            ranges = [vardict(device=one.device, size=int(one.size), offset=int(one.offset)) for one in defined]
        if len(ranges) == 1:
            return ranges[0]
        size = sum(one["size"].value for one in ranges)
        known = vardict(survives=str(survives(ram))) if ram else {}
        return {**vardict(size=size), **known, "nodes": Variant("aa{sv}", ranges)} if ranges else {}

    def get_Owner(self) -> str:
        return self._vm.owner

    def get_Unit(self) -> str:
        return self._vm.unit

    def get_User(self) -> str:
        return self._vm.user

    def get_Qemu(self) -> str:
        launch = self._vm.launched()
        return launch.argv[0] if launch else self._vm.definition.vm.qemu if self._vm.definition else ""

    def get_AdminSocket(self) -> str:
        return self._admin_socket if self._vm.pid and self._vm.owner == "agent" else ""

    def get_Checkpoint(self) -> dict[str, Variant]:
        try:
            manifest = self._vm.live_checkpoint()
        except CheckpointUnreadable as error:
            return vardict(error=error.text)
        if manifest is None:
            return {}
        return vardict(
            id=manifest.id,
            vmstate=manifest.vmstate.path,
            size=manifest.vmstate.size_bytes,
            sha256=manifest.vmstate.sha256,
            run_state=manifest.run_state,
            survives=str(manifest.survives),
            dialect=manifest.qemu.dialect,
            qemu_version=manifest.qemu.version,
            machine_type=manifest.qemu.machine_type,
            kernel=manifest.kernel,
            witness=f"{manifest.witness.kind}:{manifest.witness.digest}",
            stopped_at=manifest.times.stopped_at,
        )

    async def get_BlockedReasons(self) -> list[str]:
        """One question at a time to each QEMU, however many callers want the answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._blocked_reasons())
        try:
            async with asyncio.timeout(ANSWER_S):
                return await asyncio.shield(self._asking)
        except TimeoutError:
            return [f"its QEMU has not answered within {ANSWER_S:g} s"]

    async def _blocked_reasons(self) -> list[str]:
        try:
            return await self._vm.blocked_reasons()
        except CprError as error:
            return [error.text]

    def get_Problem(self) -> str:
        held = self._vm.held()
        return self._vm.error or (held.reason if held else "") or str(self._vm.problem or "")

    def get_Held(self) -> dict[str, Variant]:
        held = self._vm.held()
        if held is None:
            return {}
        evidence = Variant("a(sss)", [list(one) for one in held.evidence])
        return vardict(reason=held.reason, error=held.error, at=held.at, evidence=evidence)


class JobObject(BusObject):
    interface = "org.cpragent1.Job"

    def __init__(self, job: Job, cancel: Callable[[], None]) -> None:
        self._job = job
        self._cancel = cancel
        self.path = job_path(job)

    async def call_Cancel(self) -> list[Any]:
        self._cancel()
        return []

    def get_Id(self) -> int:
        return self._job.id

    def get_Kind(self) -> str:
        return self._job.kind

    def get_State(self) -> str:
        return str(self._job.state)

    def get_Cancellable(self) -> bool:
        return self._job.cancellable and not self._job.ended_at

    def get_Guests(self) -> dict[str, dict[str, Variant]]:
        return {
            vm: vardict(step=str(guest.step), since=guest.since, error=guest.error or None)
            for vm, guest in self._job.guests.items()
        }

    def get_StartedAt(self) -> float:
        return self._job.started_at

    def get_EndedAt(self) -> float:
        return self._job.ended_at

    def get_Progress(self) -> float:
        return self._job.progress

    def get_Step(self) -> str:
        return self._job.step

    def get_Result(self) -> str:
        return self._job.result

    def get_Error(self) -> dict[str, Variant]:
        return error_parts(self._job.error)


def vm_path(name: str) -> str:
    return f"{ROOT}/vm/{escape(name)}"


def job_path(job: Job) -> str:
    return f"{ROOT}/job/{job.id}"


async def _job(job: Job, taken: dict[str, Any]) -> list[Any]:
    """Its path, at once or once it is over. Raises CprError, then."""
    if taken.get("wait"):
        await job.over()
    return [job_path(job)]


def _limit(limit: int, most: int) -> int:
    """Raises InvalidArgument."""
    if not 1 <= limit <= most:
        raise InvalidArgument(f"limit is {limit}", remedy=f"it must be 1 to {most}")
    return limit


def _survives(options: dict[str, Any], default: Survives) -> Survives:
    try:
        return Survives(options.get("survives", default))
    except ValueError as error:
        raise InvalidArgument(str(error), remedy=f"survives is one of {', '.join(Survives)}") from None


_CHANGE_OPTIONS = {"dry-run": "b", "token": "s"}


def _wanted(taken: dict[str, Any]) -> Wanted:
    act = not taken.get("dry-run", False)
    return core.adoption.Wanted(taken.get("device", ""), taken.get("offset", ""), act, taken.get("token", ""))


def _change(outcome: Outcome) -> dict[str, Variant]:
    change, memory = outcome
    place = {"device": memory.device, "size": int(memory.size), "offset": int(memory.offset)} if memory else {}
    return vardict(diff=change.diff, token=change.token, **place)


_UPGRADE_OPTIONS = {
    **dict.fromkeys(("kernel", "kernel-image", "initrd", "append", "policy"), "s"),
    **dict.fromkeys(("reuse-cmdline", "dry-run", "back", "drill"), "b"),
    "max-pause": "d",
}


def _request(options: dict[str, Variant]) -> UpgradeRequest:
    taken = take_options(options, _UPGRADE_OPTIONS)
    policy = _policy(taken)
    wanted = {name.replace("-", "_"): value for name, value in taken.items()}
    return upgrade.preflight.UpgradeRequest(**{**wanted, "policy": policy})


def _policy(options: dict[str, Any]) -> Policy | None:
    if "policy" not in options:
        return None
    try:
        return Policy(options["policy"])
    except ValueError as error:
        what, remedy = f"there is no policy {options['policy']!r}", f"known are: {', '.join(Policy)}"
        raise InvalidArgument(what, remedy=remedy) from error


def _finding(finding: Finding) -> dict[str, Variant]:
    return vardict(
        severity=finding.severity,
        code=finding.code,
        what=sentence(finding.what),
        why=sentence(finding.why),
        remedy=advice(finding.remedy),
        vm=finding.vm,
        seconds=finding.seconds,
    )


def error_parts(error: CprError | None) -> dict[str, Variant]:
    if error is None:
        return {}
    return vardict(kind=error.kind, what=error.what, vm=error.vm, left=error.left, remedy=error.remedy, text=error.text)


def _device(device: DaxDevice, ranges: list[Range]) -> dict[str, Variant]:
    return vardict(
        node=device.node,
        uuid=device.uuid,
        size=device.size_bytes,
        align=device.align_bytes,
        resource=device.resource,
        numa_node=device.numa_node,
        region=device.region,
        provider=device.provider,
        mode="system-ram" if device.system_ram else "devdax",
        used=Variant("a(tts)", [list(one) for one in ranges]),
        free=Variant("a(tt)", [[one.offset, one.size] for one in core.allocation.free(device, ranges)]),
    )


def _entry(entry: Entry) -> dict[str, Variant]:
    return vardict(
        id=entry.id,
        kind=entry.kind,
        outcome=entry.outcome,
        reason=entry.reason,
        started_at=entry.started_at,
        ended_at=entry.ended_at or None,
        kernel_before=entry.kernel_before,
        kernel_after=entry.kernel_after,
        vms=Variant("as", list(entry.vms)),
        longest_pause=entry.longest_pause_s,
    )


def _timeline(timeline: GuestTimeline) -> dict[str, Variant]:
    return vardict(
        id=timeline.id,
        vm=timeline.vm,
        upgrade=timeline.upgrade,
        kernel_before=timeline.kernel_before,
        kernel_after=timeline.kernel_after,
        stopped_at=timeline.stopped_at,
        resumed_at=timeline.resumed_at,
        pause=timeline.pause_s,
        clock_behind=timeline.clock_behind_s,
        clock_problem=timeline.clock_problem,
        phases=Variant("a(sd)", [[name, length_s] for name, length_s in timeline.phases()]),
    )
