"""Many guests in one act: each of them stands still only while its own turn lasts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

Turn = AbstractAsyncContextManager[None]
NO_TURN: Turn = nullcontext()


def at_once() -> int:
    """How many guests are saved, or loaded, at a time. Each wants a processor, for its QEMU; more would all be done last
    of all, and stand still until then. One more, because what is on its way to the disk needs none."""
    return len(os.sched_getaffinity(0)) + 1


class Turns:
    """``names`` are awaited: no turn begins before all of them want one, or have said that they never will."""

    def __init__(self, names: Iterable[str]) -> None:
        self._awaited = set(names)
        self._all_ready = asyncio.Event()
        self._free = asyncio.Semaphore(at_once())

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        self.no_longer_awaited(name)
        await self._all_ready.wait()
        async with self._free:
            yield

    def no_longer_awaited(self, name: str) -> None:
        self._awaited.discard(name)
        if not self._awaited:
            self._all_ready.set()
