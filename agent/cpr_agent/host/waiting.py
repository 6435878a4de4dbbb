# SPDX-License-Identifier: GPL-2.0-or-later
"""A wait for what a descriptor has to say."""

from __future__ import annotations

import asyncio
import contextlib
import select


async def readable(fd: int, timeout_s: float) -> bool:
    """Wait until ``fd`` has something to read; False on timeout."""
    if select.select([fd], [], [], 0)[0]:
        return True
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await ready.wait()
                return True
        return False
    finally:
        loop.remove_reader(fd)
