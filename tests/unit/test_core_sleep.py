# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that must sleep while they are saved: put to sleep, woken after the load, and never left asleep."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.model import VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import Blocked, CprError, GuestAgentFailed, SaveFailed
from tests.bench import Bench
from tests.fakes import Gate

DEVICE = "net0 (vfio-pci at 00:03.0)"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A guest with a device of the host; the agent that started it is gone."""
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())
    bench.runner.vfio["web1"] = [DEVICE]
    return bench


async def save(vm: Vm) -> None:
    await vm.save(SaveRequest())


def suspend_is(bench: Bench, wanted: str) -> None:
    path = bench.definitions / "web1.toml"
    path.write_text(path.read_text().replace("[save]\n", f'[save]\nsuspend = "{wanted}"\n'))


def state(bench: Bench) -> VmState:
    async def look(vm: Vm) -> VmState:
        return vm.state

    return bench.vm(look)


@pytest.mark.parametrize("suspend", ["auto", "always"])
@pytest.mark.parametrize("act", ["load", "resume"])
def test_it_sleeps_while_it_is_saved_and_is_woken_after(bench: Bench, suspend: str, act: str) -> None:
    if suspend == "always":
        suspend_is(bench, suspend)
        bench.runner.vfio.clear()
    bench.vm(save)
    assert bench.qemu().status == "postmigrate"
    assert state(bench) is VmState.SAVED
    bench.vm(lambda vm: vm.load(LoadRequest()) if act == "load" else vm.resume())
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []
    told = [event for event in bench.records() if event in ("suspend", "save-begin", "resume", "resumed", "woken")]
    assert told == ["suspend", "save-begin", "resume", "resumed", "woken"]


def test_a_guest_that_its_user_put_to_sleep_is_not_woken(bench: Bench) -> None:
    bench.qemu().by_hand("suspended")
    bench.vm(save)
    bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.qemu().status == "suspended"
    assert "woken" not in bench.records()


@pytest.mark.parametrize(
    ("suspend", "status", "why"),
    [
        ("never", "running", "is not to be put to sleep (save.suspend is never)"),
        ("auto", "paused", "is paused"),
        ("always", "paused", "is paused"),
    ],
)
def test_what_cannot_sleep_is_refused_before(bench: Bench, suspend: str, status: str, why: str) -> None:
    suspend_is(bench, suspend)
    bench.qemu().by_hand(status)
    with pytest.raises(Blocked) as refused:
        bench.vm(save)
    assert DEVICE in refused.value.text
    assert why in refused.value.text
    assert bench.qemu().status == status
    assert "suspend" not in bench.records()


@pytest.mark.parametrize("fault", ["suspend", "after-suspend", "save", "after-save"])
def test_a_save_that_fails_leaves_it_awake(bench: Bench, fault: str) -> None:
    kind = GuestAgentFailed if fault.endswith("suspend") else SaveFailed
    bench.runner.faults["web1", fault] = kind("it failed", vm="web1")
    with pytest.raises(SaveFailed, match="VM web1: could not be saved: .*it failed"):
        bench.vm(save)
    assert bench.qemu().status == "running"
    assert bench.files() == []
    assert bench.runner.violations == []


def test_one_that_wakes_by_itself_is_not_saved(bench: Bench) -> None:
    async def meddle(vm: Vm) -> None:
        gate = bench.runner.gates["web1", "save"] = Gate()
        saving = asyncio.ensure_future(save(vm))
        await gate.entered.wait()
        bench.runner.vfio.clear()  # QEMU would refuse it otherwise; one that has only `suspend = "always"` it saves
        bench.qemu()._slept = True
        bench.qemu().by_hand("running")
        bench.qemu()._slept = False
        gate.go.set()
        await saving

    with pytest.raises(SaveFailed, match="woke by itself before it was saved. The guest is running, as before"):
        bench.vm(meddle)
    assert bench.qemu().status == "running"
    assert bench.files() == []


def test_one_that_goes_to_sleep_when_nobody_waits_any_more_is_woken(bench: Bench) -> None:
    async def late(vm: Vm) -> None:
        bench.runner.faults["web1", "suspend"] = GuestAgentFailed("it did not within 60 s", vm="web1")
        with pytest.raises(SaveFailed, match="it must sleep for that, and it did not within 60 s"):
            await save(vm)
        bench.qemu().by_hand("suspended")
        await vm.settled()

    bench.vm(late)
    assert bench.qemu().status == "running"


def journal_points(bench: Bench) -> list[str]:
    bench.vm(save)
    bench.vm(lambda vm: vm.load(LoadRequest()))
    return [f"{when} {event}" for event in dict.fromkeys(bench.records()) for when in ("before", "after")]


def test_killed_at_each_record_it_does_not_stay_asleep(tmp_path: Path) -> None:
    """Of a save and a load; a new record is covered by itself."""

    def fresh(name: str) -> Bench:
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name)
        bench.define("web1")
        bench.vm(lambda vm: vm.start())
        bench.runner.vfio["web1"] = [DEVICE]
        return bench

    async def save_and_load(vm: Vm) -> None:
        await save(vm)
        await vm.load(LoadRequest())

    async def to_the_end(vm: Vm) -> None:
        if vm.checkpointed:
            await vm.load(LoadRequest())

    points = [point for point in journal_points(fresh("points")) if not point.endswith(" start")]
    assert "after suspend" in points
    for number, point in enumerate(points):
        bench = fresh(str(number))
        bench.dies(point, save_and_load)
        bench.vm(to_the_end)
        assert bench.qemu().status == "running", point
        assert bench.runner.violations == [], point


def test_a_guest_that_cannot_be_woken_is_told_of_and_woken_by_the_next_agent(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.faults["web1", "wake"] = GuestAgentFailed("no", vm="web1")
    with pytest.raises(CprError):
        bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.qemu().status == "suspended"
    bench.runner.faults.clear()
    assert state(bench) is VmState.RUNNING
