# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel that an upgrade loads for its kexec, and takes away if the kexec does not come."""

from __future__ import annotations

import asyncio
import logging

from cpr_agent.core.jobs import Job
from cpr_agent.core.ports import Files, Kernels
from cpr_agent.core.undo import uninterrupted
from cpr_agent.core.upgrade.preflight import Plan
from cpr_agent.errors import KernelRefused

log = logging.getLogger(__name__)


def size_bytes(files: Files, plan: Plan) -> int:
    """Of the kernel and its initrd, as they are loaded. Blocking, for two looks at /boot."""
    found = (files.look_at(path) for path in (plan.kernel.image, plan.kernel.initrd) if path)
    return sum(one.size_bytes for one in found if one)


async def load(kernels: Kernels, job: Job, plan: Plan) -> None:
    """Raises KernelRefused. A load that is cancelled leaves no kernel."""
    job.enter(f"loading kernel {plan.target}")
    try:
        await kernels.load(plan.kernel, plan.command_line)
    except asyncio.CancelledError:
        await uninterrupted(unload(kernels))
        raise


async def try_out(kernels: Kernels, job: Job, plan: Plan) -> None:
    """Load the kernel and take it away again; not where that would take away a kernel that somebody else has loaded."""
    if not kernels.loaded():
        await load(kernels, job, plan)
        await uninterrupted(unload(kernels))


async def unload(kernels: Kernels) -> None:
    if kernels.loaded():
        try:
            await kernels.unload()
        except KernelRefused as error:  # no guest depends on it
            log.warning("%s", error)
