# SPDX-License-Identifier: GPL-2.0-or-later
"""The dialogue with libvirt's hook: no adopted domain starts or goes on without an act of the agent that says so.

libvirt asks in ``prepare`` before there is a QEMU, and in ``started``: after it has restored an image, before the guest
goes on; or after a plain start, when the guest runs already. Whoever starts the domain, the answer is that of an act: one
that waits for the question, or one that the question begins (an arrival).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from cpr_agent.core.model import Launch
from cpr_agent.domains.hook_server import HookRequest
from cpr_agent.errors import CprError, QemuFailed
from cpr_agent.vm.qmp import Qmp

log = logging.getLogger(__name__)

Arrive = Callable[[str, str], Awaitable[None]]
"""Another program starts this domain, with the state of this checkpoint ("" for none): act. Raises CprError."""
REASON_S = 3.0
"""For an act that has ended its QEMU to say why. libvirt waits, and shows it."""


class Start:
    """One start of a domain's QEMU, from libvirt's first question to its last. ``launch`` is None for one that an earlier
    agent has let begin."""

    def __init__(self, launch: Launch | None, uid: int = 0) -> None:
        loop = asyncio.get_running_loop()
        self.launch = launch
        self.uid = uid
        """Of its QEMU."""
        self.qmp: Qmp | None = None
        """The agent's own monitor, once its QEMU has connected to it."""
        self.creating: asyncio.Future[None] | None = None
        """The agent's own call of libvirt, if it has begun this start."""
        self.given_up = False
        self.allowed = asyncio.Event()
        """libvirt may start QEMU."""
        self.started: asyncio.Future[HookRequest] = loop.create_future()
        """libvirt asks whether the guest may go on, or goes on."""
        self.answer: asyncio.Future[str] = loop.create_future()
        """To that: why not, "" for a yes."""
        self.ended: asyncio.Future[str] = loop.create_future()
        """libvirt's start has failed, or QEMU has ended: why, as far as it is known."""

    def say(self, why: str) -> None:
        """Why the guest may not go on, "" if it may; the first word counts."""
        if not self.answer.done():
            self.answer.set_result(why)

    def end(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result(why)

    async def reason(self) -> str:
        """Why it has ended. libvirt tells the end before it answers the call that has begun it, and says more there."""
        if self.creating:
            await asyncio.wait({self.creating}, timeout=REASON_S)
            if self.creating.done() and not self.creating.cancelled() and (error := self.creating.exception()):
                return error.what if isinstance(error, CprError) else str(error)
        return self.ended.result()


class Arrival(NamedTuple):
    """``answer`` is to the question by which somebody else's start has arrived."""

    request: HookRequest
    answer: asyncio.Future[str]


class Desk:
    """``allow`` looks at a start that is asked for: why it may not begin, "" if it may, and then the way to the memory is
    open. ``close`` closes that."""

    def __init__(
        self,
        arrive: Arrive,
        checkpoint_of: Callable[[str], str],
        allow: Callable[[Start, HookRequest], str],
        close: Callable[[str], None],
        found: Callable[[str], None],
    ) -> None:
        self._arrive = arrive
        self._checkpoint_of = checkpoint_of
        self._allow = allow
        self._close = close
        self._found = found
        self._starts: dict[str, Start] = {}
        self._arrivals: dict[str, Arrival] = {}
        self._acts: set[asyncio.Task[None]] = set()
        self._waiting = asyncio.Condition()

    # -- for acts -----------------------------------------------------------------------------------------------------

    def start_of(self, domain: str) -> Start | None:
        """The one that is under way."""
        return self._starts.get(domain)

    def arriving(self, domain: str) -> bool:
        """Whether somebody else starts the domain, and waits for the agent."""
        arrival = self._arrivals.get(domain)
        return arrival is not None and arrival.request.waiting

    def begin(self, domain: str, launch: Launch, uid: int) -> tuple[Start, bool]:
        """An act lets its QEMU start. Returns whether somebody else does so already, and waits for that. Raises QemuFailed
        if that is to start it with another state."""
        start = self._starts[domain] = Start(launch, uid)
        arrival = self._arrivals.pop(domain, None)
        if arrival is None:
            return start, False
        if not arrival.request.waiting:
            self.forget(domain, start)
            raise QemuFailed("who was to start it does so no more", vm=domain, left="nothing was started")
        if why := self._allow(start, arrival.request):
            arrival.answer.set_result(why)
            self.forget(domain, start)
            raise QemuFailed(why, vm=domain, left="nothing was started")
        start.allowed.set()
        arrival.answer.set_result("")
        return start, True

    def forget(self, domain: str, start: Start) -> None:
        """It is over."""
        if self._starts.get(domain) is start:
            del self._starts[domain]

    def lost(self) -> None:
        """libvirt's daemon has ended: what it was starting it will not go on with, and ends when it is back."""
        for start in tuple(self._starts.values()):
            if start.allowed.is_set() and not start.started.done():
                start.end("libvirt's daemon has ended")

    async def asked_again(self, domain: str) -> Start:
        """Wait until libvirt asks about a start that an earlier agent has let begin."""
        async with self._waiting:
            await self._waiting.wait_for(lambda: self._orphan(domain) is not None)
        start = self._orphan(domain)
        assert start
        return start

    def _orphan(self, domain: str) -> Start | None:
        start = self._starts.get(domain)
        return start if start and start.launch is None and not start.answer.done() else None

    # -- for the hook -------------------------------------------------------------------------------------------------

    async def on_request(self, request: HookRequest) -> str:
        """Why the domain may not start or go on; "" if it may. Raises CprError."""
        match request.operation:
            case "prepare":
                return await self._prepare(request)
            case "started":
                return await self._started(request)
            case "release":
                self._close(request.domain)
                start = self._starts.get(request.domain)
                if start and (start.launch is None or start.allowed.is_set()):  # else it tells of the QEMU before
                    self.forget(request.domain, start)
                    start.end("libvirt has ended it")
        return ""

    async def _prepare(self, request: HookRequest) -> str:
        start = self._starts.get(request.domain)
        if start is None or start.launch is None or start.allowed.is_set():
            return await self._arrived(request)
        if start.given_up:
            return "the act that was to start it has been given up"
        if why := self._allow(start, request):
            return why
        start.allowed.set()
        return ""

    async def _arrived(self, request: HookRequest) -> str:
        arrival = Arrival(request, asyncio.get_running_loop().create_future())
        checkpoint = self._checkpoint_of(request.xml)
        self._arrivals[request.domain] = arrival
        act = asyncio.create_task(self._act(request.domain, checkpoint))
        self._acts.add(act)
        act.add_done_callback(self._ended)
        try:
            either: set[asyncio.Future[Any]] = {act, arrival.answer}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if arrival.answer.done():
                return arrival.answer.result()
            act.result()
            return "the agent has done something else with it: see its state"
        finally:
            if self._arrivals.get(request.domain) is arrival:
                del self._arrivals[request.domain]

    async def _act(self, domain: str, checkpoint: str) -> None:
        """Raises CprError, unless it was libvirt's to hear of it in ``started``."""
        try:
            await self._arrive(domain, checkpoint)
        except CprError as error:
            start = self._starts.get(domain)
            if start is None or not start.allowed.is_set():
                raise
            log.error("VM %s: %s", domain, error.text)
            start.say(error.text)

    def _ended(self, act: asyncio.Task[None]) -> None:
        self._acts.discard(act)
        if not act.cancelled():
            act.exception()  # who was to hear of it may have gone

    async def _started(self, request: HookRequest) -> str:
        domain = request.domain
        start = self._starts.get(domain)
        if start is None:
            start = self._starts[domain] = Start(None)
        if not start.started.done():
            start.started.set_result(request)
        if start.launch is None:
            async with self._waiting:
                self._waiting.notify_all()
            self._found(domain)
        gone = asyncio.create_task(request.until_gone())
        try:
            either: set[asyncio.Future[Any]] = {start.answer, gone}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        return start.answer.result() if start.answer.done() else "nobody waits for the answer"

    async def close(self) -> None:
        for act in tuple(self._acts):
            with contextlib.suppress(CprError):
                await act
