# SPDX-License-Identifier: GPL-2.0-or-later
"""The policies of every retry, by tenacity."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
FASTEST_S = 0.005


async def poll_until(
    probe: Callable[[], Awaitable[T]], good: Callable[[T], bool], timeout_s: float, slowest_s: float = 0.1
) -> T:
    """Ask QEMU again until the answer is ``good``, for the few changes that it announces by no event.

    From 5 ms doubling to ``slowest_s``. Returns the last answer, good or not; errors of ``probe`` pass through at once.
    """
    answer = await probe()
    if good(answer):
        return answer
    import tenacity  # where the first answer is good, as it mostly is, no guest waits for this at boot

    await asyncio.sleep(FASTEST_S)
    retrying = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_delay(timeout_s),
        wait=tenacity.wait_exponential(multiplier=FASTEST_S, max=slowest_s),
        retry=tenacity.retry_if_result(lambda answer: not good(answer)),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    return await retrying(probe)
