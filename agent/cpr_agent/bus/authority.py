"""May this caller do that? polkit decides; root, and the user that the agent itself is, need not ask.

Fails closed: no sender, no answer, no polkit all mean no.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os

from dbus_next.aio.message_bus import MessageBus
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from cpr_agent.errors import AccessDenied

log = logging.getLogger(__name__)

UID_TIMEOUT_S = 10.0
POLKIT_TIMEOUT_S = 25.0
INTERACTIVE_TIMEOUT_S = 120.0
"""How long a person may take to type a password."""
KEPT_CALLERS = 1024
_ALLOW_INTERACTION = 1
"""org.freedesktop.PolicyKit1.CheckAuthorizationFlags, AllowUserInteraction."""


class TimedOutError(AccessDenied):
    """Nobody answered."""


class Authority:
    """Asks over ``bus``, the connection that the calls come from."""

    def __init__(self, bus: MessageBus, interactive_timeout_s: float = INTERACTIVE_TIMEOUT_S) -> None:
        self._bus = bus
        self._interactive_timeout_s = interactive_timeout_s
        self._uids: dict[str, asyncio.Task[int]] = {}
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

    async def require(self, call: Message, action: str) -> None:
        """Raises AccessDenied unless the sender of ``call`` may do ``action``."""
        if not action:
            raise AccessDenied("the caller is unknown")
        if trusted(await self.uid(call)):
            return
        interactive = bool(call.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
        cancellation = f"cpr-agent-{next(self._serials)}"
        subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
        flags = _ALLOW_INTERACTION if interactive else 0
        question = _polkit("CheckAuthorization", "(sa{sv})sa{ss}us", subject, action, {}, flags, cancellation)
        try:
            reply = await self._ask(question, self._interactive_timeout_s if interactive else POLKIT_TIMEOUT_S)
        except TimedOutError:
            self._bus.send(_polkit("CancelCheckAuthorization", "s", cancellation))  # nobody need type a password any more
            raise
        authorized, challenge, _ = reply.body[0]
        if not authorized:
            raise AccessDenied(
                f"not authorized for {action}",
                left="nothing was done",
                remedy="call again with interactive authorization" if challenge else "ask your administrator, or use sudo",
            )

    async def _uid(self, sender: str) -> int:
        reply = await self._ask(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="GetConnectionUnixUser",
                signature="s",
                body=[sender],
            ),
            UID_TIMEOUT_S,
        )
        return int(reply.body[0])

    async def _ask(self, message: Message, timeout_s: float) -> Message:
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._bus.call(message)
        except TimeoutError:
            raise TimedOutError(f"{message.destination} did not answer within {timeout_s:.0f} s") from None
        if reply is None or reply.message_type is not MessageType.METHOD_RETURN or not reply.body:
            detail = reply.body[0] if reply and reply.body else "no answer"
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
