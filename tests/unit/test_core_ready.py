# SPDX-License-Identifier: GPL-2.0-or-later
"""Callers come before the VMs are recovered: they wait, or are told so, and no guest is loaded twice or left out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cpr_agent.core import vm as core_vm
from cpr_agent.core.acts.requests import SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import VmState
from cpr_agent.errors import Busy
from tests.bench import Bench, ended
from tests.fakes import Gate


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two VMs, whose guests are saved, and one of which has no QEMU any more."""
    bench = Bench(tmp_path)
    for name in ("web1", "web2"):
        bench.define(name)

    async def save(manager: Manager) -> None:
        for vm in manager.vms.values():
            await vm.start()
            await vm.save(SaveRequest())

    bench.run(save)
    bench.runner.end("web2")
    return bench


async def begun(bench: Bench, manager: Manager) -> tuple[Gate, asyncio.Task[None]]:
    """A recovery anew, in which web1's QEMU does not answer yet."""
    gate = bench.runner.gates["web1", "run_state"] = Gate()
    await manager.expect_recovery()
    recovery = asyncio.create_task(manager.recover())
    await gate.entered.wait()
    return gate, recovery


def test_an_act_before_the_recovery_is_refused_as_busy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_vm, "RECOVERY_PATIENCE_S", 0.0)

    async def act(manager: Manager) -> None:
        gate, recovery = await begun(bench, manager)
        assert manager.vm("web1").state is VmState.RECOVERING
        for refused in (manager.vm("web1").start, manager.vm("web1").resume, manager.vm("web1").discard):
            with pytest.raises(Busy, match="in the middle of the recovery"):
                await refused()
        gate.go.set()
        await recovery
        assert manager.vm("web1").state is VmState.SAVED
        await manager.vm("web1").resume()

    bench.run(act)


def test_an_act_waits_for_a_recovery_that_is_soon_over(bench: Bench) -> None:
    async def act(manager: Manager) -> None:
        gate, recovery = await begun(bench, manager)
        resume = asyncio.create_task(manager.vm("web1").resume())
        await asyncio.sleep(0)
        gate.go.set()
        await asyncio.gather(resume, recovery)
        assert manager.vm("web1").state is VmState.RUNNING

    bench.run(act)


def test_a_load_of_all_waits_for_the_recovery_and_loads_each_guest_once(bench: Bench) -> None:
    async def load(manager: Manager) -> None:
        gate, recovery = await begun(bench, manager)
        job = manager.load_all()
        await asyncio.sleep(0)
        assert job.step.startswith("waiting for the recovery of web1")
        assert "load-begin" not in bench.records()
        gate.go.set()
        await recovery
        assert (await ended(manager, job)).result == "done"

    bench.run(load)
    assert sorted(str(record["vm"]) for record in bench.journal() if record["event"] == "resume") == ["web1", "web2"]


def test_the_memory_of_a_guest_is_occupied_before_its_recovery(bench: Bench) -> None:
    """Its definition may name another range since."""

    async def look(manager: Manager) -> None:
        await manager.vm("web1").resume()
        occupied = manager.occupied("web2")
        manager.vm("web1").machine.pid = 0  # an agent that has just started
        gate, recovery = await begun(bench, manager)
        assert occupied
        assert manager.occupied("web2") == occupied
        gate.go.set()
        await recovery

    bench.run(look)
