# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection to a message bus, the agent's and cprctl's. No message may end it, or keep its owner busy.

It is our own (ADR 28). A library's would parse a whole message before anybody looks at it, take a message that it can't
parse for the end of the connection, and a full socket, too: many messages at once to a busy bus would end the agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar, Self
from urllib.parse import unquote

from cpr_agent.bus.frames import (
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_SENT_BYTES,
    FrameReader,
    frame_of,
    parse,
    parse_header,
    shown,
    unchanged,
)
from cpr_agent.bus.library import ErrorType, Message, MessageFlag, MessageType
from cpr_agent.bus.shape import sender

log = logging.getLogger(__name__)

DAEMON = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
"""Name, path and interface of the bus itself."""
SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"
"""Unless $DBUS_SYSTEM_BUS_ADDRESS names another: as sd_bus_open_system(3) has it."""
TURN_S = 0.001
"""After so long a reading the event loop gets its turn, however many more messages are waiting. Each step of a guest's save
waits for one reading at the most."""
_READ_AHEAD_BYTES = 256 << 10
"""Of the socket at once: as much as it holds."""
_CALL, _SIGNAL = MessageType.METHOD_CALL.value, MessageType.SIGNAL.value
_NO_REPLY = MessageFlag.NO_REPLY_EXPECTED.value
_MAX_LINE_BYTES = 16 << 10
_MAX_SERIAL = (1 << 32) - 1

Handler = Callable[[Message], bool]
Screen = Callable[[str], bool]


class AddressError(ValueError):
    """No address of a bus (D-Bus specification, "Server Addresses")."""


class AuthenticationError(ConnectionError):
    """The bus does not let this user in."""


class AgentBus:
    """The agent's connection, in the shape of dbus-next's and dbus-fast's ``MessageBus``. It has no task: it reads and
    writes when the event loop finds the socket ready."""

    max_body_bytes: ClassVar[int] = MAX_BODY_BYTES
    max_sent_bytes: ClassVar[int] = MAX_SENT_BYTES

    def __init__(self, address: str | None = None, *, sock: socket.socket | None = None) -> None:
        """To the bus at ``address``, by default the system bus; or over ``sock``, which it closes. Nothing can be sent
        before ``connect``. Raises AddressError, OSError."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock or _connected(address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or SYSTEM_BUS)
        self._sock.settimeout(0)
        self._stream = self._sock.makefile("rb", _READ_AHEAD_BYTES)
        self._frames = FrameReader(self._stream)
        self._reads_on = False
        self.unique_name = ""
        """As the bus calls this connection, once it has said hello."""
        self._serial = 0
        self._calls: dict[int, asyncio.Future[Message]] = {}
        self._handlers: list[Handler] = []
        self._is_heard: Screen | None = None
        self._unsent: deque[tuple[memoryview, asyncio.Future[None]]] = deque()
        self._end: asyncio.Future[None] = self._loop.create_future()

    async def connect(self) -> Self:
        """Come in, as the user that this process is (D-Bus specification, "Authentication Protocol"). Raises OSError,
        EOFError."""
        try:
            await self._say_hello()
        except BaseException:
            self.disconnect()
            raise
        return self

    async def _say_hello(self) -> None:
        user = str(os.getuid()).encode().hex()
        await self._loop.sock_sendall(self._sock, f"\0AUTH EXTERNAL {user}\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n") and len(answer) < _MAX_LINE_BYTES:
            more = await self._loop.sock_recv(self._sock, 1024)  # nothing else comes before BEGIN
            if not more:
                raise EOFError("it hung up")
            answer += more
        if not answer.startswith(b"OK "):
            raise AuthenticationError(f"authentication failed: {answer.decode(errors='replace').strip()}")
        await self._loop.sock_sendall(self._sock, b"BEGIN\r\n")
        self._loop.add_reader(self._sock, self._wake)
        reply = await self.call(Message(*DAEMON, "Hello"))
        if reply.message_type is MessageType.ERROR:
            raise ConnectionRefusedError(error_text(reply))
        self.unique_name = str(reply.body[0])

    async def call(self, message: Message) -> Message:
        """The answer to ``message``, which may be an error. Raises UnsendableError; OSError or EOFError if the connection
        has ended, or ends before there is one."""
        if self._end.done():
            raise ConnectionResetError("the connection to the bus has ended")
        answer: asyncio.Future[Message] = self._loop.create_future()
        serial = message.serial = self._next_serial()
        self._calls[serial] = answer
        try:
            self.send(message)
            return await answer
        finally:
            self._calls.pop(serial, None)

    def send(self, message: Message) -> asyncio.Future[None]:
        """Without waiting for an answer. The future is done when the message has been written, and cancelled if the
        connection ends before that. Raises UnsendableError."""
        if not message.serial:
            message.serial = self._next_serial()
        frame = frame_of(message, self.fit, self.max_sent_bytes)
        written: asyncio.Future[None] = self._loop.create_future()
        if self._end.done():
            written.cancel()
            return written
        self._unsent.append((memoryview(frame), written))
        if len(self._unsent) == 1:
            self._write()
        return written

    def add_message_handler(self, handler: Handler) -> None:
        """``handler`` hears signals, and calls without their arguments (``read_arguments``). No handler after it hears of
        one for which it returns true."""
        self._handlers.append(handler)

    def screen(self, is_heard: Screen) -> None:
        """From now on handlers hear no signals but the bus's own, and no call that wants no answer from a sender for which
        ``is_heard`` returns false. dbus-daemon lets any number of both through: a drop must cost less than it does."""
        self._is_heard = is_heard

    def disconnect(self) -> None:
        """What has not been written is not sent."""
        self._finish(None)

    async def wait_for_disconnect(self) -> None:
        """Returns after ``disconnect``. Raises OSError, EOFError if the connection was lost."""
        await asyncio.shield(self._end)

    @staticmethod
    def fit(text: str) -> str:
        """``text`` as it is sent. Raises UnsendableError."""
        return shown(text)

    # -- reading --------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._reads_on:  # or others had one turn for two readings
            self._read()

    def _read(self) -> None:
        until = self._loop.time() + TURN_S
        try:
            while self._loop.time() < until:
                frame = self._frames.next()
                if frame is None:
                    return
                if not self._is_dropped(frame) and (message := self._message(frame)):
                    self._hear(message)
                if self._end.done():
                    return
        except (OSError, EOFError) as error:
            self._finish(error)
            return
        self._reads_on = True  # the rest is in the stream's buffer, which wakes no reader
        self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        self._reads_on = False
        if not self._end.done():
            self._read()

    def _is_dropped(self, frame: bytearray) -> bool:
        if self._is_heard is None:
            return False
        kind, flags = frame[1:3]
        if kind == _CALL:
            return bool(flags & _NO_REPLY) and not self._is_heard(sender(frame))
        return kind == _SIGNAL and sender(frame) != DAEMON[0]

    def _message(self, frame: bytearray) -> Message | None:
        return parse_header(frame) if frame[1] == _CALL else parse(frame, self.max_body_bytes)

    def _hear(self, message: Message) -> None:
        if message.message_type in (MessageType.METHOD_RETURN, MessageType.ERROR):
            answer = self._calls.pop(message.reply_serial or 0, None)
            if answer and not answer.done():
                answer.set_result(message)
            return
        try:
            if any(handler(message) for handler in self._handlers):
                return
        except Exception:  # a handler's trouble with one message is not that of the next
            log.exception("a message on the bus was not understood")
        if message.message_type is MessageType.METHOD_CALL and not message.flags & MessageFlag.NO_REPLY_EXPECTED:
            self.send(Message.new_error(message, ErrorType.UNKNOWN_METHOD.value, "there is no such method here"))

    # -- writing --------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        try:
            while self._unsent:
                rest, written = self._unsent[0]
                sent = self._sock.send(rest)
                if sent < len(rest):
                    self._unsent[0] = rest[sent:], written
                    continue
                self._unsent.popleft()
                if not written.done():
                    written.set_result(None)
        except BlockingIOError:
            self._loop.add_writer(self._sock, self._write)
        except OSError as error:
            self._finish(error)
        else:
            self._loop.remove_writer(self._sock)

    def _next_serial(self) -> int:
        """Never 0 (D-Bus specification, "Message Format")."""
        self._serial = self._serial % _MAX_SERIAL + 1
        return self._serial

    def _finish(self, error: Exception | None) -> None:
        if self._end.done():
            return
        if error:
            self._end.set_exception(error)
            self._end.exception()  # known, then: whoever did not wait for it needs no traceback
        else:
            self._end.set_result(None)
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._stream.close()
        self._sock.close()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error or ConnectionResetError("the connection to the bus was ended"))
        for _, written in self._unsent:
            written.cancel()
        self._unsent.clear()


class ClientBus(AgentBus):
    """cprctl's: the agent's answers may be long, and what the user typed is sent as it is."""

    max_body_bytes = MAX_MESSAGE_BYTES
    max_sent_bytes = MAX_MESSAGE_BYTES

    @staticmethod
    def fit(text: str) -> str:
        return unchanged(text)


def error_text(reply: Message) -> str:
    """Of an answer that is an error: its text, or else its name."""
    return str(reply.body[0]) if reply.body else str(reply.error_name)


def _connected(address: str) -> socket.socket:
    """The first of ``address``'s servers that is there. Raises AddressError, OSError."""
    failure: OSError | None = None
    for family, where in _servers(address):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.connect(where)  # without the loop's help, which takes a full backlog of an AF_UNIX socket for a connection
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure or AddressError(f"{address!r} names no server")


def _servers(address: str) -> Iterator[tuple[socket.AddressFamily, str | tuple[str, int]]]:
    for one in filter(None, address.split(";")):
        transport, _, rest = one.partition(":")
        options = {}
        for key, equals, value in (option.partition("=") for option in rest.split(",") if option):
            if not equals or not re.fullmatch(r"[-0-9A-Za-z_/.*\\%]*", value):
                raise AddressError(f"{one!r} is no address of a bus")
            options[key] = unquote(value)
        match transport, options:
            case "unix", {"path": path} if "\0" not in path:
                yield socket.AF_UNIX, path
            case "unix", {"abstract": name}:
                yield socket.AF_UNIX, f"\0{name}"
            case "tcp", {"host": host, "port": port} if port.isdecimal() and int(port) < 1 << 16:
                yield socket.AF_INET, (host, int(port))
            case _:
                raise AddressError(f"{one!r} is no address of a bus that can be reached from here")
