# SPDX-License-Identifier: GPL-2.0-or-later
"""An agent that starts without a bus does what guests wait for, and comes to the bus once there is one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from cpr_agent.bus.client import CallError
from cpr_agent.bus.service import Service
from tests.lab import PATIENCE_S, Guest, Lab, until


def reached(guest: Guest) -> bool:
    try:
        return bool(guest.state)
    except CallError:
        return False


def without_bus(lab: Lab) -> None:
    lab.end_agent()
    lab.end_bus()
    lab.start_agent()


def test_a_load_that_was_interrupted_is_repeated_without_a_bus(lab: Lab) -> None:
    guest = lab.running()
    guest.save()
    lab.end_agent()
    lab.start_agent((sys.executable, "-m", "tests.bus.mortal_agent", "after load-begin"))
    with pytest.raises(CallError):
        guest.load()
    assert lab.agent_ended() == -signal.SIGKILL
    lab.end_bus()
    lab.start_agent()
    guest.until_counts()
    lab.restart_bus()
    until(lambda: reached(guest), "the agent comes to the bus")
    assert guest.state == "running"
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


def test_an_agent_ends_cleanly_that_never_had_a_bus(lab: Lab) -> None:
    guest = lab.running()
    without_bus(lab)
    assert lab.end_agent() == 0
    guest.until_counts()


def test_a_second_agent_without_a_bus_does_not_start(lab: Lab) -> None:
    """The bus is not what keeps two agents from having the same guests."""
    without_bus(lab)
    assert lab.spawn(lab.program).wait(PATIENCE_S) == 1
    assert "another agent has" in lab.log.read_text()


def test_a_name_that_another_process_has_is_taken_once_it_is_free(lab: Lab) -> None:
    guest = lab.running()
    without_bus(lab)
    agent = lab.agent_pid
    os.kill(agent, signal.SIGSTOP)  # or it might be first
    lab.restart_bus()

    async def hold() -> None:
        bus = await Service.connect(lab.address)
        await Service.own_name(bus)
        os.kill(agent, signal.SIGCONT)
        until(lambda: "another process owns org.cpragent1" in lab.log.read_text(), "the agent says so")
        bus.disconnect()

    asyncio.run(hold())
    until(lambda: reached(guest), "the agent comes to the bus")
    guest.assert_unbroken()
