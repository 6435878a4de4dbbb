# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as units of systemd, and what else the agent asks of PID 1.

``sd_bus_call`` blocks with the GIL held, so calls are short ones to PID 1 and waiting is done on signals, on a
bus connection of its own: a call would swallow into its queue what the event loop waits for on the descriptor. Signatures
are those of org.freedesktop.systemd1(5); pystemd's own objects ask for an introspection of some 50 KB of XML each time that
one is made, which takes longer than all else.

PID 1 has a socket of its own, for root alone, which is there before the message bus is. The agent begins with that, and
goes over to the bus once there is one: over its own socket PID 1 sends every signal to everybody, and it closes the
connections when it executes itself anew (bus_foreach_bus() in src/core/dbus.c; daemon-reexec).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pystemd.daemon import notify as sd_notify
from pystemd.daemon import watchdog_enabled
from pystemd.dbusexc import DBusBaseError
from pystemd.dbuslib import DBus, DBusAddress, apply_signature, path_encode

from cpr_agent.core.model import Launch
from cpr_agent.core.threads import Threads
from cpr_agent.core.undo import uninterrupted
from cpr_agent.errors import QemuFailed
from cpr_agent.host.isolation import Installer, made_for
from cpr_agent.host.leaders import machined_is_installed
from cpr_agent.host.runner import READY_TIMEOUT_S, BaseRunner, QemuPlace, RunFiles, places_of
from cpr_agent.host.users import Users

log = logging.getLogger(__name__)

JOB_TIMEOUT_S = 300.0
PRIVATE = Path("/run/systemd/private")
LOST = "the connection to systemd was lost"
OUT_OF_ORDER = "ignore-dependencies"
"""A job's mode (org.freedesktop.systemd1(5), StartUnit): the unit starts at once, and alone."""
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
    """PID 1 over its own socket until ``use_bus``; over the system bus from then on, and where there is no such socket."""

    def __init__(self, private: Path | None = None) -> None:
        self._jobs: dict[str, asyncio.Future[str]] = {}
        own = private or (PRIVATE if os.geteuid() == 0 else None)
        self._links = _Links(self._removed, self._lost, own if own and own.is_socket() else None)

    def close(self) -> None:
        self._links.close()

    def use_bus(self) -> bool:
        """The system bus is there. Returns whether PID 1 is there, too, and is asked over it from now on; jobs that are
        waited for end as ever."""
        if not self._links.private:
            return True
        try:
            links = _Links(self._removed, self._lost)
        except DBusBaseError:
            return False
        before, self._links = self._links, links
        before.drain()
        before.close()
        return True

    def _removed(self, job: str, result: str) -> None:
        future = self._jobs.get(job)
        if future and not future.done():
            future.set_result(result)

    def _lost(self) -> None:
        """Nobody tells any more of the end of these jobs."""
        for future in self._jobs.values():
            if not future.done():
                future.set_result(LOST)

    def _live(self) -> _Links:
        """Raises DBusBaseError."""
        if self._links.closed:
            self._links = _Links(self._removed, self._lost, self._links.private)
        return self._links

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
            with DBus() as bus:  # not PID 1's own socket, at which there is no logind
                reply = bus.call_method(*_LOGIN, b"ListInhibitors", [])
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

    def soft_reboots(self) -> int:
        """Since the kernel's own start; 0 where systemd does not count them (before 256). Raises DBusBaseError."""
        return int(self._property(_PATH, "Manager", "SoftRebootsCount", "u")) if self.version() >= 256 else 0

    def manager_monotonic_s(self, name: str) -> float:
        """A timestamp of the manager, in seconds since the kernel's own start; 0 if there is none."""
        return float(self._property(_PATH, "Manager", name, "t")) / 1e6

    def booting(self) -> bool:
        """Whether the jobs of the boot are not done yet (org.freedesktop.systemd1(5), SystemState)."""
        return bytes(self._property(_PATH, "Manager", "SystemState", "s")) in (b"initializing", b"starting")

    def mounts_to_come(self) -> set[str]:
        """Units of mounts that a job of PID 1 is about to start."""
        listed = self._call("ListUnitsByPatterns", "asas", (), ("*.mount",))
        return {bytes(unit[0]).decode() for unit in listed if unit[3] != b"active" and unit[7]}

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

    def _call(self, member: str, signature: str = "", *arguments: str | int | Sequence[str]) -> Any:
        """One of the Manager's methods; raises DBusBaseError."""
        return self._live().call(member, signature, *arguments)

    def _property(self, path: bytes, interface: str, name: str, kind: str) -> Any:
        """Raises DBusBaseError."""
        return self._live().get(path, interface, name, kind)


class _Links:
    """The connections to PID 1: one for calls and one for signals, or a single one at its own socket ``private``.
    ``removed`` hears of the end of each job, with its result; ``lost`` of the end of the single connection."""

    def __init__(self, removed: Callable[[str, str], None], lost: Callable[[], None], private: Path | None = None) -> None:
        """Raises DBusBaseError."""
        self.private = private
        self.closed = False
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._calls = DBusAddress(f"unix:path={private}".encode(), peer_to_peer=True) if private else DBus()
        self._calls.open()
        self._signals = self._calls

        def job_removed(message: Any, error: Any = None, userdata: Any = None) -> None:  # noqa: ARG001 - pystemd's callback
            message.process_reply(False)
            _, job, _, result = message.body
            removed(job.decode(), result.decode())

        self._callback = job_removed  # pystemd keeps no reference, and wants to set an attribute on it
        try:
            self._call("Subscribe")
            if not private:
                self._signals = DBus()
                self._signals.open()
            # Between two that are alone nobody has a name.
            self._signals.match_signal(None if private else _NAME, _PATH, _MANAGER, b"JobRemoved", self._callback)
        except DBusBaseError:
            self._calls.close()
            raise
        self._fd = self._signals.get_fd()
        self._loop.add_reader(self._fd, self.drain)

    def call(self, member: str, signature: str, *arguments: str | int | Sequence[str]) -> Any:
        try:
            return self._call(member, signature, *arguments)
        finally:
            self._drain_later()

    def get(self, path: bytes, interface: str, name: str, kind: str) -> Any:
        try:
            return self._calls.get_property(_NAME, path, _NAME + f".{interface}".encode(), name.encode(), kind.encode())
        finally:
            self._drain_later()

    def _call(self, member: str, signature: str = "", *arguments: str | int | Sequence[str]) -> Any:
        typed = apply_signature(signature.encode(), [_plain(one) for one in arguments])
        return self._calls.call_method(_NAME, _PATH, _MANAGER, member.encode(), typed).body

    def _drain_later(self) -> None:
        """A call over the only connection takes signals from its descriptor, too."""
        if self.private:
            self._loop.call_soon(self.drain)

    def drain(self) -> None:
        """sd_bus_process(3) does one thing a call, which may be one without a message: two empty ones are the end."""
        if self.closed:
            return
        empty = 0
        try:
            while empty < 2:
                empty = empty + 1 if self._signals.process().is_empty() else 0
        except DBusBaseError as error:
            if not self.private:
                raise
            log.warning("%s: %s", LOST, error)
        else:
            if self._signals.get_fd() >= 0:  # sd-bus closes it when the other end has
                return
        self.close()
        self._lost()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        self._signals.close()
        if self._calls is not self._signals:
            self._calls.close()


def _plain(argument: str | int | Sequence[str]) -> bytes | int | list[bytes]:
    if isinstance(argument, str):
        return argument.encode()
    return argument if isinstance(argument, int) else [one.encode() for one in argument]


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
            with self._files.ticket(launch, self._place, leader=machined_is_installed()) as offer:
                # While the host boots, a saved guest waits for nothing but what is its own, which is there (ADR 33). At a
                # shutdown its unit has its order.
                mode = OUT_OF_ORDER if launch.kind == "load" and self._systemd.booting() else "replace"
                # To its end, so that ``kill`` finds its process: the job would go on without a caller.
                result = await uninterrupted(self._systemd.start_unit(unit, mode))
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
