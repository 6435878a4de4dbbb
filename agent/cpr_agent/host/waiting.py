# SPDX-License-Identifier: GPL-2.0-or-later
"""A wait for what a descriptor has to say, or for the end of a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select


async def readable(fd: int, timeout_s: float) -> bool:
    """Wait until ``fd`` has something to read; False on timeout."""
    poll = select.poll()  # select(2) takes none above 1023
    poll.register(fd, select.POLLIN)
    if poll.poll(0):
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


async def ended(pid: int, timeout_s: float) -> bool:
    """Wait until the process has ended; False on timeout. By pidfd, which works for processes that are not our children,
    and leaves no room for PID reuse."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return await readable(fd, timeout_s)
    finally:
        os.close(fd)
