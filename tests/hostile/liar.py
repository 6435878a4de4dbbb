# SPDX-License-Identifier: GPL-2.0-or-later
"""A compromised QEMU: a real one, whose QMP with the agent goes through here, where it is changed by rules.

    python3 liar.py QEMU LIES QEMU-ARGUMENT…

LIES is a file of rules in JSON, read again when it has changed; without it nothing is changed. A rule is an object with
"on" (a command, "event:NAME", "greeting", or "*") and what becomes of the message:

    "silent"    it is not passed on
    "slow"      it is passed on after so many seconds, and all that comes after it waits
    "hang-up"   the connection ends
    "answer"    the text of the answer in JSON, or the text of "timestamp" with "timestamp"
    "add"       values that the answer, a list, has at its end
    "said"      this text is sent before it
    "flood"     this text is sent before it, again and again
    "state"     bytes that the file of the saved state has then, most of them a hole
    "appended"  bytes that the saved state has in addition, each of which could begin its description
    "mutate"    each part of it is replaced by nonsense, with this probability; "seed" makes that repeatable
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import socket
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

AGENT_FD = 11
PR_SET_PDEATHSIG, SIGKILL = 1, 9
NONSENSE: tuple[Any, ...] = (
    *(None, [], {}, "", 0, -1, 1.5, 1 << 64, 1 << 70, "x" * 5000, "\0", "\ud800", True, [[]], [{}], {"a": {}}),
    *(float("nan"), float("inf"), "\x1b[2J", "\u202e", "[bold]", "../../etc/passwd", "/dev/zero"),
)


class Lies:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = 0
        self._rules: list[dict[str, Any]] = []
        self._random = random.Random(0)

    def of(self, name: str) -> dict[str, Any]:
        try:
            stamp = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if stamp != self._stamp:
            self._stamp, self._rules = stamp, json.loads(self._path.read_text())
            self._random = random.Random(next((rule["seed"] for rule in self._rules if "seed" in rule), 0))
        general = name not in ("greeting", "qmp_capabilities")
        return next((rule for rule in self._rules if rule["on"] == name or (rule["on"] == "*" and general)), {})

    def mutated(self, value: Any, probability: float) -> Any:
        if self._random.random() < probability:
            return self._random.choice(NONSENSE)
        if isinstance(value, dict):
            kept = {key: one for key, one in value.items() if self._random.random() > probability / 3}
            return {key: self.mutated(one, probability) for key, one in kept.items()}
        return [self.mutated(one, probability) for one in value] if isinstance(value, list) else value


class Connection:
    """One of the agent, and one to the real QEMU for it."""

    def __init__(self, agent: socket.socket, qemu: socket.socket, lies: Lies) -> None:
        self._agent, self._qemu, self._lies = agent, qemu, lies
        self._asked: dict[Any, str] = {}
        self._state = -1

    def serve(self) -> None:
        threading.Thread(target=self._down, daemon=True).start()
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(self._agent, 65536, 4)
                if not data:
                    break
                for text in filter(str.strip, data.decode().replace("}{", "}\n{").split("\n")):
                    request = json.loads(text)
                    self._asked[request.get("id")] = request["execute"]
                if fds:
                    self._state = os.dup(fds[0])
                socket.send_fds(self._qemu, [data], fds)
                for fd in fds:
                    os.close(fd)
        except (OSError, ValueError):
            pass
        finally:
            self._end()

    def _down(self) -> None:
        try:
            for line in self._qemu.makefile("rb"):
                said = json.loads(line)
                self._agent.sendall(self._changed(said))
        except (OSError, ValueError):
            pass
        finally:
            self._end()

    def _name_of(self, said: dict[str, Any]) -> str:
        if "QMP" in said:
            return "greeting"
        return f"event:{said['event']}" if "event" in said else self._asked.pop(said.get("id"), "")

    def _spoil_state(self, rule: dict[str, Any], said: dict[str, Any]) -> None:
        if self._state < 0 or said.get("data", {}).get("status") != "completed":
            return
        if "state" in rule:
            os.ftruncate(self._state, rule["state"])
        if "appended" in rule:
            os.pwrite(self._state, b"\x06" * rule["appended"], os.fstat(self._state).st_size)

    def _say_before(self, rule: dict[str, Any]) -> None:
        self._agent.sendall(rule.get("said", "").encode())
        while "flood" in rule:
            self._agent.sendall(rule["flood"].encode() * (1 + (1 << 16) // len(rule["flood"])))
        time.sleep(rule.get("slow", 0))  # this is the lie

    def _changed(self, said: dict[str, Any]) -> bytes:
        rule = self._lies.of(self._name_of(said))
        self._spoil_state(rule, said)
        self._say_before(rule)
        if "hang-up" in rule:
            raise OSError("as it was told")
        if "silent" in rule:
            return b""
        if "add" in rule:
            said["return"] += rule["add"]
        if "mutate" in rule:
            part = "return" if "return" in said else "data"
            said[part] = self._lies.mutated(said.get(part), rule["mutate"])
        text = json.dumps(said)
        for key, part in (("answer", "return"), ("timestamp", "timestamp")):
            if key in rule and part in said:
                text = json.dumps({**said, part: "@"}).replace('"@"', rule[key], 1)
        return text.encode() + b"\r\n"

    def _end(self) -> None:
        for end in (self._agent, self._qemu):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def main(arguments: list[str]) -> None:
    qemu, lies, *argv = arguments[1:]
    if ("-machine", "none") in pairwise(argv):
        os.execv(qemu, [qemu, *argv])  # noqa: S606 - becoming QEMU is what this program is for
    hidden = f"{lies}.{os.getpid()}"
    argv = [word.replace(f"id=cpr-agent,fd={AGENT_FD}", f"id=cpr-agent,path={hidden}") for word in argv]
    parent = os.getpid()
    if os.fork():  # the real one keeps the PID that the agent knows
        os.close(AGENT_FD)
        os.execv(qemu, [qemu, *argv])  # noqa: S606 - becoming QEMU is what this program is for
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    if os.getppid() != parent:
        return
    for fd in range(3, 64):
        if fd != AGENT_FD:
            with contextlib.suppress(OSError):
                os.close(fd)
    listener = socket.socket(fileno=AGENT_FD)
    rules = Lies(Path(lies))
    while True:
        agent, _ = listener.accept()
        real = socket.socket(socket.AF_UNIX)
        for _ in range(1000):
            try:
                real.connect(hidden)
                break
            except OSError:
                time.sleep(0.01)  # the real one binds its socket when it pleases
        threading.Thread(target=Connection(agent, real, rules).serve, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv)
