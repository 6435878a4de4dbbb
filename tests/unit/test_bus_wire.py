# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection, against a bus that behaves as badly as this test makes it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cpr_agent.bus.client import plain
from cpr_agent.bus.frames import FrameReader, UnsendableError, lacks_arguments, parse
from cpr_agent.bus.library import Message, MessageFlag, MessageType, Variant, marshal
from cpr_agent.bus.service import Service
from cpr_agent.bus.shape import sender
from cpr_agent.bus.wire import DAEMON, TURN_S, AddressError, AgentBus, AuthenticationError, ClientBus

WAIT_S = 60.0


class Peer:
    """The bus's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock
        self._frames = FrameReader(sock.makefile("rb"))

    def let_in(self) -> None:
        self.expect(b"\r\n")
        self.sock.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
        self.expect(b"BEGIN\r\n")
        self.answer(self.heard(), "s", ":1.7")

    def expect(self, end: bytes) -> bytes:
        said = b""
        while not said.endswith(end):
            said += self.sock.recv(1)
        return said

    def heard(self) -> Message:
        frame = self._frames.next()
        assert frame
        message = parse(frame)
        assert message
        return message

    def say(self, message: Message, serial: int = 9) -> None:
        message.serial = serial
        self.sock.sendall(marshal(message))

    def answer(self, call: Message, signature: str = "", *body: object) -> None:
        self.say(
            Message(message_type=MessageType.METHOD_RETURN, reply_serial=call.serial, signature=signature, body=list(body))
        )


@contextlib.asynccontextmanager
async def talking(
    talk: Callable[[Peer], None], kind: type[AgentBus] = AgentBus, *, hello: bool = True
) -> AsyncIterator[AgentBus]:
    """A connection to a peer that lets it in and then does ``talk``; without ``hello``, does that at once."""
    near, far = socket.socketpair()
    bus, peer = kind(sock=near), Peer(far)

    def serve() -> None:
        if hello:
            peer.let_in()
        talk(peer)

    with far:
        served = asyncio.create_task(asyncio.to_thread(serve))
        try:
            async with asyncio.timeout(WAIT_S):
                if hello:
                    await bus.connect()
                yield bus
                await served
        finally:
            bus.disconnect()


async def connected(address: str) -> AgentBus:
    return await AgentBus(address).connect()


def call(member: str = "M", signature: str = "", *body: object) -> Message:
    return Message("a.b", "/a", "a.b", member, signature=signature, body=list(body))


def test_answers_come_to_those_who_asked() -> None:
    def talk(peer: Peer) -> None:
        first, second = peer.heard(), peer.heard()
        peer.answer(second, "s", str(second.member))
        peer.say(Message(message_type=MessageType.METHOD_RETURN, reply_serial=4711))  # nobody asked
        peer.answer(first, "s", str(first.member))

    async def main() -> None:
        async with talking(talk) as bus:
            assert bus.unique_name == ":1.7"
            replies = await asyncio.gather(bus.call(call("One")), bus.call(call("Two")))
            assert [reply.body for reply in replies] == [["One"], ["Two"]]

    asyncio.run(main())


@pytest.mark.parametrize("half_a_line", [b"", b"OK 01234"])
def test_a_bus_that_hangs_up_at_once_is_not_waited_for(half_a_line: bytes) -> None:
    def talk(peer: Peer) -> None:
        peer.sock.sendall(half_a_line)
        peer.sock.shutdown(socket.SHUT_RDWR)

    async def main() -> None:
        async with talking(talk, hello=False) as bus:
            with pytest.raises((EOFError, ConnectionError)):
                await bus.connect()

    asyncio.run(main())


def test_a_bus_that_does_not_let_us_in_says_so() -> None:
    def refuse(peer: Peer) -> None:
        assert bytes.fromhex(peer.expect(b"\r\n").split()[-1].decode()) == str(os.getuid()).encode()
        peer.sock.sendall(b"REJECTED EXTERNAL\r\n")

    def chatter(peer: Peer) -> None:
        with contextlib.suppress(OSError):
            peer.sock.sendall(b"x" * (1 << 20))

    def full(peer: Peer) -> None:
        peer.expect(b"\r\n")
        peer.sock.sendall(b"OK 0\r\n")
        peer.expect(b"BEGIN\r\n")
        hello = peer.heard()
        error = Message.new_error(hello, "org.freedesktop.DBus.Error.LimitsExceeded", "too many of you")
        error.reply_serial = hello.serial
        peer.say(error)

    async def main(talk: Callable[[Peer], None], kind: type[Exception], said: str) -> None:
        async with talking(talk, hello=False) as bus:
            with pytest.raises(kind, match=said):
                await bus.connect()
            bus.disconnect()

    asyncio.run(main(refuse, AuthenticationError, "REJECTED"))
    asyncio.run(main(chatter, AuthenticationError, "xxx"))
    asyncio.run(main(full, ConnectionRefusedError, "too many of you"))


def test_a_call_ends_with_the_connection() -> None:
    def talk(peer: Peer) -> None:
        peer.heard()
        peer.sock.shutdown(socket.SHUT_RDWR)

    async def main() -> None:
        async with talking(talk) as bus:
            with pytest.raises((EOFError, ConnectionError)):
                await bus.call(call())
            with pytest.raises((EOFError, ConnectionError)):
                await bus.wait_for_disconnect()
            with pytest.raises(ConnectionResetError):
                await bus.call(call())
            assert bus.send(call()).cancelled()

    asyncio.run(main())


def test_a_call_ends_when_we_end_the_connection() -> None:
    async def main() -> None:
        async with talking(lambda _: None) as bus:
            waiting = asyncio.create_task(bus.call(call()))
            await asyncio.sleep(0)
            bus.disconnect()
            with pytest.raises(ConnectionResetError):
                await waiting
            await bus.wait_for_disconnect()

    asyncio.run(main())


def test_a_full_socket_is_waited_for_and_the_order_kept() -> None:
    go_on = threading.Event()
    count, size = 200, 60_000

    def talk(peer: Peer) -> None:
        assert go_on.wait(WAIT_S)
        for number in range(count):
            message = peer.heard()
            assert message.body == [str(number) + "x" * size]
        peer.answer(peer.heard())

    async def main() -> None:
        async with talking(talk) as bus:
            sent = [bus.send(call("M", "s", str(number) + "x" * size)) for number in range(count)]
            assert sent[0].done()
            assert not sent[-1].done()
            go_on.set()
            await asyncio.gather(*sent)
            await bus.call(call())

    asyncio.run(main())


def test_handlers_are_asked_in_turn_and_one_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def talk(peer: Peer) -> None:
        asked = peer.heard()
        peer.say(Message.new_signal("/a", "a.b", "Bad"))
        peer.say(Message.new_signal("/a", "a.b", "Good"))
        peer.say(call("Unknown"), 77)
        answer = peer.heard()
        assert (answer.reply_serial, answer.error_name) == (77, "org.freedesktop.DBus.Error.UnknownMethod")
        peer.answer(asked)

    async def main() -> None:
        heard: list[str] = []

        def first(message: Message) -> bool:
            heard.append(f"first {message.member}")
            if message.member == "Bad":
                raise ZeroDivisionError
            return message.member == "Good"

        def second(message: Message) -> bool:
            heard.append(f"second {message.member}")
            return False

        async with talking(talk) as bus:
            bus.add_message_handler(first)
            bus.add_message_handler(second)
            await bus.call(call())
        assert heard == ["first Bad", "first Good", "first Unknown", "second Unknown"]

    asyncio.run(main())
    assert "ZeroDivisionError" in caplog.text


def sent_by(sender: str, message: Message, *more: bytes) -> bytearray:
    """``message`` as a bus passes it on, with ``more`` fields before the sender: the libraries do not write that."""
    message.serial = 7
    frame = marshal(message)
    (fields_bytes,) = struct.unpack_from("<I", frame, 12)
    fields = frame[16 : 16 + fields_bytes]
    for field in (*more, b"\7\1s\0" + struct.pack("<I", len(sender)) + sender.encode() + b"\0"):
        fields += bytes(-len(fields) % 8) + field
    body = frame[16 + fields_bytes + -fields_bytes % 8 :]
    return frame[:12] + struct.pack("<I", len(fields)) + fields + bytes(-len(fields) % 8) + body


def test_a_sender_is_found_in_a_header_without_a_library() -> None:
    unix_fds = b"\x09\1u\0\0\0\0\0"
    for message in (call(), call("M", "as", ["x"]), Message.new_signal("/a", "a.b", "S", "s", ["x"])):
        frame = sent_by(":1.66", message, unix_fds)
        assert sender(frame) == ":1.66"
        for end in range(16, len(frame)):
            assert ":1.66".startswith(sender(frame[:end]))
    unknown = b"\x0a\1y\0\0"
    assert sender(sent_by(":1.66", call(), unknown)) == ""
    assert sender(sent_by(":1.66", call(), *[unix_fds] * 16)) == ""


def test_a_flood_is_dropped_by_its_headers_while_answers_come() -> None:
    no_reply = MessageFlag.NO_REPLY_EXPECTED
    count = 2000

    def talk(peer: Peer) -> None:
        asked = peer.heard()
        unasked = Message("a.b", "/a", "a.b", "Flood", flags=no_reply, signature="as", body=[["x"] * 100])
        peer.sock.sendall(sent_by(":1.66", unasked) * count)
        peer.sock.sendall(sent_by(":1.66", Message.new_signal("/a", "a.b", "Signal")) * count)
        peer.sock.sendall(sent_by(":1.66", call("Asked", "s", "x")))
        peer.sock.sendall(sent_by(":1.8", Message("a.b", "/a", "a.b", "Unasked", flags=no_reply)))
        peer.sock.sendall(sent_by(DAEMON[0], Message.new_signal("/a", "a.b", "News", "s", ["x"])))
        peer.answer(asked)

    async def main() -> None:
        heard: list[tuple[str, str, bool]] = []

        def handler(message: Message) -> bool:
            heard.append((str(message.sender), str(message.member), lacks_arguments(message)))
            return True

        async with talking(talk) as bus:
            bus.add_message_handler(handler)
            bus.screen(lambda sender: sender != ":1.66")
            await bus.call(call())
        assert heard == [(":1.66", "Asked", True), (":1.8", "Unasked", False), (DAEMON[0], "News", False)]

    asyncio.run(main())


def test_others_have_their_turn_while_messages_are_read() -> None:
    count = 50
    answers: list[Callable[[], None]] = []

    def talk(peer: Peer) -> None:
        asked = peer.heard()
        answers.append(lambda: peer.answer(asked))
        peer.sock.sendall(sent_by(":1.8", Message.new_signal("/a", "a.b", "S")) * count)

    async def main() -> None:
        loop, turns = asyncio.get_running_loop(), 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        def slow(_: Message) -> bool:
            if answers:  # from now on the socket, too, has something to read, not only the buffer
                answers.pop()()
                turn()
            until = loop.time() + TURN_S
            while loop.time() < until:
                pass
            return True

        async with talking(talk) as bus:
            bus.add_message_handler(slow)
            await bus.call(call())
            assert turns >= count

    asyncio.run(main())


def test_the_agent_s_texts_are_made_fit_and_cprctl_s_are_sent_as_they_are_or_not_at_all() -> None:
    heard: list[object] = []

    def talk(peer: Peer) -> None:
        heard.extend(peer.heard().body)

    async def main(kind: type[AgentBus], text: str) -> None:
        async with talking(talk, kind) as bus:
            try:
                await bus.send(call("M", "v", Variant("s", text)))
            finally:
                bus.send(call("M", "s", "the end"))

    asyncio.run(main(AgentBus, "a\0b\ud800\u00a0"))
    asyncio.run(main(ClientBus, "a\tb\u00a0\r"))
    assert [getattr(one, "value", one) for one in heard] == [r"a\x00b\ud800\xa0", "a\tb\u00a0\r"]
    for text in ("a\0b", "a\ud800b"):
        with pytest.raises(UnsendableError):
            asyncio.run(main(ClientBus, text))


@pytest.mark.parametrize("library", ["dbus_fast", "dbus_next"])
def test_a_message_of_either_library_is_sent(library: str) -> None:
    """Whichever is in use: who writes against one of them need not know which that is."""
    message = pytest.importorskip(f"{library}.message", exc_type=ImportError).Message
    variant = pytest.importorskip(f"{library}.signature", exc_type=ImportError).Variant
    heard: list[Message] = []

    def talk(peer: Peer) -> None:
        asked = peer.heard()
        heard.append(asked)
        peer.answer(asked, "s", "well")

    async def main() -> None:
        body = ["x", {"a": variant("s", "a\0b"), "b": variant("v", variant("as", ["c\ud800"]))}]
        async with talking(talk) as bus:
            reply = await bus.call(message("a.b", "/a", "a.b", "M", signature="sa{sv}", body=body))
            assert isinstance(reply, Message)
            assert reply.body == ["well"]

    asyncio.run(main())
    assert plain(heard[0].body) == ["x", {"a": r"a\x00b", "b": [r"c\ud800"]}]


def test_what_is_too_large_is_not_sent() -> None:
    async def main() -> None:
        async with talking(lambda peer: peer.answer(peer.heard())) as bus:
            with pytest.raises(UnsendableError, match="bytes"):
                bus.send(call("M", "ay", bytes(17 << 20)))
            await bus.call(call())

    asyncio.run(main())


@pytest.mark.parametrize("body", [("ay", bytes(17 << 20)), ("t", 1 << 70)])
def test_an_answer_that_can_t_be_sent_becomes_an_error(body: tuple[str, object]) -> None:
    """So that its caller does not wait for ever."""
    heard: list[Message] = []
    asked = call()
    asked.serial, asked.sender = 77, ":1.8"
    signature, value = body

    async def main() -> None:
        async with talking(lambda peer: heard.append(peer.heard())) as bus:
            service = cast("Service", SimpleNamespace(_bus=bus))
            Service._reply(service, asked, Message.new_method_return(asked, signature, [value]))

    asyncio.run(main())
    assert (heard[0].reply_serial, heard[0].error_name) == (77, "org.cpragent1.Error.Internal")


@pytest.mark.parametrize(
    "address",
    [
        *("", ";", "unix", "unix:", "unix:path", "unix:dir=/x", "unix:path=/x y", "unix:path=%00", "unixexec:path=/bin/sh"),
        *("tcp:host=localhost", "tcp:host=localhost,port=x", "tcp:host=localhost,port=99999", "nonce-tcp:host=a,port=1"),
    ],
)
def test_what_is_no_address_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", ";")  # for the one that says nothing
    with pytest.raises(AddressError):
        asyncio.run(connected(address))


@pytest.mark.parametrize("kind", ["path", "abstract", "tcp", "second"])
def test_a_bus_is_found_at_each_kind_of_address(kind: str, tmp_path: Path) -> None:
    where: str | tuple[str, int] = str(tmp_path / "a b")
    if kind == "abstract":
        where = f"\0cpr-agent-test-{os.getpid()}"
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1", 0) if kind == "tcp" else where)
        listener.listen()
        port = listener.getsockname()[1] if kind == "tcp" else 0
        address = {
            "path": f"unix:path={tmp_path}/a%20b,guid=0123",
            "abstract": f"unix:abstract={str(where)[1:]}",
            "tcp": f"tcp:host=127.0.0.1,port={port}",
            "second": f"unix:path={tmp_path}/none;unix:path={tmp_path}/a%20b",
        }[kind]

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                Peer(peer).let_in()

        async def main() -> None:
            served = asyncio.create_task(asyncio.to_thread(serve))
            bus = await connected(address)
            bus.disconnect()
            await served

        asyncio.run(main())
    with pytest.raises(FileNotFoundError):
        asyncio.run(connected(f"unix:path={tmp_path}/none"))


def test_the_daemon_is_known_by_its_names() -> None:
    message = Message(*DAEMON, "GetId")
    assert (message.destination, message.path, message.interface) == DAEMON
