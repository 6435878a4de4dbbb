# SPDX-License-Identifier: GPL-2.0-or-later
"""The least that saves and loads a guest: sockets, QMP, and the fsyncs without which a checkpoint is not one. It proves
nothing, checks nothing, and can take nothing back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpr_agent.files import sync_directory
from scripts.cpu import cpu_s

PATIENCE_S = 120.0
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]

Event = dict[str, Any]


class BareVm:
    """``arguments`` are QEMU's, but for those of its RAM, which is the file ``ram`` of ``size_bytes``."""

    def __init__(self, qemu: str, arguments: list[str], ram: Path, size_bytes: int, directory: Path) -> None:
        memory = f"memory-backend-file,id=ram,size={size_bytes},mem-path={ram},share=on"
        self._argv = [qemu, *arguments, "-m", f"{size_bytes >> 20}M", "-object", memory, "-machine", "memory-backend=ram"]
        self._argv += ["-display", "none", "-qmp", "chardev:qmp"]
        self._directory = directory
        self._events: list[Event] = []
        self._cpu_before_s = 0.0
        self.cpu_s = 0.0
        """What the last save and load cost both QEMUs, until the guest ran."""
        directory.mkdir(parents=True)
        self._journal = os.open(directory / "journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def start(self, *more: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            chardev = ("-chardev", f"socket,id=qmp,fd={theirs.fileno()}")
            self._process = subprocess.Popen([self._argv[0], *chardev, *self._argv[1:], *more], pass_fds=[theirs.fileno()])
        ours.settimeout(PATIENCE_S)
        self._socket, self._stream, self._events = ours, ours.makefile("r"), []
        self._stream.readline()
        self.execute("qmp_capabilities")

    def prepare(self) -> None:
        """For either act; the guest runs on."""
        self.execute("migrate-set-capabilities", capabilities=_CAPABILITIES)

    def save(self) -> tuple[float, float]:
        """When the guest stopped, and when what was saved was durable (epoch s)."""
        state, manifest = self._directory / "vmstate", self._directory / "manifest.json"
        temporary = state.with_suffix(".saving")
        self._cpu_before_s = cpu_s(self.pid)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.execute("getfd", fd=fd, fdname="state")
        self.execute("migrate", uri="fd:state")
        self._until(_completed)
        while self.execute("query-status")["status"] != "postmigrate":
            pass
        stopped_at = _time(self._until(lambda event: event["event"] == "STOP"))
        os.fsync(fd)
        os.close(fd)
        temporary.rename(state)
        sync_directory(self._directory)
        temporary = manifest.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump({"argv": self._argv, "vmstate": str(state), "bytes": state.stat().st_size}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(manifest)
        sync_directory(self._directory)
        self._note("saved")
        return stopped_at, time.time()

    def load(self) -> float:
        """In a new QEMU. Returns when the guest ran (epoch s)."""
        self.cpu_s = self.quit() - self._cpu_before_s
        self._note("load")
        self.start("-S", "-incoming", "defer")
        self.prepare()
        with (self._directory / "vmstate").open("rb") as state:
            self.execute("getfd", fd=state.fileno(), fdname="state")
            self.execute("migrate-incoming", uri="fd:state")
            self._until(_completed)
        self._note("resume")
        (self._directory / "manifest.json").rename(self._directory / "manifest.json.loaded")
        sync_directory(self._directory)
        self.execute("cont")
        resumed_at = _time(self._until(lambda event: event["event"] == "RESUME"))
        self.cpu_s += cpu_s(self.pid)
        return resumed_at

    @property
    def pid(self) -> int:
        return self._process.pid

    def quit(self) -> float:
        """Returns the CPU seconds of its whole life."""
        self.execute("quit")
        _, status, used = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)  # or it would be waited for again
        self._close()
        return used.ru_utime + used.ru_stime

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._close()

    def _close(self) -> None:
        self._stream.close()
        self._socket.close()

    def execute(self, command: str, *, fd: int | None = None, **arguments: Any) -> Any:
        line = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._socket, [line], [] if fd is None else [fd])
        while True:
            reply = json.loads(self._stream.readline())
            if "event" in reply:
                self._events.append(reply)
            elif "error" in reply:
                raise RuntimeError(f"QEMU refused {command}: {reply['error']}")
            else:
                return reply["return"]

    def _until(self, fits: Callable[[Event], bool]) -> Event:
        while True:
            for event in self._events:
                if fits(event):
                    self._events.remove(event)
                    return event
            self._events.append(json.loads(self._stream.readline()))

    def _note(self, event: str) -> None:
        os.write(self._journal, f"{event} {time.time()}\n".encode())
        os.fsync(self._journal)


def _completed(event: Event) -> bool:
    return bool(event["event"] == "MIGRATION" and event["data"]["status"] == "completed")


def _time(event: Event) -> float:
    return float(event["timestamp"]["seconds"]) + float(event["timestamp"]["microseconds"]) / 1e6
