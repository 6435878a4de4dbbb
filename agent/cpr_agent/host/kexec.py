# SPDX-License-Identifier: GPL-2.0-or-later
"""The kexec into the next kernel, through systemd; implements core.ports.Kexec."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

from cpr_agent.core.model import Finding
from cpr_agent.host.systemd import Systemd

log = logging.getLogger(__name__)

_ENABLED = ("enabled", "enabled-runtime", "static", "linked")
_NEEDED = {
    "cpr-save.service": "guests would not be saved when an admin types `systemctl kexec`",
    "cpr-gate.service": "a kexec would not be stopped while a guest is unsaved",
    "cpr-load.service": "the guests would not be loaded after boot",
}
INHIBIT_TIMEOUT_S = 10.0
T = TypeVar("T")


class SystemdKexec:
    """``promise`` and ``withdraw`` write and remove the file that units/gate looks for, in ``run_dir``."""

    def __init__(self, systemd: Systemd, run_dir: Path) -> None:
        self._systemd = systemd
        self._ready = run_dir / "kexec-ready"

    possible = True

    def findings(self) -> list[Finding]:
        out = []
        for unit, why in _NEEDED.items():
            state = self._systemd.unit_file_state(unit)
            if state not in _ENABLED:
                what, remedy = f"{unit} is {state or 'not installed'}", f"systemctl enable --now {unit}"
                out.append(Finding(severity="error", code="unit-not-enabled", what=what, why=why, remedy=remedy))
        if self._systemd.active_state("cpr-save.service") != "active":
            what, why = "cpr-save.service is not active", "its stop is what saves guests before a kexec"
            remedy = "systemctl start cpr-save.service"
            out.append(Finding(severity="error", code="unit-not-active", what=what, why=why, remedy=remedy))
        for who, reason in self._systemd.shutdown_blockers():
            what, why = f"{who} forbids a restart of the host now", reason or "it gave no reason"
            remedy = "wait for its end: see systemd-inhibit --list"
            out.append(Finding(severity="error", code="inhibited", what=what, why=why, remedy=remedy))
        if pending := self._systemd.shutdown_pending():
            what, why = f"a shutdown is under way ({pending})", "it would stop the guests"
            out.append(Finding(severity="error", code="shutting-down", what=what, why=why, remedy="systemctl cancel"))
        return out

    @contextlib.asynccontextmanager
    async def inhibit(self, why: str) -> AsyncIterator[None]:
        """Hold a block inhibitor of logind (systemd-inhibit(1)): a child holds it, which ends when our end of its pipe
        closes, and so also when the agent is killed."""
        words = ("--what=shutdown", "--mode=block", "--who=cpr-agent", f"--why={why}", "--no-ask-password")
        command = ("systemd-inhibit", *words, "sh", "-c", "echo; exec cat")
        child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        if child.stdin is None or child.stdout is None:
            raise RuntimeError("systemd-inhibit was started without pipes")
        try:
            if not await _within(child.stdout.readline()):  # there is no logind; cpr-save and cpr-gate still guard a kexec
                log.warning("others can restart the host during the upgrade: systemd-inhibit failed")
            yield
        finally:
            child.stdin.close()
            await _within(child.wait())

    def promise(self) -> None:
        self._ready.write_text(Path("/proc/sys/kernel/random/boot_id").read_text())

    def withdraw(self) -> None:
        self._ready.unlink(missing_ok=True)

    async def pending(self) -> bool:
        return self._systemd.job_of("kexec.target") is not None

    async def start(self) -> str:
        """Start the target itself, and not by logind: its RebootWithFlags does a plain reboot where it finds no kernel, and
        would wait for delay inhibitors while guests stand still."""
        return await self._systemd.start_unit("kexec.target", mode="replace-irreversibly", timeout_s=None)

    async def over(self) -> str:
        job = self._systemd.job_of("kexec.target")
        return await self._systemd.finished(job, timeout_s=None) if job else "it is no longer under way"

    def bring_back(self) -> None:
        self._systemd.queue_start("cpr-abort.service")


async def _within(wait: Awaitable[T]) -> T | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(INHIBIT_TIMEOUT_S):
            return await wait
    return None


class NoKexec:
    """Of an agent without systemd, which leaves the host's kernel alone; implements core.ports.Kexec."""

    possible = False

    def findings(self) -> list[Finding]:
        return []

    @contextlib.asynccontextmanager
    async def inhibit(self, why: str) -> AsyncIterator[None]:  # noqa: ARG002 - the port's
        yield

    def promise(self) -> None:
        """There is no gate to promise anything to."""

    def withdraw(self) -> None:
        """Nothing was promised."""

    async def pending(self) -> bool:
        return False

    async def start(self) -> str:
        return "the agent does not run under systemd"

    async def over(self) -> str:
        return "the agent does not run under systemd"

    def bring_back(self) -> None:
        """Nothing was stopped."""
