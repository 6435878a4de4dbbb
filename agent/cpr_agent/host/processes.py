# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as processes of their own, where systemd is not PID 1: a container, a test machine. Everything but the kexec works.

Each QEMU leads a session of its own, so that neither the agent's end nor a signal to its group reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from cpr_agent.core.model import Launch
from cpr_agent.errors import QemuFailed
from cpr_agent.host.runner import BaseRunner, QemuPlace, readable, reap_when_done

START_TIMEOUT_S = 60.0


class ProcessRunner(BaseRunner):
    def unit(self, name: str) -> str:  # noqa: ARG002 - the port has units where there are any
        return ""

    def _at(self, vm: str, place: str) -> ProcessPlace:
        return ProcessPlace(vm, place, self._files)


class ProcessPlace(QemuPlace):
    async def _main_pid(self) -> int:
        try:
            pid, started = (self._files.directory(self._place) / "pid").read_text().split()
        except (OSError, ValueError):
            return 0
        return int(pid) if _start_time(int(pid)) == started else 0

    async def start(self, launch: Launch) -> None:
        self._files.write_ticket(launch, self._place)
        directory = self._files.directory(self._place)
        ready_path = directory / "notify.sock"
        ready_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as ready:
            ready.bind(str(ready_path))
            with Path(launch.log).open("ab") as log:
                child = subprocess.Popen(  # noqa: ASYNC220 - fork and exec take milliseconds, and it must outlive us
                    [sys.executable, "-I", "-S", self._files.programs.launcher, str(directory)],  # as the units do
                    env={**os.environ, "NOTIFY_SOCKET": str(ready_path)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            (directory / "pid").write_text(f"{child.pid} {_start_time(child.pid)}")
            pidfd = os.pidfd_open(child.pid)
            try:
                started = await _first(ready.fileno(), pidfd, START_TIMEOUT_S)
            finally:
                os.close(pidfd)
                ready_path.unlink(missing_ok=True)
                reap_when_done(child)
        if not started:
            await self.kill()
            raise QemuFailed(f"QEMU could not be started: {self.log_tail()}", vm=launch.vm)

    async def kill(self) -> None:
        pid = await self.pid()
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await self.wait_exit(START_TIMEOUT_S)
        self._files.point_admin(self._vm)


async def _first(ready: int, ended: int, timeout_s: float) -> bool:
    """True if ``ready`` became readable before ``ended`` did and before the timeout."""
    waits = [asyncio.create_task(readable(fd, timeout_s)) for fd in (ready, ended)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        return waits[0].done() and waits[0].result()
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat (proc(5)): tells a process from a later one with the same number; "" for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
