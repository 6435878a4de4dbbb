# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers and signals tell of a VM in the order in which it changed: the last word is what is so."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpr_agent.bus.contract import ROOT
from cpr_agent.bus.library import Message, MessageType
from cpr_agent.bus.objects import vm_path
from cpr_agent.bus.service import Service
from cpr_agent.core.model import Survives, VmState

PATIENCE_S = 20.0
RAM = SimpleNamespace(kind="dax", place="/dev/dax0.0", size_bytes=1 << 24, offset_bytes=0, survives=Survives.KEXEC)
PROPERTIES, MANAGED = "org.freedesktop.DBus.Properties", "org.freedesktop.DBus.ObjectManager"
PATH = vm_path("web1")
Question = tuple[str, str, str, list[Any]]
GET_ALL: Question = (PATH, PROPERTIES, "GetAll", ["org.cpragent1.VM"])
GET_OBJECTS: Question = (ROOT, MANAGED, "GetManagedObjects", [])


class Bus:
    """A bus of which the test is the only other end."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.handler: Callable[[Message], bool] = lambda _: False

    def add_message_handler(self, handler: Callable[[Message], bool]) -> None:
        self.handler = handler

    def screen(self, _: Callable[[str], bool]) -> None:
        pass

    def send(self, message: Message) -> None:
        self.sent.append(message)

    async def call(self, message: Message) -> Message:
        """That of the bus itself: whose connection it is."""
        answer = Message(message_type=MessageType.METHOD_RETURN, reply_serial=1, signature="u", body=[os.geteuid()])
        answer.sender = str(message.destination)
        return answer

    def told(self) -> list[dict[str, Any]]:
        """Of the VM's properties, in the order of the messages."""
        return [dict(found) for message in self.sent if (found := _properties_of(message))]


def _properties_of(message: Message) -> dict[str, Any]:
    if message.member == "PropertiesChanged" and message.path == PATH:
        found = message.body[1]
    elif message.message_type is MessageType.METHOD_RETURN:
        found = message.body[0].get(PATH, {}).get("org.cpragent1.VM", message.body[0])
    else:
        return {}
    return {name: value.value for name, value in found.items()}


class Story:
    """An agent with one VM, whose slow properties are read when the test lets them."""

    def __init__(self, run: Path) -> None:
        self.memory: list[asyncio.Future[tuple[Any, ...]]] = []
        self.reasons: list[asyncio.Future[list[str]]] = []
        self.vm: Any = SimpleNamespace(
            name="web1",
            definition=None,
            state=VmState.SAVING,
            since=0.0,
            definition_state="ok",
            pid=0,
            run_state="running",
            owner="agent",
            unit="",
            user="",
            error="",
            problem=None,
            launched=lambda: None,
            held=lambda: None,
            live_checkpoint=lambda: None,
            machine=SimpleNamespace(claimed_memory=lambda: self._later(self.memory)),
            blocked_reasons=lambda: self._later(self.reasons),
        )
        self.identified: list[str] = []
        nothing = SimpleNamespace(
            cpus=lambda _: 1, last=lambda _: None, program_identity=self._identity, program_version=lambda _: ""
        )
        ports = SimpleNamespace(definitions=nothing, history=nothing, files=nothing)
        manager: Any = SimpleNamespace(vms={"web1": self.vm}, listeners=set(), ports=ports)
        self.bus = Bus()
        bus: Any = self.bus
        self.service = Service(bus, manager, run)
        self.service.open()

    def _identity(self, path: str) -> str:
        self.identified.append(path)
        return ""

    async def _later(self, asked: list[asyncio.Future[Any]]) -> Any:
        asked.append(asyncio.get_running_loop().create_future())
        return await asked[-1]

    def call(self, path: str, interface: str, member: str, body: list[Any]) -> None:
        message = Message("org.cpragent1", path, interface, member, signature="s" * len(body), body=body)
        message.sender, message.serial = ":1.7", 7
        assert self.bus.handler(message)

    def becomes(self, state: VmState) -> None:
        self.vm.state = state
        self.service.vm_changed(self.vm)

    async def until(self, come: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not come():  # noqa: ASYNC110 - what comes is in many places, and within a few turns of the loop
                await asyncio.sleep(0)

    async def begin(self) -> None:
        """The VM is shown, and somebody listens."""
        self.service.vm_changed(self.vm)
        await self.until(lambda: self.memory)
        self.memory.pop().set_result(())
        await self.until(lambda: self.reasons)
        self.reasons.pop().set_result([])
        self.call(PATH, PROPERTIES, "Get", ["org.cpragent1.VM", "Nothing"])
        await self.until(lambda: self.bus.sent)
        self.bus.sent.clear()


@pytest.mark.parametrize("question", [GET_ALL, GET_OBJECTS], ids=["GetAll", "GetManagedObjects"])
def test_who_has_heard_of_a_change_is_not_told_then_of_what_was_before(question: Question, tmp_path: Path) -> None:
    async def main() -> None:
        story = Story(tmp_path)
        await story.begin()
        story.call(*question)
        await story.until(lambda: story.memory)
        story.memory.pop().set_result(())
        await story.until(lambda: story.reasons)
        story.becomes(VmState.SAVED)
        await story.until(lambda: story.memory)
        story.memory.pop().set_result((RAM,))
        await story.until(story.bus.told)
        story.reasons.pop().set_result(["a block job"])
        await story.until(lambda: len(story.bus.told()) > 1)
        signal, answer = story.bus.told()
        assert signal["State"] == answer["State"] == "saved"
        assert signal["Memory"] == answer["Memory"] != {}
        assert answer["BlockedReasons"] == ["a block job"]

    asyncio.run(main())


def test_what_was_read_first_is_not_told_last(tmp_path: Path) -> None:
    async def main() -> None:
        story = Story(tmp_path)
        await story.begin()
        story.becomes(VmState.SAVED)
        await story.until(lambda: story.memory)
        before = story.memory.pop()
        story.becomes(VmState.RUNNING)
        for _ in range(10):
            await asyncio.sleep(0)
        for after in story.memory:
            after.set_result(())
        before.set_result(())
        await story.until(story.bus.told)
        assert story.bus.told()[-1]["State"] == "running"

    asyncio.run(main())


def test_what_no_signal_tells_is_not_read_for_one(tmp_path: Path) -> None:
    async def main() -> None:
        story = Story(tmp_path)
        await story.begin()
        story.identified.clear()
        story.becomes(VmState.SAVED)
        await story.until(lambda: story.memory)
        story.memory.pop().set_result(())
        await story.until(story.bus.told)
        assert story.bus.told() == [{"State": "saved"}]
        assert story.identified == []

    asyncio.run(main())
