# SPDX-License-Identifier: GPL-2.0-or-later
"""Any acts, any faults, and agents that are killed anywhere: the guest is never corrupted, run twice, or lost."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Survives, VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, QemuFailed, WrongState
from tests.bench import PATIENCE_S, Bench
from tests.fakes import AgentKilled, FakeRunner


async def save_all(manager: Manager) -> None:
    manager.save_all(Survives.QEMU_RESTART)
    await manager.jobs.drain(PATIENCE_S)


async def load_all(manager: Manager) -> None:
    manager.load_all()
    await manager.jobs.drain(PATIENCE_S)


async def end_saved_qemu(manager: Manager) -> None:
    if manager.vm("web1").state is VmState.SAVED:
        await manager.vm("web1").stop("hard")


def with_vm(act: Callable[[Vm], Awaitable[object]]) -> Callable[[Manager], Awaitable[object]]:
    return lambda manager: act(manager.vm("web1"))


def by_hand(wanted: str, *allowed: str) -> Callable[[Manager], Awaitable[object]]:
    """What an admin does on his own QMP socket; the agent hears of it."""

    async def act(manager: Manager) -> None:
        runner = manager.ports.runner
        assert isinstance(runner, FakeRunner)
        qemu = runner.qemus.get("web1")
        if qemu and qemu.status in allowed:
            qemu.by_hand(wanted)
        await manager.vm("web1").refresh()

    return act


ACTS: dict[str, Callable[[Manager], Awaitable[object]]] = {
    "save": with_vm(lambda vm: vm.save(SaveRequest())),
    "load": with_vm(lambda vm: vm.load(LoadRequest())),
    "resume": with_vm(lambda vm: vm.resume()),
    "start": with_vm(lambda vm: vm.start()),
    "save all": save_all,
    "load all": load_all,
    "end the saved QEMU": end_saved_qemu,
    "pause by hand": by_hand("paused", "running"),
    "continue by hand": by_hand("running", "paused", "postmigrate"),
}
FAULTS: tuple[str, ...] = (
    "start",
    "connect",
    "run_state",
    "save",
    "after-save",
    "load",
    "after-load",
    "cont",
    "after-cont",
)
FAULTS += ("half-written", "stopped-first", "settle")


@dataclass(frozen=True)
class Life:
    """One agent: what it is asked to do, in which of QEMU's operations it meets a fault, and how long it lives."""

    acts: list[str]
    faults: list[str]
    points: int | None
    qemu_dies: bool = False
    """After it, while no agent is there to see it."""


lives = st.builds(
    Life,
    acts=st.lists(st.sampled_from(sorted(ACTS)), min_size=1, max_size=4),
    faults=st.lists(st.sampled_from(FAULTS), max_size=1),
    points=st.none() | st.integers(1, 60),
)


def live(bench: Bench, life: Life) -> None:
    async def act(manager: Manager) -> None:
        for name in life.acts:
            with contextlib.suppress(CprError):
                await ACTS[name](manager)

    bench.runner.faults = {("web1", fault): QemuFailed(f"{fault} failed", vm="web1") for fault in life.faults}
    bench.runner.life_left = life.points
    with contextlib.suppress(AgentKilled):
        bench.run(act)
    bench.runner.faults, bench.runner.life_left = {}, None
    if life.qemu_dies:
        bench.runner.end("web1")


async def look(_manager: Manager) -> None:
    """An agent that is asked nothing."""


async def bring_it_back(manager: Manager, *, paused: bool) -> None:
    """What an admin would do at last. Nobody else may have left the guest ``paused``."""
    vm = manager.vm("web1")
    assert paused or vm.state is not VmState.PAUSED
    if vm.state is VmState.SAVED:
        await vm.load(LoadRequest())
    if vm.run_state == "postmigrate":  # a paused guest whose save failed; a later agent can't know of it
        with contextlib.suppress(WrongState):
            await vm.resume()
    if vm.run_state == "postmigrate":
        await ACTS["continue by hand"](manager)
    if vm.state is VmState.PAUSED:
        await vm.resume()
    assert vm.state is VmState.RUNNING, (vm.state, vm.error)


@contextlib.contextmanager
def a_guest(witness: Literal["sampled", "off"], *, delegated: bool = False) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="cpr-agent-test-", dir="/dev/shm") as directory:
        bench = Bench(Path(directory), witness)
        bench.runner.delegated = delegated
        bench.define("web1")
        bench.vm(lambda vm: vm.start())
        yield bench


@settings(max_examples=100)
@given(st.lists(lives, min_size=1, max_size=4), st.booleans())
def test_a_guest_survives_any_lives_of_agents(history: list[Life], delegated: bool) -> None:  # noqa: FBT001 - drawn
    with a_guest(witness="sampled", delegated=delegated) as bench:
        for life in history:
            live(bench, life)
        # A guest that could not be continued is a paused one, and saved again as that.
        paused = any("pause by hand" in life.acts or "cont" in life.faults for life in history)
        bench.run(lambda manager: bring_it_back(manager, paused=paused))
        runner = bench.runner
        assert runner.violations == []
        assert runner.started.count(("web1", "start")) == 1, "it was booted again"
        assert bench.qemu().count == runner.counts["web1"]
        assert "manifest.json" not in bench.files(), "a guest that runs can still be loaded"


@pytest.mark.parametrize("act", ["save", "load", "resume", "save all", "load all", "end the saved QEMU"])
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("delegated", [False, True], ids=["own", "delegated"])
def test_a_guest_survives_an_agent_that_is_killed_anywhere_in(act: str, *, paused: bool, delegated: bool) -> None:
    """Wherever it is killed: the next agent brings the guest back, and if QEMU died as well, what is left is not loaded
    onto RAM that has moved on. No witness would notice it here: the order of things alone must do."""
    for points in range(1, 200):
        for qemu_dies in (False, True):
            with a_guest(witness="off", delegated=delegated) as bench:
                if paused:
                    live(bench, Life(["pause by hand"], [], None))
                if not act.startswith("save"):
                    live(bench, Life(["save"], [], None))
                live(bench, Life([act], [], points, qemu_dies))
                lived = bench.runner.agent_lives
                if qemu_dies:
                    live(bench, Life(["load"], [], None))
                else:
                    bench.run(lambda manager: bring_it_back(manager, paused=paused))
                assert bench.runner.violations == []
                assert bench.runner.started.count(("web1", "start")) == 1
        if lived:
            return
    raise AssertionError("it never got done")


@pytest.mark.parametrize("status", ["paused", "suspended"])
@pytest.mark.parametrize("fault", ["after-save", "half-written"])
@pytest.mark.parametrize("by_load", [False, True], ids=["by cont", "by the load"])
def test_a_guest_that_stands_survives_an_agent_killed_anywhere_in_a_save_that_fails(
    status: str, fault: str, *, by_load: bool
) -> None:
    """No checkpoint is left of it: one of its QEMUs must have it at any time."""
    for points in range(1, 200):
        with a_guest(witness="off") as bench:
            bench.runner.load_runs_guest = by_load
            bench.qemu().by_hand(status)
            live(bench, Life(["save"], [fault], points))
            lived = bench.runner.agent_lives
            if status == "paused":
                bench.run(lambda manager: bring_it_back(manager, paused=True))
            else:
                bench.run(look)
                assert bench.qemu().status in ("suspended", "postmigrate", "paused")
            assert bench.runner.violations == []
            assert bench.runner.started.count(("web1", "start")) == 1
        if lived:
            return
    raise AssertionError("it never got done")
