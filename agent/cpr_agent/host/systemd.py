# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as units of systemd, and what else the agent asks of PID 1.

``sd_bus_call`` blocks with the GIL held, so calls are short ones to PID 1 and waiting is done on signals, on a
bus connection of its own: a call would swallow into its queue what the event loop waits for on the descriptor. Signatures
are those of org.freedesktop.systemd1(5); pystemd's own objects ask for an introspection of some 50 KB of XML each time that
one is made, which takes longer than all else.
"""

from __future__ import annotations

import asyncio
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from pystemd.daemon import notify as sd_notify
from pystemd.daemon import watchdog_enabled
from pystemd.dbusexc import DBusBaseError
from pystemd.dbuslib import DBus, apply_signature, path_encode

from cpr_agent.core.model import Launch
from cpr_agent.core.threads import Threads
from cpr_agent.core.undo import uninterrupted
from cpr_agent.errors import QemuFailed
from cpr_agent.host.isolation import Installer, made_for
from cpr_agent.host.runner import READY_TIMEOUT_S, BaseRunner, QemuPlace, RunFiles, places_of
from cpr_agent.host.users import Users

JOB_TIMEOUT_S = 300.0
_NAME = b"org.freedesktop.systemd1"
_PATH = b"/org/freedesktop/systemd1"
_MANAGER = b"org.freedesktop.systemd1.Manager"
_LOGIN = (b"org.freedesktop.login1", b"/org/freedesktop/login1", b"org.freedesktop.login1.Manager")
_SHUTDOWNS = ("kexec.target", "reboot.target", "poweroff.target", "halt.target", "soft-reboot.target")
_BY_SIGNAL = (os.CLD_KILLED, os.CLD_DUMPED)


def booted() -> bool:
    """sd_booted(3): is systemd PID 1 here?"""
    return Path("/run/systemd/system").is_dir()


def notify(**state: str | int) -> None:
    """sd_notify(3); nothing happens where systemd did not start us."""
    if "NOTIFY_SOCKET" in os.environ:
        sd_notify(False, **state)


def watchdog_interval_s() -> float:
    """How often to say that we live: half of WatchdogSec=; 0 if nobody asks."""
    return float(watchdog_enabled(False)) / 2e6


class Systemd:
    """PID 1 over the system bus."""

    def __init__(self) -> None:
        self._calls = DBus()
        self._calls.open()
        self._call("Subscribe")
        self._signals = DBus()
        self._signals.open()
        self._jobs: dict[str, asyncio.Future[str]] = {}

        def job_removed(message: Any, error: Any = None, userdata: Any = None) -> None:  # noqa: ARG001 - pystemd's callback
            message.process_reply(False)
            _, job, _, result = message.body
            future = self._jobs.get(job.decode())
            if future and not future.done():
                future.set_result(result.decode())

        self._callback = job_removed  # pystemd keeps no reference, and wants to set an attribute on it
        self._signals.match_signal(_NAME, _PATH, _MANAGER, b"JobRemoved", self._callback)
        asyncio.get_running_loop().add_reader(self._signals.get_fd(), self._drain)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._signals.get_fd())
        self._signals.close()
        self._calls.close()

    async def start_unit(self, name: str, mode: str = "replace", timeout_s: float | None = JOB_TIMEOUT_S) -> str:
        """Start and wait for the job's end; returns its result, ``"done"`` if all is well."""
        return await self.finished(self._call("StartUnit", "ss", name, mode), timeout_s)

    async def stop_unit(self, name: str, timeout_s: float | None = JOB_TIMEOUT_S) -> str:
        """Likewise for its stop."""
        return await self.finished(self._call("StopUnit", "ss", name, "replace"), timeout_s)

    def queue_start(self, name: str) -> None:
        self._call("StartUnit", "ss", name, "replace")

    def kill_unit(self, name: str) -> None:
        self._call("KillUnit", "ssi", name, "all", 9)

    def forget_failure(self, name: str) -> None:
        self._call("ResetFailedUnit", "s", name)

    def reload(self) -> None:
        self._call("Reload")

    def main_pid(self, name: str) -> int:
        return int(self._property(_unit_path(name), "Service", "MainPID", "u"))

    def main_signal(self, name: str) -> int:
        """The signal that has ended its main process, 0 if none has, or there is no such unit (waitid(2), CLD_KILLED and
        CLD_DUMPED)."""
        path = _unit_path(name)
        try:
            how = int(self._property(path, "Service", "ExecMainCode", "i"))
            return int(self._property(path, "Service", "ExecMainStatus", "i")) if how in _BY_SIGNAL else 0
        except DBusBaseError:
            return 0

    def job_of(self, name: str) -> bytes | None:
        """The job that starts this unit (``kexec.target`` has one before a kexec only)."""
        jobs = self._call("ListJobs")
        return next((bytes(job[4]) for job in jobs if job[1] == name.encode() and job[2] == b"start"), None)

    def shutdown_pending(self) -> str:
        """The target of a shutdown that is under way, or ""."""
        return next((name for name in _SHUTDOWNS if self.job_of(name)), "")

    def unit_file_state(self, name: str) -> str:
        """As `systemctl is-enabled` says; "" where there is no such unit."""
        try:
            return bytes(self._call("GetUnitFileState", "s", name)).decode()
        except DBusBaseError:
            return ""

    def active_state(self, name: str) -> str:
        return bytes(self._property(_unit_path(name), "Unit", "ActiveState", "s")).decode()

    def shutdown_blockers(self) -> list[tuple[str, str]]:
        """Who blocks a shutdown by logind, and why (org.freedesktop.login1(5), ListInhibitors)."""
        try:
            reply = self._calls.call_method(*_LOGIN, b"ListInhibitors", [])
        except DBusBaseError:
            return []
        return [
            (who.decode(), why.decode())
            for what, who, why, mode, _, _ in reply.body
            if b"shutdown" in what.split(b":") and mode.startswith(b"block")
        ]

    def userspace_at(self) -> float:
        """When this boot's userspace began, epoch seconds (org.freedesktop.systemd1(5))."""
        return float(self._property(_PATH, "Manager", "UserspaceTimestamp", "t")) / 1e6

    def manager_monotonic_s(self, name: str) -> float:
        """A timestamp of the manager, in seconds since the kernel's own start; 0 if there is none."""
        return float(self._property(_PATH, "Manager", name, "t")) / 1e6

    def version(self) -> int:
        """Of PID 1: 257 for "257.13-1~deb13u1"; 0 if it can't be told."""
        found = re.match(r"v?(\d+)", bytes(self._property(_PATH, "Manager", "Version", "s")).decode())
        return int(found[1]) if found else 0

    async def finished(self, job: bytes, timeout_s: float | None = JOB_TIMEOUT_S) -> str:
        """Wait until systemd has done with the job; returns its result, or "timeout"."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._jobs[job.decode()] = future
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return "timeout"
        finally:
            del self._jobs[job.decode()]

    def _call(self, member: str, signature: str = "", *arguments: str | int) -> Any:
        """One of the Manager's methods; raises DBusBaseError."""
        plain = [one.encode() if isinstance(one, str) else one for one in arguments]
        typed = apply_signature(signature.encode(), plain)
        return self._calls.call_method(_NAME, _PATH, _MANAGER, member.encode(), typed).body

    def _property(self, path: bytes, interface: str, name: str, kind: str) -> Any:
        """Raises DBusBaseError."""
        return self._calls.get_property(_NAME, path, _NAME + f".{interface}".encode(), name.encode(), kind.encode())

    def _drain(self) -> None:
        """sd_bus_process(3) does one thing a call, which may be one without a message: two empty ones are the end."""
        empty = 0
        while empty < 2:
            empty = empty + 1 if self._signals.process().is_empty() else 0


class Setup:
    """What cpr-vm-setup@NAME.service installs for a VM: one at a time, and only what is not there."""

    def __init__(self, systemd: Systemd, installer: Installer, threads: Threads) -> None:
        self._systemd = systemd
        self._installer = installer
        self._threads = threads
        self._turn = asyncio.Lock()

    async def user(self, vm: str, user: str) -> None:
        """Raises QemuFailed, OSError."""
        async with self._turn:
            if await asyncio.to_thread(self._installer.stage_user, vm, user):
                await self._install(vm)

    async def vm(self, launch: Launch, run_dir: Path, places: tuple[str, str]) -> None:
        """Its user, and what of the host its units may see and open. Raises QemuFailed, StorageSilent,
        OSError."""
        made = await self._threads.run(launch.vm, partial(made_for, launch, run_dir, places))  # in nobody else's turn
        async with self._turn:
            if await asyncio.to_thread(self._installer.stage, launch, made, places):
                await self._install(launch.vm)

    async def _install(self, vm: str) -> None:
        unit = f"cpr-vm-setup@{vm}.service"
        try:
            result = await uninterrupted(self._systemd.start_unit(unit))
        except DBusBaseError as error:
            result = str(error)
        if result != "done":
            raise QemuFailed(
                f"its user, drop-in and AppArmor profile could not be installed ({result})",
                vm=vm,
                left="nothing was started",
                remedy=f"see: journalctl -u {unit}",
            )


class SystemdRunner(BaseRunner):
    """Each VM is ``cpr-vm@NAME.service``; what the unit does is in units/cpr-vm@.service."""

    def __init__(self, files: RunFiles, systemd: Systemd, users: Users, threads: Threads) -> None:
        super().__init__(files)
        self._systemd = systemd
        self._users = users
        self._setup = Setup(systemd, Installer(files.run_dir / "setup"), threads)

    def user(self, name: str) -> str:
        return self._users.recorded(name)

    async def assign_user(self, name: str) -> str:
        user = await asyncio.to_thread(self._users.assign, name)
        await self._setup.user(name, user)
        return user

    async def prepare(self, launch: Launch) -> None:
        await self._setup.vm(launch, self._files.run_dir, places_of(launch.vm))

    def unit(self, name: str) -> str:
        return _unit(self._files.own(name))

    def _at(self, vm: str, place: str) -> UnitPlace:
        return UnitPlace(vm, place, self._files, self._systemd, self._setup)


class UnitPlace(QemuPlace):
    def __init__(self, vm: str, place: str, files: RunFiles, systemd: Systemd, setup: Setup) -> None:
        super().__init__(vm, place, files)
        self._unit = _unit(place)
        self._systemd = systemd
        self._setup = setup

    async def _main_pid(self) -> int:
        return self._systemd.main_pid(self._unit)

    async def start(self, launch: Launch) -> None:
        unit = self._unit
        await self._setup.vm(launch, self._files.run_dir, places_of(self._vm))
        try:
            with self._files.ticket(launch, self._place) as offer:
                # To its end, so that ``kill`` finds its process: the job would go on without a caller.
                result = await uninterrupted(self._systemd.start_unit(unit))
                if result == "done" and not await offer.until_ready(await self.pid(), READY_TIMEOUT_S):
                    result = "QEMU was not reached"
        except DBusBaseError as error:
            result = str(error)
        if result != "done":
            raise QemuFailed(
                f"its unit {unit} could not be started ({result}): {self.log_tail()}",
                vm=launch.vm,
                remedy=f"see: journalctl -u {unit}",
            )

    async def _signal(self, timeout_s: float) -> int:
        """systemd hears of an end before it hears of a call: SIGCHLD has a higher priority (src/core/manager.c)."""
        return self._systemd.main_signal(self._unit) if await self.wait_exit(timeout_s) else 0

    async def kill(self) -> None:
        if await self.pid():
            self._files.killed.add(self._place)
            self._systemd.kill_unit(self._unit)
            await self.wait_exit(JOB_TIMEOUT_S)
            if self._place != self._files.own(self._vm):
                self._systemd.forget_failure(self._unit)  # it was not its fault
        self._files.grants.take_back(self._place)
        self._files.point_admin(self._vm)


def _unit_path(name: str) -> bytes:
    """Reading it loads the unit, if there is such a file."""
    return bytes(path_encode(_PATH + b"/unit", name.encode()))


def _unit(place: str) -> str:
    return f"cpr-vm@{place}.service"
