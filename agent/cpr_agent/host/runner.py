# SPDX-License-Identifier: GPL-2.0-or-later
"""What both runners share: the ticket, the record of what runs, QMP sockets, and the wait for a process's end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import marshal
import os
import pwd
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import Difference, Inventory, Launch, MemoryIdentity, QemuFacts
from cpr_agent.core.ports import Qemu
from cpr_agent.errors import QemuFailed
from cpr_agent.files import make_private_directory, read_own, write_atomically
from cpr_agent.host.grants import DeviceGrants
from cpr_agent.host.leaders import FIFO, leader_command, make_fifo
from cpr_agent.host.tickets import SAVED, Offer, offered
from cpr_agent.host.users import SHARED_USER
from cpr_agent.host.waiting import ended
from cpr_agent.text import printable

log = logging.getLogger(__name__)

LOG_TAIL_BYTES = 2000
READY_TIMEOUT_S = 60.0
"""For the launcher, a small program on a host in trouble."""
MAX_LOG_BYTES = 8 << 20
"""Of each VM; the log of the QEMU before is kept beside it."""


_INVENTORY = msgspec.json.Decoder(Inventory)
"""Made once, as in store/schema.py."""
_DIRECTORIES = {
    "": 0o755,
    "vm": 0o755,
    "setup": 0o700,
    "launched": 0o700,
    "tickets": 0o711,
    "gate": 0o711,
    "monitor": 0o711,
}
SECOND = ":b"
"""What tells a VM's second place from its first; no name of a VM has a colon."""


class Programs(NamedTuple):
    """The parts of vm/, memory/ and store/ that a runner needs. The daemon hands them in: this layer imports none."""

    connect: Callable[[str, Path, float, Launch | None, int], Awaitable[Qemu]]
    """Connect to the QEMU of a VM at a socket, within so many seconds: the one that was started so and has this PID. Raises
    QemuFailed."""
    read_launch: Callable[[bytes], Launch]
    """Raises msgspec.MsgspecError."""
    open_memory: Callable[[str, MemoryIdentity], int]
    """Open the RAM at a node, and prove on the descriptor that it is the one. Raises MemoryUnusable."""
    ticket: str
    """The name of the socket at which the launcher asks."""
    launcher: str
    """The path of the program that becomes QEMU."""


class QemuPlace(ABC):
    """One of a VM's two places. Implements core.ports.Place. ``place`` is its name: NAME or NAME:b."""

    delegated = False

    def __init__(self, vm: str, place: str, files: RunFiles) -> None:
        self._vm = vm
        self._place = place
        self._files = files

    @property
    def directory(self) -> str:
        return str(self._files.directory(self._place))

    @abstractmethod
    async def start(self, launch: Launch) -> None: ...

    @abstractmethod
    async def kill(self) -> None: ...

    @abstractmethod
    async def _main_pid(self) -> int: ...

    async def pid(self) -> int:
        pid = self._files.pids[self._place] = await self._main_pid()
        return pid

    async def connect(self, timeout_s: float) -> Qemu:
        files, place = self._files, self._place
        pid = files.pids.get(place) or await self.pid()
        path = files.directory(place) / "agent.sock"
        try:
            return await files.programs.connect(self._vm, path, timeout_s, files.launch(place), pid)
        finally:
            files.grants.take_back(place)  # a QEMU that answers has its RAM open

    async def lacks(self, launch: Launch, was: QemuFacts) -> list[Difference]:  # noqa: ARG002 - a QEMU is asked
        return []

    async def settle(self) -> None:  # noqa: B027 - other places need it
        """Nobody waits."""

    async def wait_exit(self, timeout_s: float) -> bool:
        pid = await self.pid()
        return not pid or await ended(pid, timeout_s)

    async def ended_by(self, timeout_s: float) -> int:
        return 0 if self._place in self._files.killed else await self._signal(timeout_s)

    @abstractmethod
    async def _signal(self, timeout_s: float) -> int:
        """That has ended the process which was started last; 0 if none has within so long."""

    def log_tail(self) -> str:
        launch = self._files.launch(self._place)
        try:
            with (Path(launch.log) if launch else self._files.log(self._vm)).open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - LOG_TAIL_BYTES))
                lines = log.read(LOG_TAIL_BYTES).decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return printable(" / ".join(lines[-3:]), LOG_TAIL_BYTES)


class RunFiles:
    """``run_dir`` has a directory for each VM, owned by its user; ``launched/`` and ``tickets/`` are the agent's.

    A VM has two places for a QEMU, NAME and NAME:b, of which one is its own: the second if ``second/NAME`` exists.
    """

    def __init__(self, run_dir: Path, log_dir: Path, programs: Programs) -> None:
        self.programs = programs
        self.pids: dict[str, int] = {}
        """By place, as last asked for: a guest may wait for a second question."""
        self.killed: set[str] = set()
        """Places whose last QEMU was ended by ``kill``."""
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        """By place: QEMUs that this agent has started itself."""
        self.grants = DeviceGrants()
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._in_second = {path.name for path in (run_dir / "second").glob("*")}
        self._launched = run_dir / "launched"
        self._read: dict[str, Launch] = {}

    def own(self, name: str) -> str:
        return name + SECOND if name in self._in_second else name

    def spare(self, name: str) -> str:
        return name if name in self._in_second else name + SECOND

    def adopt(self, name: str) -> None:
        marker = self._run_dir / "second" / name
        if name in self._in_second:
            marker.unlink()
        else:
            make_private_directory(marker.parent)
            marker.touch()
        self._in_second ^= {name}
        self.point_admin(name)

    def inventory(self, place: str) -> Inventory | None:
        try:
            return _INVENTORY.decode(read_own(self._inventory(place)))
        except (OSError, msgspec.MsgspecError):
            return None

    def record_inventory(self, place: str, inventory: Inventory) -> None:
        write_atomically(self._inventory(place), msgspec.json.encode(inventory), durable=False)

    def _inventory(self, place: str) -> Path:
        return self._launched / f"{place}.inventory"

    def record(self, place: str, launch: Launch) -> None:
        """Until the host starts anew. Raises OSError."""
        make_private_directory(self._launched)
        write_atomically(self._record(place), msgspec.json.encode(launch), durable=False)
        self._read.pop(place, None)

    def launch(self, place: str) -> Launch | None:
        """Each VM that is started or loaded asks for the memory of all the others: a record is read once, as no other agent
        writes one."""
        if place not in self._read:
            try:
                self._read[place] = self.programs.read_launch(read_own(self._record(place)))
            except (OSError, msgspec.MsgspecError, KeyError, ValueError):
                return None
        return self._read[place]

    def launched_all(self) -> list[str]:
        return sorted({path.stem.removesuffix(SECOND) for path in self._launched.glob("*.json")})

    @property
    def run_dir(self) -> Path:
        return self._run_dir

    def directory(self, place: str) -> Path:
        return self._run_dir / "vm" / place

    def log(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def trim_logs(self) -> None:
        """A VM's QEMU may write to its log what it likes, and one that is about to end to the log before. It appends, so
        that it goes on at the new end."""
        for path in self._log_dir.glob("*.log*"):
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                with open(fd, "r+b", buffering=0) as log:  # noqa: PTH123 - a descriptor
                    if (size := os.fstat(fd).st_size) > MAX_LOG_BYTES:
                        tail = os.pread(fd, LOG_TAIL_BYTES, size - LOG_TAIL_BYTES)
                        log.truncate(0)
                        log.write(b"... cpr-agentd has cut %d bytes off\n%b" % (size, tail))

    def point_admin(self, name: str) -> None:
        """The admin's socket has one path, whichever place the VM is in; a link leads to the second one's. The VM's user
        owns the directory, and may have put something into its place: no act fails by that."""
        if name not in self._in_second:
            return
        path = self.directory(name) / "admin.sock"
        try:
            path.unlink(missing_ok=True)
            path.symlink_to(self.directory(name + SECOND) / "admin.sock")
        except OSError as error:
            log.warning("VM %s: the admin's socket can't be reached by its path: %s", name, error)

    @contextlib.contextmanager
    def ticket(self, launch: Launch, place: str, *, leader: bool = False) -> Iterator[Offer]:
        """Offer the ticket while this lasts, and record what is started; the record ends with this boot. The log and the
        RAM are opened here: by their paths they need not be the VM's. With a ``leader`` for systemd-machined (ADR 37).
        Raises QemuFailed, MemoryUnusable, OSError."""
        self.pids.pop(place, None)
        self.killed.discard(place)
        directory = self.directory(place)
        launch = replace(launch, sockets={str(directory / Path(path).name): fd for path, fd in launch.sockets.items()})
        owner = _account(launch) if os.geteuid() == 0 else None
        for each in places_of(launch.vm):  # a QEMU that hands its guest over connects to the other place
            _make_owned(self.directory(each), owner)
        _make_directory(self.ticket_directory(place), 0o711)
        (self.ticket_directory(place) / SAVED).unlink(missing_ok=True)
        parts = {"argv": launch.argv, "sockets": launch.sockets, "memory_fds": launch.memory_fds}
        if leader:
            fifo = make_fifo(self.ticket_directory(place) / FIFO, owner[0] if owner else None)
            parts["leader"] = leader_command(self.programs.launcher, fifo)
        ticket = marshal.dumps(parts)
        with contextlib.ExitStack() as opened:

            def keep(fd: int) -> int:
                opened.callback(os.close, fd)
                return fd

            ram = zip(launch.nodes, launch.memory, strict=True)
            descriptors = [keep(_open_log(Path(launch.log))), *(keep(self.programs.open_memory(*one)) for one in ram)]
            devices = [fd for fd, one in zip(descriptors[1:], launch.memory, strict=True) if one.kind == "devdax"]
            self.grants.give(place, devices, owner[0] if owner else os.geteuid())
            self.record(place, launch)
            offer = Offer(ticket, descriptors, {os.geteuid(), *(owner or ())[:1]})
            path = self.ticket_directory(place) / self.programs.ticket
            with offered(path, offer, owner[0] if owner else None):
                yield offer

    def ticket_directory(self, place: str) -> Path:
        return self._run_dir / "tickets" / place

    def pid_file(self, place: str) -> Path:
        return self._launched / f"{place}.pid"

    def _record(self, place: str) -> Path:
        return self._launched / f"{place}.json"


def make_run_directories(run_dir: Path) -> None:
    """As units/cpr-agent.tmpfiles has them, which at boot comes after an agent that was started early. Raises OSError."""
    for name, mode in _DIRECTORIES.items():
        _make_directory(run_dir / name, mode)


def places_of(vm: str) -> tuple[str, str]:
    return vm, vm + SECOND


def _account(launch: Launch) -> tuple[int, int]:
    """Its user (uid, gid). Raises QemuFailed."""
    try:
        account = pwd.getpwnam(launch.user)
    except KeyError:
        what = f"the user {launch.user} that the VM runs as does not exist"
        raise QemuFailed(what, vm=launch.vm, left="nothing was started") from None
    return account.pw_uid, account.pw_gid


def _make_directory(path: Path, mode: int) -> bool:
    """Returns whether it is new; its parents are for everybody to pass."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        path.mkdir()
    except FileExistsError:
        return False
    path.chmod(mode)  # against the umask
    return True


def _make_owned(path: Path, owner: tuple[int, int] | None) -> None:
    """The group is for programs that serve the guest."""
    _make_directory(path, 0o750)
    if owner:
        os.chown(path, *owner, follow_symlinks=False)


def _open_log(path: Path) -> int:
    """A new one; the one before is kept."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if path.exists():
        path.replace(f"{path}.1")
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)


class BaseRunner(ABC):
    """Implements core.ports.Runner, but for the places and the units."""

    def __init__(self, files: RunFiles) -> None:
        self._files = files

    def own(self, name: str) -> QemuPlace:
        return self._at(name, self._files.own(name))

    def spare(self, name: str) -> QemuPlace:
        return self._at(name, self._files.spare(name))

    @abstractmethod
    def _at(self, vm: str, place: str) -> QemuPlace: ...

    def adopt(self, name: str) -> None:
        self._files.adopt(name)

    def user(self, name: str) -> str:  # noqa: ARG002 - units have more
        return SHARED_USER

    async def assign_user(self, name: str) -> str:
        return self.user(name)

    async def prepare(self, launch: Launch) -> None:  # noqa: B027 - units alone need something
        pass

    def launched(self, name: str) -> Launch | None:
        return self._files.launch(self._files.own(name))

    def launched_all(self) -> list[str]:
        return self._files.launched_all()

    def trim_logs(self) -> None:
        self._files.trim_logs()

    def inventory(self, name: str) -> Inventory | None:
        return self._files.inventory(self._files.own(name))

    def record_inventory(self, name: str, inventory: Inventory) -> None:
        self._files.record_inventory(self._files.own(name), inventory)


def reap_when_done(child: subprocess.Popen[bytes]) -> None:
    """A child that ends while this agent lives must not stay a zombie."""
    pidfd = os.pidfd_open(child.pid)
    loop = asyncio.get_running_loop()

    def reap() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        child.wait()

    loop.add_reader(pidfd, reap)
