"""May this caller do that? polkit decides; root, and the user that the agent itself is, need not ask.

Fails closed: no sender, no answer, no polkit all mean no.
"""

from __future__ import annotations

import asyncio
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
_ALLOW_INTERACTION = 1
"""org.freedesktop.PolicyKit1.CheckAuthorizationFlags, AllowUserInteraction."""


class Authority:
    """Asks over ``bus``, the connection that the calls come from."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus

    async def require(self, call: Message, action: str) -> None:
        """Raises AccessDenied unless the sender of ``call`` may do ``action``."""
        if not call.sender or not action:
            raise AccessDenied("the caller is unknown")
        if await self._uid(call.sender) in (0, os.geteuid()):
            return
        interactive = bool(call.flags & MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
        reply = await self._ask(
            Message(
                destination="org.freedesktop.PolicyKit1",
                path="/org/freedesktop/PolicyKit1/Authority",
                interface="org.freedesktop.PolicyKit1.Authority",
                member="CheckAuthorization",
                signature="(sa{sv})sa{ss}us",
                body=[
                    ["system-bus-name", {"name": Variant("s", call.sender)}],
                    action,
                    {},
                    _ALLOW_INTERACTION if interactive else 0,
                    "",
                ],
            ),
            INTERACTIVE_TIMEOUT_S if interactive else POLKIT_TIMEOUT_S,
        )
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
            raise AccessDenied(f"{message.destination} did not answer within {timeout_s:.0f} s") from None
        if reply is None or reply.message_type is not MessageType.METHOD_RETURN:
            detail = reply.body[0] if reply and reply.body else "no answer"
            log.warning("authorization failed: %s %s: %s", message.destination, message.member, detail)
            raise AccessDenied(f"it could not be checked whether you may do this ({detail})", left="nothing was done")
        return reply
