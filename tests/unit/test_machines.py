# SPDX-License-Identifier: GPL-2.0-or-later
"""Which VMs systemd-machined lists, and what it may ask of them. machined and the leaders are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cpr_agent.core import machines
from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.machines import SERVICE, Listed, Machines
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Survives, VmState
from cpr_agent.errors import Busy, HostFailed, QemuFailed, WrongState
from tests.bench import Bench
from tests.fakes import Gate

UNIT = "cpr-vm@web1.service"
SAVE = SaveRequest(need=Survives.QEMU_RESTART)


class FakeRegistry:
    """Implements core.machines.Registry. A machine's unit is ``unit_of`` its leader, by default the VM's."""

    def __init__(self) -> None:
        self.machines: dict[str, Listed] = {}
        self.calls: list[str] = []
        self.fault: Exception | None = None
        self.unit_of: dict[int, str] = {}

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if self.fault:
            raise self.fault

    async def get(self, name: str) -> Listed | None:
        self._called("get")
        return self.machines.get(name)

    async def register(self, name: str, leader: int) -> None:
        self._called("register")
        assert name not in self.machines
        self.machines[name] = Listed(service=SERVICE, leader=leader, unit=self.unit_of.get(leader, UNIT))

    async def unregister(self, name: str) -> None:
        self._called("unregister")
        self.machines.pop(name, None)


class FakeLeaders:
    """Implements core.machines.Leaders: each QEMU has the leader ``pid``."""

    def __init__(self, pid: int = 7) -> None:
        self.pid = pid
        self.heard: dict[str, Callable[[str], None]] = {}

    def leader(self, qemu_pid: int) -> int:
        assert qemu_pid == os.getpid()
        return self.pid

    def hear(self, unit: str, asked: Callable[[str], None]) -> None:
        self.heard.setdefault(unit, asked)

    def unhear(self, unit: str) -> None:
        del self.heard[unit]


async def until(so: Callable[[], bool]) -> None:
    while not so():  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0.001)


class Hall:
    """A bench whose agent keeps machined's list, of one VM."""

    def __init__(self, root: Path) -> None:
        self.bench = Bench(root)
        self.bench.define("web1")
        self.bench.runner.units["web1"] = UNIT
        self.registry, self.leaders = FakeRegistry(), FakeLeaders()

    def run(self, story: Callable[[Manager], Awaitable[None]]) -> None:
        async def whole(manager: Manager) -> None:
            self.machines = Machines(manager, self.registry, self.leaders)
            running = asyncio.ensure_future(self.machines.run())
            await self.settle()
            try:
                await story(manager)
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running

        self.bench.run(whole)

    def ask(self, word: str) -> None:
        self.leaders.heard[UNIT](word)

    async def settle(self) -> None:
        """Until there is nothing left to tell machined, and no request to answer."""
        await asyncio.sleep(0)
        one = self.machines
        await until(lambda: not (one._dirty or one._tasks or one._due.is_set()))


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    return Hall(tmp_path)


def test_a_guest_that_runs_is_listed_and_one_that_is_saved_is_not(hall: Hall) -> None:
    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        assert hall.registry.calls == []
        await vm.start()
        await hall.settle()
        assert hall.registry.machines == {"web1": Listed(service=SERVICE, leader=7, unit=UNIT)}
        await vm.save(SAVE)
        await hall.settle()
        assert hall.registry.machines == {}
        hall.leaders.pid = 8
        await vm.load(LoadRequest())
        await hall.settle()
        assert hall.registry.machines["web1"].leader == 8

    hall.run(story)


def test_machined_hears_nothing_while_an_act_is_under_way(hall: Hall) -> None:
    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        gate = hall.bench.runner.gates[("web1", "connect")] = Gate()
        starting = asyncio.ensure_future(vm.start())
        await gate.entered.wait()
        assert hall.registry.calls == []
        gate.go.set()
        await starting
        await hall.settle()
        assert "web1" in hall.registry.machines

    hall.run(story)


def test_an_agent_that_starts_anew_leaves_the_list_as_it_is(hall: Hall) -> None:
    async def start(manager: Manager) -> None:
        await manager.vm("web1").start()
        await hall.settle()

    async def look(manager: Manager) -> None:  # noqa: ARG001 - what is there is enough
        assert hall.registry.calls == ["get"]
        assert "web1" in hall.registry.machines
        assert UNIT in hall.leaders.heard

    hall.run(start)
    hall.registry.calls.clear()
    hall.leaders.heard.clear()
    hall.run(look)


def test_a_new_qemu_takes_the_place_of_the_one_before(hall: Hall) -> None:
    hall.registry.machines["web1"] = Listed(service=SERVICE, leader=6, unit="cpr-vm@web1:b.service")

    async def story(manager: Manager) -> None:
        await manager.vm("web1").start()
        await hall.settle()
        assert hall.registry.machines["web1"] == Listed(service=SERVICE, leader=7, unit=UNIT)

    hall.run(story)


def test_a_machine_of_another_service_keeps_its_name(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    other = hall.registry.machines["web1"] = Listed(service="libvirt-qemu", leader=6, unit="machine-qemu.scope")

    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        for _ in range(2):
            await vm.start()
            await hall.settle()
            await vm.stop("hard")
            await hall.settle()
        assert hall.registry.machines["web1"] == other
        assert caplog.text.count("libvirt-qemu has a machine of this name") == 1

    hall.run(story)


def test_a_leader_whose_number_another_process_has_by_then_is_not_listed(hall: Hall) -> None:
    hall.registry.unit_of[7] = "ssh.service"

    async def story(manager: Manager) -> None:
        await manager.vm("web1").start()
        await hall.settle()
        assert hall.registry.calls[-1] == "unregister"
        assert hall.registry.machines == {}

    hall.run(story)


def test_without_a_leader_machined_is_not_even_asked(hall: Hall) -> None:
    hall.leaders.pid = 0

    async def story(manager: Manager) -> None:
        await manager.vm("web1").start()
        await hall.settle()
        assert hall.registry.calls == []
        assert hall.leaders.heard == {}

    hall.run(story)


def test_a_machined_that_does_not_answer_is_asked_again_later_and_told_of_once(
    hall: Hall, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "RETRY_S", 0.01)
    hall.registry.fault = HostFailed("systemd-machined has not answered")

    async def story(manager: Manager) -> None:
        await manager.vm("web1").start()
        await until(lambda: len(hall.registry.calls) >= 3)
        assert caplog.text.count("has not answered") == 1
        assert manager.vm("web1").state is VmState.RUNNING
        hall.registry.fault = None
        await until(lambda: "web1" in hall.registry.machines)

    hall.run(story)


def test_poweroff_presses_the_power_button(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.start()
        await hall.settle()
        hall.ask("poweroff")
        await hall.settle()
        await vm.idle()
        assert vm.state is VmState.STOPPED
        assert "VM web1: machinectl asks for its power button" in caplog.text

    hall.run(story)


@pytest.mark.parametrize("state", ["postmigrate", "paused"])
def test_poweroff_leaves_a_guest_that_does_not_run_as_it_is(
    hall: Hall, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.start()
        await hall.settle()
        if state == "postmigrate":
            await vm.save(SAVE)
        else:
            hall.bench.qemu().status = state
        hall.ask("poweroff")
        await hall.settle()
        await vm.idle()
        assert hall.bench.qemu().status == state
        assert "machinectl poweroff is refused: VM web1: is" in caplog.text
        with pytest.raises(WrongState):
            await vm.power_off()

    hall.run(story)


def test_poweroff_is_refused_in_the_middle_of_a_save(hall: Hall) -> None:
    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.start()
        gate = hall.bench.runner.gates[("web1", "save")] = Gate()
        saving = asyncio.ensure_future(vm.save(SAVE))
        await gate.entered.wait()
        with pytest.raises(Busy):
            await vm.power_off()
        gate.go.set()
        await saving
        assert vm.state is VmState.SAVED

    hall.run(story)


def test_poweroff_is_refused_while_a_job_is_about_to_save(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.start()
        await hall.settle()
        go = asyncio.Event()
        job = manager.jobs.start("upgrade", lambda _: go.wait())  # type: ignore[arg-type,return-value]  # its result is lost
        hall.ask("poweroff")
        await hall.settle()
        assert vm.state is VmState.RUNNING
        assert "VM web1: belongs to a host in the middle of upgrade" in caplog.text
        go.set()
        await job.over()

    hall.run(story)


def test_reboot_is_refused(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    async def story(manager: Manager) -> None:
        await manager.vm("web1").start()
        await hall.settle()
        hall.ask("reboot")
        await hall.settle()
        assert manager.vm("web1").state is VmState.RUNNING
        assert "machinectl reboot is refused: VM web1: can't be rebooted from the host in order" in caplog.text

    hall.run(story)


@pytest.mark.parametrize("status", ["io-error", "paused"])
def test_a_guest_that_stands_is_left_as_it_is_also_by_a_qemu_that_answers_late(hall: Hall, status: str) -> None:
    """Storage that hangs stops a guest, and keeps its QEMU from answering."""

    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.start()
        await hall.settle()
        await vm.machine.disconnect()
        connect, silent = vm.machine._connect, [QemuFailed("does not answer", vm="web1")]

        async def late(timeout_s: float) -> Any:
            if silent:
                raise silent.pop()
            return await connect(timeout_s)

        vm.machine._connect = late  # type: ignore[method-assign]
        hall.bench.qemu().status = status
        for _ in range(2):
            hall.ask("poweroff")
            await hall.settle()
            await vm.idle()
        assert vm.pid
        assert hall.bench.qemu().status == status

    hall.run(story)


def test_a_process_that_machined_took_too_late_does_not_stay_in_the_list(hall: Hall) -> None:
    async def story(manager: Manager) -> None:
        registry = hall.registry
        register = registry.register

        async def late(name: str, leader: int) -> None:
            await register(name, leader)
            raise HostFailed("systemd-machined has not answered RegisterMachine within 10 s")

        registry.register = late  # type: ignore[method-assign]
        registry.unit_of[7] = "ssh.service"
        vm = manager.vm("web1")
        await vm.start()
        await until(lambda: bool(registry.machines))
        registry.register = register  # type: ignore[method-assign]
        hall.leaders.pid = 0
        await until(lambda: hall.machines._retry is not None)
        hall.machines._retry.cancel()  # type: ignore[union-attr]
        hall.machines._retry = None
        hall.machines.vm_changed(vm)
        await hall.settle()
        assert not registry.machines

    hall.run(story)


def test_machined_that_fails_is_not_asked_more_often_by_a_guest_that_changes_often(hall: Hall) -> None:
    hall.registry.fault = HostFailed("systemd-machined can't be asked: Unit masked")

    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.start()
        await until(lambda: hall.machines._retry is not None)
        asked = len(hall.registry.calls)
        for _ in range(20):
            hall.machines.vm_changed(vm)
            await asyncio.sleep(0)
        assert len(hall.registry.calls) == asked
        hall.machines._dirty.clear()

    hall.run(story)
