# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that has not been up for long: its systemd delays the end of a shutdown, while guests would stand still."""

from __future__ import annotations

import asyncio

from cpr_agent.core.jobs import Job
from cpr_agent.core.model import Finding
from cpr_agent.core.ports import Ports
from cpr_agent.words import length

PATIENCE_S = 300.0
"""Longer than any sensible setting, and half of what cpr-save.service has for all of its stop."""


async def wait(ports: Ports, job: Job) -> None:
    """Until a shutdown is not delayed any more, but PATIENCE_S at the most; guests run."""
    left_s = await _left_s(ports)
    if left_s > 0:
        wait_s = min(left_s, PATIENCE_S)
        job.enter(f"waiting for {length(wait_s)}: systemd delays the shutdown of a host that has just started")
        await asyncio.sleep(wait_s)  # for a moment, and no event


async def findings(ports: Ports) -> list[Finding]:
    left_s = await _left_s(ports)
    if left_s <= 0:
        return []
    what = f"systemd ends no shutdown of this host in the next {length(left_s)} (MinimumUptimeSec=)"
    if left_s <= PATIENCE_S:
        why = "an upgrade waits for that before it stops the first guest"
        return [Finding(severity="info", code="minimum-uptime", what=what, why=why, seconds=left_s)]
    why = "guests would stand still meanwhile"
    remedy = "set MinimumUptimeSec= lower in /etc/systemd/system.conf and run `systemctl daemon-reload`, or upgrade later"
    return [Finding(severity="error", code="minimum-uptime", what=what, why=why, remedy=remedy, seconds=left_s)]


async def _left_s(ports: Ports) -> float:
    return await ports.kexec.minimum_uptime_s() - ports.clock.uptime_s()
