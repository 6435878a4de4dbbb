# SPDX-License-Identifier: GPL-2.0-or-later
"""VMs as processes of their own, where systemd is not PID 1: a container, a test machine. Everything but the kexec works.

Each QEMU leads a session of its own, so that neither the agent's end nor a signal to its group reaches it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from cpr_agent.core.model import Launch
from cpr_agent.errors import QemuFailed
from cpr_agent.host.runner import READY_TIMEOUT_S, BaseRunner, QemuPlace, reap_when_done
from cpr_agent.host.waiting import readable

EXIT_TIMEOUT_S = 60.0


class ProcessRunner(BaseRunner):
    def unit(self, name: str) -> str:  # noqa: ARG002 - the port has units where there are any
        return ""

    def _at(self, vm: str, place: str) -> ProcessPlace:
        return ProcessPlace(vm, place, self._files)


class ProcessPlace(QemuPlace):
    async def _main_pid(self) -> int:
        child = self._files.children.get(self._place)
        if child:  # nobody else has its number before it is waited for
            return child.pid if child.poll() is None else 0
        try:
            pid, started = self._files.pid_file(self._place).read_text().split()
        except (OSError, ValueError):
            return 0
        return int(pid) if _start_time(int(pid)) == started else 0

    async def start(self, launch: Launch) -> None:
        with self._files.ticket(launch, self._place) as offer:
            with Path(launch.log).open("ab") as log:
                child = subprocess.Popen(  # noqa: ASYNC220 - fork and exec take milliseconds, and it must outlive us
                    [sys.executable, "-I", "-S", self._files.programs.launcher, self._files.ticket_directory(self._place)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._files.children[self._place] = child
            self._files.pid_file(self._place).write_text(f"{child.pid} {_start_time(child.pid)}")
            try:
                started = await offer.until_ready(child.pid, READY_TIMEOUT_S)
            finally:
                reap_when_done(child)
        if not started:
            await self.kill()
            raise QemuFailed(f"QEMU could not be started: {self.log_tail()}", vm=launch.vm)

    async def _signal(self, timeout_s: float) -> int:
        """Of one that an earlier agent has started it is not known. The first thread of a process that is killed may be
        gone before the others are."""
        child = self._files.children.get(self._place)
        if child is None:
            return 0
        with contextlib.suppress(ProcessLookupError):  # it was waited for
            fd = os.pidfd_open(child.pid)
            try:
                await readable(fd, timeout_s)
            finally:
                os.close(fd)
        return max(0, -(child.poll() or 0))

    async def kill(self) -> None:
        pid = await self.pid()
        if pid:
            self._files.killed.add(self._place)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await self.wait_exit(EXIT_TIMEOUT_S)
        self._files.grants.take_back(self._place)
        self._files.point_admin(self._vm)


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat (proc(5)): tells a process from a later one with the same number; "" for a dead one. The
    second is the process's own name, which may be any bytes."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == b"Z" else fields[19].decode()
