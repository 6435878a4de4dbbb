# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's clock after a pause, set by a real qemu-ga in a real Linux."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from cpr_agent.vm.guest_agent import GuestAgent
from tests.lab import Lab, until

PAUSE_S = 60


def behind_s(socket: Path) -> float:
    """By how much the guest's clock is behind ours now, as its qemu-ga tells to the nanosecond: the best of three."""

    async def read() -> tuple[float, float]:
        async with GuestAgent.connected("linux", socket, timeout_s=120) as agent:
            asked = time.time()
            told_s = await agent.execute("guest-get-time", 120) / 1e9
            return time.time() - asked, asked - told_s

    return min(asyncio.run(read()) for _ in range(3))[1]


@pytest.mark.parametrize("resync", ["auto", "never"])
def test_a_clock_is_right_after_a_pause(lab: Lab, linux_with_agent: Path, resync: str) -> None:
    guest = lab.linux_guest("linux", linux_with_agent, "", *lab.agent_port())
    guest.definition["load"] = {"resync-clock": resync}
    lab.define(guest)
    pause_s = PAUSE_S if resync == "auto" else PAUSE_S / 10
    guest.start()
    guest.until_counts()
    socket = lab.root / "qga"
    before_s = behind_s(socket)  # it booted by its RTC, which tells whole seconds
    guest.save()
    threading.Event().wait(pause_s)  # the pause is what is tested
    guest.load()
    guest.until_counts()

    def told() -> dict[str, object]:
        return dict(lab.client(lambda client: client.manager("ListHistory", "a{sv}", {}))[-1])

    if resync == "never":
        assert behind_s(socket) - before_s > pause_s - 1
        assert "clock-behind" not in told()
        return
    until(lambda: "clock-behind" in told() or told()["clock-problem"], "the clock is set")
    assert told()["clock-problem"] == ""
    assert pause_s - 1 < told()["clock-behind"] < pause_s + 60  # type: ignore[operator]
    assert abs(behind_s(socket)) < 1
    guest.assert_unbroken()


def test_a_guest_that_does_not_answer_runs_all_the_same(lab: Lab) -> None:
    """The tiny guest has the port, and nobody listens there."""
    guest = lab.running("web1", *lab.agent_port())
    guest.save()
    guest.load()
    guest.assert_unbroken()
    (told,) = until(
        lambda: [h for h in lab.client(lambda client: client.manager("ListHistory", "a{sv}", {})) if h["clock-problem"]],
        "it is told",
    )
    assert "did not answer guest-sync-delimited" in told["clock-problem"]
    assert "its clock was not set" in lab.cprctl("history").stdout
