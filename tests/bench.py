# SPDX-License-Identifier: GPL-2.0-or-later
"""Core on a bench: real store, journal, definitions and memory on files; QEMUs are fakes, and the agent can be killed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from cpr_agent.core.jobs import Job
from cpr_agent.core.listener import Listener
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import DaxDevice, Firmware, Manifest, Seconds, Vmstate
from cpr_agent.core.past import Record
from cpr_agent.core.ports import Ports
from cpr_agent.core.settings import AgentSection, Settings, WitnessSection
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.core.vm import Vm
from cpr_agent.host.firmware import KeptFirmware
from cpr_agent.host.this_host import ThisHost
from cpr_agent.memory.backends import HostMemory
from cpr_agent.store.checkpoints import CheckpointStore, PendingVmstate
from cpr_agent.store.history import History
from cpr_agent.store.journal import FileJournal
from cpr_agent.vm.definition import DefinitionDirectory
from tests.fakes import (
    AgentKilled,
    FakeDevices,
    FakeHooks,
    FakeHost,
    FakeKernels,
    FakeKexec,
    FakePrograms,
    FakeQemu,
    FakeRunner,
    FakeSurroundings,
    FakeUnits,
)

T = TypeVar("T")
RAM_BYTES = 16384
PATIENCE_S = 20.0


class MortalJournal(FileJournal):
    """The real one, and the agent can die before and after each record."""

    def __init__(self, path: Path, host: ThisHost, point: Callable[[str], None]) -> None:
        self._point = point
        super().__init__(path, host, host)

    def append(self, event: str, **facts: object) -> Record:
        self._point(f"before {event}")
        record = super().append(event, **facts)
        self._point(f"after {event}")
        return record

    def compact(self) -> None:
        self._point("before compact")
        super().compact()
        self._point("after compact")


class MortalState:
    """Implements core.ports.PendingState by the real one; the agent can die around each act."""

    def __init__(self, pending: PendingVmstate, point: Callable[[str], None]) -> None:
        self._pending = pending
        self._point = point
        self.vm = pending.vm
        self.fd = pending.fd
        self.path = pending.path

    def too_large(self) -> bool:
        return self._pending.too_large()

    def seal(self) -> Vmstate:
        self._point("before seal")
        return self._pending.seal()

    def commit(self, manifest: Manifest) -> None:
        self._point("before commit")
        self._pending.commit(manifest)
        self._point("after commit")

    def reader(self) -> int:
        return self._pending.reader()

    def abort(self) -> None:
        self._point("before abort")
        self._pending.abort()
        self._point("after abort")


class MortalStore(CheckpointStore):
    """Likewise."""

    def __init__(self, root: Path, point: Callable[[str], None]) -> None:
        super().__init__(root, ())
        self._point = point

    def begin(self, vm: str, filename: str) -> MortalState:  # type: ignore[override]  # the port's type
        self._point("before begin")
        return MortalState(super().begin(vm, filename), self._point)

    def reopen(self, vm: str, path: str) -> MortalState:  # type: ignore[override]  # likewise
        return MortalState(super().reopen(vm, path), self._point)

    def consume(self, manifest: Manifest) -> None:
        self._point("before consume")
        super().consume(manifest)
        self._point("after consume")

    def restore(self, vm: str, checkpoint: str) -> None:
        self._point("before restore")
        super().restore(vm, checkpoint)
        self._point("after restore")

    def discard(self, vm: str, suffix: str = "discarded") -> None:
        self._point("before discard-files")
        super().discard(vm, suffix)
        self._point("after discard-files")


class NamedFirmware(KeptFirmware):
    """The real one, but for the ROMs of this machine's QEMU, 5 MB in each of hundreds of directories."""

    def keep(self, vm: str, wanted: Firmware) -> None:
        super().keep(vm, Firmware(files=wanted.files))


class Bench:
    """Definitions, disk and QEMUs that outlive any agent; ``run`` is one agent's life."""

    def __init__(self, root: Path, witness: Literal["sampled", "off"] = "sampled") -> None:
        self.root = root
        self.settings = Settings(agent=AgentSection(device_timeout=Seconds(0)), witness=WitnessSection(kind=witness))
        self.runner = FakeRunner()
        self.devices = FakeDevices()
        self.host = FakeHost()
        self.kernels = FakeKernels(self.runner)
        self.kexec = FakeKexec(self.runner)
        self.units = FakeUnits(self.runner)
        self.hooks = FakeHooks(self.runner)
        self.surroundings = FakeSurroundings()
        self.definitions = root / "vms"
        self.definitions.mkdir()

    def define(
        self, name: str, device: str = "", order: int = 100, *, autostart: bool = False, on_lost_memory: str = "hold"
    ) -> None:
        (self.definitions / f"{name}.toml").write_text(
            f'[vm]\nuser = "root"\nautostart = {"true" if autostart else "false"}\n[save]\norder = {order}\n'
            f'[load]\non-lost-memory = "{on_lost_memory}"\n'
            f'[memory]\nsize = "{RAM_BYTES}"\ndevice = "{device or self.root / f"{name}.ram"}"\n'
        )

    def define_device(self, name: str, provider: str = "ACPI.NFIT") -> str:
        """A dax device, with an ordinary file in the place of its node, which core does not look at."""
        node = self.root / f"{name}.dax"
        node.write_bytes(bytes(RAM_BYTES))
        device = DaxDevice(
            node=str(node),
            uuid=f"uuid-of-{name}",
            size_bytes=RAM_BYTES,
            align_bytes=4096,
            resource=None,
            numa_node=0,
            provider=provider,
        )
        self.devices = FakeDevices(*self.devices.list(), device)
        return f"uuid:{device.uuid}"

    def ports(self) -> Ports:
        """Those of one agent."""
        return Ports(
            definitions=DefinitionDirectory(self.definitions, self.root / "run", self.root / "log"),
            runner=self.runner,
            memory=HostMemory(self.devices),
            store=MortalStore(self.root / "checkpoints", self.runner.point),
            journal=MortalJournal(self.root / "journal", self.host, self.runner.point),
            history=History(self.root / "history"),
            clock=self.host,
            boot=self.host,
            files=self.host,
            sockets=self.host,
            firmware=NamedFirmware(self.root / "firmware"),
            programs=FakePrograms(self.root / "programs", self.runner.point),
            kernels=self.kernels,
            kexec=self.kexec,
            units=self.units,
            hooks=self.hooks,
            surroundings=self.surroundings,
        )

    def run(self, work: Callable[[Manager], Awaitable[T]], *, early: bool = False) -> T:
        """Start an agent, let it recover, do ``work`` with it, and end it; what it left in the loop is cancelled.
        ``early``: it starts before the host's services, and ``work`` begins while it loads."""

        async def life() -> T:
            self.runner.agent_lives = True
            self.kexec.of_this_loop()
            for qemu in self.runner.qemus.values():
                await qemu.close()  # the connections of the agent before
            point = self.runner.point
            ports = self.ports()
            manager = Manager(ports, self.settings)
            with contextlib.closing(ports.journal):  # type: ignore[type-var]  # it is a FileJournal
                await manager.read_definitions()
                await manager.recover(early=early)
                if early:
                    return await work(manager)
                await manager.jobs.drain(PATIENCE_S)
                point("recovered")
                await manager.jobs.drain(PATIENCE_S)  # loads that were interrupted go on as a job
                result = await work(manager)
                point("done")
                await manager.close()
                return result

        async def bounded() -> T:
            async with asyncio.timeout(PATIENCE_S):
                return await life()

        return asyncio.run(bounded())

    def reboot(self) -> None:
        """The host starts anew, into the kernel that is loaded, if one is; its persistent memory stays."""
        self.runner.qemus.clear()
        self.runner.beside.clear()
        if self.kernels.is_loaded and self.kexec.under_way:
            self.host.release = self.kernels.is_loaded[0]
        self.host.boot += 1
        self.host.by_kexec = self.kexec.under_way is not None
        self.runner.forget_launches()
        self.units.boot()
        self.kernels.is_loaded = None
        self.kexec.promised, self.kexec.under_way = False, None
        self.kexec.ended_at_once = set()

    def soft_reboot(self) -> None:
        """The host's userspace starts anew; the kernel stays, and with it all memory and /run."""
        self.runner.qemus.clear()
        self.runner.beside.clear()
        self.host.soft += 1
        self.units.boot()
        self.kexec.under_way = None

    def vm(self, work: Callable[[Vm], Awaitable[T]], name: str = "web1") -> T:
        """``run`` with one VM."""
        return self.run(lambda manager: work(manager.vm(name)))

    def dies(self, point: str, work: Callable[[Vm], Awaitable[object]], name: str = "web1") -> None:
        """An agent that is killed in ``work``, "before X" or "after X", X a journal record or an act of the store."""
        self.runner.die_at = point
        with pytest.raises(AgentKilled):
            self.vm(work, name)
        self.runner.die_at = ""

    def journal(self) -> list[dict[str, Any]]:
        journal = FileJournal(self.root / "journal", self.host, self.host)
        journal.close()
        return journal.records()

    def history(self) -> list[GuestTimeline]:
        return History(self.root / "history").all()

    def records(self) -> list[str]:
        return [str(record["event"]) for record in self.journal()]

    def qemu(self, name: str = "web1") -> FakeQemu:
        return self.runner.qemus[name]

    def files(self, name: str = "web1") -> list[str]:
        directory = self.root / "checkpoints" / name
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


async def ended(manager: Manager, job: Job) -> Job:
    """Wait for its end, also of one that waits for the host's."""
    end = asyncio.Event()

    class End(Listener):
        def job_removed(self, other: Job) -> None:
            if other is job:
                end.set()

    listener = End()
    manager.listeners.add(listener)
    if job.id in manager.jobs.current:
        await end.wait()
    manager.listeners.remove(listener)
    return job
