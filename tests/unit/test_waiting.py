# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits for descriptors and for the end of processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import subprocess

from cpr_agent.host.waiting import ended, readable

HIGH = 1500
"""More than select(2) can have: an agent with many VMs has so many descriptors."""


def test_a_descriptor_of_any_number_is_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * HIGH)), hard))
    there, end = os.pipe()
    high = fcntl.fcntl(there, fcntl.F_DUPFD_CLOEXEC, HIGH)
    try:
        assert not asyncio.run(readable(high, 0.01))
        os.write(end, b".")
        assert asyncio.run(readable(high, 60.0))
    finally:
        for fd in (there, end, high):
            os.close(fd)


def test_a_process_that_has_ended_is_not_waited_for() -> None:
    with subprocess.Popen(["true"]) as child:
        assert asyncio.run(ended(child.pid, 60.0))
