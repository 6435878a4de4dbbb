# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's connection to the bus. No message may end it, or keep it busy.

dbus_next parses a whole message in Python before anybody looks at it: a message of 32 MiB, which dbus-daemon lets through,
would stop the agent for a minute. It takes a message that it can't parse for the end of the connection, and a full socket,
too: many messages at once to a busy bus would end the agent.
"""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import struct
from typing import Any, Protocol

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import BusType
from dbus_next.message import Message
from dbus_next.signature import Variant

from cpr_agent.text import printable_lines

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 10
"""Of arguments. The longest are definitions and QEMU's command lines, of some KiB."""
MAX_SENT_BYTES = 16 << 20
"""Of a message to the bus, which hangs up at 32 MiB (dbus-daemon(1), max_message_size of the system bus)."""
MAX_SENT_CHARS = 8 << 20
"""Of one text: the longest is a report."""
MESSAGES_PER_TURN = 8
"""After so many the event loop gets its turn, however many more are waiting."""
_FIXED_BYTES = 16
_BIG_ENDIAN = ord("B")


class UnsendableError(ValueError):
    """A message that the bus would hang up on, or that is none."""


class AgentBus(MessageBus):
    """As its parent, but for how messages are read, that a full socket is waited for, and that no message is sent at which
    dbus-daemon would hang up: it does at a NUL in a string, and at what is no UTF-8."""

    def __init__(self, address: str | None) -> None:
        super().__init__(address, BusType.SYSTEM)  # type: ignore[arg-type]  # None is its default
        self._writer.sock = _PatientSocket(self._sock)

    def _create_unmarshaller(self) -> FrameReader:
        return FrameReader(self._stream)

    def send(self, msg: Message) -> asyncio.Future[None]:  # type: ignore[override]  # as in the parent, which is untyped
        """Raises UnsendableError."""
        if not msg.serial:
            msg.serial = self.next_serial()
        msg.body = sendable(msg.body)
        try:
            frame = msg._marshall()  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped
        except Exception as error:  # it raises what it likes
            raise UnsendableError(f"{msg.interface}.{msg.member} on {msg.path}: {error!r}") from error
        if len(frame) > MAX_SENT_BYTES:
            raise UnsendableError(f"{msg.interface}.{msg.member} on {msg.path}: {len(frame)} bytes")
        sent: asyncio.Future[None] = self._loop.create_future()
        self._writer.messages.put_nowait((frame, [], sent))
        self._writer.schedule_write()
        return sent

    def _message_reader(self) -> None:
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = self._unmarshaller.unmarshall()
                if message is None:
                    return
                self._on_message(message)  # type: ignore[no-untyped-call]  # dbus_next leaves it untyped
        except Exception as error:  # as the parent does: the connection is over
            self._finalize(error)  # type: ignore[no-untyped-call]
            return
        if not self._disconnected:
            self._loop.call_soon(self._message_reader)  # the rest is in the stream's buffer, which wakes no reader


def sendable(value: Any) -> Any:
    """``value`` with every text in it printable, line by line; the same object if it is so already."""
    match value:
        case str():
            return printable_lines(value, MAX_SENT_CHARS)
        case Variant():
            inner = sendable(value.value)
            return value if inner is value.value else Variant(value.signature, inner)
        case list() | tuple():
            items = [sendable(item) for item in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        case dict():
            pairs = {sendable(key): sendable(item) for key, item in value.items()}
            same = all(new is old for new, old in zip(pairs.values(), value.values(), strict=False))
            return value if same and pairs.keys() == value.keys() else pairs
        case _:
            return value


class _PatientSocket:
    """For dbus_next's writer, which waits for room after a part of a message was sent, but not if it was no part at all."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, data: memoryview) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


class FrameReader:
    """Stands in for dbus_next's Unmarshaller, and uses it on whole messages only. ``stream`` does not block."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._frame = bytearray()

    def unmarshall(self) -> Message | None:
        """The next message; None if it is not all there yet. Raises EOFError, OSError."""
        while self._fill(_FIXED_BYTES) and self._fill(sum(_lengths(self._frame))):
            frame, self._frame = self._frame, bytearray()
            if message := parse(frame):
                return message
        return None

    def _fill(self, length: int) -> bool:
        while (missing := length - len(self._frame)) > 0:
            data = self._stream.read(missing)
            if data is None:
                return False
            if not data:
                raise EOFError
            self._frame += data
        return True


def parse(frame: bytearray) -> Message | None:
    """``frame`` as a message: without its body, if that is too large or makes no sense; None if the rest makes none."""
    header_bytes, body_bytes = _lengths(frame)
    headless = frame[:header_bytes]
    headless[4:8] = bytes(4)  # the length of the body (D-Bus specification, "Message Format")
    for attempt in (frame, headless) if body_bytes <= MAX_BODY_BYTES else (headless,):
        try:
            message: Message | None = Unmarshaller(io.BytesIO(attempt)).unmarshall()  # type: ignore[no-untyped-call]
        except Exception as error:  # it raises what it likes
            log.warning("a message on the bus can't be read: %r", error)
        else:
            return message
    return None


def lacks_arguments(message: Message) -> bool:
    """Were they left out by ``parse``?"""
    return bool(message.signature) and not message.body


def _lengths(frame: bytearray) -> tuple[int, int]:
    """Of the header with its padding, and of the body."""
    order = ">" if frame[0] == _BIG_ENDIAN else "<"
    body_bytes, _, fields_bytes = struct.unpack_from(f"{order}III", frame, 4)
    return _FIXED_BYTES + fields_bytes + -fields_bytes % 8, body_bytes
