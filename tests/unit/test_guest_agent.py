"""A guest agent that hangs, lies or speaks garbage: what it says is bounded, and believed only in its right shape."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cpr_agent.errors import GuestAgentFailed
from cpr_agent.vm.guest_agent import set_clock

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
NOW = 1_700_000_000.5


def talk(path: Path, peer: Peer, timeout_s: float = 20.0) -> float:
    async def both() -> float:
        server = await asyncio.start_unix_server(peer, path)
        async with server:
            return await set_clock("web1", path, lambda: NOW, timeout_s)

    return asyncio.run(both())


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
            return json.dumps({"return": int((NOW - 60) * 1e9)}).encode() + b"\n"
        case "guest-set-time":
            SET.append(arguments["time"])
            return b'{"return": {}}\n'
    raise AssertionError(request)


def test_a_clock_is_set_and_the_jump_told(tmp_path: Path) -> None:
    SET.clear()
    assert talk(tmp_path / "qga", scripted(good)) == pytest.approx(60)
    assert [int(NOW * 1e9)] == SET


def test_what_an_earlier_client_left_is_skipped(tmp_path: Path) -> None:
    stale = b'{"return": 7}\n{"half": \xff{"return": 12}\n'
    with pytest.raises(GuestAgentFailed, match="what it was not asked"):  # a delimiter of somebody else's sync
        talk(tmp_path / "a", scripted(good, stale))
    assert talk(tmp_path / "b", scripted(good, b'{"return": 7}\n{"half": ')) == pytest.approx(60)


def instead(command: str, reply: bytes) -> Callable[[dict[str, object]], bytes]:
    return lambda request: reply if request["execute"] == command else good(request)


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
        talk(tmp_path / "qga", scripted(instead(command, reply)))
    assert caught.value.vm == "web1"


def test_one_that_hangs_is_given_up(tmp_path: Path) -> None:
    for command in ("guest-sync-delimited", "guest-get-time", "guest-set-time"):
        with pytest.raises(GuestAgentFailed, match=f"did not answer {command} within"):
            talk(tmp_path / command, scripted(instead(command, b"")), timeout_s=0.3)


def test_one_that_goes_away(tmp_path: Path) -> None:
    async def gone(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    with pytest.raises(GuestAgentFailed, match="went away"):
        talk(tmp_path / "qga", gone)
    with pytest.raises(GuestAgentFailed, match="No such file"):
        asyncio.run(set_clock("web1", tmp_path / "nobody", lambda: NOW))
