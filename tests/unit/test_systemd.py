# SPDX-License-Identifier: GPL-2.0-or-later
"""PID 1 at its own socket: jobs, their ends, and a connection that is lost. The other end is a program of this test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from pystemd.dbusexc import DBusBaseError

from cpr_agent.host.systemd import LOST, Systemd
from tests.pid1 import Pid1, pid1

PATIENCE_S = 30.0


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Pid1]:
    with pid1(tmp_path / "private") as other:
        yield other


def with_systemd(tmp_path: Path, story: Callable[[Systemd], Awaitable[None]]) -> None:
    async def whole() -> None:
        systemd = Systemd(tmp_path / "private")
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story(systemd)
        finally:
            systemd.close()

    asyncio.run(whole())


async def start(systemd: Systemd, other: Pid1, unit: str, mode: str = "replace") -> asyncio.Task[str]:
    """Asked for, and not done yet."""
    job = asyncio.ensure_future(systemd.start_unit(unit, mode))
    await asyncio.sleep(0)
    assert other.heard() == f"started {unit} {mode}"
    return job


def test_a_job_is_waited_for_at_pid_1s_own_socket(tmp_path: Path, other: Pid1) -> None:
    async def story(systemd: Systemd) -> None:
        first = await start(systemd, other, "a.service", "ignore-dependencies")
        second = await start(systemd, other, "b.service")
        other.tell("end 2 b.service failed")
        assert await second == "failed"
        assert not first.done()
        other.tell("end 1 a.service done")
        assert await first == "done"

    with_systemd(tmp_path, story)


def test_the_end_of_a_job_that_comes_with_the_answer_to_a_call_is_heard(tmp_path: Path, other: Pid1) -> None:
    """The call takes it from the socket, which tells the loop of nothing then."""

    async def story(systemd: Systemd) -> None:
        first = await start(systemd, other, "a.service")
        other.tell("end 1 a.service done")
        second = await start(systemd, other, "b.service")  # whose answer comes after that
        assert await first == "done"
        other.tell("end 2 b.service done")
        assert await second == "done"

    with_systemd(tmp_path, story)


def test_a_connection_that_is_lost_ends_the_wait_and_is_made_anew(tmp_path: Path, other: Pid1) -> None:
    """PID 1 closes it when it executes itself anew."""

    async def story(systemd: Systemd) -> None:
        job = await start(systemd, other, "a.service")
        other.tell("hang-up")
        assert await job == LOST
        again = await start(systemd, other, "b.service")
        other.tell("end 1 b.service done")
        assert await again == "done"

    with_systemd(tmp_path, story)


def test_a_refused_call_leaves_the_connection_as_it_is(tmp_path: Path, other: Pid1) -> None:
    async def story(systemd: Systemd) -> None:
        job = await start(systemd, other, "a.service")
        with pytest.raises(DBusBaseError):
            systemd.reload()
        other.tell("end 1 a.service done")
        assert await job == "done"

    with_systemd(tmp_path, story)


def test_without_a_bus_pid_1_is_still_asked_at_its_own_socket(
    tmp_path: Path, other: Pid1, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")

    async def story(systemd: Systemd) -> None:
        assert not systemd.use_bus()
        job = await start(systemd, other, "a.service")
        other.tell("end 1 a.service done")
        assert await job == "done"

    with_systemd(tmp_path, story)
