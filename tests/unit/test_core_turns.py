# SPDX-License-Identifier: GPL-2.0-or-later
"""Many guests at once: none stands still for another one's sake longer than it must."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from cpr_agent.core import turns
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import DaxDevice, Survives
from cpr_agent.core.turns import Turns
from tests.bench import Bench, ended
from tests.fakes import FakeDevices, Gate


async def until_idle() -> None:
    """Whatever can go on without anybody's help has done so."""
    for _ in range(20):
        await asyncio.sleep(0)


class Standing:
    """Who has its turn now, and lets it go when told."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.now: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def wants(self, name: str) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._stand(name)))
        await until_idle()

    async def ends(self, name: str) -> None:
        self._ends[name].set()
        await until_idle()

    async def _stand(self, name: str) -> None:
        async with self._turns.turn(name):
            self.now.append(name)
            await self._ends[name].wait()
            self.now.remove(name)


def test_no_turn_begins_before_all_are_ready_and_few_last_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "at_once", lambda: 2)

    async def story() -> None:
        all_turns = Turns([["one", "two", "three"]])
        all_turns.call(0)
        standing = Standing(all_turns)
        await standing.wants("one")
        await standing.wants("two")
        assert standing.now == [], "three is still being asked"
        await standing.wants("three")
        first, second = standing.now
        await standing.ends(second)
        assert first in standing.now
        assert len(standing.now) == 2

    asyncio.run(story())


def test_one_that_will_never_want_its_turn_is_not_waited_for() -> None:
    async def story() -> None:
        all_turns = Turns([["one", "two"]])
        all_turns.call(0)
        standing = Standing(all_turns)
        await standing.wants("one")
        all_turns.no_longer_awaited("two")
        await until_idle()
        assert standing.now == ["one"]

    asyncio.run(story())


def test_a_group_begins_when_it_is_called_and_all_of_all_groups_are_ready() -> None:
    async def story() -> None:
        all_turns = Turns([["one", "two"], ["three"]])
        standing = Standing(all_turns)
        all_turns.call(0)
        for name in ("one", "two"):
            await standing.wants(name)
        assert standing.now == [], "three of the next group is still being asked"
        await standing.wants("three")
        assert standing.now == ["one", "two"]
        for name in ("one", "two"):
            await standing.ends(name)
        assert standing.now == [], "it was not called yet"
        all_turns.call(1)
        await until_idle()
        assert standing.now == ["three"]

    asyncio.run(story())


def test_a_late_one_is_waited_for_by_its_own_group_alone() -> None:
    async def story() -> None:
        all_turns = Turns([["one"], ["two", "sleeper"]], ["sleeper"])
        standing = Standing(all_turns)
        all_turns.call(0)
        for name in ("one", "two"):
            await standing.wants(name)
        await all_turns.all_ready()
        assert standing.now == ["one"]
        await standing.ends("one")
        all_turns.call(1)
        await until_idle()
        assert standing.now == []
        await standing.wants("sleeper")
        assert sorted(standing.now) == ["sleeper", "two"]

    asyncio.run(story())


class LateDevices(FakeDevices):
    """One of them comes when its gate is opened."""

    def __init__(self, late: str, *devices: DaxDevice) -> None:
        super().__init__(*devices)
        self.late, self.gate = late, Gate()

    async def wait(self, good: Callable[[DaxDevice], bool], timeout_s: float) -> DaxDevice | None:
        found = await super().wait(good, timeout_s)
        if found and found.uuid == self.late:
            self.gate.entered.set()
            await self.gate.go.wait()
        return found


def test_a_device_that_is_awaited_takes_no_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "at_once", lambda: 1)
    bench = Bench(tmp_path)
    names = ("first", "second", "third")
    for name in names:
        bench.define(name, bench.define_device(name))

    async def save(manager: Manager) -> None:
        for name in names:
            await manager.vm(name).start()
        assert (await ended(manager, manager.save_all(Survives.KEXEC))).result == "done"

    bench.run(save)
    for name in names:
        bench.runner.end(name)
    bench.devices = late = LateDevices("uuid-of-first", *bench.devices.list())

    async def load(manager: Manager) -> None:
        others = [bench.runner.gates.setdefault((name, "after-cont"), Gate()) for name in names[1:]]
        job = manager.load_all()
        await late.gate.entered.wait()
        for gate in others:
            gate.go.set()  # here to tell, not to wait
        for gate in others:
            await gate.entered.wait()
        assert bench.runner.qemus.keys() == {"second", "third"}
        late.gate.go.set()
        assert (await ended(manager, job)).result == "done"

    bench.run(load)
    assert {name: qemu.status for name, qemu in bench.runner.qemus.items()} == dict.fromkeys(names, "running")
    assert bench.runner.violations == []
