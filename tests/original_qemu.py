# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU with the original proposal's ``cpr-save`` and ``cpr-load``, of which no binary exists here: a scripted peer.

Commands, refusals and run states are those of migration/cpr.c in the last version of S. Sistare's "Live Update" series
(QEMU 7.0); the rest of QMP is what the agent asks of any QEMU. It takes QEMU's command line, and its guest counts in the
RAM that it was given, and prints as the tiny guest does. What it saves belongs to that RAM: it notices a state of another.

    python -m tests.original_qemu QEMU-ARGUMENT…
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HEADER = b"QEVM" + struct.pack(">I", 3)
MACHINE = "pc-q35-7.0"
BULK = 300_000
"""Bytes of device state, as of a real one."""
TICK_S = 0.05


class RefusedError(Exception):
    """What error_setg() would say."""


class Vm:
    """The machine and its guest. ``lock`` is QEMU's big one."""

    def __init__(self, arguments: list[str]) -> None:
        self.lock = threading.RLock()
        options = list(pairwise(arguments))
        self.backends = [self._keyed(value) for name, value in options if name == "-object"]
        own = next(backend for backend in self.backends if backend["id"] == "cpr-ram")
        self.size = int(own["size"])
        fd = int(own["mem-path"].rpartition("/")[2])
        self.ram = mmap.mmap(fd, self.size, offset=int(own.get("offset", 0)))
        chardevs = [self._keyed(value) for name, value in options if name == "-chardev"]
        self.console = next(Path(one["path"]) for one in chardevs if one["id"] == "console")
        self.listeners = [int(one["fd"]) for one in chardevs if "fd" in one]
        self.status = "inmigrate" if "-incoming" in arguments else "prelaunch"
        self.capabilities = {"x-ignore-shared": False, "x-colo": False, "events": False}
        self.fdsets: dict[int, int] = {}
        self.clients: list[Client] = []
        self.count, self.boot = 0, secrets.token_hex(8)
        if "-S" not in arguments and "-incoming" not in arguments:
            self._write_ram()
            self.status = "running"
        threading.Thread(target=self._guest, daemon=True).start()

    @staticmethod
    def _keyed(value: str) -> dict[str, str]:
        head, *rest = value.split(",")
        return {"qom-type": head, **dict(word.partition("=")[::2] for word in rest)}

    # -- the guest ----------------------------------------------------------------------------------------------------

    def _guest(self) -> None:
        while True:
            time.sleep(TICK_S)
            with self.lock:
                if self.status == "running":
                    good = self._read_ram() == (self.boot, self.count)
                    self.count += 1
                    self._write_ram()
                    with self.console.open("a") as console:
                        console.write(f"cpr-guest boot={self.boot} count={self.count} bad={int(not good)}\n")

    def _read_ram(self) -> tuple[str, int]:
        return self.ram[:8].hex(), struct.unpack(">Q", self.ram[8:16])[0]

    def _write_ram(self) -> None:
        self.ram[:16] = bytes.fromhex(self.boot) + struct.pack(">Q", self.count)
        self.ram[self.size - 8 :] = struct.pack(">Q", self.count)

    # -- commands -----------------------------------------------------------------------------------------------------

    def event(self, name: str) -> None:
        seconds, fraction = divmod(time.time(), 1)
        stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
        for client in list(self.clients):
            client.send({"event": name, "data": {}, "timestamp": stamp})

    def start(self) -> None:
        self.status = "running"
        self.event("RESUME")

    def cpr_save(self, filename: str, mode: str) -> dict[str, Any]:
        if mode != "reboot":
            raise RefusedError(f"Invalid parameter '{mode}'")
        if volatile := [one["id"] for one in self.backends if one.get("share") != "on"]:
            raise RefusedError(f"Memory region {volatile[0]} is volatile")
        if self.capabilities["x-colo"]:
            raise RefusedError("cpr-save does not support x-colo")
        was = self.status
        fd = self.open(filename, os.O_WRONLY)
        if was == "running":
            self.event("STOP")
        self.status = "save-vm"
        state = json.dumps({"boot": self.boot, "count": self.count, "status": was}).encode()
        name = MACHINE.encode()
        body = HEADER + b"\x07" + struct.pack(">I", len(name)) + name + struct.pack(">I", len(state)) + state
        try:
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(body + bytes(BULK) + self.description())
        except OSError as error:
            if was == "running":
                self.start()
            else:
                self.status = was
            raise RefusedError(f"Error -{error.errno} while saving VM state") from error
        return {}

    @staticmethod
    def description() -> bytes:
        text = json.dumps({"devices": [{"name": "cpu_common"}]}).encode()
        return b"\x06" + struct.pack(">I", len(text)) + text

    def cpr_load(self, filename: str) -> dict[str, Any]:
        if self.status == "running":
            raise RefusedError("cpr-load called for a running VM")
        with open(self.open(filename, os.O_RDONLY), "rb") as file:  # noqa: PTH123 - likewise
            data = file.read()
        if data[:8] != HEADER:
            raise RefusedError(f"{filename} is not a vmstate file")
        at = 13 + len(MACHINE)
        try:
            (length,) = struct.unpack(">I", data[at : at + 4])
            state = json.loads(data[at + 4 : at + 4 + length])
        except (struct.error, ValueError) as error:
            raise RefusedError("Error -22 while loading VM state") from error
        self.boot, self.count = state["boot"], state["count"]
        if state["status"] == "running":
            self.start()
        else:
            self.status = state["status"]
        return {}

    def open(self, filename: str, flags: int) -> int:
        if found := re.fullmatch(r"/dev/fdset/(\d+)", filename):
            fd = self.fdsets.get(int(found[1]), -1)
            if fd < 0 or _access(fd) != flags:
                raise RefusedError(f"Could not open '{filename}': No such file or directory")
            return os.dup(fd)
        try:
            return os.open(filename, flags | (os.O_CREAT | os.O_TRUNC if flags else 0), 0o600)
        except OSError as error:
            raise RefusedError(f"Could not open '{filename}': {error.strerror}") from error

    def execute(self, command: str, arguments: dict[str, Any], fd: int) -> Any:
        with self.lock:
            handler = getattr(self, "do_" + command.replace("-", "_"), None)
            if handler:
                return handler(**{name.replace("-", "_"): value for name, value in arguments.items()})
            match command:
                case "cpr-save" | "cpr-load":
                    return self.cpr_save(**arguments) if command == "cpr-save" else self.cpr_load(**arguments)
                case "add-fd":
                    number = len(self.fdsets)
                    self.fdsets[number] = fd
                    return {"fdset-id": number, "fd": fd}
                case _ if command in ANSWERS:
                    return ANSWERS[command]
            raise RefusedError(f"The command {command} has not been found")

    def do_query_status(self) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def do_query_memdev(self) -> Any:
        return [
            {"id": one["id"], "size": int(one["size"].rstrip("M")), "share": one.get("share") == "on"}
            for one in self.backends
        ]

    def do_query_migrate_capabilities(self) -> Any:
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def do_migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> Any:
        self.capabilities |= {one["capability"]: one["state"] for one in capabilities}
        return {}

    def do_qom_get(self, path: str, property: str) -> Any:  # noqa: A002 - QMP's name
        if (path, property) == ("/machine", "type"):
            return f"{MACHINE}-machine"
        backend = next((one for one in self.backends if path == f"/objects/{one['id']}"), {})
        value = {"type": backend.get("qom-type"), "discard-data": False}.get(property) if backend else None
        if value is None:
            raise RefusedError(f"Property '{path}.{property}' not found")
        return value

    def do_qom_list(self, path: str) -> Any:  # noqa: ARG002
        return []

    def do_stop(self) -> Any:
        if self.status == "running":
            self.status = "paused"
            self.event("STOP")
        return {}

    def do_cont(self) -> Any:
        if self.status in ("inmigrate", "suspended"):
            return {}
        if self.status != "running":
            self.start()
        return {}

    def do_quit(self) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}


ANSWERS: dict[str, Any] = {
    "qmp_capabilities": {},
    "query-version": {"qemu": {"major": 7, "minor": 0, "micro": 0}, "package": ""},
    "query-cpus-fast": [{"cpu-index": 0, "qom-path": "/machine/unattached/device[0]"}],
    "query-replay": {"mode": "none"},
    "query-jobs": [],
    "query-migrate": {},
    "query-named-block-nodes": [],
    "query-chardev": [],
    "query-migrate-parameters": {"downtime-limit": 300},
    "query-commands": [{"name": name} for name in ("cpr-save", "cpr-load", "migrate", "query-status")],
}


class Client:
    """One QMP connection."""

    def __init__(self, vm: Vm, connection: socket.socket) -> None:
        self._vm, self._connection = vm, connection
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\r\n")

    def serve(self) -> None:
        self.send({"QMP": {"version": ANSWERS["query-version"], "capabilities": []}})
        text, fds = "", []
        while True:
            data, got, _, _ = socket.recv_fds(self._connection, 65536, 4)
            if not data:
                return
            fds += got
            text = (text + data.decode()).lstrip()
            with contextlib.suppress(json.JSONDecodeError):  # not whole yet; nothing else ends a request
                while text:
                    request, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:].lstrip()
                    self._answer(request, fds)

    def _answer(self, request: dict[str, Any], fds: list[int]) -> None:
        command = request["execute"]
        reply: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
        try:
            fd = fds.pop(0) if command == "add-fd" else -1
            reply["return"] = self._vm.execute(command, request.get("arguments", {}), fd)
        except (RefusedError, TypeError) as error:
            reply["error"] = {"class": "GenericError", "desc": str(error)}
        if command == "qmp_capabilities":
            self._vm.clients.append(self)
        self.send(reply)


def _access(fd: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE
    return -1


def _accept(vm: Vm, fd: int) -> None:
    with socket.socket(fileno=fd) as listener:
        while True:
            connection, _ = listener.accept()
            Client(vm, connection).serve()


def main(arguments: list[str]) -> None:
    vm = Vm(arguments)
    for fd in vm.listeners:
        threading.Thread(target=_accept, args=(vm, fd), daemon=True).start()
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1:])
