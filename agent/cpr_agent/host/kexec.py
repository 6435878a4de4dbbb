# SPDX-License-Identifier: GPL-2.0-or-later
"""The kexec into the next kernel, through systemd; implements core.ports.Kexec."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable
from pathlib import Path
from typing import TypeVar

from pystemd.dbusexc import DBusBaseError

from cpr_agent.core.model import Finding, Survives
from cpr_agent.files import write_atomically
from cpr_agent.host.systemd import Systemd
from cpr_agent.host.tickets import SAVED
from cpr_agent.host.units import said

log = logging.getLogger(__name__)

_ENABLED = ("enabled", "enabled-runtime", "static", "linked")
_NEEDED = {
    "cpr-save.service": "guests would not be saved when an admin types `systemctl kexec`",
    "cpr-gate.service": "a kexec would not be stopped while a guest is unsaved",
    "cpr-load.service": "the guests would not be loaded after boot",
}
EARLY = "early"
_OF_QEMU = ("kvm_amd", "kvm_intel", "tun", "vhost_net", "vhost_vsock")
"""Modules that make a node which QEMU may open."""
_STARTED = {
    Survives.KEXEC: ("kexec.target", "systemd-kexec.service"),
    Survives.SOFT_REBOOT: ("soft-reboot.target", "systemd-soft-reboot.service"),
}
"""Units that systemd starts for it. The first that has a job counts: the two do not exclude each other."""
INHIBIT_TIMEOUT_S = 10.0
DELAYS_SINCE = 261
"""The version of systemd that began to delay the shutdown of a host that has not been up for long."""
DEFAULT_MINIMUM_UPTIME_S = 15.0
"""DEFAULT_MINIMUM_UPTIME_USEC in src/shutdown/shutdown.c."""
T = TypeVar("T")


class SystemdKexec:
    """``promise`` and ``withdraw`` write and remove two files: in ``run_dir`` the one that units/gate looks for, and in
    ``state`` the one that units/start-early looks for after the boot."""

    def __init__(self, systemd: Systemd, run_dir: Path, state: Path) -> None:
        self._systemd = systemd
        self._ready = run_dir / "kexec-ready"
        self._early = state / EARLY

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

    def promise(self, drivers: Collection[str], outlives: Survives) -> None:
        """Udev would load these modules, and QEMU's, but late; over a soft reboot they stay."""
        if outlives is Survives.KEXEC:
            modules = sorted({*drivers, *(name for name in _OF_QEMU if Path(f"/sys/module/{name}").exists())})
            write_atomically(self._early, "".join(f"{name}\n" for name in modules).encode())
        self._ready.write_text(f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {outlives}\n")

    def withdraw(self) -> None:
        for mark in self._ready.parent.glob(f"tickets/*/{SAVED}"):
            mark.unlink(missing_ok=True)
        self._ready.unlink(missing_ok=True)
        self._early.unlink(missing_ok=True)

    def end_at_once(self, places: Collection[str]) -> None:
        """By a mark that cpr-vm@.service looks for. Without one it asks QEMU, which takes longer."""
        for place in places:
            with contextlib.suppress(OSError):
                (self._ready.parent / "tickets" / Path(place).name / SAVED).touch()

    async def pending(self) -> Survives | None:
        return next((need for need, units in _STARTED.items() if any(map(self._systemd.job_of, units))), None)

    def _job(self) -> bytes | None:
        return next((job for units in _STARTED.values() for unit in units if (job := self._systemd.job_of(unit))), None)

    async def start(self) -> str:
        """Start the target itself, and not by logind: its RebootWithFlags does a plain reboot where it finds no kernel, and
        would wait for delay inhibitors while guests stand still."""
        return await self._systemd.start_unit("kexec.target", mode="replace-irreversibly", timeout_s=None)

    async def over(self) -> str:
        job = self._job()
        return await self._systemd.finished(job, timeout_s=None) if job else "it is no longer under way"

    def bring_back(self) -> None:
        self._systemd.queue_start("cpr-abort.service")

    async def minimum_uptime_s(self) -> float:
        """Read from the files that PID 1 reads: it has no property for it. systemd-shutdown(8) spares some virtual machines
        the default; a wait before guests stop costs them nothing."""
        try:
            if self._systemd.version() < DELAYS_SINCE:
                return 0.0
        except DBusBaseError:
            return 0.0
        configured = await said("systemd-analyze", "cat-config", "--no-pager", "systemd/system.conf")
        words = await asyncio.to_thread(Path("/proc/cmdline").read_text)
        return minimum_uptime_s(configured, words)


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

    def promise(self, drivers: Collection[str], outlives: Survives) -> None:
        """There is no gate to promise anything to."""

    def withdraw(self) -> None:
        """Nothing was promised."""

    def end_at_once(self, places: Collection[str]) -> None:
        """Who ends the agent's QEMUs knows nothing of a shutdown."""

    async def pending(self) -> Survives | None:
        return None

    async def start(self) -> str:
        return "the agent does not run under systemd"

    async def over(self) -> str:
        return "the agent does not run under systemd"

    def bring_back(self) -> None:
        """Nothing was stopped."""

    async def minimum_uptime_s(self) -> float:
        return 0.0


def minimum_uptime_s(configured: Iterable[str], command_line: str) -> float:
    """Of system.conf with its drop-ins, and of the kernel's command line, which is read after them (systemd-system.conf(5),
    systemd(1)). The last word counts, and a bad one does not."""
    section, wanted = "", DEFAULT_MINIMUM_UPTIME_S
    for line in map(str.strip, configured):
        if line.startswith("["):
            section = line
        elif section == "[Manager]" and (found := re.match(r"MinimumUptimeSec\s*=(.*)", line)):
            wanted = timespan_s(found[1], wanted)
    for value in re.findall(r"(?:^|\s)systemd[.]minimum[_-]uptime[_-]sec=(\S+)", command_line):
        wanted = timespan_s(value.strip('"'), wanted)
    return wanted


def timespan_s(text: str, otherwise: float) -> float:
    """A length of time as systemd.time(7) has it, in seconds: "1min 30s", "15"; ``otherwise`` for what is none."""
    text = text.strip()
    if text == "infinity":
        return float("inf")
    found = re.findall(r"(\d+(?:[.]\d+)?)\s*([a-zA-Zµ]*)\s*", text)
    if not found or "".join(f"{number}{unit}" for number, unit in found) != re.sub(r"\s", "", text):
        return otherwise
    if any(unit not in _UNITS_S for _, unit in found):
        return otherwise
    return sum(float(number) * _UNITS_S[unit] for number, unit in found)


_UNITS_S = {
    name: seconds
    for names, seconds in (
        ("us usec µs", 1e-6),
        ("ms msec", 1e-3),
        ("s sec second seconds", 1.0),
        ("m min minute minutes", 60.0),
        ("h hr hour hours", 3600.0),
        ("d day days", 86400.0),
        ("w week weeks", 604800.0),
    )
    for name in names.split()
} | {"": 1.0}
