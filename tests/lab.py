# SPDX-License-Identifier: GPL-2.0-or-later
"""A private lab: a dbus-daemon, a real agent, real QEMUs with the tiny guest, RAM in a directory of its own in /dev/shm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cpr_agent.bus.client import CallError, Client, plain
from cpr_agent.bus.client import options as variants
from scripts.guest.console import ConsoleReport, read_console

ROOT = Path(__file__).parent.parent
DAEMON = (sys.executable, "-m", "cpr_agent", "--runner", "process")
PATIENCE_S = 60.0
"""How long anything may take on a slow day; nothing on a good one comes near."""

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/><allow user="*"/>
  </policy>
</busconfig>
"""


@contextlib.contextmanager
def private_bus(directory: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A dbus-daemon of our own; yields its address and itself. Any user may connect."""
    address, daemon = start_bus(directory)
    try:
        yield address, daemon
    finally:
        if daemon.poll() is None:
            end_bus(daemon)


def start_bus(directory: Path) -> tuple[str, subprocess.Popen[str]]:
    config = directory / "bus.conf"
    config.write_text(BUS_CONFIG.format(socket=directory / "bus"))
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout
    return daemon.stdout.readline().strip(), daemon


def end_bus(daemon: subprocess.Popen[str]) -> None:
    daemon.terminate()
    daemon.communicate(timeout=PATIENCE_S)


def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Wait for what has no event (a console that grows, a state of another process); fails with ``what``."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain: {what}"
        pause.wait(0.02)
    return value


@dataclass
class Guest:
    """A VM with the tiny guest, as its admin sees it."""

    lab: Lab
    name: str
    ram: Path
    console: Path
    definition: dict[str, Any] = field(default_factory=dict)
    rams: list[Path] = field(default_factory=list)
    """Of one with NUMA nodes."""

    def call(self, member: str, signature: str = "", *body: Any) -> Any:
        return self.lab.client(lambda client: client.vm(self.name, member, signature, *body))

    def start(self) -> None:
        self.call("Start")

    def save(self, filename: str = "", mode: str = "reboot") -> None:
        self.call("CprSave", "ssa{sv}", filename, mode, {})

    def load(self, filename: str = "") -> None:
        self.call("CprLoad", "sa{sv}", filename, {})

    @property
    def properties(self) -> dict[str, Any]:
        return dict(self.lab.client(lambda client: client.vm_properties(self.name)))

    @property
    def state(self) -> str:
        return str(self.properties["State"])

    @property
    def pid(self) -> int:
        return int(self.properties["MainPID"])

    @property
    def report(self) -> ConsoleReport:
        return read_console(self.console, min_lines=0)

    def until_state(self, state: str) -> None:
        until(lambda: self.state == state, f"{self.name} {state}")

    def until_counts(self, lines: int = 3) -> int:
        """Wait until the guest has counted ``lines`` further; returns the count."""
        had = self.report.last if self.console.exists() else 0
        until(lambda: self.console.exists() and self.report.last >= had + lines, f"{self.name} counts beyond {had}")
        return self.report.last

    def assert_unbroken(self) -> None:
        """It runs, and is the same guest ever since."""
        self.until_counts()
        assert self.report.problems == (), str(self.report)

    @property
    def checkpoint(self) -> Path:
        return self.lab.state / "checkpoints" / self.name

    def checkpoint_files(self) -> list[str]:
        return sorted(path.name for path in self.checkpoint.iterdir()) if self.checkpoint.exists() else []

    def admin(self, command: str, /, **arguments: Any) -> Any:
        """One QMP command over the admin's own socket."""
        return qmp(self.lab.run / "vm" / self.name / "admin.sock", command, **arguments)


class Lab:
    """``root`` prefixes all the agent's paths; ``shm`` is for RAM."""

    def __init__(self, root: Path, shm: Path, bus: tuple[str, subprocess.Popen[str]], tiny: Path, qemu: str) -> None:
        self.root, self.shm, self.tiny, self.qemu = root, shm, tiny, qemu
        self.address, self._bus = bus
        self.definitions = root / "etc/cpr-agent/vms"
        self.definitions.mkdir(parents=True)
        self.state = root / "var/lib/cpr-agent"
        self.exports = self.state / "exports"
        self.exports.mkdir(parents=True)
        self.run = root / "run/cpr-agent"
        self.log = root / "agent.log"
        self.settings(files={"directories": [str(self.exports)]})
        self._agent: subprocess.Popen[Any] | None = None

    def settings(self, **sections: dict[str, Any]) -> None:
        (self.root / "etc/cpr-agent/agent.toml").write_text(toml(sections))

    program: tuple[str, ...] = DAEMON
    """The agent."""

    def spawn(self, program: tuple[str, ...]) -> subprocess.Popen[Any]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*program, f"--root={self.root}", f"--bus-address={self.address}"], cwd=ROOT, stderr=log
            )

    def start_agent(self, program: tuple[str, ...] = (), *, mortal: bool = False) -> None:
        """Returns when it has recovered; or, if it is ``mortal``, when it is dead."""
        before = self.log.stat().st_size if self.log.exists() else 0
        self._agent = agent = self.spawn(program or self.program)

        def recovered() -> bool:
            """It says so once recovery is over; its name is on the bus before."""
            said = self.log.read_bytes()[before:].decode()
            if mortal and agent.poll() is not None:
                return True
            assert agent.poll() is None, f"the agent ended with {agent.returncode}: {said[-2000:]}"
            return re.search(r"recovered \d+ VM|recovered; VMs", said) is not None

        until(recovered, "the agent is ready")

    def end_agent(self, number: int = signal.SIGTERM) -> int:
        assert self._agent
        self._agent.send_signal(number)
        return self.agent_ended()

    @property
    def agent_pid(self) -> int:
        assert self._agent
        return self._agent.pid

    def agent_ended(self) -> int:
        """Wait for an end that is not of our making; returns the agent's exit status."""
        assert self._agent
        return self._agent.wait(PATIENCE_S)

    def end_bus(self) -> None:
        end_bus(self._bus)

    def restart_bus(self) -> None:
        """Another daemon in the place of the one that was ended."""
        self.address, self._bus = start_bus(self.root.parent)

    def client(self, work: Callable[[Client], Any]) -> Any:
        async def connected() -> Any:
            async with Client.connected(self.address) as client:
                return plain(await work(client))

        return asyncio.run(connected())

    def job(self, member: str, **options: Any) -> str:
        """Run SaveAll or LoadAll to its end; returns its result."""
        return str(self.client(lambda client: client.run_job(member, variants(**options))).result)

    def cprctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self.cprctl_started(*arguments) as process:
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def cprctl_started(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """In pipes, with nothing to read."""
        return subprocess.Popen(
            [sys.executable, "-c", "from cpr_agent.cli.main import main; main()", *arguments],
            env={**os.environ, "CPR_AGENT_BUS_ADDRESS": self.address, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def guest(self, name: str = "web1", *more: str, qemu: str | None = None, **memory: Any) -> Guest:
        """Define a VM; ``more`` are further QEMU arguments, ``memory`` overrides [memory]."""
        console, ram = self.root / f"{name}.console", self.shm / name
        definition = {
            "vm": {
                "qemu": qemu or self.qemu,
                "user": "root",
                "arguments": [
                    *("-machine", "q35,accel=tcg", "-nodefaults", "-kernel", str(self.tiny)),
                    *("-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console", *more),
                ],
            },
            "memory": {"size": "16M", "device": str(ram), **memory},
        }
        guest = Guest(self, name, Path(definition["memory"]["device"]), console, definition)
        self.define(guest)
        return guest

    def numa_guest(self, name: str = "web1", *sizes: int) -> Guest:
        """Define a VM with a NUMA node of each size, 8 MiB by default, each with a file and a processor. The pattern that
        the tiny guest looks after is in the RAM from 4 to 12 MiB."""
        sizes = sizes or (8 << 20, 8 << 20)
        guest = self.guest(name, "-smp", str(len(sizes)))
        guest.rams = [self.shm / f"{name}-{number}" for number in range(len(sizes))]
        guest.definition["memory"] = {
            "node": [
                {"size": size, "device": str(ram), "cpus": str(number)}
                for number, (size, ram) in enumerate(zip(sizes, guest.rams, strict=True))
            ]
        }
        self.define(guest)
        return guest

    def linux_guest(self, name: str, linux: Path, append: str, *more: str, size: str = "512M") -> Guest:
        """Define a VM with the Linux guest of scripts/guest."""
        words = f"console=ttyS0 quiet loglevel=1 panic=-1 {append}"
        guest = self.guest(name, "-initrd", str(linux / "initrd.img"), "-append", words, *more, size=size)
        arguments = guest.definition["vm"]["arguments"]
        arguments[arguments.index("-kernel") + 1] = str(linux / "vmlinuz")
        self.define(guest)
        return guest

    def agent_port(self) -> tuple[str, ...]:
        """Arguments for the port that qemu-ga listens at; its socket is ``root / "qga"``."""
        chardev = f"socket,id=qga,path={self.root / 'qga'},server=on,wait=off"
        port = "virtserialport,chardev=qga,name=org.qemu.guest_agent.0"
        return ("-chardev", chardev, "-device", "virtio-serial", "-device", port)

    def define(self, guest: Guest) -> None:
        (self.definitions / f"{guest.name}.toml").write_text(toml(guest.definition))
        if self._agent:
            self.client(lambda client: client.manager("Reload"))

    def running(self, name: str = "web1", *more: str, **memory: Any) -> Guest:
        guest = self.guest(name, *more, **memory)
        guest.start()
        guest.until_counts()
        return guest

    def close(self) -> None:
        """End what we started, by its pid."""
        if self._bus.poll() is None:
            end_bus(self._bus)
        if self._agent and self._agent.poll() is None:
            self._agent.kill()
            self._agent.wait()
        for path in self.run.glob("launched/*.pid"):
            pid = int(path.read_text().split()[0])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class QmpRefused(AssertionError):
    """QEMU says no."""


def qmp(socket_path: Path, command: str, /, **arguments: Any) -> Any:
    """One QMP command by hand, as an admin with socat would send it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(socket_path))
        stream = connection.makefile("rw")
        stream.readline()
        reply: dict[str, Any] = {}
        for name, values in (("qmp_capabilities", {}), (command, arguments)):
            stream.write(json.dumps({"execute": name, "arguments": values}) + "\n")
            stream.flush()
            reply = json.loads(stream.readline())
            while "event" in reply:
                reply = json.loads(stream.readline())
            if "return" not in reply:
                raise QmpRefused(reply)
        return reply["return"]


def toml(sections: dict[str, Any]) -> str:
    """What a definition needs of TOML; JSON's strings, numbers and lists are TOML's."""
    lines = []
    for name, values in sections.items():
        tables = {key: value for key, value in values.items() if isinstance(value, list) and isinstance(value[0], dict)}
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in tables)]
        for key, entries in tables.items():
            for entry in entries:
                lines += [f"[[{name}.{key}]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    return "\n".join(lines) + "\n"


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def refused(guest: Guest, kind: str, *words: str, member: str = "CprLoad", filename: str = "") -> str:
    """The call must fail with this error, naming the VM and these words; returns the text."""
    with pytest.raises(CallError) as caught:
        if member == "CprLoad":
            guest.load(filename)
        elif member == "CprSave":
            guest.save(filename)
        elif member == "Refresh":
            guest.call(member, "a{sv}", {})
        else:
            guest.call(member)
    text = str(caught.value)
    assert caught.value.kind == kind, text
    for word in (f"VM {guest.name}", *words):
        assert word in text, text
    return text


def without_capital(sentence: str) -> str:
    """A finding's sentence, as an error has it as a part of one: an abbreviation has its capitals there, too."""
    first = sentence[:1] if sentence[1:2].isupper() else sentence[:1].lower()
    return f"{first}{sentence[1:]}".removesuffix(".")


def let_others_in(lab: Lab) -> None:
    """Let other users reach the lab's bus, below a directory that pytest keeps private."""
    lab.root.chmod(0o755)
    for directory in lab.root.parents:
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)
