# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk that is full: no record can be written, and no guest is left stopped, or let run, because of that."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.jobs import Job
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Survives, VmState
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.upgrade.preflight import UpgradeRequest
from cpr_agent.core.vm import Vm
from cpr_agent.errors import MemoryChanged, SaveFailed
from tests.bench import Bench, ended

NAMES = ("web1", "web2")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two VMs that run on dax devices."""
    bench = Bench(tmp_path)
    for name in NAMES:
        bench.define(name, bench.define_device(name))

    async def start(manager: Manager) -> None:
        for name in NAMES:
            await manager.vm(name).start()

    bench.run(start)
    return bench


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def statuses(bench: Bench) -> set[str]:
    return {qemu.status for qemu in bench.runner.qemus.values()}


@pytest.mark.parametrize("status", ["running", "paused"])
@pytest.mark.parametrize("point", ["before save-undone", "before resumed"])
def test_a_save_that_fails_is_undone_without_a_record(bench: Bench, status: str, point: str) -> None:
    bench.qemu().by_hand(status)
    bench.runner.faults["web1", "after-save"] = SaveFailed("No space left on device", vm="web1")

    async def save(vm: Vm) -> None:
        bench.runner.at[point] = full
        with pytest.raises(SaveFailed, match=f"The guest is {status}, as before" if status == "running" else "VM web1"):
            await vm.save(SaveRequest())
        bench.runner.at.clear()
        bench.runner.faults.clear()
        await vm.refresh()
        await vm.save(SaveRequest())
        await vm.resume()

    bench.vm(save)
    assert bench.qemu().status == status
    assert "manifest.json" not in bench.files()
    assert bench.runner.violations == []


@pytest.mark.parametrize("act", ["load", "resume"])
@pytest.mark.parametrize("unwritten", ["record", "hold"])
def test_a_guest_whose_hold_can_not_be_written_does_not_run(bench: Bench, act: str, unwritten: str) -> None:
    async def load(manager: Manager) -> None:
        vm = manager.vm("web1")
        await vm.save(SaveRequest())
        with (bench.root / "web1.dax").open("r+b") as ram:
            ram.seek(8192)
            ram.write(b"another guest's")
        if unwritten == "record":
            bench.runner.at["before held"] = full
        else:
            manager.ports.store.hold = lambda vm, held: full()  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(MemoryChanged):
                await (vm.load(LoadRequest()) if act == "load" else vm.resume())
        assert vm.state is VmState.SAVED

    bench.run(load)
    assert bench.qemu().status == "postmigrate"
    assert "manifest.json" in bench.files()


@pytest.mark.parametrize("runs_by_load", [False, True])
@pytest.mark.parametrize("act", ["load", "resume"])
def test_a_load_whose_end_can_not_be_announced_can_be_repeated(bench: Bench, act: str, *, runs_by_load: bool) -> None:
    """Its guest has not run, and the QEMU that it was for ends: a guest in it could be let run without a proof."""
    bench.runner.load_runs_guest = runs_by_load

    async def load(vm: Vm) -> None:
        await vm.save(SaveRequest())
        bench.runner.at["before resume"] = full
        with pytest.raises(OSError, match="No space left"):
            await vm.load(LoadRequest())
        assert "web1" not in bench.runner.qemus
        assert vm.state is VmState.SAVED
        bench.runner.at.clear()
        await (vm.load(LoadRequest()) if act == "load" else vm.resume())

    bench.vm(load)
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


@pytest.mark.parametrize("phase", [Phase.SAVING, Phase.SAVED, Phase.COMMITTING])
def test_a_phase_that_can_not_be_written_stops_no_guest(bench: Bench, phase: Phase) -> None:
    async def upgrade(manager: Manager) -> Job:
        bench.runner.at[f"before upgrade-{phase}"] = full
        failed = await ended(manager, manager.upgrade(UpgradeRequest()))
        assert "No space left" in failed.result
        bench.runner.at.clear()
        return await ended(manager, manager.save_all(Survives.KEXEC))

    assert bench.run(upgrade).result == "done"
    assert [record["event"] for record in bench.journal()].count("resumed") == (0 if phase is Phase.SAVING else 2)


def test_no_phase_that_can_not_be_written_leaves_guests_stopped(bench: Bench) -> None:
    async def upgrade(manager: Manager) -> None:
        bench.runner.at["before upgrade-committing"] = full
        await ended(manager, manager.upgrade(UpgradeRequest()))

    bench.run(upgrade)
    assert statuses(bench) == {"running"}
    assert not bench.kexec.promised
