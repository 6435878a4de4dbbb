# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU whose load itself lets the guest go on (ADR 18): its checkpoint is spent before, and put back if no guest ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.model import VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import LoadFailed, QemuFailed
from tests.bench import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.runner.load_runs_guest = True
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    return bench


async def save(vm: Vm) -> None:
    await vm.save(SaveRequest())


async def load(vm: Vm) -> str:
    return await vm.load(LoadRequest())


async def state(vm: Vm) -> VmState:
    return vm.state


def test_the_checkpoint_is_spent_before_the_load(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.at["load"] = lambda: None
    bench.vm(load)
    assert bench.records()[-3:] == ["load-begin", "resume", "resumed"]
    assert bench.qemu().status == "running"
    assert "manifest.json" not in bench.files()
    assert bench.runner.violations == []


def test_a_load_that_is_refused_puts_the_checkpoint_back_and_can_be_repeated(bench: Bench) -> None:
    bench.vm(save)
    bench.runner.faults["web1", "load"] = LoadFailed("Unknown section", vm="web1")
    with pytest.raises(LoadFailed, match="could not be loaded: Unknown section.* can be repeated"):
        bench.vm(load)
    assert bench.records()[-3:] == ["load-begin", "resume", "load-failed"]
    assert {"manifest.json", "vmstate"} <= set(bench.files())
    assert bench.vm(state) is VmState.SAVED
    bench.runner.faults.clear()
    bench.vm(load)
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


def test_after_no_answer_the_checkpoint_stays_spent(bench: Bench) -> None:
    """The guest may run: the run state decides once QEMU answers."""
    bench.vm(save)
    bench.runner.faults["web1", "after-load"] = QemuFailed("QEMU did not answer", vm="web1")
    with pytest.raises(QemuFailed, match="did not answer"):
        bench.vm(load)
    bench.runner.faults.clear()
    assert "manifest.json" not in bench.files()
    assert bench.vm(state) is VmState.RUNNING
    assert bench.runner.violations == []


@pytest.mark.parametrize("point", ["before resume", "after resume", "before consume", "after consume"])
def test_an_agent_that_ends_before_the_load_leaves_a_guest_that_is_loaded_by_the_next(bench: Bench, point: str) -> None:
    bench.vm(save)
    bench.dies(point, load)
    assert bench.vm(state) is VmState.RUNNING  # the next agent repeats the load by itself
    assert bench.runner.violations == []
    assert len(bench.runner.qemus) == 1


@pytest.mark.parametrize("point", ["before resumed", "after resumed"])
def test_an_agent_that_ends_after_the_load_leaves_a_guest_that_runs(bench: Bench, point: str) -> None:
    bench.vm(save)
    bench.dies(point, load)
    qemu = bench.qemu()
    assert qemu.status == "running"
    assert bench.vm(state) is VmState.RUNNING
    assert bench.qemu() is qemu
    assert bench.runner.violations == []


@pytest.mark.parametrize("point", ["before restore", "after restore", "before load-failed", "after load-failed"])
def test_an_agent_that_ends_while_it_puts_the_checkpoint_back_loses_nothing(bench: Bench, point: str) -> None:
    bench.vm(save)
    bench.runner.faults["web1", "load"] = LoadFailed("Unknown section", vm="web1")
    bench.dies(point, load)
    bench.runner.faults.clear()
    bench.vm(state)
    if bench.vm(state) is VmState.SAVED:
        bench.vm(load)
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []


@pytest.mark.parametrize("status", ["paused", "suspended"])
def test_a_guest_that_did_not_run_is_what_it_was(bench: Bench, status: str) -> None:
    bench.qemu().by_hand(status)
    bench.vm(save)
    bench.vm(load)
    assert bench.qemu().status == status
    assert "manifest.json" not in bench.files()
    assert bench.runner.violations == []


def test_a_new_qemu_comes_in_turn(bench: Bench) -> None:
    async def replace(vm: Vm) -> Replacement:
        return await vm.replace_qemu()

    assert bench.vm(replace) is Replacement.IN_TURN
    assert bench.qemu().status == "running"
    assert bench.runner.violations == []
