# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes that stand for VMs towards systemd-machined, and what they ask the agent (ADR 37).

A leader is vm/machine-leader: a child of its QEMU, in the same unit, as the same user. It asks at a FIFO beside the VM's
ticket, where no VM's user can put anything else. QEMU could write to that as well, as much as it likes: what it can say
are the two words that a leader says, and the more often it says them, the more seldom it is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

FIFO = "machine"
_SHELL = "/bin/sh"
_PROGRAM = "machine-leader"
WORDS = ("poweroff", "reboot")
DEAF_S, DEAFEST_S = 2.0, 300.0
"""After a request, until the next one of the same VM is heard."""
_READ_BYTES = 1 << 16
"""All that a pipe holds (pipe(7))."""
MAX_CHILDREN = 64
MACHINED = Path("/usr/share/dbus-1/system-services/org.freedesktop.machine1.service")
"""The bus starts systemd-machined by this file, at the first call."""


def machined_is_installed() -> bool:
    return MACHINED.exists()


def make_fifo(path: Path, owner: int | None) -> Path:
    """In a directory of root's. Raises OSError."""
    if not (path.exists() and stat.S_ISFIFO(path.stat().st_mode)):  # the agent may listen at one that is there
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
    if owner is not None:
        os.chown(path, owner, -1, follow_symlinks=False)
    return path


def leader_command(launcher: str, fifo: Path) -> list[str]:
    """The leader's program is beside the launcher."""
    return [_SHELL, str(Path(launcher).with_name(_PROGRAM)), str(fifo)]


class UnitLeaders:
    """Implements core.machines.Leaders. ``tickets`` is the directory of all tickets."""

    def __init__(self, tickets: Path) -> None:
        self._tickets = tickets
        self._ears: dict[str, _Ear] = {}

    def leader(self, qemu_pid: int) -> int:
        """By the kernel's word it is a child of QEMU's, and so in its unit. One that has ended is still a child, without a
        command line."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{qemu_pid}/task/{qemu_pid}/children").read_text().split()
            return next((int(pid) for pid in children[:MAX_CHILDREN] if _is_leader(pid)), 0)
        return 0

    def hear(self, unit: str, asked: Callable[[str], None]) -> None:
        if unit not in self._ears:
            place = unit.removeprefix("cpr-vm@").removesuffix(".service")
            with contextlib.suppress(OSError):
                self._ears[unit] = _Ear(self._tickets / place / FIFO, asked)

    def unhear(self, unit: str) -> None:
        if ear := self._ears.pop(unit, None):
            ear.close()


def deafness(before_s: float, silent_s: float) -> float:
    """After a request that has come ``silent_s`` after the deafness before, of ``before_s``: twice as long after one that
    has hardly waited, half as long after another."""
    return min(2 * before_s, DEAFEST_S) if silent_s < before_s else max(before_s / 2, DEAF_S)


class _Ear:
    """Hears at a FIFO. It has that open for writing, too: a last writer's end is none of the FIFO's."""

    def __init__(self, path: Path, asked: Callable[[str], None]) -> None:
        """Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._asked = asked
        self._again: asyncio.TimerHandle | None = None
        self._deaf_s = DEAF_S
        self._since = 0.0
        """When it began to listen."""
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._listen()

    def _listen(self) -> None:
        self._again = None
        self._since = self._loop.time()
        self._loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        self._loop.remove_reader(self._fd)
        self._deaf_s = deafness(self._deaf_s, self._loop.time() - self._since)
        self._again = self._loop.call_later(self._deaf_s, self._listen)
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._fd, _READ_BYTES).decode(errors="replace").splitlines()
            for word in WORDS:
                if word in said:
                    self._asked(word)

    def close(self) -> None:
        if self._again:
            self._again.cancel()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


def _is_leader(pid: str) -> bool:
    """By what the kernel says of it, which is short; its command line has any length (PR_SET_MM_MAP in prctl(2))."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_bytes().partition(b"(")[2].rpartition(b")")
    except OSError:
        return False
    return name == Path(_SHELL).name.encode() and rest.split()[:1] != [b"Z"]
