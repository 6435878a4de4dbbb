# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads of each VM's own, in which its files are looked at: storage that does not answer holds up no other VM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cpr_agent.errors import StorageSilent

T = TypeVar("T")
THREADS = 2
PATIENCE_S = 10.0
"""A disk that spins up answers within it. Guests may be waiting."""


class Threads:
    def __init__(self) -> None:
        self._pools: dict[str, ThreadPoolExecutor] = {}

    async def run(self, vm: str, work: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
        """``work``, which looks at files of the VM. Its thread goes on to wait when this gives up; while both threads of a
        VM wait, this gives up on what comes after. Raises StorageSilent, and what ``work`` raises."""
        pool = self._pools.setdefault(vm, ThreadPoolExecutor(THREADS, f"files-of-{vm}"))
        try:
            async with asyncio.timeout(patience_s):
                return await asyncio.get_running_loop().run_in_executor(pool, work)
        except TimeoutError:
            raise StorageSilent(
                f"the storage of its disks or firmware has not answered within {patience_s:g} s",
                vm=vm,
                remedy="see which mount hangs (`findmnt`, `ps -eo state,wchan,cmd`), bring it back, and try again",
            ) from None

    def forget(self, vm: str) -> None:
        if pool := self._pools.pop(vm, None):
            pool.shutdown(wait=False)  # a future that it cancelled would end the task that waits for it
