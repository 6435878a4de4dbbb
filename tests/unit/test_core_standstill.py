# SPDX-License-Identifier: GPL-2.0-or-later
"""While guests stand still no QEMU has all the time that it wants: the VM is given up, and the others go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core import turns
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Policy, RunState, Seconds, Survives, VmState
from cpr_agent.core.settings import UpgradeSection
from cpr_agent.core.turns import Places
from cpr_agent.core.upgrade import load_all, save_all
from cpr_agent.errors import Busy
from tests.bench import Bench, ended
from tests.fakes import Gate

OTHERS = ("web1", "web2")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Three VMs that run, and little patience."""
    monkeypatch.setattr(save_all, "UNDO_S", 0.2)
    bench = Bench(tmp_path)
    bench.settings = replace(bench.settings, upgrade=UpgradeSection(standstill=Seconds(0.2)))
    for name in ("evil", *OTHERS):
        bench.define(name, bench.define_device(name))

    async def start(manager: Manager) -> None:
        for vm in manager.vms.values():
            await vm.start()

    bench.run(start)
    return bench


def stuck(bench: Bench, *operations: str) -> list[Gate]:
    gates = [Gate() for _ in operations]
    bench.runner.gates |= {("evil", operation): gate for operation, gate in zip(operations, gates, strict=True)}
    return gates


def test_one_that_takes_too_long_is_given_up_and_the_others_run_on(bench: Bench) -> None:
    """Neither its save nor its undo comes to an end: the rollback waits for none of both, and nobody else may act on it."""

    async def save(manager: Manager) -> None:
        written, undone = stuck(bench, "after-save", "cont")
        job = await ended(manager, manager.save_all(Survives.KEXEC))
        assert "VM evil" in job.result
        assert "The others were resumed (web1, web2)" in job.result
        assert [manager.vm(name).state for name in OTHERS] == [VmState.RUNNING] * 2
        with pytest.raises(Busy):
            await manager.vm("evil").start()
        for gate in (written, undone):
            gate.go.set()
        await manager.vm("evil").idle()
        assert manager.vm("evil").state is VmState.RUNNING

    bench.run(save)
    assert bench.runner.violations == []
    assert bench.files("evil") == []


def test_by_force_one_that_is_stuck_is_ended_and_the_others_are_saved(bench: Bench) -> None:
    async def save(manager: Manager) -> None:
        stuck(bench, "save", "cont", "run_state")
        del bench.runner.gates["evil", "run_state"]  # it answers until it is to save
        job = await ended(manager, manager.save_all(Survives.KEXEC, Policy.FORCE))
        assert job.result == "done"
        assert [manager.vm(name).state for name in OTHERS] == [VmState.SAVED] * 2
        assert manager.vm("evil").pid == 0

    bench.runner.at["kill"] = lambda: None
    bench.run(save)
    assert bench.runner.violations == []


def test_a_cancelled_save_waits_for_no_undo_that_is_stuck(bench: Bench) -> None:
    async def save(manager: Manager) -> None:
        written, undone = stuck(bench, "after-save", "cont")
        job = manager.save_all(Survives.KEXEC)
        await written.entered.wait()
        manager.jobs.cancel(job.id)
        assert (await ended(manager, job)).result == "cancelled"
        assert [manager.vm(name).run_state for name in OTHERS] == [RunState.RUNNING] * 2
        for gate in (written, undone):
            gate.go.set()
        await manager.vm("evil").idle()
        assert manager.vm("evil").state is VmState.RUNNING

    bench.run(save)
    assert bench.runner.violations == []


def test_a_load_that_takes_long_keeps_no_later_one_from_its_turn(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_all, "GROUP_S", 0.1)
    monkeypatch.setattr(turns, "PLACE_S", 0.1)
    monkeypatch.setattr(turns, "at_once", lambda: 1)
    bench.define("evil", bench.define_device("evil"), order=1)

    async def load(manager: Manager) -> None:
        assert (await ended(manager, manager.save_all(Survives.KEXEC))).result == "done"
        (loading,) = stuck(bench, "load")
        job = manager.load_all()
        await loading.entered.wait()
        for name in OTHERS:
            while manager.vm(name).state is not VmState.RUNNING:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
        loading.go.set()
        assert (await ended(manager, job)).result == "done"

    bench.run(load)
    assert bench.runner.violations == []


def test_a_place_is_handed_on_in_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PLACE_S", 0.05)
    monkeypatch.setattr(turns, "at_once", lambda: 1)

    async def story() -> None:
        places = Places()
        async with places.place(), places.place():
            pass  # the second came to its place while the first still had it
        async with places.place():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await places._free.acquire()

    asyncio.run(story())
