# SPDX-License-Identifier: GPL-2.0-or-later
"""What callers may send at all: nothing of it ends the agent, keeps it from others, or is more than it needs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cpr_agent.bus.client import CallError
from cpr_agent.bus.contract import BUS_NAME, ROOT
from cpr_agent.bus.frames import MAX_BODY_BYTES, FrameReader, lacks_arguments, parse
from cpr_agent.bus.library import Message, MessageFlag, Variant, marshal
from cpr_agent.bus.limits import BURST, CALLS_PER_S, UNDER_WAY, UNDER_WAY_PER_USER, Limits
from cpr_agent.errors import LimitsExceeded
from tests.lab import PATIENCE_S, Guest, Lab, let_others_in

MANAGER = f"{BUS_NAME}.Manager"


def message(member: str, *body: object, signature: str = "") -> Message:
    return Message(BUS_NAME, ROOT, MANAGER, member, signature=signature, body=list(body))


def marshalled(one: Message, serial: int = 7) -> bytearray:
    one.serial = serial
    return marshal(one)


@pytest.fixture
def raw(lab: Lab) -> Iterator[socket.socket]:
    """A connection on which anything can be said."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(lab.address.partition("path=")[2].partition(",")[0])
        connection.sendall(b"\0AUTH EXTERNAL %s\r\n" % str(os.geteuid()).encode().hex().encode())
        assert connection.recv(100).startswith(b"OK")
        connection.sendall(b"BEGIN\r\n")
        daemon = "org.freedesktop.DBus"
        connection.sendall(marshalled(Message(daemon, "/org/freedesktop/DBus", daemon, "Hello"), 1))
        assert connection.recv(1000)
        yield connection


def alive(guest: Guest) -> None:
    assert guest.lab.client(lambda client: client.manager("ListVMs"))[0][0] == "web1"
    assert "ERROR" not in guest.lab.log.read_text()


@pytest.mark.parametrize("kind", [0x05, 0x77, 0xFF])
def test_a_message_of_an_unknown_type_is_ignored(lab: Lab, raw: socket.socket, kind: int) -> None:
    """D-Bus specification, "Message Format": unknown types must be ignored. Today's dbus-daemon passes none on."""
    guest = lab.running()
    strange = marshalled(message("ListVMs"))
    strange[1] = kind
    raw.sendall(bytes(strange) + bytes(marshalled(message("ListVMs"), 8)))
    alive(guest)


def test_frames_are_read_whatever_is_in_them() -> None:
    """A stream that comes in pieces, with what can't be read in between; what is too large comes without its body."""
    good, unknown = marshalled(message("ListVMs")), marshalled(message("ListVMs"))
    unknown[1] = 9
    large = marshalled(message("Check", {"append": Variant("s", "x" * MAX_BODY_BYTES)}, signature="a{sv}"))
    broken = marshalled(message("Check", {"append": Variant("s", "xyz")}, signature="a{sv}"))
    broken[-4:-1] = b"\xff\xff\xff"
    stream = b"".join((good, unknown, large, broken, good))

    class Pieces:
        def __init__(self) -> None:
            self.at = 0
            self.dry = True

        def read(self, size: int, /) -> bytes | None:
            self.dry = not self.dry
            if self.dry or self.at == len(stream):
                return None
            piece = stream[self.at : self.at + min(size, 1000)]
            self.at += len(piece)
            return piece

    pieces = Pieces()
    reader = FrameReader(pieces)
    seen = []
    while pieces.at < len(stream) or not pieces.dry:
        if (frame := reader.next()) and (one := parse(frame)):
            seen.append((one.member, lacks_arguments(one)))
    assert seen == [("ListVMs", False), ("Check", True), ("Check", True), ("ListVMs", False)]
    whole = parse(good)
    assert whole
    assert whole.path == ROOT


def test_megabytes_of_options_are_refused_at_once(lab: Lab) -> None:
    guest = lab.running()
    much = {"survives": Variant("s", "x" * (30 << 20))}
    for options_, said in (
        (much, "more than 64 KiB"),
        ({f"option{n}": Variant("b", True) for n in range(65)}, "65 options is too much"),
        ({"x" * 65: Variant("b", True)}, "whose name has 65 characters"),
        ({"survives": Variant("s", "x" * 32769)}, "an argument of 32769 characters"),
        ({"survives": Variant("as", ["x" * 33000])}, "an argument of 33000 characters"),
        ({"survives": Variant("as", ["x"] * 100)}, "a list of 100"),
    ):
        with pytest.raises(CallError, match=said) as caught:
            guest.call("CprSave", "ssa{sv}", "", "reboot", options_)
        assert caught.value.kind == "InvalidArgument"
        assert len(str(caught.value)) < 300
    with pytest.raises(CallError, match="an argument of 33000 characters"):
        guest.call("CprSave", "ssa{sv}", "/" + "x" * 32999, "reboot", {})
    assert guest.checkpoint_files() == []
    guest.assert_unbroken()


AS_NOBODY = """
import asyncio, collections, os, sys
from cpr_agent.bus.wire import ClientBus
from cpr_agent.bus.library import Message, MessageFlag, Variant
os.setgroups([]); os.setgid(65534); os.setuid(65534)

def call(flags, size):
    body = [{"append": Variant("s", "x" * size)}] if size else []
    return Message("org.cpragent1", "/org/cpragent1", "org.cpragent1.Manager", "Upgrade", signature="a{sv}" if size else "",
        body=body, flags=MessageFlag(flags))

async def main(count, at_once, flags, size):
    bus = await ClientBus(sys.argv[1]).connect()
    heard = collections.Counter()
    for _ in range(0, count, at_once):
        if flags & 1:
            await asyncio.gather(*(bus.send(call(flags, size)) for _ in range(at_once)))
            continue
        for reply in await asyncio.gather(*(bus.call(call(flags, size)) for _ in range(at_once))):
            heard[reply.error_name.rpartition(".")[2]] += 1
    print(*(f"{name}={number}" for name, number in sorted(heard.items())))

asyncio.run(main(*map(int, sys.argv[2:])))
"""


@pytest.fixture
def nobody(lab: Lab) -> Callable[..., subprocess.Popen[str]]:
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    let_others_in(lab)

    def start(count: int, at_once: int, flags: int = 0, size: int = 0) -> subprocess.Popen[str]:
        numbers = map(str, (count, at_once, flags, size))
        return subprocess.Popen([sys.executable, "-c", AS_NOBODY, lab.address, *numbers], stdout=subprocess.PIPE, text=True)

    return start


def ended(process: subprocess.Popen[str]) -> dict[str, int]:
    out, _ = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 0
    return {name: int(number) for name, _, number in (word.partition("=") for word in out.split())}


def test_who_calls_too_often_is_told_to_wait(lab: Lab, nobody: Callable[..., subprocess.Popen[str]]) -> None:
    guest = lab.running()
    heard = ended(nobody(3000, 100))
    assert heard["AccessDenied"] >= BURST
    assert heard["LimitsExceeded"] > 0, heard
    assert sum(heard.values()) == 3000
    guest.assert_unbroken()


def test_a_flood_keeps_nobody_else_from_being_served(lab: Lab, nobody: Callable[..., subprocess.Popen[str]]) -> None:
    """Calls that want no answer, of which dbus-daemon lets any number through."""
    guest = lab.running()
    flood = nobody(20_000, 500, MessageFlag.NO_REPLY_EXPECTED.value)
    while flood.poll() is None:
        alive(guest)
    ended(flood)
    guest.assert_unbroken()


def test_many_messages_to_a_bus_that_is_busy(lab: Lab, nobody: Callable[..., subprocess.Popen[str]]) -> None:
    """Each denied call of a crowd is answered while dbus-daemon reads more of them: its socket is full now and then."""
    guest = lab.running()
    crowds = [nobody(1200, 400) for _ in range(3)]
    for crowd in crowds:
        assert sum(ended(crowd).values()) == 1200
    alive(guest)
    guest.assert_unbroken()


def test_megabytes_of_somebody_without_rights(lab: Lab, nobody: Callable[..., subprocess.Popen[str]]) -> None:
    guest = lab.running()
    sender = nobody(4, 4, 0, 30 << 20)
    while sender.poll() is None:
        alive(guest)
    assert ended(sender) == {"AccessDenied": 4}
    guest.assert_unbroken()


def test_calls_that_wait_are_counted() -> None:
    limits = Limits(lambda: 0.0)
    for _ in range(UNDER_WAY):
        limits.begin(":1.1")
    with pytest.raises(LimitsExceeded, match="waiting for an answer"):
        limits.begin(":1.1")
    limits.begin(":1.2")
    limits.end(":1.1")
    limits.begin(":1.1")


def test_calls_of_a_user_are_counted_over_all_his_connections() -> None:
    limits = Limits(lambda: 0.0)
    with contextlib.ExitStack() as under_way:
        for _ in range(UNDER_WAY_PER_USER):
            under_way.enter_context(limits.one_more(1000))
        with pytest.raises(LimitsExceeded), limits.one_more(1000):
            pass
        with limits.one_more(1001):
            pass
    with limits.one_more(1000):
        pass


def test_there_is_room_for_what_would_not_be_refused() -> None:
    now = 0.0
    limits = Limits(lambda: now)
    assert limits.has_room(":1.1", 1000)
    for _ in range(UNDER_WAY):
        limits.begin(":1.1")
    assert [limits.has_room(":1.1", uid) for uid in (None, 1000)] == [False, False]
    limits.end(":1.1")
    assert limits.has_room(":1.1", 1000)
    limits.spend(1000, BURST - 0.5)
    assert [limits.has_room(":1.2", uid) for uid in (None, 1000, 1001)] == [True, False, True]
    now = 0.5 / CALLS_PER_S
    assert limits.has_room(":1.2", 1000)
    with contextlib.ExitStack() as under_way:
        for _ in range(UNDER_WAY_PER_USER):
            under_way.enter_context(limits.one_more(1001))
        assert not limits.has_room(":1.3", 1001)


def test_a_user_gets_calls_back_with_time() -> None:
    now = 0.0
    limits = Limits(lambda: now)
    for _ in range(int(BURST)):
        limits.spend(1000)
    with pytest.raises(LimitsExceeded, match="user 1000 makes more than 50 calls a second"):
        limits.spend(1000)
    limits.spend(1001)
    now = 1.0
    for _ in range(int(CALLS_PER_S) - 1):
        limits.spend(1000)
    with pytest.raises(LimitsExceeded):
        limits.spend(1000)
