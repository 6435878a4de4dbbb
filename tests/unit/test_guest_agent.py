# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest agent that hangs, lies or speaks garbage: what it says is bounded, and believed only in its right shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cpr_agent.errors import GuestAgentFailed
from cpr_agent.vm.guest_agent import offers, set_clock, suspend

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
NOW = 1_700_000_000.5


class Loop(asyncio.SelectorEventLoop):
    """Its clock can be put forward: what waits then times out at once, and nothing does because the day is slow."""

    ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self.ahead_s


def talk(path: Path, peer: Peer, timeout_s: float = 20.0) -> float:
    SET.clear()

    async def both() -> float:
        server = await asyncio.start_unix_server(peer, path)
        async with server:
            return await set_clock("web1", path, lambda: NOW, timeout_s)

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(both())


def scripted(replies: Callable[[dict[str, object]], bytes], before: bytes = b"") -> Peer:
    """A guest agent in the place of one that can't be made to misbehave; a well-behaved one is in tests/bus. It follows
    docs/interop/qemu-ga.rst: 0xFF empties its parser, and comes before the reply to guest-sync-delimited."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while line := await reader.readline():
            request = json.loads(line.rpartition(b"\xff")[2])
            writer.write(replies(request))
        writer.close()

    return peer


SET: list[object] = []


def good(request: dict[str, object]) -> bytes:
    arguments = request.get("arguments", {})
    assert isinstance(arguments, dict)
    match request["execute"]:
        case "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n"
        case "guest-get-time":
            return json.dumps({"return": SET[-1] if SET else int((NOW - 60) * 1e9)}).encode() + b"\n"
        case "guest-set-time":
            SET.append(arguments["time"])
            return b'{"return": {}}\n'
    raise AssertionError(request)


def test_a_clock_is_set_and_the_jump_told(tmp_path: Path) -> None:
    assert talk(tmp_path / "qga", scripted(good)) == pytest.approx(60)
    assert [int(NOW * 1e9)] == SET


def test_a_clock_that_is_right_counts_whatever_is_said_of_it(tmp_path: Path) -> None:
    """qemu-ga without hwclock in its guest: it sets the clock, and then reports an error."""

    def sets_and_refuses(request: dict[str, object]) -> bytes:
        done = good(request)
        return b'{"error": {"desc": "no hwclock"}}\n' if request["execute"] == "guest-set-time" else done

    assert talk(tmp_path / "qga", scripted(sets_and_refuses)) == pytest.approx(60)


def test_a_clock_that_is_not_set_is_told_whatever_is_said_of_it(tmp_path: Path) -> None:
    with pytest.raises(GuestAgentFailed, match="says that it has set the clock, which is -60 s off"):
        talk(tmp_path / "qga", scripted(instead("guest-set-time", lambda _: b'{"return": {}}\n')))


def test_what_it_says_cannot_draw_on_a_terminal(tmp_path: Path) -> None:
    drawn = json.dumps({"error": {"desc": "\x1b[2Jgone\r\nVM web2:  lost"}}).encode() + b"\n"
    with pytest.raises(GuestAgentFailed, match=r"refused guest-set-time: \[2Jgone VM web2: lost\.$"):
        talk(tmp_path / "qga", scripted(instead("guest-set-time", lambda _: drawn)))


def test_what_an_earlier_client_left_is_skipped(tmp_path: Path) -> None:
    stale = b'{"return": 7}\n{"half": \xff{"return": 12}\n'
    with pytest.raises(GuestAgentFailed, match="what it was not asked"):  # a delimiter of somebody else's sync
        talk(tmp_path / "a", scripted(good, stale))
    assert talk(tmp_path / "b", scripted(good, b'{"return": 7}\n{"half": ')) == pytest.approx(60)


def instead(command: str, reply: Callable[[dict[str, object]], bytes]) -> Callable[[dict[str, object]], bytes]:
    return lambda request: (reply if request["execute"] == command else good)(request)


@pytest.mark.parametrize(
    ("command", "reply", "said"),
    [
        ("guest-sync-delimited", b"\xff" + b"x" * 2_000_000, "garbage"),
        ("guest-sync-delimited", b"\xffnot json\n", "garbage"),
        ("guest-sync-delimited", b"\xff[1, 2]\n", "garbage"),
        ("guest-sync-delimited", b'\xff{"return": 1}\n', "what it was not asked"),
        ("guest-get-time", b'{"return": "noon"}\n', "garbage"),
        ("guest-get-time", b'{"return": true}\n', "garbage"),
        ("guest-get-time", b'{"return": ' + b"9" * 5000 + b"}\n", "garbage"),
        ("guest-get-time", b'{"return": ' + b"9" * 4000 + b"}\n", "garbage"),
        ("guest-get-time", b"[" * 100_000 + b"\n", "garbage"),
        (
            "guest-get-time",
            b'{"error": {"class": "CommandNotFound", "desc": "disabled"}}\n',
            "refused guest-get-time: disabled",
        ),
        ("guest-set-time", b'{"error": "oh"}\n', "refused guest-set-time: oh"),
        ("guest-set-time", b"\xfe\xfd\n", "garbage"),
    ],
)
def test_nonsense_is_told_as_such(tmp_path: Path, command: str, reply: bytes, said: str) -> None:
    with pytest.raises(GuestAgentFailed, match=said) as caught:
        talk(tmp_path / "qga", scripted(instead(command, lambda _: reply)))
    assert caught.value.vm == "web1"


def test_one_that_hangs_is_given_up(tmp_path: Path) -> None:
    def hang(_: dict[str, object]) -> bytes:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        loop.ahead_s += 3600.0
        return b""

    for command in ("guest-sync-delimited", "guest-get-time", "guest-set-time"):
        with pytest.raises(GuestAgentFailed, match=f"did not answer {command} within 600 s"):
            talk(tmp_path / command, scripted(instead(command, hang)), timeout_s=600.0)


def test_one_that_goes_away(tmp_path: Path) -> None:
    async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    with pytest.raises(GuestAgentFailed, match="went away"):
        talk(tmp_path / "qga", gone)
    with pytest.raises(GuestAgentFailed, match="No such file"):
        asyncio.run(set_clock("web1", tmp_path / "nobody", lambda: NOW))


def sleepy(path: Path, answer: bytes | None, *, falls_asleep: bool, timeout_s: float = 20.0) -> None:
    """Ask a guest to sleep whose agent answers so, and who then sleeps or not."""
    asked = asyncio.Event()

    def replies(request: dict[str, object]) -> bytes:
        if request["execute"] != "guest-suspend-ram":
            return good(request)
        asked.set()
        return answer or b""

    async def both() -> None:
        asleep = asyncio.get_running_loop().create_future()

        async def fall() -> None:
            await asked.wait()
            if falls_asleep:
                asleep.set_result({})

        server = await asyncio.start_unix_server(scripted(replies), path)
        async with server:
            falling = asyncio.create_task(fall())
            await suspend("web1", path, asleep, timeout_s)
            await falling

    asyncio.run(both())


@pytest.mark.parametrize("answer", [None, b'{"return": {}}\n'])
def test_a_guest_is_asleep_when_qemu_says_so(tmp_path: Path, answer: bytes | None) -> None:
    """qemu-ga says nothing when all went well; one that says so all the same is not believed, and not held against."""
    sleepy(tmp_path / "a", answer, falls_asleep=True)
    with pytest.raises(GuestAgentFailed, match="was asked to sleep, and did not within 0 s"):
        sleepy(tmp_path / "b", answer, falls_asleep=False, timeout_s=0.3)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b'{"error": {"class": "Unsupported", "desc": "no such mode"}}\n', "refused guest-suspend-ram: no such mode"),
        (b"[]\n", "with garbage"),
        (b"\x00\x01\x02\n", "with garbage"),
    ],
)
def test_a_guest_agent_that_does_not_put_its_guest_to_sleep(tmp_path: Path, answer: bytes, why: str) -> None:
    with pytest.raises(GuestAgentFailed, match=why):
        sleepy(tmp_path / "qga", answer, falls_asleep=False)


@pytest.mark.parametrize(
    ("info", "offered"),
    [
        (b'{"return": {"supported_commands": [{"name": "guest-suspend-ram", "enabled": true}]}}\n', True),
        (b'{"return": {"supported_commands": [{"name": "guest-suspend-ram", "enabled": false}]}}\n', False),
        (b'{"return": {"supported_commands": []}}\n', False),
        (b'{"return": {"supported_commands": 7}}\n', None),
        (b'{"return": 7}\n', None),
    ],
)
def test_what_a_guest_agent_offers(tmp_path: Path, info: bytes, *, offered: bool | None) -> None:
    async def ask() -> bool:
        path = tmp_path / "qga"
        peer = scripted(lambda request: info if request["execute"] == "guest-info" else good(request))
        async with await asyncio.start_unix_server(peer, path):
            return await offers("web1", path, "guest-suspend-ram")

    if offered is None:
        with pytest.raises(GuestAgentFailed, match="guest-info with garbage"):
            asyncio.run(ask())
    else:
        assert asyncio.run(ask()) is offered
