# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent that kills itself, or cancels its jobs, at one point, and whose host seems to kexec: cpr-agentd's own parts, but
for a journal and a store that carry the knife, and fakes for what this machine can't do to itself.

    python -m tests.bus.mortal_agent POINT --root=DIR --bus-address=ADDRESS [--files=DIR]

DIR is that of --files from here on, if there is one.

POINT is "before X" or "after X", where X is a record of the journal, or an act of the store: seal, commit, consume, ...;
with " N" behind it the Nth passage. With "stop " before it, it stops itself there (SIGSTOP) and waits to be continued. Each
point that it passes is a line in DIR/points.

A file DIR/cancel with "TIMES POINT" has it cancel the jobs under way at this point, and at the next TIMES - 1 records of
the journal: see ``Cancellations``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import msgspec
from msgspec.structs import replace

from cpr_agent.bus.service import Service
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import DaxDevice, Located, MemoryNode, Seconds, Survives, Unit
from cpr_agent.core.settings import Settings, UpgradeSection
from cpr_agent.core.vm import Vm
from cpr_agent.daemon import Paths, build
from cpr_agent.errors import CprError
from cpr_agent.host.this_host import ThisHost
from cpr_agent.host.units import NoUnits
from cpr_agent.memory.backends import HostMemory
from cpr_agent.memory.devices import UdevDevices
from tests.bench import MortalJournal, MortalStore
from tests.fakes import FakeKernels, FakeKexec, FakeRunner

STORE = ("seal", "commit", "begin", "abort", "consume", "discard-files", "compact")
"""Acts of the store, and of the journal's on itself: all other points are records."""


class LabHost(ThisHost):
    """Implements core.ports.Clock, Boot, Files and Sockets by the real one, but for the boot, which the lab counts in a
    file, how it began, and a clock that the lab steps."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def _number(self, name: str) -> int:
        path = self._root / name
        return int(path.read_text()) if path.exists() else 0

    def boot_id(self) -> str:
        return f"boot-{self._number('boot')}"

    def booted_by_kexec(self) -> bool:
        return (self._root / "by-kexec").exists()

    def now(self) -> float:
        return super().now() + self._number("stepped-s")


class KeptMemory(HostMemory):
    """Implements core.ports.Memory by the real one, on /dev/shm as if a kexec kept it: in the lab none happens."""

    async def _locate(self, object_id: str, wanted: MemoryNode, timeout_s: float) -> Located:
        located = await super()._locate(object_id, wanted, timeout_s)
        return replace(located, identity=replace(located.identity, survives=Survives.KEXEC))


class LabDevices(UdevDevices):
    """Dax devices as the file DIR/devices lists them, where there is one: they can be looked at alone."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._file = root / "devices"

    def list(self) -> list[DaxDevice]:
        return msgspec.json.decode(self._file.read_bytes(), type=list[DaxDevice]) if self._file.exists() else super().list()


class LabKexec(FakeKexec):
    """Implements core.ports.Kexec: DIR/kexec is there while one is under way, and the FIFO DIR/kexec-said ends it."""

    def __init__(self, runner: FakeRunner, root: Path) -> None:
        super().__init__(runner)
        self._under_way, self._fifo, self._ready = root / "kexec", root / "kexec-said", root / "kexec-ready"

    def promise(self, drivers: Collection[str], outlives: Survives) -> None:  # noqa: ARG002
        self._ready.touch()

    def withdraw(self) -> None:
        self._ready.unlink(missing_ok=True)

    async def pending(self) -> Survives | None:
        return Survives.KEXEC if self._under_way.exists() else None

    async def start(self) -> str:
        self._under_way.touch()
        return await self.over()

    async def over(self) -> str:
        # Before the look: who calls it off meanwhile finds a reader, or is seen.
        with open(os.open(self._fifo, os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0) as fifo:  # noqa: PTH123
            if not self._under_way.exists():
                return "it was over before"
            said = asyncio.Event()
            asyncio.get_running_loop().add_reader(fifo, said.set)
            await said.wait()
            asyncio.get_running_loop().remove_reader(fifo)
            return fifo.read(100).decode().strip()


class LabUnits(NoUnits):
    """Implements core.ports.Units: each file in DIR/units is a unit that is to stop first. It runs unless the file says
    "inactive". One that says "stuck" never stops."""

    def __init__(self, root: Path) -> None:
        self._directory = root / "units"

    async def all(self, names: Collection[str] = ()) -> dict[str, Unit]:  # noqa: ARG002 - these are all
        return {path.name: Unit(name=path.name, active_state=self._state(path.name)) for path in self._files()}

    def settings(self) -> Settings:
        names = tuple(path.name for path in self._files())
        return Settings(upgrade=UpgradeSection(stop_first=names, stop_first_timeout=Seconds(2 if names else 120)))

    async def stop(self, name: str) -> str:
        if (self._directory / name).read_text() == "stuck":
            await asyncio.Event().wait()
        (self._directory / name).write_text("inactive")
        return ""

    async def start(self, name: str) -> str:
        (self._directory / name).write_text("active")
        return ""

    def _files(self) -> list[Path]:
        return sorted(self._directory.iterdir()) if self._directory.exists() else []

    def _state(self, name: str) -> str:
        return "inactive" if (self._directory / name).read_text() == "inactive" else "active"


class Cancellations:
    """Cancels the jobs of ``manager`` as Job.Cancel does, also where that is refused already. From the first time on, and
    as long as a job is under way, it tries at each point to start each VM, as any caller might: the answers are lines in
    DIR/starts, "POINT: VM ERROR"."""

    def __init__(self, manager: Manager, root: Path) -> None:
        self._manager = manager
        self._wanted, self._starts = root / "cancel", root / "starts"
        self._loop = asyncio.get_running_loop()
        self._point = ""
        self._left = 0
        self._begun = False
        self._targets: set[int] = set()
        """The jobs that were under way at the first cancellation: a later one is no part of it."""
        self._tries: set[asyncio.Task[None]] = set()

    def wants_another(self) -> bool:
        """Whether DIR/cancel has come since the last passage."""
        if not self._wanted.exists():
            return False
        times, _, self._point = self._wanted.read_text().partition(" ")
        self._left, self._begun = int(times), False
        self._targets.clear()
        self._wanted.unlink()
        return True

    def pass_by(self, name: str, passage: str) -> None:
        """Returns once the jobs are cancelled, if this is the point."""
        record = name.split()[1] not in STORE
        cancels = self._left > 0 and (record if self._begun else self._point in (name, passage))
        self._begun = self._begun or cancels
        if not self._begun:
            return
        self._left -= cancels
        if threading.current_thread() is threading.main_thread():
            self._meddle(passage, cancels=cancels)
            return
        done = threading.Event()

        def meddle() -> None:
            self._meddle(passage, cancels=cancels)
            done.set()

        self._loop.call_soon_threadsafe(meddle)
        done.wait()

    def _meddle(self, passage: str, *, cancels: bool) -> None:
        jobs = self._manager.jobs
        running = [number for number, job in jobs.current.items() if not job.parked.is_set()]
        if cancels and not self._targets:
            self._targets.update(running)
        under_way = self._targets.intersection(running)
        for number in under_way if cancels else ():
            jobs._tasks[number].cancel()
        for vm in self._manager.vms.values() if under_way else ():
            task = self._loop.create_task(self._try_to_start(vm, passage))
            self._tries.add(task)
            task.add_done_callback(self._tries.discard)

    async def _try_to_start(self, vm: Vm, passage: str) -> None:
        try:
            await vm.start()
            answer = "started"
        except CprError as error:
            answer = error.kind
        with self._starts.open("a") as starts:
            print(f"{passage}: {vm.name} {answer}", file=starts)


async def serve(paths: Paths, files: Path, address: str, point: str) -> None:
    passed: Counter[str] = Counter()
    one_at_a_time = threading.Lock()
    cancellations: Cancellations | None = None

    def pass_by(name: str) -> None:
        """Acts of the store pass here in threads of their own."""
        with one_at_a_time:
            if cancellations and cancellations.wants_another():
                passed.clear()
            passed[name] += 1
            passage = f"{name} {passed[name]}"
            with (files / "points").open("a") as points:
                print(passage, file=points)
        if point.removeprefix("stop ") in (name, passage):
            os.kill(os.getpid(), signal.SIGSTOP if point.startswith("stop ") else signal.SIGKILL)
        if cancellations:
            cancellations.pass_by(name, passage)

    bus = await Service.connect(address)
    manager, domains = build(paths, Settings(), None, MortalStore(paths.state / "checkpoints", pass_by))
    world = FakeRunner()
    host = LabHost(files)
    ports = replace(
        manager.ports,
        memory=(KeptMemory if (files / "kexec-said").exists() else HostMemory)(LabDevices(files)),
        journal=MortalJournal(paths.state / "journal", host, pass_by),
        clock=host,
        boot=host,
        files=host,
        sockets=host,
        kernels=FakeKernels(world),
        kexec=LabKexec(world, files),
        units=LabUnits(files),
    )
    manager = Manager(ports, LabUnits(files).settings())
    if domains:
        domains.attach(manager.arrive, manager.look_again, manager.reload)
    cancellations = Cancellations(manager, files)
    service = Service(bus, manager, paths.run)
    await Service.own_name(bus)
    await manager.read_definitions()
    if domains:
        domains.open()
    await manager.recover()
    service.open()
    print("recovered; VMs run as processes", file=sys.stderr, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    lost = asyncio.ensure_future(service.disconnected())
    await asyncio.wait({asyncio.ensure_future(stop.wait()), lost}, return_when=asyncio.FIRST_COMPLETED)
    if lost.done():
        os._exit(1)  # as cpr-agentd does
    await manager.close()
    if domains:
        await domains.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("point")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--bus-address", required=True)
    options = parser.parse_args()
    asyncio.run(serve(Paths(options.root), options.files or options.root, options.bus_address, options.point))


if __name__ == "__main__":
    main()
