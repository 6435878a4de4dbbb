# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m tests.pid1 SOCKET: stands for PID 1 at its own socket. It is a process, because a call of pystemd stops every
thread of the caller's. It speaks the D-Bus of two that are alone: no names, no Hello, and signals that come unasked.

It says "started UNIT MODE" for each unit that it is asked to start, and hears: "end JOB UNIT RESULT", and "hang-up".
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpr_agent.bus.frames import MAX_SENT_BYTES, FrameReader, frame_of, parse, unchanged
from cpr_agent.bus.library import Message, MessageType

MANAGER = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
ANSWERS = {b"AUTH": b"DATA\r\n", b"DATA": b"OK 0123456789abcdef0123456789abcdef\r\n", b"NEGO": b"AGREE_UNIX_FD\r\n"}


class Pid1:
    """The process, for a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def heard(self) -> str:
        """The next that it says."""
        assert self._process.stdout
        return self._process.stdout.readline().strip()

    def tell(self, words: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()


@contextmanager
def pid1(path: Path) -> Iterator[Pid1]:
    command = [sys.executable, "-m", "tests.pid1", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        one = Pid1(process)
        assert one.heard() == "ready"
        yield one
        process.kill()


class _Talk:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        stream = connection.makefile("rb")
        while (line := stream.readline().lstrip(b"\0")) and not line.startswith(b"BEGIN"):
            connection.sendall(ANSWERS[line[:4]])
        connection.setblocking(False)  # noqa: FBT003 - the library's
        self._frames = FrameReader(stream)
        self._serial = 0
        self._started = 0

    def hear(self) -> None:
        """Raises EOFError, OSError."""
        while frame := self._frames.next():
            call = parse(frame)
            if call and call.message_type is MessageType.METHOD_CALL:
                self._answer(call)

    def send(self, message: Message) -> None:
        self._serial += 1
        message.serial = self._serial
        self.socket.sendall(frame_of(message, unchanged, MAX_SENT_BYTES))

    def end(self, job: str, unit: str, result: str) -> None:
        for _ in range(3):  # others come with it
            self.send(Message.new_signal(*MANAGER, "UnitNew", "so", [unit, "/org/freedesktop/systemd1/unit/x"]))
        body = [int(job), f"/org/freedesktop/systemd1/job/{job}", unit, result]
        self.send(Message.new_signal(*MANAGER, "JobRemoved", "uoss", body))

    def _answer(self, call: Message) -> None:
        if call.member == "StartUnit":
            self._started += 1
            unit, mode = call.body
            self.send(Message.new_signal(*MANAGER, "JobNew", "uos", [self._started, "/job", unit]))
            self.send(Message.new_method_return(call, "o", [f"/org/freedesktop/systemd1/job/{self._started}"]))
            print("started", unit, mode, flush=True)
        elif call.member == "Subscribe":
            self.send(Message.new_method_return(call, "", []))
        else:
            self.send(Message.new_error(call, "org.freedesktop.DBus.Error.UnknownMethod", "no"))


def main() -> None:
    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ, "told")
    print("ready", flush=True)
    talk: _Talk | None = None
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                talk = _Talk(listener.accept()[0])
                selector.register(talk.socket, selectors.EVENT_READ)
                talk.hear()
            elif key.data == "told":
                word, *more = sys.stdin.readline().split()
                assert talk
                if word == "end":
                    talk.end(*more)
                else:
                    talk.socket.shutdown(socket.SHUT_RDWR)
            elif talk:
                try:
                    talk.hear()
                except (EOFError, OSError):
                    selector.unregister(talk.socket)
                    talk = None


if __name__ == "__main__":
    main()
