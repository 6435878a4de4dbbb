# SPDX-License-Identifier: GPL-2.0-or-later
"""A new QEMU for a guest without a reboot: beside the old one, which takes the guest back if anything fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Difference, PluggedDevice, VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import AlreadySaved, LoadFailed, QemuFailed, WrongState
from tests.bench import Bench
from tests.fakes import AgentKilled, Gate

QEMU = "/usr/bin/qemu-system-x86_64"
LOADED = ["manifest.json.loaded", "vmstate.loaded"]


def fresh(root: Path) -> Bench:
    root.mkdir(exist_ok=True)
    bench = Bench(root)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A VM that runs; the agent that started it is gone."""
    return fresh(tmp_path / "bench")


async def refresh(vm: Vm) -> str:
    return await vm.replace_qemu()


def state(bench: Bench) -> VmState:
    async def look(vm: Vm) -> VmState:
        return vm.state

    return bench.vm(look)


def test_a_device_that_a_hook_has_unplugged_puts_no_guest_to_sleep(tmp_path: Path) -> None:
    """It is asked for after the hooks: its guest gets its new QEMU beside the old one."""
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.runner.plugged["web1"] = [PluggedDevice(name="peripheral/vf0", kind="vfio-pci")]
    bench.vm(lambda vm: vm.start())
    bench.runner.at["hook pre-save"] = bench.runner.plugged.clear
    assert bench.vm(refresh) == "beside"
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


def test_the_guest_goes_on_in_another_qemu(bench: Bench) -> None:
    for _ in range(3):
        old = bench.qemu()
        assert bench.vm(refresh) == "beside"
        assert bench.qemu() is not old
        assert bench.qemu().status == "running"
        assert bench.runner.beside == {}
        assert bench.files() == LOADED
    assert bench.runner.violations == []


def test_what_two_must_not_open_is_refused_before_the_new_one_starts(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.define("web1")
    path = bench.definitions / "web1.toml"
    arguments = 'arguments = ["-netdev", "tap,id=net0,ifname=tap0,script=no"]'
    path.write_text(path.read_text().replace("[vm]\n", f"[vm]\n{arguments}\n"))
    bench.vm(lambda vm: vm.start())
    old = bench.qemu()
    bench.runner.faults["web1", "start"] = AssertionError("the new one was started")
    with pytest.raises(LoadFailed, match="two at once can't have the tap device tap0.*cprctl refresh --in-turn web1"):
        bench.vm(refresh)
    assert bench.qemu() is old
    assert old.status == "running"
    bench.runner.faults.clear()
    assert bench.vm(lambda vm: vm.replace_qemu(Replacement.IN_TURN)) == "in-turn"


@pytest.mark.parametrize("fault", ["start", "connect", "differences", "load", "after-load"])
def test_what_fails_leaves_it_in_the_old_one(bench: Bench, fault: str) -> None:
    old = bench.qemu()

    async def fail(vm: Vm) -> None:
        bench.runner.faults["web1", fault] = QemuFailed("the new one is broken", vm="web1")
        with pytest.raises(
            LoadFailed, match="VM web1: could not get a new QEMU: .*broken.* goes on in the QEMU that it had"
        ):
            await refresh(vm)

    bench.vm(fail)
    assert bench.qemu() is old
    assert old.status == "running"
    assert bench.runner.beside == {}
    stopped = fault in ("load", "after-load")
    assert bench.files() == (["manifest.json.discarded", "vmstate.discarded"] if stopped else [])
    assert ("save-begin" in bench.records()) == stopped
    bench.runner.faults.clear()
    assert bench.vm(refresh) == "beside"


def test_one_qemu_hands_it_to_the_other_where_both_can(bench: Bench) -> None:
    bench.runner.transfers = True
    for _ in range(3):
        old = bench.qemu()
        assert bench.vm(refresh) == "transfer"
        assert bench.qemu() is not old
        assert bench.qemu().status == "running"
        assert bench.runner.beside == {}
        assert bench.files() == []
    assert "save-begin" not in bench.records()
    assert bench.runner.violations == []


@pytest.mark.parametrize(
    "fault",
    ["start", "handing_over", "connect", "differences", "take_over", "half-taken", "after-take_over", "handed_over"],
)
def test_what_is_not_handed_over_stays_in_the_old_one(bench: Bench, fault: str) -> None:
    bench.runner.transfers = True
    old = bench.qemu()

    async def fail(vm: Vm) -> None:
        bench.runner.faults["web1", fault] = QemuFailed("the new one is broken", vm="web1")
        with pytest.raises(LoadFailed, match="could not get a new QEMU: .*broken.* goes on in the QEMU that it had"):
            await refresh(vm)

    bench.vm(fail)
    assert (bench.qemu(), old.status) == (old, "running")
    assert bench.runner.beside == {}
    assert bench.runner.violations == []
    stopped = fault in ("half-taken", "after-take_over", "handed_over")
    assert ("transfer-undone" in bench.records()) == stopped
    bench.runner.faults.clear()
    assert bench.vm(refresh) == "transfer"


def test_an_older_qemu_is_refused(bench: Bench) -> None:
    old = bench.qemu()
    bench.runner.lacking = [Difference("version of QEMU", "10.0 (the same or newer is good)", "7.2")]
    with pytest.raises(LoadFailed, match="version of QEMU was 10.0 .* is 7.2"):
        bench.vm(refresh)
    assert (bench.qemu(), old.status) == (old, "running")


@pytest.mark.parametrize("status", ["paused", "suspended"])
def test_a_guest_that_does_not_run_gets_it_in_turn(bench: Bench, status: str) -> None:
    bench.qemu().by_hand(status)
    assert bench.vm(refresh) == "in-turn"
    assert bench.qemu().status == status
    assert bench.runner.violations == []


def in_turn(vm: Vm) -> Awaitable[str]:
    return vm.replace_qemu(Replacement.IN_TURN)


def kept(bench: Bench) -> list[str]:
    return [path.name for path in (bench.root / "programs").glob("*")]


@pytest.mark.parametrize("status", ["running", "paused", "suspended"])
@pytest.mark.parametrize("operation", ["start", "differences", "load", "after-load"])
def test_in_turn_what_fails_brings_the_old_one_back(bench: Bench, operation: str, status: str) -> None:
    if status != "running":
        bench.qemu().by_hand(status)
    bench.runner.broken[QEMU] = operation
    back = "VM web1: could not get a new QEMU: .*broken.* Its guest goes on in the QEMU that it had, on the same RAM. "
    for _ in range(2):  # also once it runs in the one that was kept
        with pytest.raises(LoadFailed, match=back):
            bench.vm(in_turn)
        assert bench.qemu().status == status
        assert str(bench.root) in bench.qemu().launch.argv[0]
        assert bench.files() == LOADED
        assert kept(bench) == ["web1"]
    bench.runner.broken.clear()
    bench.vm(in_turn)
    assert (bench.qemu().status, bench.qemu().launch.argv[0]) == (status, QEMU)
    assert kept(bench) == []
    assert bench.runner.violations == []


def spoil(bench: Bench) -> None:
    with (bench.root / "web1.ram").open("r+b") as ram:
        os.pwrite(ram.fileno(), b"\xff" * 100, 8192)


def test_memory_that_has_changed_is_not_run_on_in_the_old_one(bench: Bench) -> None:
    """The new one beside it could have written there."""
    bench.runner.at["after commit"] = lambda: spoil(bench)
    old = bench.qemu()
    with pytest.raises(LoadFailed, match="its RAM is not what it was.* It stays saved, and stands still"):
        bench.vm(refresh)
    bench.runner.at.clear()
    assert (bench.qemu(), old.status) == (old, "postmigrate")
    assert state(bench) is VmState.HELD
    assert bench.runner.beside == {}
    assert bench.runner.violations == []


def test_in_turn_an_older_one_brings_the_old_one_back(bench: Bench) -> None:
    bench.runner.broken[QEMU] = "lesser"
    with pytest.raises(LoadFailed, match="version of QEMU was 10.0 .* is 7.2.* goes on in the QEMU that it had"):
        bench.vm(in_turn)
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


def test_in_turn_what_both_fail_leaves_it_saved(bench: Bench) -> None:
    bench.runner.faults["web1", "load"] = LoadFailed("no", vm="web1")
    with pytest.raises(LoadFailed, match="old QEMU, brought back, failed too: .* It stays saved, and the load can"):
        bench.vm(in_turn)
    assert state(bench) is VmState.SAVED
    bench.runner.faults.clear()
    bench.runner.broken[QEMU] = "load"
    assert bench.vm(lambda vm: vm.load(LoadRequest())) == ""
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


def refresh_while(bench: Bench, operation: str, change: Callable[[], object]) -> LoadFailed:
    """In turn, and ``change`` happens during that operation of a QEMU; it fails."""

    async def act(vm: Vm) -> None:
        gate = bench.runner.gates["web1", operation] = Gate()
        refreshing = asyncio.ensure_future(vm.replace_qemu(Replacement.IN_TURN))
        await gate.entered.wait()
        change()
        gate.go.set()
        await refreshing

    with pytest.raises(LoadFailed) as caught:
        bench.vm(act)
    bench.runner.gates.clear()
    return caught.value


@pytest.mark.parametrize("lost", ["not kept", "damaged"])
def test_in_turn_without_the_old_one_it_stays_saved(bench: Bench, lost: str) -> None:
    """There is no room for it, say; or what is kept is not the program that has saved the guest."""
    programs = bench.root / "programs"
    if lost == "not kept":
        programs.write_text("in the way")

    def damage() -> None:
        for copy in programs.glob("web1/bin/*"):
            os.truncate(copy, 1000)

    bench.runner.broken[QEMU] = "start"
    error = refresh_while(bench, "save", damage)
    assert "broken" in error.what
    why = ": its old QEMU could not be kept (" if lost == "not kept" else ""
    assert error.left.startswith(f"it stays saved{why}")
    assert error.left.endswith(", and the load can be repeated")
    assert state(bench) is VmState.SAVED
    bench.runner.broken.clear()
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.runner.violations == []


def test_memory_that_has_changed_is_not_proved_by_the_old_one_either(bench: Bench) -> None:
    bench.runner.broken[QEMU] = "load"
    error = refresh_while(bench, "load", lambda: spoil(bench))
    assert "brought back, failed too: its RAM is not what it was" in error.what
    assert state(bench) is VmState.HELD
    assert bench.runner.violations == []


def test_what_is_saved_or_stopped_is_refused(bench: Bench) -> None:
    bench.vm(lambda vm: vm.save(SaveRequest()))
    with pytest.raises(AlreadySaved):
        bench.vm(refresh)
    bench.vm(lambda vm: vm.resume())
    bench.vm(lambda vm: vm.stop("hard"))
    with pytest.raises(WrongState):
        bench.vm(refresh)


@pytest.mark.parametrize("how", ["transfer", "beside", "in-turn", "brought back"])
def test_killed_anywhere_the_guest_goes_on(tmp_path: Path, how: str) -> None:
    """At each touch of the world; the next agent has it running by itself, in one QEMU."""

    async def act(vm: Vm) -> None:
        if how == "brought back":
            with pytest.raises(LoadFailed, match="goes on in the QEMU that it had"):
                await in_turn(vm)
        else:
            assert await vm.replace_qemu(Replacement.IN_TURN if how == "in-turn" else None) == how

    points, ended = 0, False
    while not ended:
        points += 1
        bench = fresh(tmp_path / str(points))
        bench.runner.transfers = how == "transfer"
        if how == "brought back":
            bench.runner.broken[QEMU] = "load"
        started = bench.qemu()
        bench.runner.life_left = points
        with contextlib.suppress(AgentKilled):
            bench.vm(act)
            ended = True
        bench.runner.life_left = None
        assert state(bench) is VmState.RUNNING, points
        assert bench.runner.beside == {}, points
        assert bench.runner.violations == [], points
        taken_back = {"rollback", "transfer-undone"} & {*bench.records()}
        assert (bench.qemu() is started) == ("resume" not in bench.records() or bool(taken_back)), points
        if not ended:
            save_of_an_admin_is_left_alone(bench)
    assert points > 20


def save_of_an_admin_is_left_alone(bench: Bench) -> None:
    """A refresh that was killed is over once the guest goes on."""
    bench.vm(lambda vm: vm.save(SaveRequest()))
    assert state(bench) is VmState.SAVED


def test_all_get_one_and_the_first_that_fails_ends_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for order, name in enumerate(("web1", "web2", "web3")):
        bench.define(name, order=order)

    async def start(manager: Manager) -> None:
        for vm in manager.vms.values():
            await vm.start()

    async def refresh_all(manager: Manager) -> str:
        job = manager.refresh_all()
        await manager.jobs.drain(60)
        return job.result

    bench.run(start)
    assert bench.run(refresh_all) == "done"
    bench.runner.faults["web2", "load"] = LoadFailed("no", vm="web2")
    said = bench.run(refresh_all)
    assert "VM web2: could not get a new QEMU" in said
    assert "1 of 3 have a new QEMU, and these were not tried: web3" in said
    assert {qemu.status for qemu in bench.runner.qemus.values()} == {"running"}
    assert bench.runner.violations == []
