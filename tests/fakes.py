# SPDX-License-Identifier: GPL-2.0-or-later
"""Fakes of what the unit tests can't have: QEMU processes that can be told how to fail, and dax devices.

Everything else around core is real in the unit tests too: store, journal, definitions, memory and its witness, on files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent.core.model import (
    BlockNode,
    BootTimes,
    DaxDevice,
    Difference,
    DiskIdentity,
    Finding,
    HookFailure,
    HookPhase,
    Inventory,
    Kernel,
    Launch,
    Part,
    PluggedDevice,
    QemuFacts,
    RunState,
    Survives,
    Throttle,
    Unit,
    UnitStop,
)
from cpr_agent.core.ports import Qemu
from cpr_agent.core.run_states import RUN_STATES
from cpr_agent.errors import KernelRefused, LoadFailed, QemuEnded, QemuFailed, QemuRefused, QemuUnreachable, SaveFailed
from cpr_agent.host.programs import KeptPrograms
from cpr_agent.host.this_host import ThisHost

HEADER = b"QEVM\x00\x00\x00\x03"


class AgentKilled(BaseException):
    """What every port raises once the agent is dead: nothing that it would do after a SIGKILL happens."""


@dataclass
class Gate:
    """An operation that waits here until ``go`` is set."""

    entered: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)


class FakeHost(ThisHost):
    """Implements core.ports.Clock, Boot, Files and Sockets by the real one, but for what a test must not do to its machine:
    start it anew, give it another kernel, step its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.boot = 1
        self.soft = 0
        """How often userspace was started anew since."""
        self._started_at: dict[str, float] = {}
        self.release = "6.12.1"
        self.stepped_s = 0.0
        self.by_kexec = False
        self.installed = "running"
        """Identity of the QEMU at the path that definitions name."""

    def booted_by_kexec(self) -> bool:
        return self.by_kexec

    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    def start_id(self) -> str:
        return f"{self.boot_id()}.{self.soft}" if self.soft else self.boot_id()

    def userspace_at(self) -> float:
        return self._started_at.setdefault(self.start_id(), self.now())

    def kernel(self) -> str:
        return self.release

    def program_identity(self, path: str) -> str:
        return "running" if path.startswith("/proc/") else self.installed

    def now(self) -> float:
        return super().now() + self.stepped_s

    def boot_ended_at(self, boot_id: str) -> float:  # noqa: ARG002 - no journal knows these boots
        return 0.0


class FakeKernels:
    """Implements core.ports.Kernels: a test must not load a kernel into its machine. The real ones are in tests/host."""

    def __init__(self, runner: FakeRunner) -> None:
        self.kernels = [Kernel(version=version, image=f"/boot/vmlinuz-{version}") for version in ("6.12.2", "6.12.1")]
        self.line = "root=/dev/sda memmap=4G!8G quiet"
        self.wrong: list[Finding] = []
        self.refusal = ""
        self.is_loaded: tuple[str, str] | None = None
        self._runner = runner

    def installed(self) -> list[Kernel]:
        return self.kernels

    def command_line(self) -> str:
        return self.line

    def findings(self, kernel: Kernel, drivers: Collection[str]) -> list[Finding]:  # noqa: ARG002
        return self.wrong

    def loaded(self) -> bool:
        return self.is_loaded is not None

    async def load(self, kernel: Kernel, command_line: str) -> None:
        self._runner.point("load-kernel")
        if self.refusal:
            raise KernelRefused(self.refusal)
        self.is_loaded = (kernel.version, command_line)

    async def unload(self) -> None:
        self._runner.point("unload-kernel")
        self.is_loaded = None


class FakeSurroundings:
    """Implements core.ports.Surroundings: a finding without a VM is the host's."""

    def __init__(self) -> None:
        self.wrong: list[Finding] = []

    def findings(self) -> list[Finding]:
        return [finding for finding in self.wrong if not finding.vm]

    def findings_of(self, vm: str) -> list[Finding]:
        return [finding for finding in self.wrong if finding.vm == vm]


class FakeKexec:
    """Implements core.ports.Kexec: a test machine can't be sent into another kernel. ``started`` tells that it was asked
    to; what then becomes of the host is the test's to say, by ``fail`` or by Bench.reboot."""

    possible = True

    def __init__(self, runner: FakeRunner) -> None:
        self.wrong: list[Finding] = []
        self.promised = False
        self.outlived: Survives | None = None
        self.ended_at_once: set[str] = set()
        self.under_way: Survives | None = None
        self.inhibited = 0
        self.brought_back = 0
        self.least_uptime_s = 0.0
        self.started = asyncio.Event()
        self._said = ""
        self._end = asyncio.Event()
        self._runner = runner

    def findings(self) -> list[Finding]:
        return self.wrong

    @contextlib.asynccontextmanager
    async def inhibit(self, why: str) -> AsyncIterator[None]:  # noqa: ARG002
        self.inhibited += 1
        try:
            yield
        finally:
            self.inhibited -= 1

    def promise(self, drivers: Collection[str], outlives: Survives) -> None:  # noqa: ARG002
        self._runner.point("promise")
        self.promised = True
        self.outlived = outlives

    def withdraw(self) -> None:
        self._runner.point("withdraw")
        self.ended_at_once = set()
        self.promised = False

    def end_at_once(self, places: Collection[str]) -> None:
        self._runner.point("end-at-once")
        self.ended_at_once = {Path(place).name for place in places}

    async def pending(self) -> Survives | None:
        return self.under_way

    async def start(self) -> str:
        self._runner.point("kexec")
        self.begin()
        return await self.over()

    async def over(self) -> str:
        if self.under_way:
            await self._end.wait()
        return self._said

    def bring_back(self) -> None:
        self.brought_back += 1

    async def minimum_uptime_s(self) -> float:
        return self.least_uptime_s

    def of_this_loop(self) -> None:
        """Events belong to the event loop of an agent's life."""
        self.started, self._end = asyncio.Event(), asyncio.Event()

    def begin(self, kind: Survives = Survives.KEXEC) -> None:
        """What somebody's `systemctl kexec` does."""
        self.under_way = kind
        self._end.clear()
        self.started.set()

    def fail(self, said: str = "canceled") -> None:
        self.under_way, self._said = None, said
        self.started.clear()
        self._end.set()


class FakeUnits:
    """Implements core.ports.Units: a test's machine has no systemd. ``there`` are its units; a test adds some by ``add``.
    ``stuck`` never stop, ``failing`` says what comes of a unit's stop or start. ``acts`` tells who was stopped and started,
    and ``statuses`` what the guests' QEMUs were doing then. The real ones are in tests/host."""

    needed: Collection[str] = ("cpr-agent.service", "cpr-load.service", "dbus.socket")

    def __init__(self, runner: FakeRunner) -> None:
        self.there: dict[str, Unit] = {}
        self._at_boot: dict[str, Unit] = {}
        self.failing: dict[tuple[str, str], str] = {}
        self.stuck: set[str] = set()
        self.acts: list[tuple[str, str]] = []
        self.statuses: list[set[str]] = []
        self.shutdown: list[UnitStop] = []
        self.gate: Gate | None = None
        """At which each act waits."""
        self.times = BootTimes()
        self._runner = runner

    def add(self, name: str, *takes_along: str, **facts: Any) -> None:
        self.there[name] = self._at_boot[name] = Unit(name=name, takes_along=frozenset(takes_along), **facts)

    def boot(self) -> None:
        """Each is again as it was added."""
        self.there.update(self._at_boot)

    async def all(self, names: Collection[str] = ()) -> dict[str, Unit]:
        self._runner.point()
        unknown = {name: Unit(name=name, load_state="not-found", active_state="inactive") for name in names}
        return {**unknown, **self.there} if self.there else {}

    async def stop(self, name: str) -> str:
        return await self._act("stop", name)

    async def start(self, name: str) -> str:
        return await self._act("start", name)

    def lacking(self, paths: Collection[str], devices: Collection[str], interfaces: Collection[str]) -> list[str]:
        """Mounts of ``there`` that are on the way to a path, and devices, by their units' names."""
        self._runner.point()
        named = {*devices, *interfaces}
        return [
            unit.name
            for unit in self.there.values()
            if unit.active_state != "active"
            and (unit.name in named or any(unit.mount_point and path.startswith(f"{unit.mount_point}/") for path in paths))
        ]

    async def _act(self, act: str, name: str) -> str:
        self._runner.point(f"{act} {name}")
        self.acts.append((act, name))
        self.statuses.append({qemu.status for qemu in self._runner.qemus.values()})
        if act == "stop" and name in self.stuck:
            await asyncio.Event().wait()
        if self.gate:
            self.gate.entered.set()
            await self.gate.go.wait()
        if said := self.failing.get((act, name)):
            return said
        unit = self.there[name]
        along = [name, *unit.takes_along] if act == "stop" else [name]
        for one in along:
            self.there[one] = replace(self.there[one], active_state="inactive" if act == "stop" else "active")
        self._runner.point(f"{act} {name} done")
        return ""

    async def stops(self, boot_id: str, since: float, until: float) -> list[UnitStop]:
        assert boot_id.startswith("boot-")
        return [stop for stop in self.shutdown if since <= stop.ended_at <= until]

    async def boot_times(self) -> BootTimes:
        return self.times


class FakeHooks:
    """Implements core.ports.Hooks: unit tests run no programs. ``failing`` is by phase and VM, what its hook says; ``ran``
    tells which ran, and what the guests' QEMUs were doing then. Real scripts are in tests/bus."""

    def __init__(self, runner: FakeRunner) -> None:
        self.failing: dict[tuple[str, str], str] = {}
        self.ran: list[tuple[str, str, str]] = []
        self.statuses: list[dict[str, str]] = []
        self._runner = runner

    async def run(
        self,
        phase: HookPhase,
        vm: str,
        upgrade: str,
        facts: Mapping[str, object],  # noqa: ARG002
    ) -> list[HookFailure]:
        self._runner.point(f"hook {phase}")
        self.ran.append((phase, vm, upgrade))
        self.statuses.append({name: qemu.status for name, qemu in self._runner.qemus.items()})
        why = self.failing.get((phase, vm))
        return [HookFailure(f"/etc/cpr-agent/hooks.d/{phase}.d/10-test", why)] if why else []


class FakePrograms(KeptPrograms):
    """Implements core.ports.Programs by the real one; a fake QEMU's process is the test's own, with other arguments."""

    def __init__(self, root: Path, point: Callable[[], None]) -> None:
        super().__init__(root)
        self._point = point

    def keep(self, vm: str, pid: int, arguments: Sequence[str]) -> None:  # noqa: ARG002
        self._point()
        super().keep(vm, pid, Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:-1])
        self._point()

    def kept(self, vm: str, sha256: str) -> str:
        self._point()
        return super().kept(vm, sha256)

    def forget(self, vm: str) -> None:
        self._point()
        super().forget(vm)
        self._point()


class FakeDevices:
    """Implements memory.devices.Devices: a test machine has no dax device; the real ones are in tests/host."""

    def __init__(self, *devices: DaxDevice) -> None:
        self._devices = list(devices)
        self._away: list[DaxDevice] = []
        self.volumes: dict[int, str] = {}
        self.below: dict[int, tuple[str, ...]] = {}

    def list(self) -> list[DaxDevice]:
        return self._devices

    def take_away(self, uuid: str) -> None:
        """Until ``bring_back``."""
        self._away += [one for one in self._devices if one.uuid == uuid]
        self._devices = [one for one in self._devices if one.uuid != uuid]

    def bring_back(self) -> None:
        self._devices, self._away = [*self._devices, *self._away], []

    def volume(self, st_dev: int) -> str:
        return self.volumes.get(st_dev, "")

    def drivers_below(self, st_dev: int) -> tuple[str, ...]:
        return self.below.get(st_dev, ())

    async def wait(self, good: Callable[[DaxDevice], bool], timeout_s: float) -> DaxDevice | None:  # noqa: ARG002
        return next(filter(good, self._devices), None)


class FakeQemu:
    """Implements core.ports.Qemu: a guest that counts, in the real file that is its RAM, each time that it gets to run.

    A fake because a real QEMU can't be made to fail or to wait in each of its operations; the same acts on real ones are in
    tests/bus. It notices what a real one would not: being loaded with a state that does not belong to its RAM.
    """

    def __init__(self, runner: FakeRunner, launch: Launch) -> None:
        self.launch = launch
        self.status = "inmigrate"
        self.loaded = False
        self.offered = False
        self._slept = False
        self._halved = False
        self._runner = runner
        self._callbacks: list[Callable[[str], None]] = []
        if launch.kind == "start":
            self.run(booting=True)

    # -- the guest ----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        with Path(self.launch.nodes[0]).open("rb") as ram:
            return int.from_bytes(os.pread(ram.fileno(), 8, self.launch.memory[0].offset_bytes), "big")

    def run(self, *, booting: bool = False) -> None:
        """The guest runs, and counts; a boot starts the count far from any other."""
        self.status = "running"
        both = (self._runner.qemus.get(self.launch.vm), self._runner.beside.get(self.launch.vm))
        if any(qemu.status == "running" for qemu in both if qemu and qemu is not self):
            self._runner.violations.append(f"VM {self.launch.vm}: runs twice")
        count = (self._runner.boots() if booting else self.count) + 1
        for node, memory in zip(self.launch.nodes, self.launch.memory, strict=True):
            with Path(node).open("r+b") as ram:
                os.pwrite(ram.fileno(), count.to_bytes(8, "big"), memory.offset_bytes)
        self._runner.counts[self.launch.vm] = count

    def by_hand(self, status: str) -> None:
        """What an admin does over another socket."""
        if status == "running" and self._slept and self.status == "postmigrate":
            self._runner.end(self.launch.vm)  # as QEMU 10.0 and 11.1 do
        elif status == "running":
            self.run()
        self.status = status
        for callback in list(self._callbacks):
            callback({"running": "WAKEUP" if self._slept else "RESUME", "suspended": "SUSPEND"}.get(status, "STOP"))

    # -- the port -----------------------------------------------------------------------------------------------------

    def on_change(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    async def _step(self, operation: str) -> None:
        self._runner.point()
        if self not in (self._runner.qemus.get(self.launch.vm), self._runner.beside.get(self.launch.vm)):
            raise QemuUnreachable("the connection to QEMU is lost", vm=self.launch.vm)
        if gate := self._runner.gates.get((self.launch.vm, operation)):
            gate.entered.set()
            await gate.go.wait()
        if fault := self._runner.faults.get((self.launch.vm, operation)):
            raise fault
        if self._runner.broken.get(self.launch.argv[0]) == operation:
            raise QemuFailed("the program is broken", vm=self.launch.vm)

    async def run_state(self) -> str:
        await self._step("run_state")
        return self.status

    async def version(self) -> str:
        return "10.0"

    async def blocked_reasons(self, launch: Launch) -> list[str]:  # noqa: ARG002
        await self._step("blocked_reasons")
        return self._runner.blocked.get(self.launch.vm, [])

    async def until_saveable(self, launch: Launch, timeout_s: float) -> list[str]:  # noqa: ARG002
        await self._step("until_saveable")
        return await self.blocked_reasons(launch)

    async def facts(self, launch: Launch) -> QemuFacts:  # noqa: ARG002
        return QemuFacts(version="10.0", machine_type="pc-q35-10.0", dialect="cpr-reboot")

    async def differences(self, was: QemuFacts, launch: Launch) -> list[Difference]:  # noqa: ARG002
        await self._step("differences")
        if self._runner.broken.get(self.launch.argv[0]) == "lesser":
            return [Difference("version of QEMU", "10.0 (the same or newer is good)", "7.2")]
        return self._runner.lacking

    async def lacks(self, was: QemuFacts) -> list[Difference]:  # noqa: ARG002
        assert self.launch.argv[1:3] == ("-machine", "none"), "it was to have no machine"
        return self._runner.lacking

    @property
    def pid(self) -> int:
        """This process's own PID stands for all: /proc has it."""
        return os.getpid()

    async def inventory(self) -> Inventory:
        await self._step("inventory")
        nodes = [
            BlockNode(
                disk="d0",
                role="",
                node=disk.node,
                driver=disk.driver,
                filename=disk.filename,
                size_bytes=-(-Path(disk.filename).stat().st_size // 512) * 512,
            )
            for disk in await self.disks()
        ]
        runner, name = self._runner, self.launch.vm
        return Inventory(
            nodes=tuple(nodes),
            devices=tuple(runner.plugged.get(name, ())),
            parts=tuple(runner.parts.get(name, ())),
            throttles=runner.throttled.get(name, ()),
        )

    async def throttle(self, some: Iterable[Throttle]) -> None:
        await self._step("throttle")
        self._runner.throttled[self.launch.vm] = tuple(some)

    async def brief_inventory(self) -> Inventory:
        return replace(await self.inventory(), placed=False)

    async def parts(self) -> Inventory:
        has = await self.inventory()
        return Inventory(parts=has.parts, throttles=has.throttles)

    async def listening(self) -> list[str]:
        return self._runner.listening.get(self.launch.vm, [])

    async def disks(self) -> list[DiskIdentity]:
        disk = self._runner.disks.get(self.launch.vm)
        return [DiskIdentity(node="disk", driver="file", filename=str(disk))] if disk else []

    async def save(self, vmstate_fd: int, timeout_s: float, checkpoint: str) -> float:  # noqa: ARG002
        await self._step("save")
        was = self.status
        if self._runner.delegated and was == "running":
            self.status = "paused"
            self._runner.point("stopped first")
            await self._step("stopped-first")
        if was == "postmigrate":
            raise SaveFailed("Can't migrate the vm that was paused due to previous migration", vm=self.launch.vm)
        if self._runner.vfio.get(self.launch.vm) and self.status != "suspended":
            raise SaveFailed("VFIO device only supports cpr-reboot for runstate suspended", vm=self.launch.vm)
        self._slept = self.status == "suspended"
        state = {"vm": self.launch.vm, "count": self.count, "was": was}
        self._halved = (self.launch.vm, "half-written") in self._runner.faults
        os.write(vmstate_fd, HEADER + (b"{" if self._halved else json.dumps(state).encode()))
        self.status = "postmigrate"
        await self._step("half-written")
        await self._step("after-save")
        return 0.0

    async def has_saved(self) -> bool:
        await self._step("has_saved")
        return not self._halved

    async def load_runs_guest(self, saved_as: str = "") -> bool:  # noqa: ARG002
        return self._runner.load_runs_guest

    async def load(self, vmstate_fd: int, timeout_s: float, saved_as: str = "") -> float:  # noqa: ARG002
        await self._step("load")
        state = json.loads(os.read(vmstate_fd, 1000).removeprefix(HEADER))
        if self.status != "inmigrate":
            raise LoadFailed("it is not waiting for a state", vm=self.launch.vm)
        was = state.pop("was")
        self._slept = was == "suspended"
        if state != {"vm": self.launch.vm, "count": self.count}:
            self._runner.violations.append(f"VM {self.launch.vm}: {state} loaded onto count {self.count}")
        self.status, self.loaded = "paused", True
        if self._runner.load_runs_guest and was != "paused":
            self.status = was
            if was == "running":
                self.run()
        await self._step("after-load")
        return time.time() if self.status == "running" else 0.0

    async def transfer_problem(self) -> str:
        return "" if self._runner.transfers else "aux-ram-share=on is required"

    @contextlib.asynccontextmanager
    async def handing_over(
        self,
        directory: str,
        taker_lives: Callable[[], Awaitable[bool]],
        timeout_s: float,  # noqa: ARG002
    ) -> AsyncIterator[Callable[[], Awaitable[float]]]:
        await self._step("handing_over")
        assert await taker_lives()
        assert any(directory in word for word in self._runner.beside[self.launch.vm].launch.argv)
        self.offered = True

        async def handed_over() -> float:
            await self._step("handed_over")
            if self.status != "postmigrate":
                raise SaveFailed("it was not handed over", vm=self.launch.vm)
            return time.time()

        try:
            yield handed_over
        finally:
            self.offered = False

    async def withdraw(self) -> None:
        await self._step("withdraw")
        self.offered = False

    async def take_over(self, directory: str, timeout_s: float) -> None:  # noqa: ARG002
        await self._step("take_over")
        old = self._runner.qemus[self.launch.vm]
        if self.status != "inmigrate" or not old.offered:
            raise LoadFailed("nothing is offered", vm=self.launch.vm)
        old.status = "postmigrate"
        await self._step("half-taken")
        self.status, self.loaded = "paused", True
        await self._step("after-take_over")

    async def cont(self) -> float:
        await self._step("cont")
        if not RUN_STATES[RunState(self.status)].resumes and self.status != "postmigrate":
            raise QemuRefused(f"cannot continue from {self.status}", vm=self.launch.vm)
        if self._slept and self.status == "postmigrate":
            self._runner.end(self.launch.vm)  # as QEMU 10.0 and 11.1 do
            raise QemuEnded("QEMU has aborted", vm=self.launch.vm)
        if self._slept:
            self.status = "suspended"
        else:
            self.run()
        await self._step("after-cont")
        return 0.0

    async def set_guest_clock(self, now: Callable[[], float]) -> float | None:  # noqa: ARG002
        await self._step("set_guest_clock")
        return None

    async def vfio_devices(self, some: Sequence[PluggedDevice]) -> list[str]:
        plugged = [one.name for one in some if one.kind.startswith("vfio-")]
        return [*self._runner.vfio.get(self.launch.vm, []), *plugged]

    async def sleep_problem(self) -> str:
        await self._step("sleep_problem")
        return ""

    async def suspend(self, timeout_s: float) -> float:  # noqa: ARG002
        await self._step("suspend")
        self.status = "suspended"
        await self._step("after-suspend")
        return time.time()

    async def wake(self) -> float:
        await self._step("wake")
        if self.status != "suspended":
            return 0.0
        self._slept = False
        self.run()
        await self._step("after-wake")
        return time.time()

    async def powerdown(self) -> None:
        await self._step("powerdown")
        self._runner.end(self.launch.vm)

    async def quit(self) -> None:
        self._runner.point()
        if self._runner.qemus.get(self.launch.vm) is self:
            self._runner.end(self.launch.vm)

    async def close(self) -> None:
        self._callbacks.clear()


class FakePlace:
    """Implements core.ports.Place, by the place's role: unlike a real one it can't be held over an adoption."""

    def __init__(self, runner: FakeRunner, name: str, qemus: dict[str, FakeQemu], launches: dict[str, Launch]) -> None:
        self._runner = runner
        self._name = name
        self._qemus = qemus
        self._launches = launches

    @property
    def delegated(self) -> bool:
        return self._runner.delegated

    async def lacks(self, launch: Launch, was: QemuFacts) -> list[Difference]:  # noqa: ARG002
        return self._runner.lacking

    async def settle(self) -> None:
        self._runner.point()
        if fault := self._runner.faults.get((self._name, "settle")):
            raise fault
        self._runner.settled.append(self._name)

    @property
    def directory(self) -> str:
        return f"/run/cpr-agent/vm/{self._name}{'' if self._qemus is self._runner.qemus else ':b'}"

    async def start(self, launch: Launch) -> None:
        runner = self._runner
        runner.point()
        runner.started.append((launch.vm, launch.kind))
        self._launches[launch.vm] = launch
        if gate := runner.gates.get((launch.vm, "start")):
            gate.entered.set()
            await gate.go.wait()
        if fault := runner.faults.get((launch.vm, "start")):
            raise fault
        if runner.broken.get(launch.argv[0]) == "start":
            raise QemuFailed("the program is broken", vm=launch.vm)
        assert launch.vm not in self._qemus, "two QEMUs in one place"
        assert not (runner.delegated and self._qemus is runner.beside), "there is no second place"
        self._qemus[launch.vm] = FakeQemu(runner, launch)

    async def connect(self, timeout_s: float) -> Qemu:  # noqa: ARG002
        runner = self._runner
        runner.point()
        if gate := runner.gates.get((self._name, "connect")):
            gate.entered.set()
            await gate.go.wait()
        if fault := runner.faults.get((self._name, "connect")):
            raise fault
        return self._qemus[self._name]

    async def pid(self) -> int:
        self._runner.point()
        return os.getpid() if self._name in self._qemus else 0

    async def wait_exit(self, timeout_s: float) -> bool:  # noqa: ARG002
        return self._name not in self._qemus

    async def kill(self) -> None:
        self._runner.point()
        self._qemus.pop(self._name, None)

    async def ended_by(self, timeout_s: float) -> int:  # noqa: ARG002
        return self._runner.signals.get(self._name, 0)

    def log_tail(self) -> str:
        return ""


class FakeRunner:
    """Implements core.ports.Runner, and is the world that outlives an agent: its QEMUs go on when the agent is replaced.

    ``faults`` and ``gates`` are by VM and operation; ``counts`` is how far each guest got; ``violations`` must stay empty.
    """

    def __init__(self) -> None:
        self.qemus: dict[str, FakeQemu] = {}
        self.users: dict[str, str] = {}
        self.units: dict[str, str] = {}
        self.prepared: list[Launch] = []
        self.beside: dict[str, FakeQemu] = {}
        self.faults: dict[tuple[str, str], Exception] = {}
        self.parts: dict[str, list[Part]] = {}
        self.throttled: dict[str, tuple[Throttle, ...]] = {}
        self.signals: dict[str, int] = {}
        """By VM: what has ended its QEMU."""
        self.broken: dict[str, str] = {}
        """By the path of a program, the operation in which it fails."""
        self.gates: dict[tuple[str, str], Gate] = {}
        self.blocked: dict[str, list[str]] = {}
        self.vfio: dict[str, list[str]] = {}
        self.listening: dict[str, list[str]] = {}
        """By VM: the names of sockets, which the test has bound."""
        self.lacking: list[Difference] = []
        self.transfers = False
        self.load_runs_guest = False
        self.delegated = False
        """Whether all QEMUs are run by another service: see core.ports.Place."""
        self.settled: list[str] = []
        self.disks: dict[str, Path] = {}
        """Of each VM one at the most, which the test has open."""
        self.plugged: dict[str, list[PluggedDevice]] = {}
        self.inventories: dict[str, Inventory] = {}
        self.counts: dict[str, int] = {}
        self.violations: list[str] = []
        self.started: list[tuple[str, str]] = []
        self.agent_lives = True
        self.die_at = ""
        self.at: dict[str, Callable[[], object]] = {}
        """What happens to the world when the agent passes there."""
        self.life_left: int | None = None
        self._launches: dict[str, Launch] = {}
        self._beside: dict[str, Launch] = {}
        self._boots = 0

    def point(self, name: str = "") -> None:
        """The agent passes here; it dies if this is the point, or if its last hour has come, and then does nothing more."""
        if self.life_left is not None:
            self.life_left -= 1
        if name in self.at:
            self.at[name]()
        if (name and name == self.die_at) or self.life_left == 0:
            self.agent_lives = False
        if not self.agent_lives:
            raise AgentKilled

    def boots(self) -> int:
        self._boots += 1
        return self._boots * 1000

    def end(self, name: str) -> None:
        self.qemus.pop(name, None)

    def own(self, name: str) -> FakePlace:
        return FakePlace(self, name, self.qemus, self._launches)

    def spare(self, name: str) -> FakePlace:
        return FakePlace(self, name, self.beside, self._beside)

    def adopt(self, name: str) -> None:
        self.point("adopt")
        for one, other in ((self.qemus, self.beside), (self._launches, self._beside)):
            for place, taken in ((one, other.pop(name, None)), (other, one.pop(name, None))):
                if taken:
                    place[name] = taken  # type: ignore[assignment]  # QEMUs, then launches

    def forget_launches(self) -> None:
        """/run is empty after a reboot."""
        self._launches.clear()
        self._beside.clear()

    def launched(self, name: str) -> Launch | None:
        return self._launches.get(name)

    def launched_all(self) -> list[str]:
        return sorted(self._launches)

    def inventory(self, name: str) -> Inventory | None:
        return self.inventories.get(name)

    def record_inventory(self, name: str, inventory: Inventory) -> None:
        self.point()
        self.inventories[name] = inventory

    def user(self, name: str) -> str:
        return self.users.get(name, "")

    async def assign_user(self, name: str) -> str:
        return self.users.setdefault(name, "nobody")

    async def prepare(self, launch: Launch) -> None:
        self.prepared.append(launch)

    def unit(self, name: str) -> str:
        return self.units.get(name, "")

    def trim_logs(self) -> None:
        """There are none."""

    def put(self, launch: Launch, status: str, **changes: object) -> FakeQemu:
        """A QEMU that an earlier agent left behind."""
        launch = replace(launch, **changes)
        self._launches[launch.vm] = launch
        self.qemus[launch.vm] = qemu = FakeQemu(self, replace(launch, kind="load"))
        qemu.status = status
        return qemu
