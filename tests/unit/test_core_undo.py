# SPDX-License-Identifier: GPL-2.0-or-later
"""Undos come to their end, however often the act that they take back is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cpr_agent.core.undo import Undo, uninterrupted
from tests.fakes import Gate


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_work_ends_before_its_last_cancellation_is_raised() -> None:
    async def story() -> None:
        gate = Gate()

        async def work() -> str:
            gate.entered.set()
            await gate.go.wait()
            return "done"

        inner = asyncio.ensure_future(work())
        task = asyncio.ensure_future(uninterrupted(inner))
        await gate.entered.wait()
        for word in ("first", "second", "last"):
            task.cancel(word)
            await turn()
            assert not task.done()
        gate.go.set()
        with pytest.raises(asyncio.CancelledError, match="last"):
            await task
        assert inner.result() == "done"

    asyncio.run(story())


def test_the_failure_of_cancelled_work_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        gate = Gate()

        async def work() -> None:
            await gate.go.wait()
            raise ValueError("it failed")

        task = asyncio.ensure_future(uninterrupted(work()))
        await turn()
        task.cancel()
        await turn()
        gate.go.set()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value.__cause__, ValueError)

    asyncio.run(story())
    assert "it failed" in caplog.text


def test_without_a_cancellation_the_result_or_the_error_is_the_works() -> None:
    async def fail() -> None:
        raise ValueError("no")

    async def story() -> None:
        assert await uninterrupted(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(ValueError, match="no"):
            await uninterrupted(fail())

    asyncio.run(story())


@pytest.mark.parametrize("end", ["done", "left", "failed", "step failed"])
def test_steps_run_in_reverse_unless_the_block_was_done(end: str) -> None:
    ran: list[str] = []

    def step(name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            ran.append(name)
            if end == "step failed" and name == "second":
                raise ValueError("the step")

        return run

    async def story() -> None:
        async with Undo() as undo:
            undo.push(step("first"))
            undo.push(step("second"))
            if end == "done":
                undo.done()
            if end.endswith("failed"):
                raise KeyError("the block")

    if end.endswith("failed"):
        with pytest.raises(KeyError, match="the block"):
            asyncio.run(story())
    else:
        asyncio.run(story())
    assert ran == ([] if end == "done" else ["second", "first"])
