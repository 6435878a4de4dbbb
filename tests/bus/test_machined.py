# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls to systemd-machined over a real bus; it is a fake, as the real one can't be had on a private bus. What the real one
makes of them, tests/machines shows in the host VM."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.machined import Machined
from cpr_agent.bus.wire import AgentBus
from cpr_agent.core.machines import SERVICE, Listed
from cpr_agent.errors import HostFailed, WrongState
from tests.lab import ROOT, private_bus

PATIENCE_S = 20.0


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with private_bus(tmp_path) as (address, _):
        yield address


@contextlib.contextmanager
def machined(address: str, how: str = "answers") -> Iterator[None]:
    command = [sys.executable, "-m", "tests.bus.fake_machined", address, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.terminate()


def ask(address: str, story: Callable[[Machined], Awaitable[None]], timeout_s: float = PATIENCE_S) -> None:
    async def whole() -> None:
        bus = await AgentBus(address).connect()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story(Machined(bus, timeout_s))
        finally:
            bus.disconnect()

    asyncio.run(whole())


def test_a_vm_is_registered_found_and_taken_from_the_list(address: str) -> None:
    async def story(registry: Machined) -> None:
        assert await registry.get("web1") is None
        await registry.register("web1", 4711)
        assert await registry.get("web1") == Listed(service=SERVICE, leader=4711, unit="cpr-vm@web1.service")
        with pytest.raises(WrongState, match="it says: Machine 'web1' already exists"):
            await registry.register("web1", 4712)
        await registry.unregister("web1")
        assert await registry.get("web1") is None
        await registry.unregister("web1")

    with machined(address):
        ask(address, story)


def test_a_name_that_machined_does_not_take_is_that_vm_s_problem_alone(address: str) -> None:
    async def story(registry: Machined) -> None:
        with pytest.raises(WrongState, match="it says: Invalid machine name"):
            await registry.register("odd..name", 4711)

    with machined(address):
        ask(address, story)


@pytest.mark.parametrize("how", ["silence", "denies"])
def test_a_machined_that_can_t_be_asked_is_one_that_fails(address: str, how: str) -> None:
    async def story(registry: Machined) -> None:
        with pytest.raises(HostFailed, match="systemd-machined"):
            await registry.get("web1")

    with machined(address, how):
        ask(address, story, timeout_s=0.2)


@pytest.mark.parametrize("how", ["nothing", "numbers"])
def test_an_answer_of_another_shape_is_one_of_a_machined_that_fails(address: str, how: str) -> None:
    async def story(registry: Machined) -> None:
        if how == "numbers":
            await registry.register("web1", 4711)
        with pytest.raises(HostFailed, match="answers for web1 with what is no machine"):
            await registry.get("web1")

    with machined(address, how):
        ask(address, story)


def test_no_machined_is_one_that_fails(address: str) -> None:
    async def story(registry: Machined) -> None:
        with pytest.raises(HostFailed, match="can't be asked"):
            await registry.get("web1")

    ask(address, story)
