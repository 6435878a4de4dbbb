# SPDX-License-Identifier: GPL-2.0-or-later
"""What a process has used. Standard library alone: host-vm runs without a venv."""

import time


def cpu_s(pid: int) -> float:
    """CPU time of all threads that a process has or had, by its CPU clock (clock_getcpuclockid(3)), which is finer than the
    ticks of /proc/PID/stat."""
    return time.clock_gettime(~pid << 3 | 2)
