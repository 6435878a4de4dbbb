# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that is spoken to by QMP alone, without the agent: the tiny guest, or another, on RAM that has a name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.guest.console import read_console
from tests.lab import PATIENCE_S, ROOT, until

SIZE = "16M"


class RefusedError(Exception):
    """QEMU's own words."""


def original_qemu(release: str) -> str:
    """Path of the QEMU with cpr-save and cpr-load that was built from Debian RELEASE's. Debian 14 changes its own too often
    for `make qemu-cpr`: the tests can do without."""
    found = subprocess.run(["scripts/qemu-cpr", "path", release], cwd=ROOT, capture_output=True, text=True, check=False)
    if path := found.stdout.strip():
        return path
    missing = f"no QEMU that has cpr-save here; build it with: scripts/qemu-cpr build {release}"
    if os.environ.get("CPR_TEST_REQUIRE_QEMUS") and release != "14":
        pytest.fail(missing)
    pytest.skip(missing)


class Machine:
    """One QEMU process. ``events`` are the names of what it has told so far, but for those of the chardevs."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.events: list[str] = []
        self.log = log
        mine, its = socket.socketpair()
        with its, log.open("ab") as errors:
            words = ["-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control"]
            self.process = subprocess.Popen(
                [*command, *words], pass_fds=[its.fileno()], stderr=errors, env={**os.environ, **environment}
            )
        mine.settimeout(PATIENCE_S)
        self._socket, self._stream = mine, mine.makefile("rb")
        self._read()
        self.execute("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise ConnectionResetError(f"QEMU has ended: {self.log.read_text()[-500:]}")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message["event"])
        return message

    def execute(self, command: str, fd: int | None = None, **arguments: Any) -> Any:
        """Raises RefusedError, ConnectionResetError. ``_`` in arguments' names is ``-``."""
        request = {"execute": command, "arguments": {name.replace("_", "-"): value for name, value in arguments.items()}}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [] if fd is None else [fd])
        while "event" in (reply := self._read()):
            pass
        if "error" in reply:
            raise RefusedError(reply["error"]["desc"])
        return reply["return"]

    def hmp(self, line: str) -> str:
        """A line for the human monitor, and what that says."""
        return str(self.execute("human-monitor-command", command_line=line)).strip()

    def wait_for(self, event: str) -> None:
        while event not in self.events:
            self._read()

    @property
    def status(self) -> str:
        return str(self.execute("query-status")["status"])

    def save(self, path: Path | str, mode: str = "reboot") -> None:
        self.execute("cpr-save", filename=str(path), mode=mode)

    def load(self, path: Path | str) -> None:
        self.execute("cpr-load", filename=str(path))

    def quit(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            self.execute("quit")
        self.end()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stream.close()
        self._socket.close()


class Desk:
    """A directory, RAM with a name, and the QEMUs that are started on it."""

    def __init__(self, qemu: str, root: Path, shm: Path, kernel: Path) -> None:
        self.qemu, self.root, self.kernel = qemu, root, kernel
        self.ram, self.console, self.state = shm / "ram", root / "console", root / "state"
        self.machines: list[Machine] = []
        self.more: list[str] = []
        """Arguments of all that are started from now on."""
        self.environment: dict[str, str] = {}

    @property
    def version(self) -> tuple[int, int]:
        return (7, 2) if "qemu-cpr-12" in self.qemu else (10, 0)

    def start(self, *more: str, machine: str = "q35", backend: str = "", size: str = SIZE) -> Machine:
        backend = backend or f"memory-backend-file,id=ram,share=on,mem-path={self.ram},size={size}"
        kernel = [] if "-kernel" in self.more else ["-kernel", str(self.kernel)]
        words = [
            *(self.qemu, "-machine", f"{machine},accel=tcg,memory-backend=ram", "-m", size, "-object", backend),
            *("-nodefaults", "-display", "none", *kernel),
            *("-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"),
        ]
        one = Machine([*words, *self.more, *more], self.root / "qemu.log", **self.environment)
        self.machines.append(one)
        return one

    def incoming(self, *more: str, machine: str = "q35") -> Machine:
        return self.start("-incoming", "defer", *more, machine=machine)

    def running(self, *more: str, **keywords: str) -> Machine:
        one = self.start(*more, **keywords)
        self.until_counts()
        return one

    def saved(self, *more: str) -> Path:
        """A guest that ran is saved, and its QEMU has ended."""
        one = self.running(*more)
        one.save(self.state)
        one.quit()
        return self.state

    @contextlib.contextmanager
    def other_guest(self) -> Iterator[None]:
        """Machines that are started in it have RAM and a console of their own."""
        ram, console = self.ram, self.console
        self.ram, self.console = ram.with_name("other"), console.with_name("other")
        yield
        self.ram, self.console = ram, console

    @property
    def last(self) -> int:
        return read_console(self.console, min_lines=0).last if self.console.exists() else 0

    def until_counts(self) -> None:
        had = self.last
        until(lambda: self.last >= had + 3, f"the guest counts beyond {had}")

    def assert_unbroken(self) -> None:
        self.until_counts()
        report = read_console(self.console)
        assert report.problems == (), str(report)

    def close(self) -> None:
        for one in self.machines:
            if one.process.poll() is None:
                one.end()

    def free(self, disk: Path) -> bool:
        """Whether another process could take the disk's lock for writing."""
        command = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def small_file_system(at: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)
        shutil.rmtree(at)
