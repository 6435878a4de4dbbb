"""What both runners share: the ticket, the record of what runs, QMP sockets, and the wait for a process's end."""

from __future__ import annotations

import asyncio
import contextlib
import marshal
import os
import pwd
import select
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import Launch
from cpr_agent.core.ports import Qemu
from cpr_agent.files import make_private_directory, write_atomically
from cpr_agent.store.schema import read_launch
from cpr_agent.vm.launch import TICKET
from cpr_agent.vm.qemu import LiveQemu

LOG_TAIL_BYTES = 2000


SECOND = ":b"
"""What tells a VM's second place from its first; no name of a VM has a colon."""


class BaseRunner(ABC):
    """``run_dir`` has a directory for each VM, owned by its user, and ``launched/``, which only the agent can write.

    A VM has two places for a QEMU, NAME and NAME:b, of which one is its own: the second if ``second/NAME`` exists.
    """

    def __init__(self, run_dir: Path, log_dir: Path) -> None:
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._in_second = {path.name for path in (run_dir / "second").glob("*")}
        self._launched = run_dir / "launched"
        self._read: dict[str, tuple[tuple[int, int], Launch]] = {}

    async def active(self, name: str, *, beside: bool = False) -> int:
        return await self._main_pid(self._place(name, beside=beside))

    @abstractmethod
    async def _main_pid(self, place: str) -> int: ...

    async def connect(self, name: str, timeout_s: float, *, beside: bool = False) -> Qemu:
        place = self._place(name, beside=beside)
        return await LiveQemu.connect(name, self._directory(place) / "agent.sock", timeout_s)

    def adopt(self, name: str) -> None:
        marker = self._run_dir / "second" / name
        if name in self._in_second:
            marker.unlink()
        else:
            make_private_directory(marker.parent)
            marker.touch()
        self._in_second ^= {name}
        self._point_admin(name)

    def directory(self, name: str, *, beside: bool = False) -> str:
        return str(self._directory(self._place(name, beside=beside)))

    def launched(self, name: str, *, beside: bool = False) -> Launch | None:
        """Each VM that is started or loaded asks what memory all the others have: a record is read once, as it is replaced
        as a whole or not at all."""
        place = self._place(name, beside=beside)
        try:
            info = os.stat(f"{self._launched}/{place}.json")  # noqa: PTH116 - for each of them
            version = info.st_ino, info.st_mtime_ns
            if place not in self._read or self._read[place][0] != version:
                self._read[place] = version, read_launch(self._record(place).read_bytes())
            return self._read[place][1]
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    def launched_all(self) -> list[str]:
        return sorted({path.stem.removesuffix(SECOND) for path in self._launched.glob("*.json")})

    def log_tail(self, name: str, *, beside: bool = False) -> str:
        launch = self.launched(name, beside=beside)
        try:
            with Path(launch.log if launch else self._log_dir / f"{name}.log").open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return " / ".join(lines[-3:])

    async def wait_exit(self, name: str, timeout_s: float) -> bool:
        return await self._exited(self._place(name), timeout_s)

    async def _exited(self, place: str, timeout_s: float) -> bool:
        """By pidfd, which works for processes that are not our children, and leaves no room for PID reuse."""
        pid = await self._main_pid(place)
        if not pid:
            return True
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return await readable(fd, timeout_s)
        finally:
            os.close(fd)

    def _place(self, name: str, *, beside: bool = False) -> str:
        """Where the VM's own QEMU lives, or the one beside it."""
        return f"{name}{SECOND}" if (name in self._in_second) != beside else name

    def _point_admin(self, name: str) -> None:
        """The admin's socket has one path, whichever place the VM is in; a link leads to the second one's."""
        if self._place(name) == name:
            return
        path = self._directory(name) / "admin.sock"
        path.unlink(missing_ok=True)
        path.symlink_to(self._directory(name + SECOND) / "admin.sock")

    def _write_ticket(self, launch: Launch, place: str) -> None:
        """Leave the ticket and the agent's own record, which end with this boot. The log file is made here: its directory
        is not the VM's."""
        directory = self._directory(place)
        launch = replace(launch, sockets={str(directory / Path(path).name): fd for path, fd in launch.sockets.items()})
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        log = Path(launch.log)
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        if log.exists():
            log.replace(f"{log}.1")
        log.touch(mode=0o640)
        owner = None
        if os.geteuid() == 0:
            account = pwd.getpwnam(launch.user)
            owner = (account.pw_uid, account.pw_gid)
            for path in (directory, log):
                os.chown(path, *owner, follow_symlinks=False)
        write_atomically(directory / TICKET, marshal.dumps(msgspec.to_builtins(launch)), 0o400, owner, durable=False)
        make_private_directory(self._record(place).parent)
        write_atomically(self._record(place), msgspec.json.encode(launch), durable=False)

    def _directory(self, place: str) -> Path:
        return self._run_dir / "vm" / place

    def _record(self, place: str) -> Path:
        return self._launched / f"{place}.json"


def reap_when_done(child: subprocess.Popen[bytes]) -> None:
    """A child that ends while this agent lives must not stay a zombie."""
    pidfd = os.pidfd_open(child.pid)
    loop = asyncio.get_running_loop()

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        child.wait()

    loop.add_reader(pidfd, reap)


async def readable(fd: int, timeout_s: float) -> bool:
    """Wait until ``fd`` has something to read; False on timeout."""
    if select.select([fd], [], [], 0)[0]:
        return True
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await ready.wait()
                return True
        return False
    finally:
        loop.remove_reader(fd)
