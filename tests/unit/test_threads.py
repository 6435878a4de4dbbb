# SPDX-License-Identifier: GPL-2.0-or-later
"""Each VM's files are looked at in threads of its own."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cpr_agent.core.threads import THREADS, Threads
from cpr_agent.errors import StorageSilent


def test_who_waits_for_a_vm_that_is_removed_meanwhile_is_told_and_not_cancelled() -> None:
    silent = threading.Event()

    async def story() -> None:
        threads = Threads()
        looks = [asyncio.create_task(threads.run("web1", silent.wait, patience_s=0.5)) for _ in range(THREADS + 1)]
        await asyncio.sleep(0)  # all have asked
        threads.forget("web1")
        for look in looks:
            with pytest.raises(StorageSilent):
                await look

    try:
        asyncio.run(story())
    finally:
        silent.set()
