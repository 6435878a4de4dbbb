# SPDX-License-Identifier: GPL-2.0-or-later
"""The questions of libvirt's hook, and whose the answers are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cpr_agent.domains.desk import Desk, Start
from cpr_agent.domains.hook_server import HookRequest
from cpr_agent.errors import AlreadySaved, QemuFailed
from tests.samples import launch

PATIENCE_S = 20.0


class Office:
    """A desk, and all that it does around itself. ``acts`` is what an arrival begins."""

    def __init__(self) -> None:
        self.arrived: list[tuple[str, str]] = []
        self.closed: list[str] = []
        self.found: list[str] = []
        self.refusal = ""
        self.act: Callable[[], Awaitable[None]] = self._do_nothing
        self.desk = Desk(self._arrive, lambda xml: xml, lambda start, request: self.refusal, self.closed.append, self._find)

    async def _do_nothing(self) -> None:
        """It refuses nothing, and starts nothing."""

    def _find(self, domain: str) -> None:
        self.found.append(domain)

    async def _arrive(self, domain: str, checkpoint: str) -> None:
        self.arrived.append((domain, checkpoint))
        await self.act()

    async def ask(self, operation: str, xml: str = "") -> str:
        return await self.desk.on_request(HookRequest(operation, "begin", "web1", xml))


def run(work: Callable[[Office], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await work(Office())

    asyncio.run(bounded())


def test_an_act_that_waits_is_asked_first() -> None:
    async def work(office: Office) -> None:
        start, arrived = office.desk.begin("web1", launch(), 0)
        assert (arrived, start.allowed.is_set()) == (False, False)
        assert await office.ask("prepare") == ""
        assert start.allowed.is_set()
        assert office.arrived == []

    run(work)


def test_a_start_of_somebody_else_begins_an_act_which_decides() -> None:
    async def work(office: Office) -> None:
        async def act() -> None:
            start, arrived = office.desk.begin("web1", launch(), 0)
            assert arrived
            assert start.allowed.is_set()
            await asyncio.Event().wait()

        office.act = act
        assert await office.ask("prepare", "id-1") == ""
        assert office.arrived == [("web1", "id-1")]

    run(work)


def test_the_refusal_of_an_act_is_what_virsh_shows() -> None:
    async def work(office: Office) -> None:
        async def act() -> None:
            raise AlreadySaved("is saved", vm="web1")

        office.act = act
        with pytest.raises(AlreadySaved):
            await office.ask("prepare")

    run(work)


def test_an_act_that_starts_nothing_is_no_yes() -> None:
    async def work(office: Office) -> None:
        assert "something else" in await office.ask("prepare")

    run(work)


def test_what_is_started_with_another_state_is_refused_to_both() -> None:
    async def work(office: Office) -> None:
        async def act() -> None:
            with pytest.raises(QemuFailed, match="another image"):
                office.desk.begin("web1", launch(), 0)
            assert office.desk.start_of("web1") is None

        office.refusal, office.act = "another image", act
        assert await office.ask("prepare", "id-1") == "another image"

    run(work)


def test_an_act_whose_arrival_has_given_up_starts_nothing() -> None:
    async def work(office: Office) -> None:
        request = HookRequest("prepare", "begin", "web1", "id-1")
        problems: list[str] = []

        async def act() -> None:
            request.give_up()
            try:
                office.desk.begin("web1", launch(), 0)
            except QemuFailed as error:
                problems.append(error.what)

        office.act = act
        await office.desk.on_request(request)
        assert problems == ["who was to start it does so no more"]

    run(work)


def test_a_second_question_while_a_start_is_under_way_begins_an_act_of_its_own() -> None:
    async def work(office: Office) -> None:
        office.desk.begin("web1", launch(), 0)
        assert await office.ask("prepare") == ""
        assert "something else" in await office.ask("prepare")
        assert office.arrived == [("web1", "")]

    run(work)


def test_an_act_that_was_given_up_lets_nothing_start_any_more() -> None:
    async def work(office: Office) -> None:
        start, _ = office.desk.begin("web1", launch(), 0)
        start.given_up = True
        assert "given up" in await office.ask("prepare")
        assert not start.allowed.is_set()

    run(work)


@pytest.mark.parametrize("word", ["", "its devices are others"], ids=["yes", "no"])
def test_the_guest_goes_on_as_the_act_says(word: str) -> None:
    async def work(office: Office) -> None:
        start, _ = office.desk.begin("web1", launch(), 0)
        await office.ask("prepare")
        asked = asyncio.create_task(office.ask("started"))
        await start.started
        assert not asked.done()
        start.say(word)
        start.say("a second word")
        assert await asked == word

    run(work)


def test_an_arrival_that_fails_later_tells_libvirt_why() -> None:
    async def work(office: Office) -> None:
        failing = asyncio.Event()

        async def act() -> None:
            office.desk.begin("web1", launch(), 0)
            await failing.wait()
            raise AlreadySaved("has other devices", vm="web1")

        office.act = act
        assert await office.ask("prepare") == ""
        asked = asyncio.create_task(office.ask("started"))
        start = office.desk.start_of("web1")
        assert start
        await start.started
        failing.set()
        assert "has other devices" in await asked

    run(work)


def test_no_answer_is_given_to_a_hook_that_has_gone() -> None:
    async def work(office: Office) -> None:
        office.desk.begin("web1", launch(), 0)
        await office.ask("prepare")
        request = HookRequest("started", "begin", "web1", "")
        asked = asyncio.create_task(office.desk.on_request(request))
        request.give_up()
        assert "nobody waits" in await asked

    run(work)


def test_a_start_that_an_agent_before_has_allowed_waits_for_the_recovery() -> None:
    async def work(office: Office) -> None:
        again = asyncio.create_task(office.desk.asked_again("web1"))
        asked = asyncio.create_task(office.ask("started"))
        start = await again
        assert start.launch is None
        assert office.found == ["web1"]
        assert not asked.done()
        start.say("")
        assert await asked == ""

    run(work)


def test_the_end_of_a_qemu_ends_its_start_and_closes_the_way() -> None:
    async def work(office: Office) -> None:
        start, _ = office.desk.begin("web1", launch(), 0)
        await office.ask("prepare")
        assert await office.ask("release") == ""
        assert start.ended.done()
        assert office.desk.start_of("web1") is None
        assert office.closed == ["web1"]

    run(work)


def test_the_end_of_the_qemu_before_does_not_end_the_next_start() -> None:
    async def work(office: Office) -> None:
        start, _ = office.desk.begin("web1", launch(), 0)
        await office.ask("release")
        assert office.desk.start_of("web1") is start
        assert not start.ended.done()

    run(work)


def test_what_a_daemon_was_starting_that_has_ended_is_over() -> None:
    async def work(office: Office) -> None:
        start, _ = office.desk.begin("web1", launch(), 0)
        office.desk.lost()
        assert not start.ended.done(), "libvirt was not asked to yet"
        await office.ask("prepare")
        office.desk.lost()
        assert await start.reason() == "libvirt's daemon has ended"

    run(work)


def test_a_guest_that_waits_for_the_answer_is_not_over_with_the_daemon() -> None:
    """The hook's end says whether anybody waits for the answer."""

    async def work(office: Office) -> None:
        start, _ = office.desk.begin("web1", launch(), 0)
        await office.ask("prepare")
        asked = asyncio.create_task(office.ask("started"))
        await start.started
        office.desk.lost()
        assert not start.ended.done()
        start.say("")
        await asked

    run(work)


def test_a_start_is_over_once() -> None:
    async def work(office: Office) -> None:
        old, _ = office.desk.begin("web1", launch(), 0)
        new, _ = office.desk.begin("web1", launch(), 0)
        office.desk.forget("web1", old)
        assert office.desk.start_of("web1") is new
        assert isinstance(new, Start)

    run(work)
