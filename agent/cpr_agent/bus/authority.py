# SPDX-License-Identifier: GPL-2.0-or-later
"""May this caller do that? polkit decides; root, and the user that the agent itself is, need not ask.

Fails closed: no sender, no answer, no polkit all mean no.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator

from cpr_agent.bus.library import Message, MessageFlag, MessageType, Variant
from cpr_agent.bus.wire import DAEMON, AgentBus
from cpr_agent.errors import AccessDenied, LimitsExceeded

log = logging.getLogger(__name__)

UID_TIMEOUT_S = 10.0
POLKIT_TIMEOUT_S = 25.0
INTERACTIVE_TIMEOUT_S = 120.0
"""How long a person may take to type a password."""
KEPT_CALLERS = 1024
QUESTIONS_PER_USER = 4
"""To polkit at once; others of the same user wait for their turn, but not for a password of his that may never come."""
PASSWORDS_IN_ALL = 32
"""Questions that a person may have to answer: dbus-daemon lets one connection wait for 128 replies."""
_ALLOW_INTERACTION = 1
"""org.freedesktop.PolicyKit1.CheckAuthorizationFlags, AllowUserInteraction."""


_RIGHTS = {
    "org.cpragent1.inspect": "see the virtual machines of this host",
    "org.cpragent1.manage-vms": "start, stop or change virtual machines",
    "org.cpragent1.save": "save virtual machines",
    "org.cpragent1.load": "let saved virtual machines go on",
    "org.cpragent1.upgrade": "restart this host, or replace the QEMU of its virtual machines",
}
"""What each action is to who may not do it."""


class TimedOutError(AccessDenied):
    """A question without an answer."""


class Authority:
    """Asks over ``bus``, the connection that the calls come from."""

    def __init__(self, bus: AgentBus, interactive_timeout_s: float = INTERACTIVE_TIMEOUT_S) -> None:
        self._bus = bus
        self._interactive_timeout_s = interactive_timeout_s
        self._uids: dict[str, asyncio.Task[int]] = {}
        self._questions: dict[str, set[asyncio.Task[Message]]] = {}
        """By connection, those that wait for an answer."""
        self._passwords: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()
        self._turns: dict[int, asyncio.Semaphore] = {}
        """By user: questions that a person may have to answer, others, and the turns of these."""
        self._serials = itertools.count(1)

    async def uid(self, call: Message) -> int:
        """The user that the sender of ``call`` is, whose name no other connection will ever have (D-Bus specification,
        "Bus names"). Raises AccessDenied."""
        if not call.sender:
            raise AccessDenied("the caller is unknown")
        if call.sender not in self._uids:
            self._uids[call.sender] = asyncio.create_task(self._uid(call.sender))
            while len(self._uids) > KEPT_CALLERS:
                del self._uids[next(iter(self._uids))]
        try:
            return await asyncio.shield(self._uids[call.sender])
        except AccessDenied:
            self._uids.pop(call.sender, None)
            raise

    def known_uid(self, sender: str) -> int | None:
        """As ``uid`` has found it, without a question; None if it has not."""
        found = self._uids.get(sender)
        return found.result() if found and found.done() and not found.cancelled() and not found.exception() else None

    async def require(self, call: Message, action: str) -> None:
        """Raises AccessDenied unless the sender of ``call`` may do ``action``."""
        await self._require(call, action, interactive=bool(call.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION))

    async def allows(self, call: Message, action: str) -> bool:
        """Whether the sender may do ``action`` too, without a password typed for it."""
        try:
            await self._require(call, action, interactive=False)
        except (AccessDenied, LimitsExceeded):
            return False
        return True

    def gone(self, sender: str) -> None:
        """This connection has ended: its questions need no answer."""
        self._uids.pop(sender, None)
        for question in self._questions.pop(sender, ()):
            question.cancel()

    async def _require(self, call: Message, action: str, *, interactive: bool) -> None:
        if not action:
            raise AccessDenied("the caller is unknown")
        uid = await self.uid(call)
        if trusted(uid):
            return
        async with self._turn(uid, interactive=interactive):
            reply = await self._question(str(call.sender), action, interactive=interactive)
        authorized, challenge, _ = reply.body[0]
        if not authorized:
            as_root = "use sudo, or have an administrator give you the right: /usr/share/doc/cpr-agent/access.md"
            raise AccessDenied(
                f"you are not authorized to {_RIGHTS.get(action, action)}",
                left="nothing was done",
                remedy="call again with interactive authorization" if challenge and not interactive else as_root,
            )

    @contextlib.asynccontextmanager
    async def _turn(self, uid: int, *, interactive: bool) -> AsyncIterator[None]:
        """Raises LimitsExceeded, for a question that a person may have to answer, and too many of those wait."""
        if interactive and (self._passwords[uid] >= QUESTIONS_PER_USER or self._passwords.total() >= PASSWORDS_IN_ALL):
            raise LimitsExceeded(
                f"{self._passwords[uid]} calls of user {uid} wait for a password",
                left="nothing was done",
                remedy="answer them, or end them",
            )
        counted = self._passwords if interactive else self._waiting
        turns = (
            contextlib.nullcontext() if interactive else self._turns.setdefault(uid, asyncio.Semaphore(QUESTIONS_PER_USER))
        )
        counted[uid] += 1
        try:
            async with turns:
                yield
        finally:
            counted[uid] -= 1
            if not counted[uid]:
                del counted[uid]
                if not interactive:
                    del self._turns[uid]

    async def _question(self, sender: str, action: str, *, interactive: bool) -> Message:
        """Polkit's answer. A question that is given up, or whose caller has gone, is taken back, so that polkit asks for no
        password any more. Raises AccessDenied."""
        cancellation = f"cpr-agent-{next(self._serials)}"
        subject = ["system-bus-name", {"name": Variant("s", sender)}]
        flags = _ALLOW_INTERACTION if interactive else 0
        message = _polkit("CheckAuthorization", "(sa{sv})sa{ss}us", subject, action, {}, flags, cancellation)
        timeout_s = self._interactive_timeout_s if interactive else POLKIT_TIMEOUT_S
        question = asyncio.create_task(self._ask(message, timeout_s))
        self._questions.setdefault(sender, set()).add(question)
        try:
            await asyncio.wait({question})
            if question.cancelled():
                raise TimedOutError("the caller has gone")
            return question.result()
        except (TimedOutError, asyncio.CancelledError):
            question.cancel()
            self._bus.send(_polkit("CancelCheckAuthorization", "s", cancellation))
            raise
        finally:
            asked = self._questions.get(sender, set())
            asked.discard(question)
            if not asked:
                self._questions.pop(sender, None)

    async def _uid(self, sender: str) -> int:
        reply = await self._ask(Message(*DAEMON, "GetConnectionUnixUser", signature="s", body=[sender]), UID_TIMEOUT_S)
        return int(reply.body[0])

    async def _ask(self, message: Message, timeout_s: float) -> Message:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._bus.call(message)
        except TimeoutError:
            raise TimedOutError(f"{message.destination} did not answer within {timeout_s:.0f} s") from None
        if reply.message_type is not MessageType.METHOD_RETURN or not reply.body:
            detail = reply.body[0] if reply.body else "no answer"
            log.warning("authorization failed: %s %s: %s", message.destination, message.member, detail)
            raise AccessDenied(f"it could not be checked whether you may do this ({detail})", left="nothing was done")
        return reply


def trusted(uid: int) -> bool:
    """Root, and the user that the agent itself is."""
    return uid in (0, os.geteuid())


def _polkit(member: str, signature: str, *body: object) -> Message:
    """org.freedesktop.PolicyKit1.Authority(5)."""
    name = "org.freedesktop.PolicyKit1"
    path, interface = "/org/freedesktop/PolicyKit1/Authority", f"{name}.Authority"
    return Message(name, path, interface, member, signature=signature, body=list(body))
