# SPDX-License-Identifier: GPL-2.0-or-later
"""A job that is cancelled leaves nothing behind: no work that goes on, and no guest without what it needs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.jobs import Job, JobState
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import RunState, Survives, VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, QemuFailed, WrongState
from cpr_agent.files import write_atomically
from cpr_agent.store import checkpoints
from tests.bench import Bench, ended
from tests.fakes import Gate


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A VM that runs on a dax device."""
    bench = Bench(tmp_path)
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    return bench


async def turns(number: int = 50) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def save(vm: Vm) -> None:
    await vm.save(SaveRequest())


def test_a_checkpoint_that_becomes_live_does_so_before_it_is_taken_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread writes it, which no cancellation ends."""
    write = write_atomically
    writing, go = asyncio.Event(), threading.Event()

    async def act(vm: Vm) -> None:
        loop = asyncio.get_running_loop()

        def write_late(path: Path, content: bytes) -> None:
            if path.name == "manifest.json":
                loop.call_soon_threadsafe(writing.set)
                go.wait()
            write(path, content)

        monkeypatch.setattr(checkpoints, "write_atomically", write_late)
        task = asyncio.ensure_future(save(vm))
        await writing.wait()
        task.cancel()
        for _ in range(10):  # an undo that did not wait would be over then
            await turns()
            await asyncio.to_thread(lambda: None)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await loop.shutdown_default_executor()

    bench.vm(act)
    assert bench.qemu().status == "running"
    assert bench.files() == []


@pytest.mark.parametrize("status", ["running", "paused"])
def test_a_load_that_is_cancelled_as_its_guest_goes_on_is_a_load(bench: Bench, status: str) -> None:
    """The guest has its timeline, its clock, and its hooks."""
    bench.qemu().by_hand(status)
    bench.vm(save)
    point = "before resume" if status == "paused" else "before resumed"

    async def cancel(manager: Manager) -> Job:
        job = manager.load_all()
        bench.runner.at[point] = lambda: manager.jobs.cancel(job.id)
        await ended(manager, job)
        await manager.vm("web1").settled()
        return job

    assert bench.run(cancel).state is JobState.CANCELLED
    assert bench.qemu().status == status
    assert [timeline.vm for timeline in bench.history()] == ["web1"]
    assert [phase for phase, *_ in bench.hooks.ran][-1] == "post-load"


def test_a_transfer_that_is_cancelled_as_its_guest_goes_on_is_one(bench: Bench) -> None:
    bench.runner.transfers = True

    async def cancel(manager: Manager) -> Job:
        job = manager.refresh_all()
        bench.runner.at["before resumed"] = lambda: manager.jobs.cancel(job.id)
        await ended(manager, job)
        await manager.vm("web1").settled()
        return job

    old = bench.qemu()
    assert bench.run(cancel).state is JobState.CANCELLED
    assert bench.qemu() is not old
    assert bench.qemu().status == "running"
    assert [timeline.vm for timeline in bench.history()] == ["web1"]
    assert bench.runner.violations == []


def test_work_that_a_load_has_left_goes_on_when_its_job_is_cancelled(bench: Bench) -> None:
    bench.vm(save)

    async def cancel(manager: Manager) -> Job:
        clock = bench.runner.gates["web1", "set_guest_clock"] = Gate()
        job = manager.load_all()
        await clock.entered.wait()
        await turns()
        manager.jobs.cancel(job.id)
        await ended(manager, job)
        clock.go.set()
        await manager.vm("web1").settled()
        return job

    assert bench.run(cancel).state is JobState.CANCELLED
    assert [phase for phase, *_ in bench.hooks.ran][-1] == "post-load"


@pytest.mark.parametrize("point", ["save", "after-save", "start", "connect", "load", "after-load", "cont"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_refresh_in_turn_that_is_cancelled_leaves_its_guest_running(bench: Bench, point: str, times: int) -> None:
    """Once the old QEMU has ended, the load comes to its end."""

    async def cancel(manager: Manager) -> Job:
        gate = bench.runner.gates["web1", point] = Gate()
        job = manager.refresh_all_in_turn()
        await gate.entered.wait()
        for _ in range(times):
            with contextlib.suppress(WrongState):  # it may be over already
                manager.jobs.cancel(job.id)
            await turns()
        gate.go.set()
        return await ended(manager, job)

    old = bench.qemu()
    assert bench.run(cancel).state is JobState.CANCELLED
    assert (bench.qemu() is old) == ("save" in point)
    assert bench.qemu().status == "running"
    assert "manifest.json" not in bench.files()
    assert bench.records()[-1] == "refreshed"
    assert bench.runner.violations == []


def test_a_refresh_in_turn_that_is_cancelled_holds_a_guest_whose_memory_has_changed(bench: Bench) -> None:
    async def cancel(manager: Manager) -> Job:
        job = manager.refresh_all_in_turn()

        def spoil() -> None:
            manager.jobs.cancel(job.id)
            with (bench.root / "web1.dax").open("r+b") as ram:
                ram.seek(8192)
                ram.write(b"another guest's")

        bench.runner.at["after saved"] = spoil
        return await ended(manager, job)

    assert bench.run(cancel).state is JobState.CANCELLED

    async def look(vm: Vm) -> VmState:
        return vm.state

    assert bench.vm(look) is VmState.HELD
    assert bench.qemu().status == "postmigrate"


def test_a_job_that_is_over_can_not_be_cancelled(bench: Bench) -> None:
    async def late(manager: Manager) -> None:
        job = await ended(manager, manager.save_all(Survives.KEXEC))
        with pytest.raises(WrongState, match="job 1 is over"):
            manager.jobs.cancel(job.id)

    bench.run(late)


# -- what QEMU tells of at the end of an act ------------------------------------------------------------------------------


def after_the_last_look(vm: Vm, event: Callable[[], None]) -> None:
    """``event`` happens once the act has looked at QEMU for the last time, and before it is over."""
    derive, looks = vm.machine.derive, [0]

    async def derive_then() -> None:
        await derive()
        looks[0] += 1
        if looks[0] == 2:
            event()

    vm.machine.derive = derive_then  # type: ignore[method-assign]


def test_an_event_at_the_very_end_of_an_act_is_not_missed(bench: Bench) -> None:
    async def act(vm: Vm) -> None:
        after_the_last_look(vm, lambda: bench.qemu().by_hand("paused"))
        with pytest.raises(CprError):
            await vm.load(LoadRequest())
        await vm.settled()
        assert (vm.state, vm.run_state) == (VmState.PAUSED, RunState.PAUSED)

    bench.vm(act)


def test_a_guest_that_can_not_be_woken_is_no_obstacle_for_others(bench: Bench) -> None:
    async def act(manager: Manager) -> None:
        vm = manager.vm("web1")
        vm.machine.expect_late_sleep(60)
        bench.runner.faults["web1", "wake"] = QemuFailed("it sleeps on", vm="web1")
        bench.qemu().by_hand("suspended")
        await manager.reload()
        await vm.settled()
        assert vm.state is VmState.SUSPENDED

    bench.run(act)


# -- a hand on another socket of QEMU's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["load", "resume"])
def test_a_saved_guest_that_is_let_run_by_hand_while_it_is_proved_is_not_ended(bench: Bench, act: str) -> None:
    if act == "resume":
        bench.qemu().by_hand("paused")
    bench.vm(save)
    old = bench.qemu()
    bench.runner.at["before load-begin"] = lambda: old.by_hand("running")

    async def load(vm: Vm) -> None:
        with pytest.raises(CprError, match="was resumed by hand meanwhile"):
            await (vm.load(LoadRequest()) if act == "load" else vm.resume())
        assert vm.state is VmState.RUNNING

    bench.vm(load)
    assert (bench.qemu(), old.status) == (old, "running")
    assert bench.records()[-1] == "resumed-by-hand"
    assert bench.runner.violations == []


@pytest.mark.parametrize("transfers", [False, True])
def test_a_guest_that_is_let_run_by_hand_during_a_refresh_runs_in_no_other_qemu(bench: Bench, *, transfers: bool) -> None:
    bench.runner.transfers = transfers
    old = bench.qemu()
    bench.runner.at["before resume"] = lambda: old.by_hand("running")

    async def refresh(vm: Vm) -> None:
        with pytest.raises(CprError, match="was resumed by hand meanwhile"):
            await vm.replace_qemu()
        assert vm.state is VmState.RUNNING

    bench.vm(refresh)
    assert (bench.qemu(), old.status) == (old, "running")
    assert bench.runner.beside == {}
    assert "manifest.json" not in bench.files()
    assert bench.runner.violations == []
