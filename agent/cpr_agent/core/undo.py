# SPDX-License-Identifier: GPL-2.0-or-later
"""How an act that fails is taken back: to its end, however often its caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


async def uninterrupted(work: Awaitable[T]) -> T:
    """Run ``work`` to its end, however often the caller is cancelled meanwhile; then raise the cancellation (the last one),
    if there was one."""
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation:
        failure = None if task.cancelled() else task.exception()
        if failure:  # the caller is told of its cancellation instead
            log.error("work that was to be cancelled has failed", exc_info=failure)
        raise cancellation from failure
    return task.result()


class Undo:
    """Runs the pushed steps in reverse order, unless the block came to its ``done``. The block's error wins over
    those of the steps, which are logged; without one the first error of a step is raised.

    ``left`` has what the steps say of the state that they left, each a sentence fit for an admin.
    """

    def __init__(self) -> None:
        self.left = ""
        self._steps: list[Callable[[], Awaitable[str | None]]] = []

    def push(self, step: Callable[[], Awaitable[str | None]]) -> None:
        self._steps.append(step)

    def done(self) -> None:
        self._steps.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._steps:
            return
        failure = await uninterrupted(self._run())
        if failure and error is None:
            raise failure

    async def _run(self) -> BaseException | None:
        first: BaseException | None = None
        while self._steps:
            try:
                said = await self._steps.pop()()
            except BaseException as error:
                log.error("an undo step failed", exc_info=error)
                first = first or error
            else:
                self.left = "; ".join(filter(None, (self.left, said)))
        return first
