# SPDX-License-Identifier: GPL-2.0-or-later
"""The bus's bounds, without a bus: what is sent, what calls cost, and who hears of changes."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr_agent.bus.client import CallError, Client
from cpr_agent.bus.frames import sendable
from cpr_agent.bus.library import Message, Variant, marshal
from cpr_agent.bus.limits import COSTS, HEAVY_IN_ALL, HEAVY_PER_USER, MAX_TEXT_BYTES, Limits, refuse_long_text
from cpr_agent.bus.listeners import IN_ALL, PER_USER, Listeners
from cpr_agent.bus.objects import MAX_HISTORY, BusObject, ManagerObject, VmObject
from cpr_agent.bus.service import WORKERS, Service, answered
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.errors import InvalidArgument, LimitsExceeded
from tests.samples import timeline

PATIENCE_S = 20.0
TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
"""Lone surrogates, NUL and all."""


@given(st.recursive(TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=6), TEXT, TEXT)
def test_whatever_is_said_can_be_sent(value: object, key: str, text: str) -> None:
    body = sendable([[text], {key: Variant("v", Variant("s", text))}, Variant("as", [text, key])])
    message = Message.new_signal("/a", "a.b", "C", "asa{sv}v", body)
    message.serial = 1
    frame = bytes(marshal(message))
    assert text.isprintable() or b"\0" not in body[0][0].encode()
    assert frame
    assert not any("\0" in leaf for leaf in leaves(sendable(value)))


def leaves(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [leaf for item in value for leaf in leaves(item)]  # type: ignore[attr-defined]


class OneOfMany(BusObject):
    interface = "org.cpragent1.VM"

    def __init__(self, path: str) -> None:
        self.path = path


def test_an_object_that_fails_is_left_out_of_all(caplog: pytest.LogCaptureFixture) -> None:
    name, pid = {"Name": Variant("s", "web1")}, {"MainPID": Variant("u", 7)}

    def rest(one: BusObject) -> dict[str, Variant]:
        if one.path == "/c":
            raise ValueError("liar")
        return pid

    found = dict(answered([(OneOfMany("/a"), ValueError("liar")), (OneOfMany("/b"), name), (OneOfMany("/c"), name)], rest))
    assert found == {"/b": {"org.cpragent1.VM": {**name, **pid}}}
    assert "/a is left out" in caplog.text
    assert "/c is left out" in caplog.text
    with pytest.raises(asyncio.CancelledError):
        list(answered([(OneOfMany("/a"), asyncio.CancelledError())], rest))


def test_what_can_be_sent_is_sent_as_it_is() -> None:
    body = ["a\n\tb", {"k": Variant("a{sv}", {"x": Variant("t", 7)})}, [1, 2.5, True], Variant("s", "größer")]
    assert sendable(body) is body


def test_heavy_calls_are_few_for_each_user_and_for_all() -> None:
    limits = Limits(lambda: 0.0)
    open_ = []

    def begin(uid: int, cost: float = COSTS["Check"]) -> None:
        one = limits.under_way(uid, cost)
        one.__enter__()
        open_.append(one)

    for _ in range(HEAVY_PER_USER):
        begin(1000)
    with pytest.raises(LimitsExceeded, match="4 such calls of user 1000 are under way"):
        begin(1000)
    begin(1000, 1.0)
    for uid in range(1001, 1001 + HEAVY_IN_ALL - HEAVY_PER_USER):
        begin(uid)
    with pytest.raises(LimitsExceeded, match="8 of all users"):
        begin(2000)
    for one in open_:
        one.__exit__(None, None, None)
    begin(2000)


def test_a_call_costs_what_it_is_worth() -> None:
    limits = Limits(lambda: 0.0)
    for _ in range(50):
        limits.spend(1000, COSTS["Validate"])
    with pytest.raises(LimitsExceeded):
        limits.spend(1000)


def test_long_texts_are_for_root() -> None:
    def call(member: str, length: int) -> Message:
        return Message("a.b", "/a", "a.b", member, signature="ss", body=["x", "a" * length])

    refuse_long_text(call("Validate", MAX_TEXT_BYTES))
    refuse_long_text(call("Report", MAX_TEXT_BYTES + 1))
    with pytest.raises(InvalidArgument, match="more than 8 KiB"):
        refuse_long_text(call("Validate", MAX_TEXT_BYTES + 1))


def test_listeners_are_those_who_asked_last_and_all_of_root() -> None:
    listeners = Listeners()
    for number in range(PER_USER + 2):
        listeners.add(f":1.{number}", 1000)
        listeners.add(f":1.{number}", 1000)
    assert list(listeners) == [f":1.{number}" for number in range(2, PER_USER + 2)]
    for number in range(2 * IN_ALL):
        listeners.add(f":2.{number}", 2000 + number)
        listeners.add(f":3.{number}", os.geteuid())
    assert sum(not name.startswith(":3.") for name in listeners) == IN_ALL
    assert sum(name.startswith(":3.") for name in listeners) == 2 * IN_ALL
    listeners.discard(":3.0")
    listeners.discard(":9.9")
    assert ":3.0" not in list(listeners)


def test_a_bus_that_never_answers_is_said_to_have_timed_out(tmp_path: Path) -> None:
    async def connect() -> None:
        async with Client.connected(f"unix:path={tmp_path}/bus", timeout_s=0.1):
            pass

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "bus"))
        silent.listen()
        with pytest.raises(CallError, match="cannot connect to D-Bus: timed out"):
            asyncio.run(connect())


def service_of(manager: Any, run: Path) -> Service:
    """On a bus on which nobody calls."""
    bus: Any = SimpleNamespace(add_message_handler=lambda _: None, screen=lambda _: None)
    return Service(bus, manager, run)


def test_a_property_is_read_while_texts_of_callers_keep_all_their_threads(tmp_path: Path) -> None:
    over = threading.Event()
    vm: Any = SimpleNamespace(name="web1", pid=7)
    files = SimpleNamespace(program_version=lambda path: f"10.0 of {path}")
    manager: Any = SimpleNamespace(vms={}, listeners=set(), ports=SimpleNamespace(files=files))

    async def story() -> str:
        service = service_of(manager, tmp_path)
        texts = [asyncio.create_task(service.apart(over.wait)) for _ in range(WORKERS)]
        await asyncio.sleep(0)  # they have begun
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await VmObject(vm, manager, "", service).get_QemuRunning()
        finally:
            over.set()
            await asyncio.gather(*texts)

    assert asyncio.run(story()) == "10.0 of /proc/7/exe"


def test_the_newest_loads_are_told_and_gathered_in_a_thread(tmp_path: Path) -> None:
    threads = set()

    def every() -> list[GuestTimeline]:
        threads.add(threading.get_ident())
        return [timeline(id=f"{n}", vm=f"web{n % 2}") for n in range(MAX_HISTORY + 100)]

    manager: Any = SimpleNamespace(vms={}, listeners=set(), ports=SimpleNamespace(history=SimpleNamespace(all=every)))

    async def ids(**wanted: Variant) -> list[int]:
        target = ManagerObject(manager, service_of(manager, tmp_path))
        (found,) = await target.call_ListHistory(wanted)
        return [int(one["id"].value) for one in found]

    assert asyncio.run(ids()) == [*range(100, MAX_HISTORY + 100)]
    assert asyncio.run(ids(vm=Variant("s", "web1"))) == [*range(1, MAX_HISTORY + 100, 2)]
    assert asyncio.run(ids(vm=Variant("s", "web1"), limit=Variant("u", 2))) == [MAX_HISTORY + 97, MAX_HISTORY + 99]
    for limit in (0, MAX_HISTORY + 1):
        with pytest.raises(InvalidArgument, match=f"It must be 1 to {MAX_HISTORY}"):
            asyncio.run(ids(limit=Variant("u", limit)))
    assert threading.get_ident() not in threads
